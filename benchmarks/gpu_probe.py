"""Two questions of gpu_check.py, whose answers are JSON files: python benchmarks/gpu_probe.py device|native FILE.

device: which GPU does torch see?
native: does the package's CUDA library run on it, with a kernel for every operator?

Exits with a sentence where the answer is no.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch


def device() -> dict[str, Any]:
    """Return what torch says of the first GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(f"this Python's torch {torch.__version__} sees no GPU")
    gpu = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "l2_bytes": gpu.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def native() -> dict[str, Any]:
    """Return what the package was built with; every operator must have a CUDA kernel of its own, and run it."""
    from ptq4cuda import _native, ops
    from ptq4cuda.info import info
    from ptq4cuda.ops.registration import NAMESPACE, SCHEMAS

    print(info())
    if not _native.cuda_loaded:
        raise SystemExit(f"the CUDA library is not loaded: {_native.cuda_reason}")
    if reason := _native.device_reason(0):
        raise SystemExit(reason)
    names = [f"{NAMESPACE}::{schema.split('(')[0]}" for schema in SCHEMAS]
    without = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
    if without:
        raise SystemExit(f"there are operators without a CUDA kernel: {', '.join(without)}")
    codes = ops.quantize(torch.tensor([-1.0, 0.2, 0.5, 9.0], device="cuda"), 0.25, 1, 4)
    if codes.tolist() != [0, 2, 3, 15]:
        raise SystemExit(f"quantize gives {codes.tolist()} on the device instead of [0, 2, 3, 15]")
    return {"operators": names, "library": _native.cuda_path, **_native.build_info}


if __name__ == "__main__":
    questions = {"device": device, "native": native}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=questions)
    parser.add_argument("file", type=Path, help="receives the answer")
    arguments = parser.parse_args()
    arguments.file.write_text(json.dumps(questions[arguments.question](), indent=1) + "\n")
