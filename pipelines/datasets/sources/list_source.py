"""Lists the images of a source in any known format without reading them, and reads one image.

Every file below a source becomes an item, is skipped by a rule, or is rejected; `Account` records
the last two.
"""

import importlib
import io
import os
from dataclasses import replace
from pathlib import Path

from PIL import Image

from pipelines.datasets.class_names import names_by_id
from pipelines.datasets.sources.item import Account, Item, Source, printable
from pipelines.datasets.sources.source_format import ListOptions, SourceFormat
from pipelines.datasets.sources.walk import check_root
from trainer.errors import UserError

__all__ = ["FORMATS", "ListOptions", "list_source", "read_item"]

FORMATS = (
    "idx",
    "imagenet",
    "folders",
)
"""The modules of this package whose ``FORMAT`` is a SourceFormat. The first one that detects a
source lists it; `folders` detects every folder. A new format adds one line.
"""


def list_source(source: str, options: ListOptions | None = None) -> Source:
    """Detect the kind of ``source`` and list its images. Raises UserError."""
    try:
        return _list(source, options or ListOptions())
    except UserError as error:  # names in messages may contain arbitrary bytes
        raise UserError(*map(printable, error.faults)) from None


def _list(source: str, options: ListOptions) -> Source:
    root = check_root(source)
    account = Account()
    detected = next(source for source in map(_format, FORMATS) if source.detect(root))
    splits = detected.splits(root, options, account)
    names = Path(options.class_names) if options.class_names else root / "synset_words.txt"
    if options.class_names is not None or names.is_file():
        classes = names_by_id(names, splits[0].class_ids)  # all splits have the same classes
        splits = [replace(split, classes=classes) for split in splits]
    return Source(splits, account)


def _format(module: str) -> SourceFormat:
    found: SourceFormat = importlib.import_module(f"pipelines.datasets.sources.{module}").FORMAT
    return found


def read_item(item: Item) -> bytes:
    """Return the image's bytes, unmodified. Raw pixels are encoded as PNG.

    Raises UserError if the file changed since it was listed.
    """
    if item.pixels is not None:
        buffer = io.BytesIO()
        Image.fromarray(item.pixels(item.path, item.offset)).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()
    try:
        with open(item.path, "rb") as file:
            status = os.fstat(file.fileno())
            if item.offset:
                file.seek(item.offset)
            content = file.read(item.size)
    except OSError as error:
        raise UserError(f"{item.source}: cannot be read any more: {error.strerror}") from None
    if len(content) != item.size or status.st_mtime_ns != item.changed:
        raise UserError(
            f"{item.source}: was changed while it was being packed; pack again when the source "
            "is complete"
        )
    return content
