"""Lists the images of a source without reading them: class folders, ImageNet's tars or idx files.

Every file below a source becomes an item, is skipped by a rule, or is rejected; `Account` records
the last two.
"""

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from pipelines.datasets.class_names import names_by_id
from pipelines.datasets.sources.folders import folder_splits
from pipelines.datasets.sources.idx import idx_images, idx_splits, is_idx_folder
from pipelines.datasets.sources.imagenet import has_imagenet_tars, imagenet_splits
from pipelines.datasets.sources.item import Account, Item, Source, printable
from pipelines.datasets.sources.layout import Layout
from pipelines.datasets.sources.walk import check_root
from trainer.errors import UserError


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


def list_source(source: str, options: ListOptions | None = None) -> Source:
    """Detect the kind of ``source`` and list its images. Raises UserError."""
    try:
        return _list(source, options or ListOptions())
    except UserError as error:  # names in messages may contain arbitrary bytes
        raise UserError(*map(printable, error.faults)) from None


def _list(source: str, options: ListOptions) -> Source:
    root = check_root(source)
    account = Account()
    if is_idx_folder(root):
        splits = idx_splits(root, account)
    elif has_imagenet_tars(root):
        splits = imagenet_splits(root, account)
    else:
        splits = folder_splits(root, options.layout, options.nested, account)
    names = Path(options.class_names) if options.class_names else root / "synset_words.txt"
    if options.class_names is not None or names.is_file():
        classes = names_by_id(names, splits[0].class_ids)  # all splits have the same classes
        splits = [replace(split, classes=classes) for split in splits]
    return Source(splits, account)


def read_item(item: Item) -> bytes:
    """Return the image's bytes, unmodified. An image of an idx file is encoded as PNG.

    Raises UserError if the file changed since it was listed.
    """
    if item.is_idx:
        buffer = io.BytesIO()
        Image.fromarray(idx_images(item.path)[item.offset]).save(buffer, "PNG", compress_level=6)
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
