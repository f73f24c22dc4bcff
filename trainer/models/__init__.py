"""The models: a registry, and one builder per family."""

# every family that is imported here is registered; add a new one to this line
from trainer.models import alexnet, googlenet, resnet, vgg  # noqa: F401
from trainer.models.registry import build_model, get_model_spec, list_models

__all__ = ["build_model", "get_model_spec", "list_models"]
