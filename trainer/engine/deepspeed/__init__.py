"""Adapters to DeepSpeed: configuration, gradients, optimizer state, loss scale."""
