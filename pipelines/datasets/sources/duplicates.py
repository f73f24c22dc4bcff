"""Detects images of val that are in train too, so that validation would measure training data."""

import hashlib
from collections.abc import Callable, Sequence

from pipelines.datasets.sources.item import Item

_COMPARED = 10_000  # candidates whose content is read; nearly all of them are equal

Marked = tuple[Item, int]
"""An item, and the checksum of its first bytes."""


def leak_note(
    train: Sequence[Marked], val: Sequence[Marked], read: Callable[[Item], bytes]
) -> str | None:
    """Return a warning if images of ``val`` have the same bytes as one of ``train``, else None."""
    marks = {(item.size, mark) for item, mark in val}
    candidates: dict[tuple[int, int], list[Item]] = {}
    for item, mark in train:
        if (item.size, mark) in marks:
            candidates.setdefault((item.size, mark), []).append(item)
    digests: dict[tuple[int, int], dict[bytes, Item]] = {}
    equal: list[tuple[Item, Item]] = []
    doubtful = [(item, (item.size, mark)) for item, mark in val if (item.size, mark) in candidates]
    for item, key in doubtful[:_COMPARED]:
        if key not in digests:
            digests[key] = {
                hashlib.sha256(read(other)).digest(): other for other in candidates[key]
            }
        if other := digests[key].get(hashlib.sha256(read(item)).digest()):
            equal.append((item, other))
    if not equal:
        return None
    least = "at least " if len(doubtful) > _COMPARED else ""
    item, other = equal[0]
    return (
        f"warning: {least}{len(equal):,} of the {len(val):,} images of val are in train too: "
        f"{item.source} equals {other.source}"
    )
