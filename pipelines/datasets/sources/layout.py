"""Determines which folders of a source are splits and which are classes.

A folder named like a split (`train`, `Training`, `val`, `test`, `seg_test`, ...) is a split if it
contains folders. Splits next to classes are ambiguous and an error, and so is everything that would
merge splits.
"""

import os
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from pipelines.datasets.sources.item import Account, printable
from pipelines.datasets.sources.walk import Entry, Walk, files_below, looks_like_image
from trainer.errors import UserError, shortened

Layout = Literal["auto", "splits", "classes"]
"""Interpretation of the top-level folders of a source."""

_WORDS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
}
_FILLERS = frozenset(
    [
        "set",
        "sets",
        "data",
        "dataset",
        "split",
        "image",
        "images",
        "img",
        "imgs",
        "folder",
        "seg",
        "samples",
    ]
)


@dataclass(frozen=True)
class SplitFolder:
    """Name of a split in the dataset, and its folder."""

    name: str
    path: str


def split_kind(name: str) -> str | None:
    """Return ``train``, ``val`` or ``test`` for a folder name in any usual spelling, else None."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = [_without_suffix(word) for word in re.findall(r"[^\W\d_]+", spaced.casefold())]
    kinds = {_WORDS.get(word) for word in words if word not in _FILLERS}
    return kinds.pop() if len(kinds) == 1 else None


def _without_suffix(word: str) -> str:
    for suffix in ("set", "data", "images"):
        if (stem := word.removesuffix(suffix)) in _WORDS:
            return stem
    return word


def find_split_folders(root: str, layout: Layout, account: Account) -> list[SplitFolder]:
    """Return the folders of the splits, or the source as ``train`` if its folders are classes.

    Entries next to the splits are skipped and counted. Raises UserError if the layout is ambiguous.
    """
    top = Walk(Account())  # discarded: the folder is accounted for when it is listed for packing
    folders = [entry for entry in top.entries(root, is_class=False) if entry.is_folder]
    words = {folder.name: kind for folder in folders if (kind := split_kind(folder.name))}
    if layout == "classes" or not words:
        if layout == "splits":
            raise UserError(
                f"{printable(root)}: --layout splits, but it contains no folder train or val"
            )
        return [SplitFolder("train", root)]
    splits = [
        folder for folder in folders if folder.name in words and _contains_folders(folder, account)
    ]
    if account.faults:
        return []
    if not splits:
        named = ", ".join(printable(os.path.join(root, name)) for name in sorted(words))
        raise UserError(
            f"{named}: named like a split, but contains no class folders; put a folder per class "
            "into SOURCE or into its train and val folders, or use --layout classes if the "
            "folders of SOURCE are the classes"
        )
    chosen = _choose(root, {folder: words[folder.name] for folder in splits})
    _skip_rest(
        root,
        [folder for folder in folders if folder not in chosen.values()],
        chosen,
        words,
        layout,
        account,
    )
    return [SplitFolder(name, folder.path) for name, folder in chosen.items()]


def _choose(root: str, kinds: dict[Entry, str]) -> dict[str, Entry]:
    """Choose the folders of ``train`` and ``val``; ``val`` is a validation folder, else a test
    folder.
    """
    by_kind: dict[str, list[Entry]] = {}
    for folder, kind in kinds.items():
        by_kind.setdefault(kind, []).append(folder)
    for same in by_kind.values():
        if len(same) > 1:
            names = " and ".join(printable(folder.name) for folder in same)
            raise UserError(
                f"{printable(root)}: {names} are the same split; splits are never merged: move "
                "one of them away"
            )
    if "train" not in by_kind:
        raise UserError(
            f"{printable(root)}: contains {', '.join(sorted(printable(f.name) for f in kinds))} "
            "but no train folder, whose classes define the labels; to pack only one, as `train`, "
            "name it as the source; use --layout classes if it is a class"
        )
    chosen = {"train": by_kind["train"][0]}
    if val := by_kind.get("val") or by_kind.get("test"):
        chosen["val"] = val[0]
    return chosen


def _skip_rest(
    root: str,
    folders: list[Entry],
    chosen: dict[str, Entry],
    words: dict[str, str],
    layout: Layout,
    account: Account,
) -> None:
    """Account for the entries next to the split folders.

    Raises UserError if they may contain classes.
    """
    loose = [
        entry.path for entry in Walk(account).entries(root, is_class=False) if not entry.is_folder
    ]
    account.skip("next to the split folders", *loose)
    ambiguous, flat = [], []
    for folder in folders:
        unreadable: list[str] = []
        files = files_below(folder.path, unreadable)
        kind = words.get(folder.name)
        if kind == "test" and "val" in chosen:
            account.skip(f"a test split; {printable(chosen['val'].name)} is packed as val", *files)
        elif layout == "auto" and kind:
            flat.append(
                f"{printable(folder.path)}: is named like a split, but contains no class "
                "folders; --layout splits skips it"
            )
        elif layout == "auto" and (
            unreadable or any(map(looks_like_image, files)) or os.path.islink(folder.path)
        ):
            ambiguous.append(printable(folder.name))
        else:
            account.skip("in folders next to the splits", *files)
    if flat:
        raise UserError(*flat)
    if ambiguous:
        splits = ", ".join(sorted(printable(folder.name) for folder in chosen.values()))
        raise UserError(
            f"{printable(root)}: contains split folders ({splits}) and other folders with images "
            f"({', '.join(shortened(ambiguous))}), so which folders are classes is ambiguous; "
            "name one of the folders as the source, or use --layout splits, which skips the "
            "others, or --layout classes"
        )


def _contains_folders(folder: Entry, account: Account) -> bool:
    listed = Account()  # files are accounted for later, but a folder that cannot be listed is not
    found = any(entry.is_folder for entry in Walk(listed).entries(folder.path))
    account.faults += listed.faults
    return found
