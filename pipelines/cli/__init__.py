"""The `convoy` command: arguments and output, with one file per group of commands."""
