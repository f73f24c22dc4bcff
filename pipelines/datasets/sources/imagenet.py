"""Lists ImageNet's tars: train.tar with a tar per class, val.tar with images, and the devkit."""

from pathlib import Path, PurePosixPath

from pipelines.datasets.sources.devkit import ARCHIVE, FOLDERS, TRUTH, Devkit
from pipelines.datasets.sources.item import Account, Item, Split, printable
from pipelines.datasets.sources.keys import has_equal_keys, sample_keys
from pipelines.datasets.sources.source_format import ListOptions, SourceFormat
from pipelines.datasets.sources.walk import HIDDEN, skip_others, skipped_by_name
from trainer.data.shards.tar_reader import TarError, list_members
from trainer.errors import UserError, shortened

Found = list[tuple[str, int, int]]
"""Name, byte offset and size of each image."""


def has_imagenet_tars(root: Path) -> bool:
    return any(_find(root, split) for split in ("train", "val"))


def imagenet_splits(root: Path, options: ListOptions, account: Account) -> list[Split]:
    """Return the splits of ``ILSVRC2012_img_train.tar`` and ``ILSVRC2012_img_val.tar``, or one of
    them.

    Raises UserError for corrupt tars, and for a val.tar without its ground truth.
    """
    train, val = _find(root, "train"), _find(root, "val")
    used = {path.name for path in (train, val) if path is not None}
    devkit_files = {
        ARCHIVE,
        TRUTH,
        "meta.mat",
        "synset_words.txt",
        *(folder.split("/")[0] for folder in FOLDERS),
    }
    skip_others(root, used | devkit_files, "next to ImageNet's tars", account)
    devkit = Devkit(root)
    splits = []
    if train is not None:
        splits.append(_train_split(train, devkit, account))
    if val is not None:
        splits.append(
            _val_split(val, train, splits[0].class_ids if splits else None, devkit, account)
        )
    return splits


def _find(root: Path, split: str) -> Path | None:
    return next(
        (root / n for n in (f"ILSVRC2012_img_{split}.tar", f"{split}.tar") if (root / n).is_file()),
        None,
    )


def _train_split(path: Path, devkit: Devkit, account: Account) -> Split:
    classes = sorted(_members(path, account))
    if wrong := [name for name, _, _ in classes if not name.endswith(".tar")]:
        raise UserError(
            f"{path}: {wrong[0]} is not a class's tar, as ILSVRC2012_img_train.tar contains"
        )
    ids = [PurePosixPath(name).stem for name, _, _ in classes]
    if twice := sorted({identity for identity in ids if ids.count(identity) > 1}):
        raise UserError(f"{path}: contains {twice[0]}.tar more than once")
    if not classes:
        raise UserError(f"{path}: contains no tars of classes")
    names: list[tuple[str, str]] = []
    labels: list[int] = []
    found: Found = []
    faults: list[str] = []
    for label, (name, offset, size) in enumerate(classes):
        try:
            inner = _members(path, account, offset, size)
        except UserError as error:
            faults.append(f"{path}: {printable(name)}: {str(error).removeprefix(f'{path}: ')}")
            continue
        if not inner:
            faults.append(f"{path}: {printable(name)} contains no images")
        found += inner
        labels += [label] * len(inner)
        names += [(ids[label], PurePosixPath(n).stem) for n, _, _ in inner]
    if faults:
        raise UserError(*shortened(faults, "faults"))
    return Split(
        "train", ids, [devkit.words.get(i, i) for i in ids], _items(path, names, labels, found)
    )


def _val_split(
    path: Path, train: Path | None, ids: list[str] | None, devkit: Devkit, account: Account
) -> Split:
    images = sorted(_members(path, account))
    truth = devkit.ground_truth()
    if len(truth) != len(images):
        raise UserError(f"{TRUTH}: has {len(truth)} lines for the {len(images)} images of {path}")
    ids = ids or sorted(set(truth))
    if unknown := sorted(set(truth) - set(ids)):
        raise UserError(f"{TRUTH}: names class {unknown[0]}, which is not in {train}")
    label_of = {identity: label for label, identity in enumerate(ids)}
    names = [
        (identity, PurePosixPath(name).stem)
        for (name, _, _), identity in zip(images, truth, strict=True)
    ]
    labels = [label_of[identity] for identity in truth]
    return Split(
        "val", ids, [devkit.words.get(i, i) for i in ids], _items(path, names, labels, images)
    )


def _items(path: Path, names: list[tuple[str, str]], labels: list[int], found: Found) -> list[Item]:
    """Build the items of a split.

    Keys are the image names if these are unique, as ImageNet's are; otherwise they include the
    class.
    """
    if not has_equal_keys([stem for _, stem in names]):
        names = [("", stem) for _, stem in names]
    changed = path.stat().st_mtime_ns
    return [
        Item(key, label, str(path), offset, size, changed=changed, name=name)
        for key, label, (name, offset, size) in zip(
            sample_keys(names, labels), labels, found, strict=True
        )
    ]


def _members(path: Path, account: Account, start: int = 0, size: int | None = None) -> Found:
    """Return the files of a tar, or of a tar inside it; offsets are relative to the outer tar."""
    try:
        members = list_members(path, start, size)
    except TarError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    found: dict[str, tuple[str, int, int]] = {}
    for member in members:
        if member.kind in ("directory", "volume label"):
            continue
        if any(skipped_by_name(part, is_folder=False) for part in PurePosixPath(member.name).parts):
            account.skip(HIDDEN, f"{path}: {member.name}")
        elif not member.is_file:
            raise UserError(
                f"{path}: {printable(member.name)} is a {member.kind}, not a file; write the "
                "tar with --dereference"
            )
        elif member.name in found:
            raise UserError(f"{path}: contains {printable(member.name)} more than once")
        else:
            found[member.name] = (member.name, start + member.data_offset, member.size)
    return list(found.values())


FORMAT = SourceFormat(has_imagenet_tars, imagenet_splits)
