"""The index of a dataset split: its shards, the offset of each sample in them, and the class names.

Each split has one ``index.json``.
"""

import builtins
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.data.storage.client import folder_of
from trainer.data.storage.location import is_remote
from trainer.data.storage.store import Store, not_json, open_store, read_whole
from trainer.errors import UserError, shortened

INDEX_NAME = "index.json"
FORMAT: Final = "convoy-index/1"
_Count = Annotated[int, Field(ge=0, le=2**62)]
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_AT_ONCE = 4  # shards whose SHA-256 is computed concurrently


class Shard(BaseModel):
    """One tar archive. Sample ``i`` occupies the bytes ``[offsets[i], offsets[i + 1])``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    samples: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: _Count
    offsets: list[_Count]
    """``samples + 1`` byte offsets, ascending; the last is where the end-of-archive mark begins."""
    keys: list[str]
    """WebDataset's ``__key__`` of each sample, in archive order."""

    def structure_fault(self) -> str | None:
        """Returns what is inconsistent within this entry, or None."""
        if self.name.startswith("/") or ".." in self.name.split("/") or _CONTROL.search(self.name):
            return "its name leads out of the folder of the shards, or contains control characters"
        if not len(self.keys) == len(self.offsets) - 1 == self.samples:
            return (
                f"has {self.samples} samples, but {len(self.keys)} keys and "
                f"{len(self.offsets)} offsets"
            )
        if self.offsets[0] != 0 or self.offsets[-1] > self.bytes:
            return (
                f"its samples extend from byte {self.offsets[0]} to {self.offsets[-1]:,} of "
                f"{self.bytes:,}"
            )
        steps = np.diff(np.array(self.offsets, np.int64))
        if steps.size and int(steps.min()) <= 0:
            return f"sample {int(steps.argmin())} does not begin before the next one"
        return None

    def size_fault(self, size: int | None) -> str | None:
        """Returns what is wrong with a shard of ``size`` bytes (None: missing), or None."""
        if size is None:
            return "is in the index but missing"
        return None if size == self.bytes else f"has {size:,} bytes, the index says {self.bytes:,}"

    def digest_fault(self, sha256: str) -> str | None:
        """Returns what is wrong with a shard of this SHA-256, or None."""
        return (
            None
            if sha256 == self.sha256
            else f"its SHA-256 is {sha256[:16]}..., the index says {self.sha256[:16]}..."
        )


class Index(BaseModel):
    """All shards of a split. ``digest`` identifies the content: equal digests mean equal bytes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["convoy-index/1"] = FORMAT
    split: str
    samples: _Count
    bytes: _Count
    shards_in: Literal["", ".."] = ""
    """The shards' folder relative to the index: ``..`` if several splits share one folder."""
    classes: list[str]
    """Human-readable name of each label."""
    class_ids: list[str]
    """The source's identifier of each label: a folder name, a WordNet id, a number."""
    plan: str
    """SHA-256 of the data to pack and the settings; compared by a second ``convoy pack``."""
    digest: str
    shards: list[Shard]

    @classmethod
    def of(
        cls,
        split: str,
        classes: list[str],
        class_ids: list[str],
        shards: list[Shard],
        plan: str = "",
        shards_in: Literal["", ".."] = "",
    ) -> "Index":
        """Creates the index of these shards, computing its totals and digest."""
        return cls(
            shards_in=shards_in,
            split=split,
            samples=sum(shard.samples for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            classes=classes,
            class_ids=class_ids,
            plan=plan,
            digest=digest_of(classes, class_ids, shards),
            shards=shards,
        )

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of samples in each shard, int64 [shards]."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """First sample number of each shard, followed by the total count: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    def locate(self, sample: int) -> tuple[int, int]:
        """Returns (shard number, position in that shard) of a sample number."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def key(self, sample: int) -> str:
        shard, place = self.locate(sample)
        return self.shards[shard].keys[place]

    def to_json(self) -> "builtins.bytes":
        """Serializes the index with one shard per line, for readability."""
        head = self.model_dump(exclude={"shards"} if self.shards_in else {"shards", "shards_in"})
        lines = [json.dumps(shard.model_dump(), separators=(",", ":")) for shard in self.shards]
        text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        return (text + ',\n "shards": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n").encode()


def digest_of(classes: list[str], class_ids: list[str], shards: list[Shard]) -> str:
    """Returns the SHA-256 over the classes and each shard's name, counts and own SHA-256."""
    content = [classes, class_ids, [[s.name, s.samples, s.bytes, s.sha256] for s in shards]]
    text = json.dumps(content, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def parse_index(raw: bytes, where: str) -> Index:
    """Parses and validates an index from its JSON; raises UserError that names ``where``."""
    try:
        index = Index.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise not_json(
                raw, where, "write it again with `convoy index` or `convoy pack --overwrite`"
            ) from None
        place = ".".join(str(part) for part in first["loc"])
        if place == "format":
            found = str(first["input"])[:40]
            raise UserError(
                f"{where}: its format is {found!r}, but this version of Convoy reads {FORMAT!r}"
            ) from None
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"{where} is not an index that Convoy wrote: {message}") from None
    if fault := _index_fault(index):
        raise UserError(f"{where}: {fault}")
    return index


def _index_fault(index: Index) -> str | None:
    for shard in index.shards:
        if fault := shard.structure_fault():
            return f"{shard.name[:200]!r}: {fault}"
    if len({shard.name for shard in index.shards}) != len(index.shards):
        return "a shard occurs twice"
    if not index.shards or not index.samples:
        return "holds no samples"
    if index.samples != sum(s.samples for s in index.shards) or index.bytes != sum(
        s.bytes for s in index.shards
    ):
        return "its totals are not the sums over its shards"
    if not index.classes or len(index.classes) != len(index.class_ids):
        return f"has {len(index.classes)} classes, but {len(index.class_ids)} class_ids"
    if index.digest != digest_of(index.classes, index.class_ids, index.shards):
        return (
            f"its content does not match its digest {index.digest[:80]}; it was modified or "
            "truncated"
        )
    return None


def write_index(store: Store, name: str, index: Index) -> None:
    """Writes an index after parsing its bytes again, so that no unreadable index is written.

    Raises UserError, also for text that is not valid Unicode.
    """
    where = f"{store.url}/{name}"
    try:
        raw = index.to_json()
    except UnicodeEncodeError as error:
        text = error.object[max(0, error.start - 20) : error.end + 20]
        raise UserError(
            f"{where}: cannot be written: {text!r} is not valid Unicode; rename the file or folder"
        ) from None
    if parse_index(raw, where) != index:
        raise AssertionError(f"{where}: the index differs when it is read back")
    store.write(name, raw)


def open_index(url: str) -> tuple[Index, Store]:
    """Returns the index of the split at ``url`` and the store that contains its shards.

    Raises UserError if no index exists.
    """
    store = open_store(url)
    raw = store.read_small(INDEX_NAME)
    if raw is None:
        splits = [
            f"{store.url}/{name}"
            for name in ("train", "val")
            if store.read_small(f"{name}/{INDEX_NAME}") is not None
        ]
        if splits:
            raise UserError(f"{url}: contains splits, but is not one; use {' or '.join(splits)}")
        raise UserError(
            f"{url}: no {INDEX_NAME} found; run `convoy pack`, or `convoy index` for existing "
            "shards"
        )
    index = parse_index(raw, f"{url.rstrip('/')}/{INDEX_NAME}")
    return index, open_store(_parent(url)) if index.shards_in else store


def _parent(url: str) -> str:
    """Returns the URL of the parent folder of ``url``."""
    if is_remote(url):
        return url.rstrip("/").rpartition("/")[0]
    return os.fspath(folder_of(url, create=False).parent)


def check_shards(index: Index, store: Store) -> None:
    """Compares the presence and size of every shard with the index, using one listing.

    Raises UserError with one line per error (at most ten).
    """
    there = store.sizes()
    _refuse(
        store,
        [
            (shard, fault)
            for shard in index.shards
            if (fault := shard.size_fault(there.get(shard.name)))
        ],
    )


def check_digests(index: Index, store: Store, numbers: Iterable[int]) -> None:
    """Compares the size and SHA-256 of the shards of these numbers with the index.

    Reads each shard once, several concurrently, and holds ``_AT_ONCE`` pieces in memory. Raises
    UserError with one line per differing shard (at most ten), and RetryableError.
    """

    def fault_of(number: int) -> str | None:
        shard = index.shards[number]
        if fault := shard.size_fault(store.size(shard.name)):
            return fault
        sha256 = hashlib.sha256()
        for piece in read_whole(store, shard.name, shard.bytes):
            sha256.update(piece)
        return shard.digest_fault(sha256.hexdigest())

    chosen = list(numbers)
    with ThreadPoolExecutor(_AT_ONCE, "digests") as threads:
        found = zip(chosen, threads.map(fault_of, chosen), strict=True)
        _refuse(store, [(index.shards[number], fault) for number, fault in found if fault])


def _refuse(store: Store, faults: list[tuple[Shard, str]]) -> None:
    if faults:
        raise UserError(
            *shortened([f"{store.url}/{shard.name}: {fault}" for shard, fault in faults], "shards")
        )
