"""Which sample comes when: pure functions of (index, seed, epoch, global batch size), the same on
any number of ranks.

The shards are shuffled and their samples concatenated; the row is cut into as many equal *lanes* as
a global batch has slots, and slot ``j`` of every global batch reads lane ``j`` from its beginning
to its end. Inside a lane, blocks of ``shuffle_window / global_size`` samples are shuffled. A lane
is a stretch of bytes, so a rank reads few long ranges and each byte is read once, by one rank; and
since the number of ranks appears nowhere here, it cannot change the order.
"""

from dataclasses import dataclass

import numpy as np

from trainer.errors import UserError

_ORDER, _AUGMENT, _MIX = 1, 2, 3  # one random stream each


@dataclass(frozen=True)
class EpochOrder:
    """``samples[step, slot]``: the sample number that a slot reads at a step; ``weights`` is 0
    where it only pads.
    """

    samples: np.ndarray  # int64 [steps, global_size]
    weights: np.ndarray  # float32 [steps, global_size]
    block: int
    """Steps after which every lane begins a new shuffled block."""

    @property
    def steps(self) -> int:
        return len(self.samples)


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seeds)))


def steps_per_epoch(samples: int, global_size: int, tail: str) -> int:
    """Optimizer steps of an epoch. ``pad``: the last partial global batch is a step too; ``drop``:
    it is left out.
    """
    if samples < global_size:
        raise UserError(
            f"batch.global_size: {global_size} is more than the {samples} samples of data.train"
        )
    return samples // global_size if tail == "drop" else -(-samples // global_size)


def block_steps(window: int, global_size: int) -> int:
    """Steps in which about ``window`` samples are shuffled among each other."""
    return max(1, -(-window // global_size))


def epoch_order(
    sizes: np.ndarray, seed: int, epoch: int, global_size: int, window: int, tail: str = "pad"
) -> EpochOrder:
    """The order of one epoch over shards of ``sizes`` samples.

    With ``pad`` a lane that is one sample shorter than the others repeats its last one with weight
    zero.
    """
    total = int(sizes.sum())
    steps = steps_per_epoch(total, global_size, tail)
    random = _generator(seed, epoch, _ORDER)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = np.argsort(random.random(len(sizes)), kind="stable")
    row = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])

    lengths = np.full(global_size, total // global_size)
    lengths[: total % global_size] += 1
    lane_starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    lane = np.repeat(np.arange(global_size), lengths)
    place = np.arange(total) - lane_starts[lane]
    block = block_steps(window, global_size)
    block_number = lane * (int(lengths.max()) // block + 1) + place // block
    row = row[np.argsort(block_number + random.random(total), kind="stable")]

    step = np.arange(steps)[:, None]
    weights = (step < lengths[None, :]).astype(np.float32)
    return EpochOrder(row[lane_starts[None, :] + np.minimum(step, lengths - 1)], weights, block)


def micro_batch_slots(
    global_size: int, world_size: int, rank: int, accumulation_steps: int
) -> np.ndarray:
    """The slots of a global batch that a rank serves: int64 [accumulation_steps, micro_size].

    Slot ``j`` belongs to micro-batch ``j mod (world_size x accumulation_steps)``: which samples
    share a micro-batch (and its batch-norm statistics) depends on the micro-batch's size alone, and
    a short last batch is spread over all of them.
    """
    micro_batches = world_size * accumulation_steps
    first = np.arange(accumulation_steps) * world_size + rank
    return first[:, None] + micro_batches * np.arange(global_size // micro_batches)[None, :]


def augment_uniforms(seed: int, epoch: int, step: int, global_size: int, count: int) -> np.ndarray:
    """Random numbers in [0, 1) for every slot of one global batch: float64 [global_size, count]."""
    return _generator(seed, epoch, _AUGMENT, step).random((global_size, count))


def mix_generator(seed: int, epoch: int, step: int, micro_batch: int) -> np.random.Generator:
    """What draws how a micro-batch is mixed; ``micro_batch``: its number in the global batch, as
    ``micro_batch_slots`` counts.
    """
    return _generator(seed, epoch, _MIX, step, micro_batch)


def eval_range(samples: int, world_size: int, rank: int) -> range:
    """The stretch of a validation split that a rank measures; the stretches of all ranks are the
    split, once.
    """
    return range(samples * rank // world_size, samples * (rank + 1) // world_size)
