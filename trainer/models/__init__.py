"""The models: a registry, and one builder per family."""

from trainer.models import alexnet, googlenet, resnet, vgg
from trainer.models.registry import build_model, get_model_spec, list_models

__all__ = ["alexnet", "build_model", "get_model_spec", "googlenet", "list_models", "resnet", "vgg"]
