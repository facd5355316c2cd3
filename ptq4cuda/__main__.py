"""`python -m ptq4cuda`."""

from ptq4cuda.cli import main

main()
