"""The random numbers of augmentations: one named stream per augmentation.

The numbers of a sample are a pure function of (seed, epoch, step, slot of the global batch, name of
the stream). They do not depend on ranks, on threads or on other augmentations.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LATEST_VERSION = 2
"""The version of the random streams that new runs use.

Checkpoints record the version. A run that resumes continues with the version of its checkpoint, so
that it draws the numbers that it would have drawn without the interruption.
"""

_VERSION_1_COLUMNS = {
    "flip": slice(0, 1),
    "random_resized_crop": slice(1, 23),
    "padded_crop": slice(1, 3),
    "rand_augment": slice(24, 36),
    "trivial_augment": slice(24, 27),
    "random_erasing": slice(36, 59),
}
"""Columns of the one array from which version 1 takes the numbers of all augmentations."""
_VERSION_1_COUNT = 59
_VERSION_1_SAMPLES, _VERSION_1_BATCHES = 2, 3  # seeds


@dataclass(frozen=True)
class RandomStreams:
    """The random streams of one epoch.

    ``version``: 1, of checkpoints that record no version, or 2. Version 1 draws one array of fixed
    layout per global batch, so an augmentation could not be added without changing all numbers. In
    version 2 each stream is a counter-based generator (Philox; Salmon et al. 2011): the seed and
    the name of the stream are its key; epoch, step and micro-batch are the counter's upper words.
    """

    version: int
    seed: int
    epoch: int

    def uniforms(
        self, counts: Mapping[str, int], step: int, global_size: int
    ) -> dict[str, np.ndarray]:
        """Draws numbers in [0, 1) for the samples of a global batch.

        ``counts``: numbers per sample, by stream. Returns float64 [global_size, count] by stream.
        """
        drawn = {}
        if self.version == 1:
            rows = self._version_1(_VERSION_1_SAMPLES, step).random((global_size, _VERSION_1_COUNT))
            drawn = {name: rows[:, columns] for name, columns in _VERSION_1_COLUMNS.items()}
        return {
            name: drawn[name]
            if name in drawn
            else self._philox(name, step, 0).random((global_size, count))
            for name, count in counts.items()
        }

    def generator(self, name: str, step: int, micro_batch: int) -> np.random.Generator:
        """Returns the generator of a stream for one micro-batch.

        ``micro_batch``: its number in the global batch, as numbered by ``micro_batch_slots``.
        """
        if self.version == 1:
            return self._version_1(_VERSION_1_BATCHES, step, micro_batch)
        return self._philox(name, step, micro_batch)

    def _philox(self, name: str, step: int, micro_batch: int) -> np.random.Generator:
        key = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=16).digest()
        return np.random.Generator(
            np.random.Philox(
                key=int.from_bytes(key, "little"),
                counter=np.array([0, micro_batch, step, self.epoch], np.uint64),
            )
        )

    def _version_1(self, kind: int, *position: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, self.epoch, kind, *position]))
