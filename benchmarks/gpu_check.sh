#!/usr/bin/env bash
# Proves the CUDA kernels on this machine's GPU, in about ten minutes: builds and installs the package, runs the tests on
# the device, runs the operators under compute-sanitizer, times networks, their layers and every operator, and writes
# benchmarks/results/<gpu>.json and .md (driver, clocks, commit, figures). Run it from anywhere:
#
#     benchmarks/gpu_check.sh
#
# The environment's Python needs torch with CUDA, and pytest and hypothesis for the tests; nvcc must be on PATH. Nothing
# is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
fail() { echo "gpu_check: $*" >&2; exit 1; }
step() { printf '\n== %s\n' "$*"; }

python=${PYTHON:-python3}
export PYTHONSAFEPATH=1  # the installed package, not the sources in this folder
export PYTHONPATH=$root/tests${PYTHONPATH:+:$PYTHONPATH}
command -v nvidia-smi > /dev/null || fail "nvidia-smi was not found; this needs a machine with an NVIDIA GPU."
$python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
    || fail "$python has no torch that sees a GPU."

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
name=$(tr '[:upper:] ' '[:lower:]-' <<< "$gpu" | tr -cd 'a-z0-9-')
results=$root/benchmarks/results
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"

step "build"
PTQ4CUDA_CUDA=1 $python -m pip install -q --no-build-isolation --no-deps .
(cd "$work" && $python -m ptq4cuda info) | tee "$work/info.txt"

step "tests on the device"
# From the repository's folder, but with the installed package: pytest's importlib mode leaves the sources alone.
set +e
$python -m pytest -q tests/ops tests/pipeline/test_cuda.py -p no:cacheprovider -k "cuda and not cuda_on_cpu" 2>&1 | tee "$work/tests.txt"
tested=${PIPESTATUS[0]}
set -e

step "compute-sanitizer"
sanitized="not run: compute-sanitizer was not found"
if command -v compute-sanitizer > /dev/null; then
    sanitized=""
    for tool in memcheck racecheck; do
        if (cd "$work" && timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 3 \
            $python "$root/tests/cuda_on_cpu/sanitized_ops.py" cuda) > "$work/$tool.txt" 2>&1; then
            sanitized="$sanitized $tool: clean;"
        else
            sanitized="$sanitized $tool: FAILED;"
            tail -30 "$work/$tool.txt"
        fi
    done
fi
echo "$sanitized"

step "networks"
(cd "$work" && $python -m ptq4cuda bench-models --device cuda --model resnet50 --model mobilenet_v2 \
    --batch 1 --batch 64 --layers --json "$work/models.json" ${GPU_CHECK_QUICK:+--no-compiled}) \
    2> "$work/models.err" | tee "$work/models.txt" || { tail -20 "$work/models.err"; fail "the benchmark failed."; }

step "operators"
(cd "$work" && $python -m ptq4cuda bench --device cuda --json "$work/timings.json" ${GPU_CHECK_QUICK:+--quick}) \
    2> "$work/bench.err" | tee "$work/bench.txt" || { tail -20 "$work/bench.err"; fail "the benchmark failed."; }

step "results"
facts=$(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,memory.total \
    --format=csv,noheader | head -1)
$python - "$work" "$results/$name" "$facts" "$tested" "$sanitized" "$(git rev-parse HEAD 2> /dev/null || echo unknown)" << 'PYTHON'
import json
import sys
from pathlib import Path

work, out, facts, tested, sanitized, commit = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]
names = ("gpu", "driver", "max_sm_clock", "max_memory_clock", "sm_clock", "memory_clock", "memory")
summary = (work / "tests.txt").read_text().strip().splitlines()[-1]
figures = json.loads((work / "timings.json").read_text())
models = json.loads((work / "models.json").read_text())
record = {
    "machine": dict(zip(names, facts.split(", "), strict=True)),
    "commit": commit,
    "tests": {"passed": tested == "0", "summary": summary},
    "sanitizer": sanitized.strip(),
    "operators": figures["timings"],
    "models": models["models"],
    "layers": models["layers"],
}
Path(out + ".json").write_text(json.dumps(record, indent=1) + "\n")
lines = [f"# {record['machine']['gpu']}", ""]
lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in record["machine"].items()]
lines += [f"- {figures['machine']}", f"- commit: {commit}", f"- tests on the device: {summary}"]
lines += [f"- compute-sanitizer: {record['sanitizer']}", ""]
for file in ("models.txt", "bench.txt"):
    lines += ["```", (work / file).read_text().strip(), "```", ""]
Path(out + ".md").write_text("\n".join(lines))
print(f"Wrote {out}.json and {out}.md")
PYTHON
[ "$tested" -eq 0 ] || fail "tests failed on the device."
case $sanitized in *FAILED*) fail "compute-sanitizer found errors." ;; esac
