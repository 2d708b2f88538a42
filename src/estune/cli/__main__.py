"""`python -m estune.cli`, the same as `estune`."""

from estune.cli import main

main()
