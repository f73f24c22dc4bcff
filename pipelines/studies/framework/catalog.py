"""The catalog of studies, by name."""

import difflib
import importlib

from pipelines.studies.framework.study import Study
from trainer.errors import UserError

NAMES = (
    "activation",
    "dropout",
    "small-filters",
    "inception",
    "pool-head",
    "depth",
    "identity",
    "gradient-path",
    "batch-norm",
    "data-parallel",
    "model-parallel",
    "mixed-precision",
    "accumulation",
    "warmup",
    "linear-scaling",
    "size-and-skill",
    "then-and-now",
)
"""Names in the order of docs/statements.md. Each is ``STUDY`` of the module of that name, with
underscores for dashes.
"""


def load(name: str) -> Study:
    """Return the study of that name. Raises UserError with the nearest names."""
    if name not in NAMES:
        nearest = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.4) or list(NAMES)
        raise UserError(
            f"there is no study {name!r}; nearest: {', '.join(nearest)}; `convoy study` lists all"
        )
    study: Study = importlib.import_module(
        f"pipelines.studies.experiments.{name.replace('-', '_')}"
    ).STUDY
    return study


def studies() -> list[Study]:
    return [load(name) for name in NAMES]
