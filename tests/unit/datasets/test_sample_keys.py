"""Sample keys: unique, readable, safe in a tar and in webdataset, computed in linear time."""

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.datasets.sources.keys import has_equal_keys, sample_keys
from trainer.data.shards.tar import header, split_name

names = st.lists(
    st.tuples(
        st.sampled_from(["cat", "Cat", "猫", "狗", "-c", "a.b", "x" * 60]),
        st.text(min_size=1, max_size=8),
    )
)


def keys_of(pairs: list[tuple[str, str]]) -> list[str]:
    classes = sorted({folder for folder, _ in pairs})
    return sample_keys(pairs, [classes.index(folder) for folder, _ in pairs])


@settings(max_examples=40, deadline=None)
@given(names)
def test_keys_are_unique_and_safe(pairs: list[tuple[str, str]]) -> None:
    keys = keys_of(pairs)
    assert len(set(keys)) == len(pairs)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_+-]+/[A-Za-z0-9_+-]+", key)
        assert not key.startswith("-")
        assert "/-" not in key
        assert header(f"{key}.webp", 1)[:100].rstrip(b"\0").decode() == f"{key}.webp"
        assert split_name(f"{key}.cls") == (key, "cls")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.from_regex(r"[A-Za-z0-9_]{1,40}", fullmatch=True), unique=True))
def test_plain_names_are_unchanged(stems: list[str]) -> None:
    assert keys_of([("cat", stem) for stem in stems]) == [f"cat/{stem}" for stem in stems]
    assert not has_equal_keys(stems)


def test_equal_names_are_numbered_around_existing_names() -> None:
    pairs = [("c", "a"), ("c", "a"), ("c", "a-2"), ("c", "a"), ("d", "a"), ("c", "a-2")]
    assert keys_of(pairs) == ["c/a", "c/a-3", "c/a-2", "c/a-4", "d/a", "c/a-2-2"]


def test_long_and_non_latin_names_stay_recognizable() -> None:
    long = [
        ("portal", f"screenshot_of_the_customer_portal_2024_production_{i:07d}") for i in range(3)
    ]
    assert [key[-7:] for key in keys_of(long)] == ["0000000", "0000001", "0000002"]
    assert keys_of(
        [("café", "Größe_1"), ("猫", "屏幕截图_17"), ("狗", "屏幕截图_17"), ("猫", "屏")]
    ) == [
        "cafe/Gro_e_1",
        "class-2/__17",
        "class-1/__17",
        "class-2/_",
    ]


def test_numbering_equal_keys_takes_linear_time() -> None:
    def seconds(pairs: list[tuple[str, str]]) -> float:
        started = time.process_time()
        assert len(set(keys_of(pairs))) == len(pairs)
        return time.process_time() - started

    distinct = min(seconds([("c", f"{i:07d}") for i in range(20_000)]) for _ in range(2))
    for pairs in (
        [("c", "猫" * 60)] * 20_000,
        [("c", "x" * 30 + f"{i:07d}" + "y" * 30) for i in range(20_000)],
        [("c", "a")] * 10_000 + [("c", f"a-{i}") for i in range(2, 10_002)],
        [("c", f"a-{i % 20}") for i in range(20_000)],
    ):
        assert seconds(pairs) < 20 * distinct + 0.5  # quadratic time would be minutes
