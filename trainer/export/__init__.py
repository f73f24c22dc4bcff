"""Trained models for others: the exported file, the MLflow model, the registry."""
