#!/usr/bin/env bash
# Proves the CUDA kernels on this machine's GPU, in under ten minutes: builds and installs the package, runs the tests
# on the device, times networks, their layers and every operator, and runs the operators under compute-sanitizer. Run it
# from anywhere:
#
#     benchmarks/gpu_check.sh
#
# What is found goes into $OUT, by default benchmarks/results: result.json and the logs, see gpu_check.py. The
# environment's Python ($PYTHON, by default python3) needs torch with CUDA, setuptools and ninja to build, and pytest and
# hypothesis for the tests; nvcc must be on PATH. Nothing is downloaded.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py"
