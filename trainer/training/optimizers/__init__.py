"""The optimizers: a registry, and one file per optimizer. Importing it does not import torch."""

# every optimizer that is imported here is registered; add a new one to this line
from trainer.training.optimizers import adamw, lamb, lars, sgd  # noqa: F401
