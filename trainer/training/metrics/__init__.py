"""Metrics of a training run: what is measured, and one file per group of logged metrics."""

# the metrics of every file that is imported here are logged; add a new one to this line
from trainer.training.metrics import gradients  # noqa: F401
