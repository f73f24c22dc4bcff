"""Images to pack (items) in splits, and an account of every other file of a source."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

_NAMED = 3  # skipped files that are listed per rule


@dataclass(frozen=True, slots=True)
class Item:
    """One image: bytes ``offset`` to ``offset + size`` of a file, or image number ``offset`` of a
    file of raw pixels.
    """

    key: str
    label: int
    path: str
    offset: int
    size: int
    extension: str = ""
    """Extension of the image format; empty until the content is checked."""
    changed: int = 0
    """The file's modification time, ns; detects that an image changed since it was listed."""
    pixels: Callable[[str, int], np.ndarray] | None = None
    """Returns image number ``offset`` of the file ``path``, uint8 [height, width] or [height,
    width, 3], if the file holds raw pixels. A function of a module, since workers call it.
    """
    name: str = ""
    """Name of the member, if the image is in a tar."""

    @property
    def source(self) -> str:
        """Return the location of the image, for messages."""
        if self.name:
            return printable(f"{self.path}: {self.name} at byte {self.offset:,}")
        return printable(self.path if not self.offset else f"{self.path} at byte {self.offset:,}")


@dataclass(frozen=True)
class Split:
    """The images of ``train`` or ``val`` in source order.

    ``class_ids[label]`` is the name of a class in the source, ``classes[label]`` the readable name.
    """

    name: str
    class_ids: list[str]
    classes: list[str]
    items: list[Item]


@dataclass
class Account:
    """Account of the files of a source that are not packed."""

    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Paths by rule; a skipped folder contributes each file in it."""
    rejected: list[str] = field(default_factory=list)
    """``PATH: REASON`` of files that cannot be packed; --skip-bad omits them."""
    faults: list[str] = field(default_factory=list)
    """``PATH: REASON`` of what makes the source ambiguous or unreadable; always an error."""
    notes: list[str] = field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        return sum(map(len, self.skipped.values()))

    def skip(self, rule: str, *paths: str) -> None:
        if paths:
            self.skipped.setdefault(rule, []).extend(paths)

    def reject(self, path: str, reason: str) -> None:
        self.rejected.append(f"{printable(path)}: {reason}")

    def fault(self, path: str, reason: str) -> None:
        self.faults.append(f"{printable(path)}: {reason}")

    def skip_lines(self) -> list[str]:
        """Return one line per rule, with the first names."""
        lines = []
        for rule, paths in self.skipped.items():
            named = ", ".join(printable(path) for path in paths[:_NAMED])
            lines.append(
                f"skipped {len(paths):,} ({rule}): {named}{', ...' if len(paths) > _NAMED else ''}"
            )
        return lines


@dataclass(frozen=True)
class Source:
    """All splits of a source, listed but not read, and the account of its other files."""

    splits: list[Split]
    account: Account


def printable(text: str) -> str:
    r"""Return ``text`` on one line, with control characters and undecodable bytes escaped (\n,
    \xe9).
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode represents it
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
