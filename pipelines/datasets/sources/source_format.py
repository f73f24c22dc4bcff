"""What a dataset source is: a layout of files on a disk that `convoy pack` reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.datasets.sources.item import Account, Split
from pipelines.datasets.sources.layout import Layout


@dataclass(frozen=True)
class ListOptions:
    """Options for interpreting a source.

    ``class_names``: a file in a format of `pipelines.datasets.class_names`; defaults to
    synset_words.txt, if the source contains it. ``nested``: images at any depth below a class
    folder belong to it.
    """

    class_names: str | None = None
    layout: Layout = "auto"
    nested: bool = False


@dataclass(frozen=True)
class SourceFormat:
    """A layout of image files.

    ``detect``: whether a folder has this layout. ``splits``: lists the images without reading them,
    `train` first, and records every other file in the account; raises UserError.
    """

    detect: Callable[[Path], bool]
    splits: Callable[[Path, ListOptions, Account], list[Split]]
