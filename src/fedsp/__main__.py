"""`python -m fedsp` is the command line."""

from fedsp.cli import main

main()
