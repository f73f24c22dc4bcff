"""Reads the bytes of the next micro-batches' samples from the store."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from trainer.data.batch import Fetched, Window
from trainer.data.index import Index
from trainer.data.shards.sample_reader import SampleRange, coalesce, read_range
from trainer.data.shards.tar import Sample
from trainer.data.storage.store import RangeReader

_AHEAD = 2  # windows that are read in advance while one is decoded


def fetch_samples(
    windows: Iterable[Window],
    index: Index,
    store: RangeReader,
    pool: ThreadPoolExecutor,
    budget: int,
) -> Iterator[Fetched]:
    """Yields micro-batches with their samples, reading the next windows in the background.

    Windows are read ahead as long as all held data fits in ``budget`` bytes.
    """
    reading: deque[tuple[Window, list[Future[dict[int, Sample]]], int]] = deque()
    planned = ((window, *_parts(window, index)) for window in windows)
    held = 0  # bytes of the window that is being yielded
    waiting = next(planned, None)
    while waiting is not None or reading:
        while waiting is not None:
            window, parts, size = waiting
            if reading and (
                len(reading) > _AHEAD or held + size + sum(size for *_, size in reading) > budget
            ):
                break
            reading.append(
                (window, [pool.submit(read_range, part, index, store) for part in parts], size)
            )
            waiting = next(planned, None)
        window, futures, held = reading.popleft()
        samples = {
            number: sample for future in futures for number, sample in future.result().items()
        }
        futures.clear()
        for part in window:
            yield part, [samples[int(number)] for number in part.samples]
        samples.clear()


def _parts(window: Window, index: Index) -> tuple[list[SampleRange], int]:
    """Returns the sample ranges to read for a window, and their total size in bytes."""
    parts = list(coalesce(np.concatenate([part.samples for part in window]), index))
    return parts, sum(
        index.shards[p.shard].offsets[p.end] - index.shards[p.shard].offsets[p.first] for p in parts
    )
