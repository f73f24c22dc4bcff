"""The `convoy` command: arguments and printing, one file per group of commands."""
