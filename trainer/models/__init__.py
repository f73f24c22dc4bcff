"""The networks: a table of variants and one builder a family."""

from trainer.models import resnet as resnet  # registers its variants
from trainer.models.registry import build_model, find_variant, variants

__all__ = ["build_model", "find_variant", "variants"]
