#!/usr/bin/env bash
# Packages a network in Python, builds main.cpp, runs the package without Python, and compares the outputs, bit for bit.
# It needs cmake and the environment that ptq4cuda is installed in.
set -euo pipefail
[ $# -eq 0 ] || { sed -n '2,3s/^# //p' "$0"; [ "$1" = --help ]; exit; }
example=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

python "$example/package.py" .
cmake -S "$example" -B build -DCMAKE_PREFIX_PATH="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
cmake --build build
operators=$(python -c 'import ptq4cuda; print(ptq4cuda.__path__[0] + "/_C.so")')
build/serve "$operators" net.pt2 input.bin 5,3,64,64 output.bin
cmp output.bin expected.bin
echo "the outputs are those of Python, bit for bit"
