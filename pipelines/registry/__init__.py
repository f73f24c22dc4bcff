"""Trained models: evaluation, registration, weights for other programs."""
