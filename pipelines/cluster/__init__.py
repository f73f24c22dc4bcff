"""Kubernetes jobs: rendering, submitting, status, secrets."""
