"""The loader: what a rank gets is its slice of one order, from any step, however it is read,
decoded and cut.
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
def test_any_ranks_workers_and_start_give_the_same_samples(
    digits: Path, split: tuple[int, int], start: int, workers: int, prefetch_mb: int
) -> None:
    """Against the order itself; pixels too, which are those of one rank that decodes in its own
    thread.
    """
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
        "the same steps on every rank"
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
    assert counting.requests < 6 * 48 + len(index.shards) * 4, "long stretches"


def test_a_set_smaller_than_the_shuffle_window_is_read_in_long_stretches_where_it_fits(
    digits: Path,
) -> None:
    index, store = open_index(str(digits / "train"))
    wanted = -(-2 * index.bytes // MB)
    for prefetch_mb, long in ((wanted + 1, True), (wanted // 2, False)):
        counting = Counting(store)
        _rank(
            _config(digits, 48, prefetch_mb=prefetch_mb, shuffle_window=10**6),
            digits,
            1,
            0,
            store=counting,
        )
        assert (counting.requests < index.samples / 4) == long


def test_it_is_said_how_much_room_long_stretches_want(digits: Path) -> None:
    """The figure that is told is enough, and a little less is not; nothing is told of a local
    folder or behind a cache.
    """
    index, _ = open_index(str(digits / "train"))
    keys: dict[str, Any] = {
        "train": "s3://bucket/digits",
        "shuffle_window": 10**6,
        "prefetch_mb": 1,
    }
    said = prefetch_hint(_config(digits, 48, **keys), index, 1)
    assert said is not None
    wanted = int(said.split("; with ")[1].split(",")[0])
    assert wanted == pytest.approx(2 * index.bytes / MB, abs=1.1, rel=0.03)
    assert prefetch_hint(_config(digits, 48, **keys | {"prefetch_mb": wanted}), index, 1) is None
    assert (
        prefetch_hint(_config(digits, 48, **keys | {"prefetch_mb": wanted - 1}), index, 1)
        is not None
    )
    assert (
        prefetch_hint(_config(digits, 48, **keys | {"prefetch_mb": -(-wanted // 2)}), index, 2)
        is None
    ), "half of it each"
    assert (
        prefetch_hint(_config(digits, 48, **keys | {"train": str(digits / "train")}), index, 1)
        is None
    )
    assert prefetch_hint(_config(digits, 48, cache_dir="/cache", **keys), index, 1) is None


def test_what_was_consumed_is_not_read(digits: Path) -> None:
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
def test_windows_are_the_steps_in_order_and_within_the_bound(
    steps: int, block: int, start: int, lane: float, lanes: int, budget: int
) -> None:
    order = EpochOrder(np.zeros((steps, 1), np.int64), np.ones((steps, 1), np.float32), block)
    windows = list(step_windows(order, start, lane, lanes, budget))
    assert [step for first, end in windows for step in range(first, end)] == list(
        range(start, steps)
    )
    for first, end in windows:
        assert end == first + 1 or (end - first) * lane * lanes <= budget / 2 + 1


def test_a_rank_does_not_hold_more_than_it_may(
    jpeg_folder: Path, tmp_path: Path, convoy_ok: Any
) -> None:
    """How far the reading runs ahead of the consumer, in bytes."""
    convoy_ok("pack", jpeg_folder, tmp_path, "--shards", 4)
    index, store = open_index(str(tmp_path / "train"))
    counting = Counting(store)
    config = _config(tmp_path, 2, prefetch_mb=1, workers=0, shuffle_window=4)
    mean = index.bytes / index.samples
    batches = train_loader(config, index, counting, 0, 1, 0, 1)  # type: ignore[arg-type]
    for step, _ in enumerate(batches):
        ahead = sum(int(counts.sum()) for counts in counting.read.values()) - (step + 1) * 2 * mean
        assert ahead < 1.1 * MB


# --- samples that are bad
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(digits_folder: Path, tmp_path: Path, convoy_ok: Any) -> tuple[Path, str, str]:
    """Digits, the image of one training and one validation sample overwritten; and their keys."""
    convoy_ok("pack", digits_folder, tmp_path, "--shards", 5)
    spoilt = []
    for split in ("train", "val"):
        index, _ = open_index(str(tmp_path / split))
        shard = index.shards[2]
        with (tmp_path / split / shard.name).open("r+b") as file:
            file.seek(shard.offsets[7] + 512)
            file.write(b"spoiled!" * 8)
        spoilt.append(shard.keys[7])
    return tmp_path, spoilt[0], spoilt[1]


def test_a_bad_sample_stops_the_run_and_is_named(spoiled: tuple[Path, str, str]) -> None:
    data, key, _ = spoiled
    with pytest.raises(
        UserError, match=rf"train-000002\.tar: sample {key} at byte [\d,]+: cannot be decoded"
    ):
        _rank(_config(data, 48), data, 1, 0)


def test_a_bad_sample_that_is_skipped_weighs_nothing_and_is_told(
    spoiled: tuple[Path, str, str], digits: Path
) -> None:
    data, key, other = spoiled
    config = _config(data, 48, bad_samples="skip")
    good = _rank(_config(digits, 48), digits, 1, 0)
    got = _rank(config, data, 1, 0)
    assert [batch.keys for batch in got] == [batch.keys for batch in good], "nothing else moves"
    lines = [line for batch in got for line in batch.bad]
    assert len(lines) == 1
    assert f"sample {key} at byte" in lines[0]
    for ours, whole in zip(got, good, strict=True):
        place = ours.keys.index(key) if key in ours.keys else None
        same = np.arange(48) != (-1 if place is None else place)
        assert np.array_equal(ours.pixels[same], whole.pixels[same])
        assert np.array_equal(ours.weights[same], whole.weights[same])
        assert ours.global_weight == whole.global_weight
        if place is not None:
            assert ours.weights[place] == 0
    index, store = open_index(str(data / "val"))
    batches = list(eval_loader(config, index, store, 1, 0))
    assert sum(len(batch.labels) for batch in batches) == index.samples - 1
    assert [f"sample {other} at byte" in line for batch in batches for line in batch.bad] == [True]


# --- sizes
# ------------------------------------------------------------------------------------------------------------


def test_images_grow_with_the_epochs(digits: Path) -> None:
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
    ("keys", "told"),
    [
        ({"initial_size": 300}, "initial_size: 300 is more than image_size 224"),
        ({"initial_size": 128}, "initial_size: needs grow_until"),
        ({"initial_size": 128, "grow_from": 5, "grow_until": 5}, "above grow_from 5"),
    ],
)
def test_growth_that_is_none_is_refused(digits: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _config(digits, 48, **({"image_size": 224} | keys))


def _first(batches: Iterator[Batch], count: int) -> list[Batch]:
    taken = list(itertools.islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def test_labels_alone_are_those_of_the_images(digits: Path) -> None:
    index: Index
    index, store = open_index(str(digits / "train"))
    config = _config(digits, 48)
    whole = _first(train_loader(config, index, store, 0, 1, 0, 1), 3)
    labels = _first(train_loader(config, index, store, 0, 1, 0, 1, labels_only=True), 3)
    assert all(
        np.array_equal(a.labels, b.labels) and a.keys == b.keys
        for a, b in zip(whole, labels, strict=True)
    )
