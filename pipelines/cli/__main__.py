"""`python -m pipelines.cli` is the `convoy` command."""

from pipelines.cli.main import main

main()
