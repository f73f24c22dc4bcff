"""What there is to pack: class folders, ImageNet's own tars, idx files; listed, but not read.

Every file below a source becomes an item, or is skipped by a rule, or is rejected; `Account` keeps
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
    """How a source is understood.

    ``class_names``: a file that `pipelines.datasets.class_names` reads; by default synset_words.txt
    if that is in the source. ``nested``: images at any depth below a class folder belong to it.
    """

    class_names: str | None = None
    layout: Layout = "auto"
    nested: bool = False


def list_source(source: str, options: ListOptions | None = None) -> Source:
    """Recognize the kind of ``source`` and list its images; raises UserError."""
    try:
        return _list(source, options or ListOptions())
    except UserError as error:  # names in messages may be of any bytes
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
    """The image's bytes, unmodified; of an idx file the pixels as PNG.

    Raises UserError if the file is not the one that was listed.
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
