"""Options that several optimizers share, with their bounds and descriptions."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import Doc

from trainer.config.field_types import Decay

Momentum = Annotated[Decay, Doc("Momentum.")]
Nesterov = Annotated[bool, Doc("Whether to use Nesterov momentum.")]
Betas = Annotated[
    list[Decay],
    Field(min_length=2, max_length=2),
    Doc("Decay rates of the first and second moments."),
]

BETAS = [0.9, 0.999]


def check_nesterov(options: Mapping[str, Any]) -> None:
    """Raise ValueError for Nesterov momentum without momentum."""
    if options["nesterov"] and not options["momentum"]:
        raise ValueError("nesterov: true needs a momentum above 0")
