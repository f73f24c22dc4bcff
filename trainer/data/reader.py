"""Samples by their number, out of the shards' byte ranges."""

import numpy as np

from trainer.data.index import Index
from trainer.data.shard import Sample, encoded_image, read_sample
from trainer.data.storage import Store


def read_samples(numbers: np.ndarray, index: Index, store: Store) -> dict[int, Sample]:
    """The samples of these numbers, by number. Neighbours in a shard are read as one range.

    Raises ServiceLost where the store is lost, UserError where the bytes are not what was indexed.
    """
    wanted = np.unique(numbers)
    shard_of = np.searchsorted(index.starts, wanted, side="right") - 1
    samples: dict[int, Sample] = {}
    for number in np.unique(shard_of):
        shard, first = index.shards[number], int(index.starts[number])
        places = wanted[shard_of == number] - first
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        starts = [shard.offsets[run[0]] for run in runs]
        ends = [shard.offsets[run[-1] + 1] for run in runs]
        for run, start, content in zip(runs, starts, store.read_ranges(shard.name, starts, ends), strict=True):
            for place in run:
                begin, end = shard.offsets[place] - start, shard.offsets[place + 1] - start
                where = f"{store.url}/{shard.name}: sample {shard.keys[place]} at byte {shard.offsets[place]:,}"
                samples[first + int(place)] = read_sample(content[begin:end], shard.keys[place], where)
    return samples


def read_image(number: int, index: Index, store: Store) -> bytes:
    """The encoded image of one sample."""
    return bytes(encoded_image(read_samples(np.array([number]), index, store)[number]))
