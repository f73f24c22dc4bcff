"""Selects the .tar files below a URL that are the shards of one split.

Shards of several splits are never combined, and no shard is skipped silently.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from trainer.data.index import INDEX_NAME
from trainer.data.storage.client import folder_of
from trainer.data.storage.location import is_remote
from trainer.data.storage.store import Store
from trainer.errors import UserError, shortened

_COMPRESSED = re.compile(
    r"(\.tar\.(gz|zst|zstd|xz|bz2|lz4|lzma|br|Z|7z)|\.(tgz|tzst|txz|tbz2?|tlz))$", re.IGNORECASE
)
_UNFINISHED = re.compile(
    r"\.tar\.(part|partial|tmp|temp|incomplete|crdownload|download|filepart|aria2|!qb)(\.\w+)?$",
    re.IGNORECASE,
)
_SPLIT_WORDS = {
    word: split
    for split, words in {
        "train": "train training trn trainset traindata",
        "trainval": "trainval",
        "val": "val valid vali validation validate valset minival",
        "test": "test testing tst testset testdata",
        "dev": "dev devel devset",
        "eval": "eval evaluation evalset",
        "holdout": "holdout heldout",
        "extra": "extra",
        "unlabeled": "unlabeled unlabelled",
    }.items()
    for word in words.split()
}
_NAMED = 5  # missing shards that a note lists


def choose_shards(store: Store, pattern: str | None) -> dict[str, int]:
    """Return name and size of the shards below a store's URL, sorted by name.

    ``pattern``: select only the shards whose names match. Raises UserError if there are none, if
    some are compressed, unfinished or unreadable, and if their names indicate several splits.
    """
    listed = store.sizes()
    if ".pack/plan.json" in listed:
        raise UserError(
            f"{store.url}: is an unfinished dataset of `convoy pack`; run that command again "
            "to complete it"
        )
    sizes = {name: size for name, size in sorted(listed.items()) if not _is_hidden(name)}
    is_chosen = {name: pattern is None or fnmatchcase(name, pattern) for name in sizes}
    faults = [
        f"{store.url}/{name}: is compressed, so its samples cannot be read individually; "
        "decompress it to a .tar"
        for name in sizes
        if is_chosen[name] and _COMPRESSED.search(name)
    ]
    for name in sizes:
        partial = _UNFINISHED.search(name)
        if partial and (
            pattern is None or fnmatchcase(name[: partial.start() + len(".tar")], pattern)
        ):
            faults.append(f"{store.url}/{name}: is an unfinished download; finish or delete it")
    faults += [f"{store.url}/{name}: {fault}" for name, fault in _unlisted(store, sizes, pattern)]
    if faults:
        raise UserError(*shortened(faults))
    tars = {
        name: size
        for name, size in sizes.items()
        if is_chosen[name] and name.lower().endswith(".tar")
    }
    if not tars:
        matching = f" that matches --shards {pattern!r}" if pattern else ""
        raise UserError(f"{store.url}: contains no .tar file{matching}")
    if pattern is None:
        _check_no_index_below(store, sizes)
    _check_one_split(store.url, tars)
    return tars


def split_of(name: str) -> str | None:
    """Return the split that a shard's name or folder contains as a word, if any.

    ``imagenet1k-train-0000.tar`` gives ``train``. Several are joined: ``train/val``.
    """
    words = (
        word
        for word in re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
        if word
    )
    found = dict.fromkeys(_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS)
    return "/".join(found) or None


def missing_shards(names: Iterable[str]) -> list[str]:
    """Return the names that are missing in numbered series of shards.

    ``a-0001.tar`` is missing between ``a-0000.tar`` and ``a-0002.tar``.
    """
    series: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for name in names:
        numbered = re.fullmatch(r"(.*?)([0-9]+)(-of-[0-9]+[^0-9/]*|[^0-9/]*)", name)
        if numbered:
            head, digits, tail = numbered.groups()
            width = len(digits) if digits.startswith("0") else 0
            series[head, tail, width].add(int(digits))
    for (head, tail, width), numbers in list(
        series.items()
    ):  # 99.tar, 100.tar: numbers that outgrow the zero padding
        padded = [
            key
            for key in series
            if key[:2] == (head, tail) and key[2] and len(str(min(numbers))) >= key[2]
        ]
        if width == 0 and len(padded) == 1:
            series[padded[0]] |= series.pop((head, tail, width))
    missing = []
    for (head, tail, width), numbers in series.items():
        total = re.match(r"-of-([0-9]+)", tail)
        first, end = (0, int(total[1])) if total else (min(min(numbers), 1), max(numbers))
        if end - first > (2**20 if total else 100 * len(numbers)) or (
            len(numbers) < 2 and not total
        ):
            continue  # dates or ids, not a series
        if total and int(total[1]) in numbers:  # numbered from 1
            first, end = 1, end + 1
        elif not total and 0 not in numbers:
            first = 1
        missing += [
            f"{head}{number:0{width}d}{tail}"
            for number in range(first, end)
            if number not in numbers
        ]
    return missing


def notes_on_names(names: Collection[str]) -> list[str]:
    """Return notes on gaps in the shard numbers, and on names of several patterns."""
    kinds = Counter(re.sub("[0-9]+", "*", name) for name in names)
    notes = []
    if len(kinds) > 1:
        listed = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(_NAMED))
        more = f" and {len(kinds) - _NAMED} more" if len(kinds) > _NAMED else ""
        notes.append(
            f"warning: shards with {len(kinds)} patterns of names become one split: "
            f"{listed}{more}; --shards selects some of them"
        )
    if missing := missing_shards(names):
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        notes.append(
            "warning: the numbers of the shards have gaps; missing: "
            f"{', '.join(missing[:_NAMED])}{more}"
        )
    return notes


def _is_hidden(name: str) -> bool:
    """Return whether a file is hidden.

    Examples: ``._a.tar`` of macOS, caches of download tools, unfinished files of ``convoy pack``.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _unlisted(store: Store, sizes: dict[str, int], pattern: str | None) -> list[tuple[str, str]]:
    """Return local entries that should be shards but are not listed, with the reason."""
    if is_remote(store.url):
        return []
    root = os.fspath(folder_of(store.url, create=False))
    found = []

    def unreadable(error: OSError) -> None:
        found.append((os.path.relpath(error.filename, root), f"cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        for entry in sorted(folders + files):
            path = os.path.join(folder, entry)
            name = os.path.relpath(path, root)
            if name in sizes or not entry.lower().endswith(".tar") or _is_hidden(name):
                continue
            if pattern is not None and not fnmatchcase(name, pattern):
                continue
            reason = (
                "is a dangling link"
                if os.path.islink(path) and not os.path.exists(path)
                else "is not a regular file"
            )
            found.append((os.fsencode(name).decode(errors="backslashreplace"), reason))
    return found


def _check_no_index_below(store: Store, sizes: dict[str, int]) -> None:
    below = sorted(name for name in sizes if name.endswith(f"/{INDEX_NAME}"))
    if below:
        folders = ", ".join(
            f"{store.url}/{name.removesuffix(f'/{INDEX_NAME}')}" for name in below[:_NAMED]
        )
        raise UserError(
            f"{store.url}: contains indexed splits, which are never merged into one: {folders}; "
            "use their URLs, or select shards with --shards PATTERN"
        )


def _check_one_split(url: str, names: Iterable[str]) -> None:
    examples: dict[str | None, str] = {}
    for name in names:
        examples.setdefault(split_of(name), name)
    if len(examples) > 1:
        found = ", ".join(f"{name} ({split or 'no split'})" for split, name in examples.items())
        raise UserError(
            f"{url}: holds shards of several splits, which are never merged into one: {found}; "
            "index each split separately, by the URL of its folder or with --shards PATTERN"
        )
