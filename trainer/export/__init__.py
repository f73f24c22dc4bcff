"""Exports trained models: the exported files, the MLflow model, the model registry."""
