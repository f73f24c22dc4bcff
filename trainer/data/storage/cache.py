"""Caches shards on a local disk of the node (``data.cache_dir`` and ``data.cache_gb``)."""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from trainer.data.index import Index
from trainer.data.storage.block_cache import CorruptBlock, DiskBlockCache
from trainer.data.storage.store import RangeReader
from trainer.errors import UserError

BLOCK_BYTES = 4 * 2**20
_FETCHED_AT_ONCE = 8  # blocks

_LOG = logging.getLogger(__name__)


def with_cache(
    store: RangeReader, index: Index, folder: str | None, gigabytes: float
) -> RangeReader:
    """Returns ``store`` behind a cache of at most ``gigabytes`` GiB in ``folder``.

    Returns ``store`` itself if ``folder`` is None.
    """
    if folder is None:
        return store
    return Cache(
        store,
        folder,
        int(gigabytes * 2**30),
        index.digest,
        {shard.name: shard.bytes for shard in index.shards},
    )


class Cache:
    """A RangeReader that caches another one in ``folder``.

    Shards are divided into blocks of ``block_bytes``. A required block that is missing is fetched
    in full, once for all processes that share ``folder``. If the disk is full or cannot be written,
    a warning is logged once and reads go to the store. Raises UserError if ``folder`` cannot be a
    folder.

    ``max_bytes``: limit for all cached blocks in ``folder``, including those of other datasets.
    ``digest``: the index's digest. ``sizes``: bytes of each shard, by name.
    """

    def __init__(
        self,
        store: RangeReader,
        folder: Path | str,
        max_bytes: int,
        digest: str,
        sizes: Mapping[str, int],
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.hit_bytes, self.missed_bytes = 0, 0
        """Requested bytes that were read from the disk, and from the store."""
        self._store = store
        self._folder = Path(folder)
        self._blocks = DiskBlockCache(self._folder, max_bytes)
        self._digest = quote(digest.removeprefix("sha256:"), safe="")
        self._sizes = sizes
        self._block_bytes = block_bytes
        self._writes = True
        self._reported: set[str] = set()
        """Corrupt blocks that were logged."""
        self._lock = threading.Lock()
        try:
            self._blocks.clean()
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"{folder}: is not a folder, so shards cannot be cached in it (data.cache_dir)"
            ) from None
        except OSError as error:
            self._give_up(error)

    @property
    def url(self) -> str:
        return self._store.url

    def read_ranges(
        self, name: str, starts: Sequence[int], ends: Sequence[int]
    ) -> list[memoryview]:
        """Returns the bytes ``[start, end)`` of a shard for each pair.

        Raises what the store raises.
        """
        size = self._sizes.get(name)
        if size is None or max(ends, default=0) > size:
            return self._store.read_ranges(name, starts, ends)  # raises the specific error
        parts = [
            np.empty(max(0, end - start), np.uint8) for start, end in zip(starts, ends, strict=True)
        ]
        # By block number: destination array, first byte and end in the block.
        needed: dict[int, list[tuple[np.ndarray, int, int]]] = {}
        for part, start, end in zip(parts, starts, ends, strict=True):
            for number in range(
                start // self._block_bytes, -(-end // self._block_bytes) if end > start else 0
            ):
                base = number * self._block_bytes
                first, last = max(start, base), min(end, base + self._block_bytes)
                needed.setdefault(number, []).append(
                    (part[first - start : last - start], first - base, last - base)
                )
        missing = [
            number
            for number in sorted(needed)
            if not self._read(name, number, needed[number], report=True)
        ]
        for at in range(0, len(missing), _FETCHED_AT_ONCE):
            group = {number: needed[number] for number in missing[at : at + _FETCHED_AT_ONCE]}
            self._fetch(name, group)
        return [part.data.toreadonly() for part in parts]

    def _read(
        self,
        name: str,
        number: int,
        pieces: list[tuple[np.ndarray, int, int]],
        report: bool = False,
    ) -> bool:
        """Fills the pieces from the disk; returns False if the block is missing or corrupt.

        ``report``: log a corrupt block, once.
        """
        block, length = self._name(name, number), self._length(name, number)
        try:
            for piece, first, last in pieces:
                content = self._blocks.read(block, length, first, last)
                if content is None:
                    return False
                piece[:] = np.frombuffer(content, np.uint8)
        except (CorruptBlock, OSError) as error:
            if report and block not in self._reported:
                self._reported.add(block)
                _LOG.warning("%s/%s: %s; it is fetched again", self._folder, block, error)
            return False
        self._count(hit=sum(len(piece) for piece, _, _ in pieces))
        return True

    def _fetch(self, name: str, needed: Mapping[int, list[tuple[np.ndarray, int, int]]]) -> None:
        """Fills missing pieces from the store and caches their blocks.

        A block that another process has written in the meantime is read from the disk.
        """
        if not self._writes:
            self._read_uncached(name, needed)
            return
        of_name = {self._name(name, number): number for number in needed}
        left = dict(needed)
        try:
            with self._blocks.acquire(list(of_name)) as claims:
                for number in needed:
                    if self._read(name, number, needed[number]):
                        del left[number]
                claimed = {
                    number: block
                    for block, number in of_name.items()
                    if number in left and block in claims
                }
                contents = self._fetch_blocks(name, claimed)
                for number, content in contents.items():
                    self._fill(content, left.pop(number))
                for number, content in contents.items():
                    self._blocks.write(claimed[number], claims[claimed[number]], content)
        except OSError as error:
            self._give_up(error)
        if left:
            self._read_uncached(name, left)

    def _fetch_blocks(self, name: str, numbers: Iterable[int]) -> dict[int, memoryview]:
        starts = [number * self._block_bytes for number in numbers]
        ends = [
            start + self._length(name, number)
            for start, number in zip(starts, numbers, strict=True)
        ]
        return (
            dict(zip(numbers, self._store.read_ranges(name, starts, ends), strict=True))
            if starts
            else {}
        )

    def _fill(self, content: memoryview, pieces: list[tuple[np.ndarray, int, int]]) -> None:
        for piece, first, last in pieces:
            piece[:] = np.frombuffer(content[first:last], np.uint8)
            self._count(missed=len(piece))

    def _read_uncached(
        self, name: str, needed: Mapping[int, list[tuple[np.ndarray, int, int]]]
    ) -> None:
        """Reads only the required bytes from the store and caches nothing."""
        pieces = [
            (piece, number * self._block_bytes + first)
            for number in needed
            for piece, first, _ in needed[number]
        ]
        contents = self._store.read_ranges(
            name, [start for _, start in pieces], [start + len(piece) for piece, start in pieces]
        )
        for (piece, _), content in zip(pieces, contents, strict=True):
            piece[:] = np.frombuffer(content, np.uint8)
            self._count(missed=len(piece))

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            is_first, self._writes = self._writes, False
        if is_first:
            _LOG.warning(
                "%s: %s; shards are no longer cached there", self._folder, error.strerror or error
            )

    def _count(self, hit: int = 0, missed: int = 0) -> None:
        with self._lock:
            self.hit_bytes += hit
            self.missed_bytes += missed

    def _name(self, name: str, number: int) -> str:
        return f"{self._digest}/{quote(name, safe='')}.{number:06d}"

    def _length(self, name: str, number: int) -> int:
        return min(self._block_bytes, self._sizes[name] - number * self._block_bytes)
