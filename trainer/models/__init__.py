"""The networks: a table of variants and one builder a family."""

from trainer.models import alexnet, googlenet, resnet, vgg
from trainer.models.registry import build_model, find_variant, variants

__all__ = ["alexnet", "build_model", "find_variant", "googlenet", "resnet", "variants", "vgg"]
