#!/usr/bin/env bash
# Proves the CUDA kernels on this machine's GPU, in under ten minutes; gpu_check.sh --help says how.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
