"""The user's mistakes, through the real commands: one clear line, exit code 2, nothing
half-written.
"""

import shutil
import socket
from pathlib import Path

import pytest
from support.helpers import Run

RECIPE = "digits-resnet8"


@pytest.fixture
def train(digits: Path, tmp_path: Path) -> list[object]:
    """A training command that would work."""
    return [
        "train",
        RECIPE,
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        f"train.output_dir={tmp_path}/out",
    ]


def _one_line(told: str) -> str:
    lines = told.strip().splitlines()
    assert len(lines) == 1, told
    return lines[0]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "optimizer.momentun=0.9",
            "optimizer.momentun: unknown key; did you mean optimizer.momentum?",
        ),
        (
            "batch.global_size=many",
            "batch.global_size: 'many' is wrong: input should be a valid integer",
        ),
        ("batch.global_size=63", "batch.micro_size: 16 does not divide the 63 samples of a rank"),
        ("batch.global_size=1200", "batch.global_size: 1200 is more than the 600 samples"),
        ("model.name=resnet9", "model.name: there is no model 'resnet9'; nearest: resnet"),
        (
            "data.image_size=2",
            "data.image_size: 2 is too small for resnet8, which needs at least 3 pixels",
        ),
        ("model.num_classes=3", "model.num_classes: 3 is less than the 10 classes"),
        (
            "schedule.warmup_epochs=99",
            "schedule.warmup_epochs: 99.0 epochs are 990 steps, but the run has 100; use less "
            "than 10",
        ),
        ("tracking.register_as=name", "tracking.register_as: needs a server"),
    ],
)
def test_a_wrong_recipe(
    convoy_refuses: Run, train: list[object], tmp_path: Path, override: str, told: str
) -> None:
    assert told in _one_line(convoy_refuses(*train, override))
    assert not (tmp_path / "out").exists()


def test_several_faults_are_all_told(convoy_refuses: Run, train: list[object]) -> None:
    told = convoy_refuses(
        *train, "optimizer.momentun=0.9", "batch.global_size=many", "train.epoch=3"
    )
    assert len(told.strip().splitlines()) == 3
    assert "did you mean train.epochs?" in told


def test_layers_are_not_compiled_without_a_compiler(
    convoy_refuses: Run, train: list[object]
) -> None:
    told = _one_line(convoy_refuses(*train, "train.compile=true", env={"CXX": "g++-none"}))
    assert "train.compile: needs a C++ compiler, but there is no g++-none here" in told


def test_ranks_that_do_not_fit(convoy_refuses: Run, train: list[object]) -> None:
    assert (
        "batch.global_size: 64 does not divide by 3 ranks; nearest that do: 63 or 66"
        in _one_line(convoy_refuses(*train, "--procs", 3))
    )
    assert "601 ranks are more than the 600 samples" in _one_line(
        convoy_refuses(*train, "--procs", 601)
    )


def test_a_prefix_without_an_index(
    convoy_refuses: Run, train: list[object], digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no index.json is there" in _one_line(
        convoy_refuses(*train, f"data.train={tmp_path}/empty")
    )
    assert f"contains splits, but is not one; use {digits}/train or {digits}/val" in _one_line(
        convoy_refuses(*train, f"data.train={digits}")
    )
    assert "there is no such folder" in _one_line(
        convoy_refuses(*train, f"data.train={tmp_path}/nowhere")
    )


@pytest.mark.parametrize("procs", [1, 2])
def test_shards_that_are_missing_or_of_another_size(
    convoy_refuses: Run, train: list[object], digits: Path, tmp_path: Path, procs: int
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits / "train", copy)
    (copy / "train-000001.tar").unlink()
    with (copy / "train-000002.tar").open("ab") as file:
        file.write(b"more")
    told = convoy_refuses(*train, f"data.train={copy}", "--procs", procs)
    assert len(told.strip().splitlines()) == 2
    assert "train-000001.tar: is in the index but missing" in told
    assert "train-000002.tar: has" in told


def test_an_object_store_that_is_not_there(convoy_refuses: Run, train: list[object]) -> None:
    with socket.socket() as taken:  # bound but not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        env = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        for command in (["verify", "s3://convoy/x"], [*train, "data.train=s3://convoy/x"]):
            told = _one_line(convoy_refuses(*command, env=env))
            assert "cannot be reached" in told
            assert address in told


def test_a_bucket_that_is_forbidden_or_not_there(
    convoy_refuses: Run, train: list[object], jpeg_folder: Path, service_env: dict[str, str]
) -> None:
    wrong = service_env | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    for command in (
        ["verify", "s3://convoy/x"],
        ["pack", jpeg_folder, "s3://convoy/x"],
        [*train, "data.train=s3://convoy/x"],
    ):
        assert "permission denied; check the credentials" in _one_line(
            convoy_refuses(*command, env=wrong)
        )
    for url in ("s3://no-such-bucket/x", "ftp://convoy/x"):
        assert url in _one_line(convoy_refuses("verify", url, env=service_env))


def test_usage(convoy: Run, convoy_refuses: Run) -> None:
    assert "No such option: --prcs" in convoy_refuses("train", RECIPE, "--prcs", 2)
    assert "No such command 'trian'" in convoy_refuses("trian")
    assert convoy("--help").returncode == 0


def test_models_that_cannot_be_loaded(
    convoy_refuses: Run, digits: Path, service_env: dict[str, str], tmp_path: Path
) -> None:
    told = _one_line(
        convoy_refuses("evaluate", "models:/nobody@champion", digits / "val", env=service_env)
    )
    assert "models:/nobody@champion: cannot be loaded" in told
    assert "nobody" in _one_line(convoy_refuses("promote", "nobody", "1", env=service_env))
    assert "must name the MLflow server" in _one_line(convoy_refuses("promote", "nobody", "1"))
    assert (
        "no such file"
        in _one_line(convoy_refuses("sync", tmp_path / "none.jsonl", env=service_env)).lower()
    )
