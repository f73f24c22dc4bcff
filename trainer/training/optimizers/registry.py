"""Registry of all optimizers by name. Importing it does not import torch."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Groups = list[dict[str, Any]]
"""Parameter groups as torch's optimizers take them, each with its ``weight_decay``."""

NEEDS_LAYER_NORMS = (
    "needs the norm of each layer's weights, which ZeRO and 16-bit precision store in one flat "
    "tensor"
)
"""Limitation of layer-wise optimizers."""


def _accept(options: Mapping[str, Any]) -> None:
    """Accept every combination of options."""


@dataclass(frozen=True)
class OptimizerSpec:
    """An entry of the registry: how to build an optimizer, what it keeps, and where it works."""

    name: str
    """The value of ``optimizer.name``."""
    builder: Callable[..., "torch.optim.Optimizer"]
    """Takes parameter groups and a learning rate; imports torch when it is called.

    Its keyword-only parameters are the options that a recipe may set. Optimizers that share an
    option give it the same type and default (``options.py``).
    """
    state_keys: tuple[str, ...]
    """Keys of the tensors that the optimizer keeps for each weight, in the weight's shape.

    The engine creates them as zeros before the first step, so zeros must have the effect of an
    empty state. Checkpoints contain them.
    """
    step_counter: Literal["weight", "group"] | None = None
    """Where the optimizer keeps the tensor ``step``, the number of updates: in the state of each
    weight, in each parameter group, or nowhere.
    """
    fused: bool = False
    """Whether it assumes that parameter, gradient and state have the same memory layout."""
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    limitation: str = ""
    """Why it does not work with other ZeRO stages and precisions, for the error message."""
    validate: Callable[[Mapping[str, Any]], None] = _accept
    """Raises ValueError, which begins with the key, for options that do not go together."""

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options by name, with type and default."""
        parameters = inspect.signature(self.builder).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


OPTIMIZERS: dict[str, OptimizerSpec] = {}


def register(spec: OptimizerSpec) -> None:
    """Add an optimizer. Raises ValueError if its name or an option contradicts another's."""
    if spec.name in OPTIMIZERS:
        raise ValueError(f"optimizer {spec.name} is registered twice")
    for other in OPTIMIZERS.values():
        for name in spec.options.keys() & other.options.keys():
            if spec.options[name] != other.options[name]:
                raise ValueError(
                    f"optimizer {spec.name}: option {name} has another type or default than that "
                    f"of {other.name}; give it another name"
                )
    OPTIMIZERS[spec.name] = spec


def optimizer_options() -> dict[str, tuple[inspect.Parameter, list[str]]]:
    """Return each option of any optimizer, with the names of the optimizers that have it."""
    found: dict[str, tuple[inspect.Parameter, list[str]]] = {}
    for spec in OPTIMIZERS.values():
        for name, parameter in spec.options.items():
            found.setdefault(name, (parameter, []))[1].append(spec.name)
    return found
