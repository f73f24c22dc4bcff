"""Samples by their number, out of the shards' byte ranges."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.index import Index
from trainer.data.shards.tar import Sample, encoded_image, read_sample
from trainer.data.storage.store import RangeReader

_REQUEST = (
    8 * 2**20
)  # bytes; most that is asked for at once, so that a long stretch comes in several requests side by side


@dataclass(frozen=True)
class SampleRange:
    """Neighbours in a shard: its samples ``first`` to ``end - 1``."""

    shard: int
    first: int
    end: int


def coalesce(numbers: np.ndarray, index: Index) -> Iterator[SampleRange]:
    """Where the samples of these numbers stand, each once, as few long stretches as that takes."""
    wanted = np.unique(numbers)
    shard_of = np.searchsorted(index.starts, wanted, side="right") - 1
    for number in np.unique(shard_of):
        offsets = index.shards[number].offsets
        places = wanted[shard_of == number] - index.starts[number]
        for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
            first, end = int(run[0]), int(run[-1]) + 1
            while first < end:
                cut = first + 1
                while cut < end and offsets[cut + 1] - offsets[first] <= _REQUEST:
                    cut += 1
                yield SampleRange(int(number), first, cut)
                first = cut


def read_range(stretch: SampleRange, index: Index, store: RangeReader) -> dict[int, Sample]:
    """Its samples, by number. Raises RetryableError where the store is lost, UserError where the
    bytes are not what was indexed.
    """
    shard, first = index.shards[stretch.shard], int(index.starts[stretch.shard])
    start = shard.offsets[stretch.first]
    (content,) = store.read_ranges(shard.name, [start], [shard.offsets[stretch.end]])
    samples = {}
    for place in range(stretch.first, stretch.end):
        where = (
            f"{store.url}/{shard.name}: sample {shard.keys[place]} at byte {shard.offsets[place]:,}"
        )
        part = content[shard.offsets[place] - start : shard.offsets[place + 1] - start]
        samples[first + place] = read_sample(part, shard.keys[place], where)
    return samples


def read_samples(numbers: np.ndarray, index: Index, store: RangeReader) -> dict[int, Sample]:
    """The samples of these numbers, by number, one request after another. Raises as ``read_range``."""
    return {
        n: sample
        for stretch in coalesce(numbers, index)
        for n, sample in read_range(stretch, index, store).items()
    }


def read_image(number: int, index: Index, store: RangeReader) -> bytes:
    """The encoded image of one sample."""
    return bytes(encoded_image(read_samples(np.array([number]), index, store)[number]))
