"""Trained models: evaluation, registration, import and export of weights."""
