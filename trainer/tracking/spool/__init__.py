"""The spool, a file of entries that MLflow has not accepted yet, and its delivery."""
