"""WebDataset keys from file names: ASCII, without dots, at most 95 characters, each unique."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_UNSAFE = re.compile(r"[^A-Za-z0-9_+-]")
_LIMIT = 40  # characters of a class and of a stem: a plain tar header holds a name of 100
_HEAD = 18  # characters of a longer name's beginning; the rest is its end, which tells files apart


def sample_keys(names: Sequence[tuple[str, str]], labels: Sequence[int]) -> list[str]:
    """A key for each (class, stem): ``class/stem`` made safe; collisions are numbered in order.

    An empty class is omitted. Depends on the order of ``names`` only; takes linear time.
    """
    folders: dict[tuple[str, int], str] = {}
    wanted = []
    for (folder, stem), label in zip(names, labels, strict=True):
        prefix = folders.get((folder, label))
        if prefix is None:
            prefix = folders[folder, label] = (
                f"{_safe(folder, f'class-{label}')}/" if folder else ""
            )
        wanted.append(prefix + _safe(stem, "_"))
    return _numbered(wanted)


def has_equal_keys(stems: Sequence[str]) -> bool:
    """Whether ``sample_keys`` would have to number some of these stems."""
    return len({_safe(stem, "_") for stem in stems}) < len(stems)


def _numbered(wanted: list[str]) -> list[str]:
    if len(taken := set(wanted)) == len(wanted):
        return wanted
    counts = Counter(wanted)
    keys, seen = [], set()
    following: dict[str, int] = {}
    for key in wanted:
        if (
            counts[key] == 1 or key not in seen
        ):  # the first one, and names that exist as such, keep it
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
        name = re.sub(r"[^\x00-\x7f]+", "_", name)  # one for a word of another script
        if not name.strip("_"):
            return fallback
    name = _UNSAFE.sub("_", name)
    if name.startswith("-"):  # would be taken for an option of a command
        name = "_" + name[1:]
    if len(name) > _LIMIT:
        name = f"{name[:_HEAD]}__{name[_HEAD + 2 - _LIMIT :]}"
    return name
