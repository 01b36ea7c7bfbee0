"""`python -m frameloom` is the `frameloom` command."""

from frameloom.cli import main

main()
