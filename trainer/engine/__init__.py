"""Optimizer steps on one or many ranks: data parallelism, pipeline parallelism, CUDA graphs."""
