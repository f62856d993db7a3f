"""`python -m exactune`: the same as the `exactune` command."""

from exactune.cli.main import main

main()
