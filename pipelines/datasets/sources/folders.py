"""Lists a source of class folders."""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipelines.datasets.sources.item import Account, Item, Split, printable
from pipelines.datasets.sources.keys import sample_keys
from pipelines.datasets.sources.layout import find_split_folders, split_kind
from pipelines.datasets.sources.source_format import ListOptions, SourceFormat
from pipelines.datasets.sources.walk import Entry, Walk, looks_like_image
from trainer.errors import UserError, shortened

_SIDE_FILES = frozenset(
    {
        ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yml", ".yaml", ".md", ".html", ".htm",
        ".log", ".pdf", ".zip", ".gz", ".tar", ".npy", ".mat", ".db", ".py"
    }
)  # fmt: skip
_ONE_LEVEL = frozenset(
    {
        "images", "image", "imgs", "img", "jpg", "jpeg", "jpegs", "png", "pngs", "photos",
        "pictures", "jpegimages", "originals", "original", "data"
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Class:
    name: str
    path: str
    files: list[tuple[str, Entry]]
    """(folder relative to the class folder, file) of each file."""


def folder_splits(root: Path, options: ListOptions, account: Account) -> list[Split]:
    """Return the splits of a source of class folders. Raises UserError if the source is ambiguous.

    ``options.nested``: all images below a class folder belong to it, regardless of its subfolders'
    names.
    """
    found: list[list[_Class]] = []
    folders = find_split_folders(str(root), options.layout, account)
    for folder in folders:
        classes = _class_folders(folder.path, options.nested, account)
        if not classes and not account.faults:
            raise UserError(
                f"{printable(folder.path)}: contains no class folders; supported sources: a "
                "folder per class, ImageNet's tars, idx files"
            )
        found.append(classes)
    if len(found) == 2:
        _check_same_classes(found[0], found[1], account)
    if account.faults:
        raise UserError(*shortened([*account.faults, *account.rejected], "faults"))
    _check_single_class(found[0], account)
    ids = [one.name for one in found[0]]
    return [
        _split(folder.name, classes, ids) for folder, classes in zip(folders, found, strict=True)
    ]


def _class_folders(root: str, nested: bool, account: Account) -> list[_Class]:
    walk = Walk(account)
    walk.enter(Entry(os.path.basename(root), root, os.stat(root)))
    classes = []
    for entry in walk.entries(root, is_class=False):
        if entry.is_folder:
            num_faults = len(account.faults)
            one = _Class(entry.name, entry.path, list(walk.files(entry)))
            classes.append(one)
            if not nested:
                _check_levels(one, account)
            if not one.files and len(account.faults) == num_faults:
                account.fault(one.path, "this class folder is empty")
        elif looks_like_image(entry.path):
            account.reject(entry.path, "is next to the class folders, so it has no class")
        else:
            account.skip("not an image, next to the class folders", entry.path)
    _check_names(classes, account)
    return classes


def _check_single_class(classes: list[_Class], account: Account) -> None:
    """Warn about a single class, or raise UserError: in most cases it is a list without classes."""
    if len(classes) > 1:
        return
    only = classes[0]
    if only.name.lower() in _ONE_LEVEL:
        raise UserError(
            f"{printable(only.path)}: would be the only class, so this seems to be a list of "
            "images without classes; use a folder per class (rename the folder if it is a class)"
        )
    account.notes.append(f"warning: the dataset has only one class, {printable(only.name)}")


def _check_names(classes: list[_Class], account: Account) -> None:
    """Check that class names are UTF-8 text, and distinct both as text and to a reader."""
    by_form: dict[str, str] = {}
    by_case: dict[str, list[str]] = {}
    for one in classes:
        if any(0xDC80 <= ord(char) <= 0xDCFF for char in one.name):
            account.fault(
                one.path, "the name of this class is not UTF-8; rename the folder (`convmv` does)"
            )
            continue
        if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in one.name):
            account.fault(
                one.path, "the name of this class contains a control character; rename the folder"
            )
            continue
        form = unicodedata.normalize("NFC", one.name).strip()
        if (other := by_form.setdefault(form, one.name)) != one.name:
            both = f"{other!a} and {one.name!a}"
            account.fault(
                one.path,
                f"the classes {both} differ only by spaces or Unicode normalization; rename or "
                "merge them",
            )
        by_case.setdefault(form.casefold(), []).append(one.name)
    account.notes.extend(
        f"classes whose names differ only by case are not merged: {', '.join(names)}"
        for names in by_case.values()
        if len(set(names)) > 1
    )


def _check_levels(one: _Class, account: Account) -> None:
    """Reject a class folder that seems to be a level above the classes, or contains splits."""
    below = Counter(relative for relative, _ in one.files)
    tops = sorted({relative.split("/")[0] for relative in below if relative})
    if splits := [top for top in tops if split_kind(top)]:
        account.fault(
            os.path.join(one.path, splits[0]),
            "is a split's folder within what would be a class; expected SPLIT/CLASS/IMAGE: "
            f"name {printable(one.path)} as the source if the splits are in it (--nested if it "
            "is a part of the class)",
        )
        return
    has_images = any(
        not relative and os.path.splitext(file.name)[1].lower() not in _SIDE_FILES
        for relative, file in one.files
    )
    if not tops or has_images:
        return
    folders = [relative for relative, _ in one.files if relative]
    if len(set(folders)) == 1 and all(part.lower() in _ONE_LEVEL for part in folders[0].split("/")):
        return
    account.fault(
        one.path,
        "contains no images but folders "
        f"({', '.join(map(printable, tops[:3]))}{', ...' if len(tops) > 3 else ''}), which would "
        f"become one class; if these are the classes, name {printable(one.path)} as the source; "
        "if their images belong to "
        "one class, use --nested",
    )


def _check_same_classes(train: list[_Class], val: list[_Class], account: Account) -> None:
    """Compare the classes of the two splits; the labels are those of train.

    A class that is only in val is an error. A class that is only in train is noted.
    """
    known = {one.name for one in train}
    similar = {_loosely(name): name for name in known}
    for one in val:
        if one.name not in known:
            near = similar.get(_loosely(one.name))
            hint = f"; it contains {near!a}, which is spelled differently" if near else ""
            account.fault(
                one.path, f"this class is not in {printable(os.path.dirname(train[0].path))}{hint}"
            )
    if missing := sorted(known - {one.name for one in val}):
        named = ", ".join(shortened([printable(name) for name in missing]))
        account.notes.append(
            f"val has no images of {len(missing)} of the {len(train)} classes: {named}"
        )


def _loosely(name: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _split(name: str, classes: list[_Class], ids: list[str]) -> Split:
    label_of = {identity: label for label, identity in enumerate(ids)}
    files = [(one, file) for one in classes for _, file in one.files]
    labels = [label_of[one.name] for one, _ in files]
    keys = sample_keys([(one.name, os.path.splitext(file.name)[0]) for one, file in files], labels)
    items = [
        Item(key, label, file.path, 0, file.status.st_size, changed=file.status.st_mtime_ns)
        for key, label, (_, file) in zip(keys, labels, files, strict=True)
    ]
    return Split(name, ids, list(ids), items)


FORMAT = SourceFormat(Path.is_dir, folder_splits)
