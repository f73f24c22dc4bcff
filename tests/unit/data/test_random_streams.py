"""Random streams of augmentations, against Philox in plain Python and numbers of version 0.1.0."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest

from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.data.index import open_index
from trainer.data.loader import train_loader
from trainer.data.random_streams import LATEST_VERSION, RandomStreams
from trainer.data.transforms.augmentation import AUGMENTATIONS, ImageAugmentation, register
from trainer.data.transforms.mixup import Mix, Mixup

DATA = Path(__file__).parents[2] / "compatibility/fixture/data/train"
COUNTS = {a.stream: a.num_uniforms for a in AUGMENTATIONS if a.num_uniforms}
SEED, EPOCH, STEP, GLOBAL = 5, 3, 7, 48


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


# --- version 1: the numbers of Convoy 0.1.0 -------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "digest"),
    [
        ("flip", "a0372720e59c5434"),
        ("random_resized_crop", "c856c1a33c6b7732"),
        ("padded_crop", "671c5597fa1b35a7"),
        ("rand_augment", "1f00f35cb704e402"),
        ("trivial_augment", "d9ce0df59f9bdddf"),
        ("random_erasing", "066aa492ac583047"),
    ],
)
def test_version_1_draws_the_samples_numbers_of_0_1_0(stream: str, digest: str) -> None:
    drawn = RandomStreams(1, SEED, EPOCH).uniforms({stream: COUNTS[stream]}, STEP, GLOBAL)
    assert drawn[stream].shape == (GLOBAL, COUNTS[stream])
    assert _digest(drawn[stream]) == digest


def test_version_1_draws_the_mixes_of_0_1_0() -> None:
    streams, mixup = RandomStreams(1, SEED, EPOCH), Mixup(mixup=0.2, cutmix=1.0)
    assert [mixup.draw(streams.generator("mixup", STEP, number), 224) for number in range(3)] == [
        Mix(0.8110052614795918, (137, 224, 26, 135)),
        Mix(0.8068797831632653, (0, 95, 93, 195)),
        Mix(0.39421237244897955, (8, 212, 0, 149)),
    ]


def test_version_1_gives_the_batches_of_0_1_0() -> None:
    digest = hashlib.sha256()
    augment = {"crop": "padded", "padding": 2, "erase": 0.5, "mixup": 0.2, "cutmix": 1.0}
    for batch in _batches(1, augment, accumulation=2):
        digest.update(batch.pixels.tobytes() + repr((batch.keys, batch.mix)).encode())
    assert digest.hexdigest()[:16] == "d5d9e0879ce0dba4"


# --- version 2 ------------------------------------------------------------------------------------


def _philox(key: int, counter: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, section 3.3 and their table 2): four 64-bit words."""
    low = 2**64 - 1
    keys, words = [key & low, key >> 64], [counter >> 64 * i & low for i in range(4)]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            right >> 64 ^ words[1] ^ keys[0],
            right & low,
            left >> 64 ^ words[3] ^ keys[1],
            left & low,
        ]
        keys = [keys[0] + 0x9E3779B97F4A7C15 & low, keys[1] + 0xBB67AE8584CAA73B & low]
    return words


def test_version_2_is_philox_keyed_by_seed_and_name() -> None:
    drawn = RandomStreams(2, SEED, EPOCH).uniforms({"flip": 3}, STEP, GLOBAL)["flip"]
    key = int.from_bytes(hashlib.blake2b(b"5 flip", digest_size=16).digest(), "little")
    start = EPOCH << 192 | STEP << 128
    words = [word for block in range(1, 37) for word in _philox(key, start + block)]
    assert drawn.ravel().tolist() == [(word >> 11) / 2**53 for word in words]

    generator = RandomStreams(2, SEED, EPOCH).generator("flip", STEP, 9)
    assert generator.random() == (_philox(key, start + (9 << 64) + 1)[0] >> 11) / 2**53


@pytest.mark.parametrize("version", range(1, LATEST_VERSION + 1))
def test_another_stream_changes_no_numbers(version: int) -> None:
    streams = RandomStreams(version, SEED, EPOCH)
    alone = streams.uniforms(COUNTS, STEP, GLOBAL)
    for counts in ({"color": 4, **COUNTS}, {**COUNTS, "color": 4}):
        both = streams.uniforms(counts, STEP, GLOBAL)
        assert both.keys() == counts.keys()
        assert all(np.array_equal(both[name], alone[name]) for name in alone)
    for name in alone:
        assert np.array_equal(
            streams.uniforms({name: COUNTS[name]}, STEP, GLOBAL)[name], alone[name]
        )


def test_streams_are_uniform_and_independent() -> None:
    """Of each other, of their neighbors in time, and of those of the next seed."""
    size = 20_000
    columns = [
        RandomStreams(2, seed, epoch).uniforms({name: 1}, step, size)[name][:, 0]
        for name in (*COUNTS, "mixup")
        for seed, epoch, step in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    columns += [
        RandomStreams(2, 0, 0).generator("mixup", 0, number).random(size) for number in (1, 2)
    ]
    assert len(np.unique(columns)) == len(columns) * size
    assert min(kstest(column, "uniform").pvalue for column in columns) > 1e-3
    values = (np.array(columns) - 0.5) * 12**0.5
    same_sample = np.abs(values @ values.T / size)
    next_sample = np.abs(values[:, :-1] @ values[:, 1:].T / size)
    np.fill_diagonal(same_sample, 0.0)
    assert max(same_sample.max(), next_sample.max()) < 5 / size**0.5


# --- batches --------------------------------------------------------------------------------------


def _batches(
    version: int,
    augment: dict,
    world: int = 1,
    rank: int = 0,
    accumulation: int = 1,
    start: int = 0,
) -> Iterator[Batch]:
    config = RunConfig.model_validate(
        {
            "model": {"name": "resnet8"},
            "data": {
                "train": str(DATA),
                "image_size": 16,
                "workers": 0,
                "shuffle_window": 32,
                "seed": SEED,
            },
            "batch": {"global_size": 24},
            "augment": augment,
            "train": {"max_steps": 1},
        }
    )
    index, store = open_index(str(DATA))
    return train_loader(
        config,
        index,
        store,
        EPOCH,
        world,
        rank,
        accumulation,
        start,
        streams_version=version,
    )


@pytest.mark.parametrize("version", range(1, LATEST_VERSION + 1))
@pytest.mark.parametrize(
    "augment",
    [
        {"auto": "rand", "erase": 0.5, "mixup": 0.2, "cutmix": 1.0},
        {"crop": "padded", "auto": "trivial", "erase": 0.5, "mixup": 0.2},
    ],
)
def test_batches_do_not_depend_on_ranks_or_resumption(version: int, augment: dict) -> None:
    whole = list(_batches(version, augment, accumulation=6))
    for world, accumulation, start in ((6, 1, 0), (3, 2, 2), (2, 3, 4)):
        for rank in range(world):
            for i, batch in enumerate(_batches(version, augment, world, rank, accumulation, start)):
                step, part = divmod(i, accumulation)
                want = whole[(start + step) * 6 + part * world + rank]
                assert np.array_equal(batch.pixels, want.pixels)
                assert (batch.keys, batch.mix) == (want.keys, want.mix)
            assert i == (5 - start) * accumulation - 1


def test_enabling_an_augmentation_changes_no_other() -> None:
    """Mixup and erasing as an example: images that are not erased stay as they were."""
    plain = list(islice(_batches(2, {"auto": "rand"}), 3))
    more = list(islice(_batches(2, {"auto": "rand", "erase": 0.5, "mixup": 0.2}), 3))
    for before, after in zip(plain, more, strict=True):
        same = [np.array_equal(*pair) for pair in zip(before.pixels, after.pixels, strict=True)]
        assert 4 < sum(same) < 20
        filled = (after.pixels != before.pixels).any(-1)
        assert (after.pixels[filled] == np.array([124, 116, 104])).all()


def test_two_augmentations_cannot_share_a_stream() -> None:
    before = list(AUGMENTATIONS)
    with pytest.raises(ValueError, match="two augmentations with the stream 'random_erasing'"):

        @register
        class Another(ImageAugmentation):
            stream = "random_erasing"

    assert before == AUGMENTATIONS
