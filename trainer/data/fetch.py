"""Reading the bytes of the next micro-batches' samples from the store."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from trainer.data.batch import Fetched, Window
from trainer.data.index import Index
from trainer.data.shards.sample_reader import SampleRange, coalesce, read_range
from trainer.data.shards.tar import Sample
from trainer.data.storage.store import RangeReader

_AHEAD = 2  # windows that are read while one is decoded


def fetch_samples(
    windows: Iterable[Window],
    index: Index,
    store: RangeReader,
    pool: ThreadPoolExecutor,
    budget: int,
) -> Iterator[Fetched]:
    """Micro-batches with their samples. The next windows are read meanwhile, while all that is held
    has ``budget`` bytes.
    """
    reading: deque[tuple[Window, list[Future[dict[int, Sample]]], int]] = deque()
    planned = ((window, *_parts(window, index)) for window in windows)
    held = 0  # bytes of the window that is being taken apart
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
    """What is to be read for a window, and how many bytes that is."""
    parts = list(coalesce(np.concatenate([part.samples for part in window]), index))
    return parts, sum(
        index.shards[p.shard].offsets[p.end] - index.shards[p.shard].offsets[p.first] for p in parts
    )
