"""The sampling order: pure functions of (index, seed, epoch, global batch size).

The shards are shuffled and their samples concatenated. The resulting sequence is cut into as many
equal *streams* as a global batch has slots, and slot ``j`` of every global batch reads stream ``j``
from beginning to end. Within a stream, blocks of ``shuffle_window / global_size`` samples are
shuffled.

A stream is a contiguous range of bytes, so a rank reads a few long ranges, and each byte is read
once, by one rank. The order does not depend on the number of ranks.
"""

from dataclasses import dataclass

import numpy as np

from trainer.errors import UserError

_ORDER = 1  # distinguishes the order's random numbers from those of augmentations, version 1


@dataclass(frozen=True)
class EpochOrder:
    """The sampling order of one epoch.

    ``samples[step, slot]`` is the sample number that a slot reads at a step.
    ``weights[step, slot]`` is 0 if the slot is padding.
    """

    samples: np.ndarray  # int64 [steps, global_size]
    weights: np.ndarray  # float32 [steps, global_size]
    block: int
    """Steps per shuffled block; every stream starts a new block after this many steps."""

    @property
    def steps(self) -> int:
        return len(self.samples)


def steps_per_epoch(samples: int, global_size: int, tail: str) -> int:
    """Returns the number of optimizer steps per epoch.

    ``tail``: with ``pad``, the last partial global batch is a step too; with ``drop``, it is
    dropped. Raises UserError if there are fewer samples than one global batch.
    """
    if samples < global_size:
        raise UserError(
            f"batch.global_size: {global_size} is more than the {samples} samples of data.train"
        )
    return samples // global_size if tail == "drop" else -(-samples // global_size)


def block_steps(window: int, global_size: int) -> int:
    """Returns the steps per shuffled block, which together read about ``window`` samples."""
    return max(1, -(-window // global_size))


def epoch_order(
    sizes: np.ndarray, seed: int, epoch: int, global_size: int, window: int, tail: str = "pad"
) -> EpochOrder:
    """Computes the order of one epoch over shards of ``sizes`` samples.

    With ``pad``, a stream that is one sample shorter than the others repeats its last sample with
    weight 0.
    """
    total = int(sizes.sum())
    steps = steps_per_epoch(total, global_size, tail)
    random = np.random.Generator(np.random.PCG64([seed, epoch, _ORDER]))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = np.argsort(random.random(len(sizes)), kind="stable")
    sequence = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])

    lengths = np.full(global_size, total // global_size)
    lengths[: total % global_size] += 1
    stream_starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    stream = np.repeat(np.arange(global_size), lengths)
    place = np.arange(total) - stream_starts[stream]
    block = block_steps(window, global_size)
    block_number = stream * (int(lengths.max()) // block + 1) + place // block
    sequence = sequence[np.argsort(block_number + random.random(total), kind="stable")]

    step = np.arange(steps)[:, None]
    weights = (step < lengths[None, :]).astype(np.float32)
    samples = sequence[stream_starts[None, :] + np.minimum(step, lengths - 1)]
    return EpochOrder(samples, weights, block)


def micro_batch_slots(
    global_size: int, world_size: int, rank: int, accumulation_steps: int
) -> np.ndarray:
    """Returns a rank's slots of a global batch: int64 [accumulation_steps, micro_size].

    Slot ``j`` belongs to micro-batch ``j mod (world_size x accumulation_steps)``. Thus the samples
    that share a micro-batch (and its batch-norm statistics) depend only on the micro-batch size,
    and a partial last batch is spread over all micro-batches.
    """
    micro_batches = world_size * accumulation_steps
    first = np.arange(accumulation_steps) * world_size + rank
    return first[:, None] + micro_batches * np.arange(global_size // micro_batches)[None, :]


def eval_range(samples: int, world_size: int, rank: int) -> range:
    """Returns the samples of a validation split that a rank evaluates.

    The ranges of all ranks together cover the split exactly once.
    """
    return range(samples * rank // world_size, samples * (rank + 1) // world_size)
