"""The spool: a file of what MLflow has not accepted yet, and its delivery."""
