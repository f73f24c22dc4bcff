"""Process-wide changes to other packages and to the environment, undone when the run ends."""

import logging
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

_undo = ExitStack()


def set_attribute(module: Any, name: str, value: Any) -> None:
    """Set an existing attribute of a module or class."""
    on_undo(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def set_item(mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set ``mapping[key]``, for example an environment variable."""
    if key in mapping:
        on_undo(mapping.__setitem__, key, mapping[key])
    else:
        on_undo(mapping.pop, key, None)
    mapping[key] = value


def on_undo(restore: Callable[..., Any], *arguments: Any) -> None:
    """Call ``restore(*arguments)`` when the patches are undone."""
    _undo.callback(restore, *arguments)


def enter(context: AbstractContextManager[Any]) -> None:
    """Enter a context that ends when the patches are undone."""
    _undo.enter_context(context)


def undo_patches() -> None:
    """Restore everything that this module changed, in reverse order. May be called repeatedly."""
    _undo.close()


@contextmanager
def log_level(logger: str, level: int) -> Iterator[None]:
    """Set the level of another package's logger in this context."""
    before = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(level)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(before)


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Ignore Pillow's warnings about large images and odd metadata in this context.

    Convoy either accepts or rejects an image. The filter applies to all threads, so enter the
    context before starting those that decode.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
