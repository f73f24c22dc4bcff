"""Checks at startup that installed packages have the internals that Convoy uses."""

import inspect
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from trainer.errors import UserError


def require_attributes(package: str, owner: Any, names: Iterable[str]) -> None:
    """Check that ``owner``, a module, class or object of ``package``, has the attributes ``names``.

    Raises UserError that names the first missing attribute and the installed version.
    """
    for name in names:
        if not hasattr(owner, name):
            named = owner if inspect.ismodule(owner) or inspect.isclass(owner) else type(owner)
            raise missing_in(package, f"{named.__name__} has no attribute {name!r}")


def missing_in(package: str, what: str) -> UserError:
    """Return the error for an internal of ``package`` that ``what`` says is missing."""
    return UserError(
        f"{package} {version(package)}: {what}, which Convoy uses; install the version of "
        f"{package} that Convoy's pyproject.toml requires"
    )
