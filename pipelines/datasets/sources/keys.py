"""Derives WebDataset keys from file names: ASCII, no dots, at most 95 characters, unique."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_UNSAFE = re.compile(r"[^A-Za-z0-9_+-]")
_LIMIT = 40  # characters of a class and of a stem: a plain tar header holds a name of 100
_HEAD = 18  # characters kept from the start of a longer name; its end distinguishes files


def sample_keys(names: Sequence[tuple[str, str]], labels: Sequence[int]) -> list[str]:
    """Return a key per (class, stem): ``class/stem`` without unsafe characters.

    Collisions are numbered in order. An empty class is omitted. The result depends only on the
    order of ``names``; the time is linear.
    """
    folders: dict[tuple[str, int], str] = {}
    keys = []
    for (folder, stem), label in zip(names, labels, strict=True):
        prefix = folders.get((folder, label))
        if prefix is None:
            prefix = folders[folder, label] = (
                f"{_safe(folder, f'class-{label}')}/" if folder else ""
            )
        keys.append(prefix + _safe(stem, "_"))
    return _numbered(keys)


def has_equal_keys(stems: Sequence[str]) -> bool:
    """Return whether ``sample_keys`` would have to number some of these stems."""
    return len({_safe(stem, "_") for stem in stems}) < len(stems)


def _numbered(names: list[str]) -> list[str]:
    if len(taken := set(names)) == len(names):
        return names
    counts = Counter(names)
    keys, seen = [], set()
    following: dict[str, int] = {}
    for key in names:
        if counts[key] == 1 or key not in seen:  # the first occurrence of a key stays unchanged
            seen.add(key)
            keys.append(key)
            continue
        number = following.get(key, 2)
        while (unique := f"{key}-{number}") in taken:
            number += 1
        following[key] = number + 1
        taken.add(unique)
        keys.append(unique)
    return keys


def _safe(name: str, fallback: str) -> str:
    if not name.isascii():
        name = "".join(
            char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char)
        )
        name = re.sub(r"[^\x00-\x7f]+", "_", name)  # one underscore per word of another script
        if not name.strip("_"):
            return fallback
    name = _UNSAFE.sub("_", name)
    if name.startswith("-"):  # would be parsed as a command-line option
        name = "_" + name[1:]
    if len(name) > _LIMIT:
        name = f"{name[:_HEAD]}__{name[_HEAD + 2 - _LIMIT :]}"
    return name
