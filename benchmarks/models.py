"""Times whole networks: python benchmarks/models.py --help. The same as `ptq4cuda bench-models`."""

import sys

from ptq4cuda.cli import main

sys.argv.insert(1, "bench-models")
main()
