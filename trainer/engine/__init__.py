"""Optimizer steps on one or many ranks: data parallelism, pipeline stages, CUDA graphs."""
