"""Scans a third-party shard for samples.

Also finds everything that prevents an exact representation.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainer.data.index import Shard
from trainer.data.shards.tar import (
    IMAGES,
    MAX_CLASSES,
    is_side_file,
    is_system_file,
    parse_label,
    split_name,
)
from trainer.data.shards.tar_reader import Member, TarError, read_members
from trainer.data.storage.store import Store, open_store, read_whole
from trainer.errors import shortened

_MAX_LABEL_BYTES = 1024


@dataclass
class Scan:
    """Result of scanning a shard: its index entry, labels and faults.

    ``ignored``: members that belong to no sample, by kind.
    """

    shard: Shard
    labels: dict[int, int]
    """Number of samples of each label."""
    faults: list[str]
    ignored: Counter[str]


@dataclass
class _Group:
    """Adjacent members that share a key."""

    key: str
    offset: int
    names: dict[str, str] = field(default_factory=dict)
    """Names of the members by extension."""

    @property
    def images(self) -> list[str]:
        return [extension for extension in self.names if extension in IMAGES]

    @property
    def is_sample(self) -> bool:
        """False for text files that describe the archive and have their own key."""
        return not all(is_side_file(name) for name in self.names.values())

    def faults(self) -> Iterator[str]:
        if not self.images or "cls" not in self.names:
            found = ", ".join(sorted(self.names))
            yield f"sample {self.key}: needs an image and its label (.cls), but has: {found}"
        if len(self.images) > 1:
            names = ", ".join(self.names[extension] for extension in self.images)
            yield f"sample {self.key}: has several images, {names}; keep one"


def scan_shard(url: str, name: str, size: int) -> Scan:
    """Read a shard of ``size`` bytes from beginning to end. Runs in a worker."""
    reading = _Reading(open_store(url), name, size)
    scanner = _Scanner()
    try:
        for member in read_members(reading, size):
            scanner.add(member)
        scanner.finish()
        faults = scanner.faults
    except TarError as error:
        faults = [str(error)]
    samples = scanner.samples
    shard = Shard(
        name=name,
        samples=len(samples),
        sha256=reading.sha256.hexdigest(),
        bytes=size,
        offsets=[
            0,
            *(sample.offset for sample in samples[1:]),
            scanner.end,
        ],  # bytes before the first sample belong to it
        keys=[sample.key for sample in samples],
    )
    return Scan(shard, dict(scanner.labels), shortened(faults, "faults"), scanner.ignored)


class _Scanner:
    """Groups the members of a shard into samples."""

    def __init__(self) -> None:
        self.samples: list[_Group] = []
        self.labels: Counter[int] = Counter()
        self.faults: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.end = 0
        self._keys: set[str] = set()
        self._group: _Group | None = None

    def add(self, member: Member) -> None:
        """Add the next member. Reads the data of a label."""
        self.end = member.end
        if not member.is_file:
            self._add_special(member)
            return
        if is_system_file(member.name):
            self.ignored["hidden or system files"] += 1
            return
        key, extension = split_name(member.name)
        if self._group is None or key != self._group.key:
            self._close()
            self._group = _Group(key, member.offset)
            if key in self._keys:
                self.faults.append(
                    f"sample {key}: its members are not adjacent, or two samples have this key"
                )
            self._keys.add(key)
        if other := self._group.names.get(extension):
            self.faults.append(
                f"sample {key}: {other} and {member.name} are the same member; rename one of "
                "the samples"
            )
        elif extension.startswith("__"):
            self.faults.append(f"sample {key}: the extension of {member.name} is reserved")
        self._group.names[extension] = member.name
        if extension == "cls":
            self._add_label(key, member)

    def finish(self) -> None:
        self._close()
        if not self.samples:
            ignored = ", ".join(f"{count} {kind}" for kind, count in self.ignored.items())
            self.faults.append("contains no sample" + (f" ({ignored})" if ignored else ""))

    def _add_special(self, member: Member) -> None:
        extension = split_name(member.name)[1]
        if extension == "cls" or extension in IMAGES:
            self.faults.append(
                f"{member.name} is a {member.kind}, not a file; write the archive with the "
                "files' content (tar --dereference --hard-dereference)"
            )
        elif member.kind not in ("directory", "volume label"):
            self.ignored["links or special files"] += 1

    def _add_label(self, key: str, member: Member) -> None:
        content = member.read() if member.size <= _MAX_LABEL_BYTES else b"%d bytes" % member.size
        label = parse_label(content)
        if label is None:
            self.faults.append(
                f"sample {key}: its label {content[:20]!r} is not a class number; write decimal "
                "digits, and count from 0"
            )
        elif label >= MAX_CLASSES:
            hint = (
                " (-1 as an unsigned number)" if label in (2**16 - 1, 2**32 - 1, 2**64 - 1) else ""
            )
            self.faults.append(
                f"sample {key}: its label {label}{hint} is above {MAX_CLASSES - 1:,}, the "
                "highest that is supported"
            )
        else:
            self.labels[label] += 1

    def _close(self) -> None:
        if (group := self._group) is None:
            return
        if group.is_sample:
            self.samples.append(group)
            self.faults += group.faults()
        else:
            self.ignored["text files without an image"] += len(group.names)


class _Reading:
    """File that reads a shard once, from beginning to end, and hashes it."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._pieces = read_whole(store, name, size)
        self._piece = memoryview(b"")
        self.sha256 = hashlib.sha256()

    def read(self, count: int) -> bytes:
        if not self._piece:
            self._piece = next(self._pieces, self._piece)
            self.sha256.update(self._piece)
        part = bytes(self._piece[:count])
        self._piece = self._piece[len(part) :]
        return part
