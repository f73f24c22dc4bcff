"""The loader: each rank gets its slice of one global order.

This holds for any start step, split over ranks, prefetch budget and number of decode threads.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.data.index import Index, open_index
from trainer.data.loader import eval_loader, prefetch_hint, step_windows, train_loader
from trainer.data.sampler import EpochOrder, epoch_order
from trainer.data.storage.store import Store
from trainer.errors import UserError

MB = 2**20


def _config(data: Path, global_size: int, **keys: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "resnet8"},
            "data": {
                "train": str(data / "train"),
                "image_size": 8,
                "shuffle_window": 96,
                "seed": 5,
                **keys,
            },
            "batch": {"global_size": global_size, "eval_size": 13},
            "train": {"max_steps": 1},
        }
    )


class Counting:
    """A store that counts how often each byte of a shard is read."""

    def __init__(self, store: Store) -> None:
        self._store, self.url = store, store.url
        self.read: dict[str, np.ndarray] = {}
        self.requests = 0

    def read_ranges(self, name: str, starts: list[int], ends: list[int]) -> list[memoryview]:
        counts = self.read.setdefault(name, np.zeros(self._store.size(name), int))
        for start, end in zip(starts, ends, strict=True):
            counts[start:end] += 1
            self.requests += 1
        return self._store.read_ranges(name, starts, ends)


def _rank(
    config: RunConfig,
    data: Path,
    world: int,
    rank: int,
    accumulation: int = 1,
    start: int = 0,
    **options: Any,
) -> list[Batch]:
    index, store = open_index(str(data / "train"))
    return list(
        train_loader(
            config, index, options.get("store", store), 1, world, rank, accumulation, start
        )
    )


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([(1, 1), (2, 1), (3, 2), (6, 1), (12, 2)]),
    st.integers(0, 14),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 4096]),
)
def test_samples_are_independent_of_ranks_threads_and_start_step(
    digits: Path, split: tuple[int, int], start: int, workers: int, prefetch_mb: int
) -> None:
    """Keys are compared with the order itself, and pixels with one rank without decode threads."""
    world, accumulation = split
    config = _config(digits, 48, workers=workers, prefetch_mb=prefetch_mb)
    index, _ = open_index(str(digits / "train"))
    order = epoch_order(index.sizes, 5, 1, 48, 96)
    alone = _rank(_config(digits, 48, workers=0), digits, 1, 0)
    pixels = {
        (step, key): image
        for step, batch in enumerate(alone)
        for key, image in zip(batch.keys, batch.pixels, strict=False)
    }
    ranks = [_rank(config, digits, world, rank, accumulation, start) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {max(0, order.steps - start) * accumulation}, (
        "every rank has the same number of steps"
    )
    for step in range(start, order.steps):
        parts = [
            batches[(step - start) * accumulation + a]
            for batches in ranks
            for a in range(accumulation)
        ]
        keys = sorted(key for part in parts for key in part.keys)
        assert keys == sorted(
            index.key(int(n))
            for n, weight in zip(order.samples[step], order.weights[step], strict=True)
            if weight
        )
        for part in parts:
            kept = part.pixels[part.weights > 0]
            assert all(
                np.array_equal(image, pixels[step, key])
                for key, image in zip(part.keys, kept, strict=True)
            )


@pytest.mark.parametrize(("world", "prefetch_mb"), [(1, 64), (2, 64), (4, 1), (8, 64)])
def test_each_byte_is_read_once_over_all_ranks(digits: Path, world: int, prefetch_mb: int) -> None:
    index, store = open_index(str(digits / "train"))
    config = _config(digits, 48, prefetch_mb=prefetch_mb)
    counting = Counting(store)
    for rank in range(world):
        _rank(config, digits, world, rank, store=counting)
    for shard in index.shards:
        assert (counting.read[shard.name][: shard.offsets[-1]] == 1).mean() > 0.98
        assert counting.read[shard.name].sum() <= 1.02 * shard.bytes
    assert counting.requests < 6 * 48 + len(index.shards) * 4, "reads long ranges"


def test_dataset_smaller_than_shuffle_window_is_read_in_long_ranges_if_it_fits(
    digits: Path,
) -> None:
    index, store = open_index(str(digits / "train"))
    needed = -(-2 * index.bytes // MB)
    for prefetch_mb, long in ((needed + 1, True), (needed // 2, False)):
        counting = Counting(store)
        _rank(
            _config(digits, 48, prefetch_mb=prefetch_mb, shuffle_window=10**6),
            digits,
            1,
            0,
            store=counting,
        )
        assert (counting.requests < index.samples / 4) == long


def test_prefetch_hint_names_the_memory_needed_for_long_ranges(digits: Path) -> None:
    """The recommended size is enough and a little less is not.

    There is no hint for a local folder or behind a cache.
    """
    index, _ = open_index(str(digits / "train"))
    keys: dict[str, Any] = {
        "train": "s3://bucket/digits",
        "shuffle_window": 10**6,
        "prefetch_mb": 1,
    }
    hint = prefetch_hint(_config(digits, 48, **keys), index, 1)
    assert hint is not None
    needed = int(hint.split("; set it to ")[1].split(" ")[0])
    assert needed == pytest.approx(2 * index.bytes / MB, abs=1.1, rel=0.03)
    assert prefetch_hint(_config(digits, 48, **keys | {"prefetch_mb": needed}), index, 1) is None
    assert (
        prefetch_hint(_config(digits, 48, **keys | {"prefetch_mb": needed - 1}), index, 1)
        is not None
    )
    assert (
        prefetch_hint(_config(digits, 48, **keys | {"prefetch_mb": -(-needed // 2)}), index, 2)
        is None
    ), "each of two ranks needs half"
    assert (
        prefetch_hint(_config(digits, 48, **keys | {"train": str(digits / "train")}), index, 1)
        is None
    )
    assert prefetch_hint(_config(digits, 48, cache_dir="/cache", **keys), index, 1) is None


def test_resume_does_not_read_consumed_samples(digits: Path) -> None:
    index, store = open_index(str(digits / "train"))
    config, counting = _config(digits, 48), Counting(store)
    rest = _rank(config, digits, 1, 0, start=9, store=counting)
    read = sum(int(counts.sum()) for counts in counting.read.values())
    mean = index.bytes / index.samples
    assert read < 1.2 * mean * sum(len(batch.keys) for batch in rest)


@settings(deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 64),
    st.integers(0, 100),
    st.floats(100, 300_000),
    st.integers(1, 512),
    st.integers(1, 8192).map(lambda mb: mb * MB),
)
def test_windows_cover_all_steps_in_order_within_the_budget(
    steps: int, block: int, start: int, step_bytes: float, streams: int, budget: int
) -> None:
    order = EpochOrder(np.zeros((steps, 1), np.int64), np.ones((steps, 1), np.float32), block)
    windows = list(step_windows(order, start, step_bytes, streams, budget))
    assert [step for first, end in windows for step in range(first, end)] == list(
        range(start, steps)
    )
    for first, end in windows:
        assert end == first + 1 or (end - first) * step_bytes * streams <= budget / 2 + 1


def test_read_ahead_stays_within_prefetch_budget(
    jpeg_folder: Path, tmp_path: Path, convoy_ok: Any
) -> None:
    """Measures in bytes how far reading is ahead of the consumer."""
    convoy_ok("pack", jpeg_folder, tmp_path, "--shards", 4)
    index, store = open_index(str(tmp_path / "train"))
    counting = Counting(store)
    config = _config(tmp_path, 2, prefetch_mb=1, workers=0, shuffle_window=4)
    mean = index.bytes / index.samples
    batches = train_loader(config, index, counting, 0, 1, 0, 1)  # type: ignore[arg-type]
    for step, _ in enumerate(batches):
        ahead = sum(int(counts.sum()) for counts in counting.read.values()) - (step + 1) * 2 * mean
        assert ahead < 1.1 * MB


# --- bad samples ----------------------------------------------------------------------------------


@pytest.fixture
def corrupted(digits_folder: Path, tmp_path: Path, convoy_ok: Any) -> tuple[Path, str, str]:
    """Digits with one training and one validation image overwritten, and the keys of these two."""
    convoy_ok("pack", digits_folder, tmp_path, "--shards", 5)
    keys = []
    for split in ("train", "val"):
        index, _ = open_index(str(tmp_path / split))
        shard = index.shards[2]
        with (tmp_path / split / shard.name).open("r+b") as file:
            file.seek(shard.offsets[7] + 512)
            file.write(b"corrupt!" * 8)
        keys.append(shard.keys[7])
    return tmp_path, keys[0], keys[1]


def test_bad_sample_is_an_error_that_names_it(corrupted: tuple[Path, str, str]) -> None:
    data, key, _ = corrupted
    with pytest.raises(
        UserError, match=rf"train-000002\.tar: sample {key} at byte [\d,]+: cannot be decoded"
    ):
        _rank(_config(data, 48), data, 1, 0)


def test_skipped_bad_sample_has_weight_zero_and_is_reported(
    corrupted: tuple[Path, str, str], digits: Path
) -> None:
    data, key, other = corrupted
    config = _config(data, 48, bad_samples="skip")
    good = _rank(_config(digits, 48), digits, 1, 0)
    got = _rank(config, data, 1, 0)
    assert [batch.keys for batch in got] == [batch.keys for batch in good], (
        "others keep their place"
    )
    lines = [line for batch in got for line in batch.bad]
    assert len(lines) == 1
    assert f"sample {key} at byte" in lines[0]
    for ours, expected in zip(got, good, strict=True):
        place = ours.keys.index(key) if key in ours.keys else None
        same = np.arange(48) != (-1 if place is None else place)
        assert np.array_equal(ours.pixels[same], expected.pixels[same])
        assert np.array_equal(ours.weights[same], expected.weights[same])
        assert ours.global_weight == expected.global_weight
        if place is not None:
            assert ours.weights[place] == 0
    index, store = open_index(str(data / "val"))
    batches = list(eval_loader(config, index, store, 1, 0))
    assert sum(len(batch.labels) for batch in batches) == index.samples - 1
    assert [f"sample {other} at byte" in line for batch in batches for line in batch.bad] == [True]


# --- image sizes ----------------------------------------------------------------------------------


def test_image_size_grows_with_the_epoch(digits: Path) -> None:
    keys = {
        "image_size": 224,
        "initial_size": 128,
        "grow_from": 2,
        "grow_until": 10,
        "size_step": 32,
    }
    data = _config(digits, 48, **keys).data
    assert [data.size_in(epoch) for epoch in range(12)] == [
        128,
        128,
        128,
        128,
        160,
        160,
        192,
        192,
        192,
        224,
        224,
        224,
    ]
    small = _config(digits, 48, image_size=16, initial_size=8, grow_until=2, size_step=4)
    index, store = open_index(str(digits / "train"))
    sides = [
        next(train_loader(small, index, store, epoch, 1, 0, 1)).pixels.shape for epoch in range(3)
    ]
    assert sides == [(48, 8, 8, 3), (48, 12, 12, 3), (48, 16, 16, 3)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"initial_size": 300}, "initial_size: 300 is more than image_size 224"),
        ({"initial_size": 128}, "initial_size: needs grow_until"),
        ({"initial_size": 128, "grow_from": 5, "grow_until": 5}, "above grow_from 5"),
    ],
)
def test_invalid_progressive_resizing_is_an_error(
    digits: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _config(digits, 48, **({"image_size": 224} | keys))


def _first(batches: Iterator[Batch], count: int) -> list[Batch]:
    taken = list(itertools.islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def test_labels_only_loader_gives_the_labels_of_the_images(digits: Path) -> None:
    index: Index
    index, store = open_index(str(digits / "train"))
    config = _config(digits, 48)
    full = _first(train_loader(config, index, store, 0, 1, 0, 1), 3)
    labels = _first(train_loader(config, index, store, 0, 1, 0, 1, labels_only=True), 3)
    assert all(
        np.array_equal(a.labels, b.labels) and a.keys == b.keys
        for a, b in zip(full, labels, strict=True)
    )
