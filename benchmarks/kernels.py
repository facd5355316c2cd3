"""Times every operator: python benchmarks/kernels.py --help. The same as `ptq4cuda bench`."""

import sys

from ptq4cuda.cli import main

sys.argv.insert(1, "bench")
main()
