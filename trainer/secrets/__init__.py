"""Credentials: finding them, and keeping them out of logs, files, MLflow and process arguments."""
