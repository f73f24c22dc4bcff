"""The sample order: each sample once per epoch, for any number of ranks.

`convoy order` prints the same order as the functions.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import RunText

from trainer.data.index import open_index
from trainer.data.sampler import epoch_order, eval_range, micro_batch_slots

SHARDS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int, int, int]:
    """Shard sizes, world size, accumulation steps, micro-batch size, window and seed."""
    world, accumulation, micro = (
        draw(st.sampled_from([1, 2, 3, 7, 8, 64, 512])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    sizes = np.array(draw(SHARDS))
    short = world * accumulation * micro - int(sizes.sum())
    if short > 0:
        sizes[-1] += short
    return (
        sizes,
        world,
        accumulation,
        micro,
        draw(st.sampled_from([1, 16, 1000])),
        draw(st.integers(0, 2**31)),
    )


@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from(["pad", "drop"]))
def test_each_sample_is_seen_once_and_all_ranks_make_the_same_steps(
    layout: tuple, tail: str
) -> None:
    sizes, world, accumulation, micro, window, seed = layout
    global_size, total = world * accumulation * micro, int(sizes.sum())
    order = epoch_order(sizes, seed, 3, global_size, window, tail)
    slots = np.stack(
        [micro_batch_slots(global_size, world, rank, accumulation) for rank in range(world)]
    )
    assert sorted(slots.ravel()) == list(range(global_size)), (
        "the slots of the ranks partition a global batch"
    )
    seen = order.samples[order.weights > 0]
    assert len(set(seen.tolist())) == len(seen)
    assert len(seen) == (total if tail == "pad" else total // global_size * global_size)
    assert order.steps == (-(-total // global_size) if tail == "pad" else total // global_size)
    # a partial last batch is spread evenly over the micro-batches
    last = np.array([[order.weights[-1, s].sum() for s in rank] for rank in slots])
    assert last.max() - last.min() <= 1


@settings(max_examples=50, deadline=None)
@given(SHARDS, st.integers(0, 2**31), st.sampled_from([1, 64, 10_000]))
def test_order_is_a_function_of_seed_and_epoch(sizes: list[int], seed: int, window: int) -> None:
    shards, size = np.array(sizes), min(4, sum(sizes))
    first = epoch_order(shards, seed, 0, size, window)
    assert np.array_equal(first.samples, epoch_order(shards, seed, 0, size, window).samples)
    if sum(sizes) > 30 and window > 1:
        assert not np.array_equal(first.samples, epoch_order(shards, seed, 1, size, window).samples)
        assert not np.array_equal(
            first.samples, epoch_order(shards, seed + 1, 0, size, window).samples
        )


def test_stream_reads_its_shards_in_one_pass() -> None:
    order = epoch_order(np.full(20, 100), 0, 0, 8, 400)
    for slot in range(8):
        blocks = [
            order.samples[i : i + order.block, slot] for i in range(0, order.steps, order.block)
        ]
        assert len(blocks) > 3
        for block in blocks:  # a block is one range of a shard, or one of each of two shards
            assert np.sum(np.diff(np.sort(block)) != 1) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_eval_ranges_partition_the_validation_split(world_size: int) -> None:
    parts = [eval_range(151, world_size, rank) for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(151))


def test_order_command_prints_the_keys_of_each_rank(convoy_ok: RunText, digits: Path) -> None:
    def keys(world_size: int, rank: int, *more: object) -> list[list[str]]:
        lines = convoy_ok(
            "order",
            digits / "train",
            "--epoch",
            2,
            "--world-size",
            world_size,
            "--rank",
            rank,
            "--batch-size",
            42,
            "--json",
            *more,
        ).splitlines()
        parsed = [json.loads(line) for line in lines]
        first = int(more[1]) if more else 0
        assert [p["step"] for p in parsed] == list(range(first, first + len(parsed)))
        return [p["keys"] for p in parsed]

    alone = keys(1, 0)
    index, _ = open_index(str(digits / "train"))
    assert sorted(k for step in alone for k in step) == sorted(
        k for shard in index.shards for k in shard.keys
    )
    for world_size in (2, 3, 7):
        shared = [keys(world_size, rank) for rank in range(world_size)]
        assert {len(steps) for steps in shared} == {len(alone)}
        for step, everything in enumerate(alone):
            assert sorted(k for rank in shared for k in rank[step]) == sorted(everything)
    assert keys(1, 0, "--start-step", 5, "--limit", 3) == alone[5:8]
    assert keys(1, 0, "--start-step", 0, "--tail", "drop") == [
        step for step in alone if len(step) == 42
    ]


def test_order_command_rejects_invalid_options(convoy_refuses: RunText, digits: Path) -> None:
    base = ("order", digits / "train", "--epoch", 0, "--world-size", 4)
    assert "--batch-size: 42 is not divisible" in convoy_refuses(
        *base, "--rank", 0, "--batch-size", 42
    )
    assert "--rank: 4 must be less than" in convoy_refuses(*base, "--rank", 4, "--batch-size", 40)
    assert "--tail: 'keep' is neither pad nor drop" in convoy_refuses(
        *base, "--rank", 0, "--batch-size", 40, "--tail", "keep"
    )
    assert "contains splits, but is not one; use " in convoy_refuses(
        "order", digits, *base[2:], "--rank", 0, "--batch-size", 40
    )
