"""Credentials: finds them and keeps them out of logs, files, MLflow and process arguments."""
