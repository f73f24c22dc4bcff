"""Fixtures shared by all tests: the real command, real services and small sets of real images."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from support.helpers import Run, RunText, run_convoy

from pipelines.local import servers

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


# Only `make test-gpu` uses GPUs, so that all other tests behave the same with and without them.
if "CONVOY_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell that runs the tests in the background makes them, and all their child processes, ignore
# these signals.
for _number, _action in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _action)

# The same examples in every run, so that a failure is caused by the change under test;
# CONVOY_EXPLORE=1 generates new ones.
settings.register_profile("convoy", derandomize="CONVOY_EXPLORE" not in os.environ)
settings.load_profile("convoy")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Restore the environment after each test.

    For example, `mlflow.set_tracking_uri` sets a variable that every process started by a later
    test would inherit.
    """
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def convoy() -> Run:
    return run_convoy


@pytest.fixture
def convoy_ok() -> RunText:
    """Run a command that must succeed; returns stdout."""

    def run(*arguments: object, **options: object) -> str:
        done = run_convoy(*arguments, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def convoy_refuses() -> RunText:
    """Run a command that must end with exit code 2 and no traceback; returns stderr."""

    def run(*arguments: object, **options: object) -> str:
        done = run_convoy(*arguments, **options)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.strip(), "no error message"
        return done.stderr

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that share an expensive fixture in one worker, which creates it once.

    The tests of the services are divided into two groups, to balance the workers. With
    CONVOY_SHUFFLE=SEED all tests run in random order, to find tests that depend on others.
    """
    if seed := os.environ.get("CONVOY_SHUFFLE"):
        random.Random(seed).shuffle(items)
    for item in items:
        for fixture in ("services", "trainings"):
            if fixture in getattr(item, "fixturenames", ()):
                suffix = " of tracking" if item.path.parent.name == "tracking" else ""
                item.add_marker(pytest.mark.xdist_group(fixture + suffix))


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Services]:
    """A real S3 server and a real MLflow server."""
    folder = tmp_path_factory.mktemp("services")
    try:
        yield servers.up(folder)
    finally:
        servers.down(folder, grace_seconds=0)  # their data is not needed any more


@pytest.fixture
def client(services: servers.Services) -> "MlflowClient":
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=services.mlflow_url)


@pytest.fixture(scope="session")
def service_env(services: servers.Services) -> dict[str, str]:
    return services.environment()


@pytest.fixture(scope="session")
def bucket(services: servers.Services) -> str:
    return f"s3://{servers.BUCKET}"


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 handwritten digits for training and 151 for validation, as PNG class folders."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for number in range(751):
        split = "train" if number < 600 else "val"
        path = root / split / str(digits.target[number]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * (255 / 16)).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def digits(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, packed to 5 shards per split on disk."""
    packed = tmp_path_factory.mktemp("packed")
    done = run_convoy("pack", digits_folder, packed, "--shards", 5)
    assert done.returncode == 0, done.stderr
    return packed


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """The two photographs that scikit-learn includes, 640 x 427."""
    return [Image.fromarray(array) for array in load_sample_images().images]


@pytest.fixture(scope="session")
def jpeg_folder(photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 crops of the photographs as JPEGs in two class folders."""
    root = tmp_path_factory.mktemp("jpegs")
    for number in range(40):
        image = photographs[number % 2]
        path = root / ("china", "flower")[number % 2] / f"{number:03d}.JPEG"
        path.parent.mkdir(exist_ok=True)
        image.crop((number * 4, number, number * 4 + 160 + number, number + 120)).save(
            path, quality=92
        )
    return root
