"""Types of recipe values: numeric bounds and rules for paths and names."""

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field
from typing_extensions import Doc

# Every number has a lower and an upper bound so that derived values cannot overflow int64 (sample
# order), fp32 (device) or the operating system's seconds. tests/unit/config/test_schema.py checks
# all of them.
_LARGEST = 1e30
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Pixels = Annotated[int, Field(ge=1, le=16384)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Positive = Annotated[float, Field(gt=0, le=_LARGEST)]
NonNegative = Annotated[float, Field(ge=0, le=_LARGEST)]
Minutes = Annotated[float, Field(ge=0, le=1e6)]
Epochs = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _usable_alpha(value: float) -> float:
    if 0 < value < 1e-3:  # numpy's Beta distribution returns NaN in this range
        raise ValueError("must be 0 (off) or at least 0.001")
    return value


Alpha = Annotated[float, Field(ge=0, le=1000), AfterValidator(_usable_alpha)]
Mean = Annotated[list[Fraction], Field(min_length=3, max_length=3)]
Deviation = Annotated[
    list[Annotated[float, Field(ge=1e-3, le=10)]], Field(min_length=3, max_length=3)
]


def _is_url(value: str) -> str:
    """Validates a storage URL or a plain path."""
    if not value.strip():
        raise ValueError("must not be empty")
    if value.startswith("~"):  # the shell does not expand it after `key=`
        raise ValueError("~ is not expanded here; write the full path of the home folder")
    return value


def _is_folder(value: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise ValueError("must be a folder of this machine, as a plain path, not a URL")
    return _is_url(value)


def _is_experiment(value: str) -> str:
    """Applies MLflow's rule (mlflow.utils.validation) and rejects names of only spaces."""
    if not value.strip():
        raise ValueError("must not be empty")
    if len(value) > 500:
        raise ValueError("has more than the 500 characters that MLflow allows")
    return value


def _is_registered_name(value: str) -> str:
    """Applies the width limit of MLflow's database column.

    ``tracking.server.check_registered_name`` checks the other rules.
    """
    if value != value.strip() or not value:
        raise ValueError("must not be empty, and must not begin or end with a space")
    if len(value) > 256:
        raise ValueError("has more than the 256 characters that MLflow allows")
    return value


Url = Annotated[str, AfterValidator(_is_url)]
Folder = Annotated[str, AfterValidator(_is_folder)]
ExperimentName = Annotated[str, AfterValidator(_is_experiment)]
RegisteredName = Annotated[str, AfterValidator(_is_registered_name)]


def description_of(annotation: Any) -> str:
    """Returns the text of the ``Doc`` in an ``Annotated`` type."""
    return next(str(part.documentation) for part in get_args(annotation) if isinstance(part, Doc))
