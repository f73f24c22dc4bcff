"""User errors through the real commands: one line on stderr, exit code 2, no partial output."""

import shutil
import socket
from pathlib import Path

import pytest
from support.helpers import Run, RunText

RECIPE = "digits-resnet8"


@pytest.fixture
def train(digits: Path, tmp_path: Path) -> list[object]:
    """A valid training command."""
    return [
        "train",
        RECIPE,
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        f"train.output_dir={tmp_path}/out",
    ]


def _one_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.momentun=0.9",
            "optimizer.momentun: unknown key; did you mean optimizer.momentum?",
        ),
        (
            "batch.global_size=many",
            "batch.global_size: 'many' is invalid: input should be a valid integer",
        ),
        ("batch.global_size=63", "batch.micro_size: 16 does not divide the 63 samples per rank"),
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
def test_invalid_override_is_one_line_and_writes_nothing(
    convoy_refuses: RunText, train: list[object], tmp_path: Path, override: str, message: str
) -> None:
    assert message in _one_line(convoy_refuses(*train, override))
    assert not (tmp_path / "out").exists()


def test_all_errors_of_a_recipe_are_reported(convoy_refuses: RunText, train: list[object]) -> None:
    stderr = convoy_refuses(
        *train, "optimizer.momentun=0.9", "batch.global_size=many", "train.epoch=3"
    )
    assert len(stderr.strip().splitlines()) == 3
    assert "did you mean train.epochs?" in stderr


def test_compile_without_a_compiler_is_rejected(
    convoy_refuses: RunText, train: list[object]
) -> None:
    line = _one_line(convoy_refuses(*train, "train.compile=true", env={"CXX": "g++-none"}))
    assert "train.compile: needs a C++ compiler, but g++-none was not found" in line


def test_invalid_number_of_ranks_is_rejected_with_valid_batch_sizes(
    convoy_refuses: RunText, train: list[object]
) -> None:
    assert (
        "batch.global_size: 64 is not divisible by 3 ranks; nearest valid sizes: 63 or 66"
        in _one_line(convoy_refuses(*train, "--procs", 3))
    )
    assert "601 ranks are more than the 600 samples" in _one_line(
        convoy_refuses(*train, "--procs", 601)
    )


def test_data_without_an_index_is_rejected(
    convoy_refuses: RunText, train: list[object], digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no index.json found" in _one_line(
        convoy_refuses(*train, f"data.train={tmp_path}/empty")
    )
    assert f"contains splits, but is not one; use {digits}/train or {digits}/val" in _one_line(
        convoy_refuses(*train, f"data.train={digits}")
    )
    assert "there is no such folder" in _one_line(
        convoy_refuses(*train, f"data.train={tmp_path}/nowhere")
    )


@pytest.mark.parametrize("procs", [1, 2])
def test_missing_and_resized_shards_are_named(
    convoy_refuses: RunText, train: list[object], digits: Path, tmp_path: Path, procs: int
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits / "train", copy)
    (copy / "train-000001.tar").unlink()
    with (copy / "train-000002.tar").open("ab") as file:
        file.write(b"more")
    stderr = convoy_refuses(*train, f"data.train={copy}", "--procs", procs)
    assert len(stderr.strip().splitlines()) == 2
    assert "train-000001.tar: is in the index but missing" in stderr
    assert "train-000002.tar: has" in stderr


def test_unreachable_object_store_is_one_line_with_its_address(
    convoy_refuses: RunText, train: list[object]
) -> None:
    with socket.socket() as bound:  # bound but not listening: every connection is refused
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        env = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        for command in (["verify", "s3://convoy/x"], [*train, "data.train=s3://convoy/x"]):
            line = _one_line(convoy_refuses(*command, env=env))
            assert "cannot be reached" in line
            assert address in line


def test_forbidden_or_missing_bucket_is_rejected(
    convoy_refuses: RunText, train: list[object], jpeg_folder: Path, service_env: dict[str, str]
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


def test_usage_errors_name_the_option_or_command(convoy: Run, convoy_refuses: RunText) -> None:
    assert "No such option: --prcs" in convoy_refuses("train", RECIPE, "--prcs", 2)
    assert "No such command 'trian'" in convoy_refuses("trian")
    assert convoy("--help").returncode == 0


def test_missing_models_and_spools_are_named(
    convoy_refuses: RunText, digits: Path, service_env: dict[str, str], tmp_path: Path
) -> None:
    line = _one_line(
        convoy_refuses("evaluate", "models:/nobody@champion", digits / "val", env=service_env)
    )
    assert "models:/nobody@champion: cannot be loaded" in line
    assert "nobody" in _one_line(convoy_refuses("promote", "nobody", "1", env=service_env))
    assert "must name the MLflow server" in _one_line(convoy_refuses("promote", "nobody", "1"))
    assert (
        "no such file"
        in _one_line(convoy_refuses("sync", tmp_path / "none.jsonl", env=service_env)).lower()
    )
