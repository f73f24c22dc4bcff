"""Reads samples by their numbers from byte ranges of the shards."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.index import Index
from trainer.data.shards.tar import Sample, encoded_image, read_sample
from trainer.data.storage.store import RangeReader

# Maximum bytes per request, so that a long range is fetched by several concurrent requests.
_REQUEST = 8 * 2**20


@dataclass(frozen=True)
class SampleRange:
    """Consecutive samples of a shard: ``first`` to ``end - 1``."""

    shard: int
    first: int
    end: int


def coalesce(numbers: np.ndarray, index: Index) -> Iterator[SampleRange]:
    """Yields the locations of these samples, each once, as few long ranges as possible."""
    numbers = np.unique(numbers)
    shard_of = np.searchsorted(index.starts, numbers, side="right") - 1
    for number in np.unique(shard_of):
        offsets = index.shards[number].offsets
        places = numbers[shard_of == number] - index.starts[number]
        for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
            first, end = int(run[0]), int(run[-1]) + 1
            while first < end:
                stop = first + 1
                while stop < end and offsets[stop + 1] - offsets[first] <= _REQUEST:
                    stop += 1
                yield SampleRange(int(number), first, stop)
                first = stop


def read_range(part: SampleRange, index: Index, store: RangeReader) -> dict[int, Sample]:
    """Returns the samples of a range, by number.

    Raises RetryableError if the store becomes unavailable, and UserError if the bytes differ from
    those that were indexed.
    """
    shard, first = index.shards[part.shard], int(index.starts[part.shard])
    start = shard.offsets[part.first]
    (content,) = store.read_ranges(shard.name, [start], [shard.offsets[part.end]])
    samples = {}
    for place in range(part.first, part.end):
        where = (
            f"{store.url}/{shard.name}: sample {shard.keys[place]} at byte {shard.offsets[place]:,}"
        )
        sample = content[shard.offsets[place] - start : shard.offsets[place + 1] - start]
        samples[first + place] = read_sample(sample, shard.keys[place], where)
    return samples


def read_samples(numbers: np.ndarray, index: Index, store: RangeReader) -> dict[int, Sample]:
    """Returns the samples of these numbers, by number, sending one request after another.

    Raises what ``read_range`` raises.
    """
    return {
        n: sample
        for part in coalesce(numbers, index)
        for n, sample in read_range(part, index, store).items()
    }


def read_image(number: int, index: Index, store: RangeReader) -> bytes:
    """Returns the encoded image of one sample."""
    return bytes(encoded_image(read_samples(np.array([number]), index, store)[number]))
