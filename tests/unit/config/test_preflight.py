"""Checks before training, and full disks during training: one line of stderr, no leftover files."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.helpers import RunText

from trainer.config.preflight import check_model, check_run
from trainer.config.run_plan import RunPlan, build_run_plan, check_config
from trainer.config.schema import load_config
from trainer.data.index import Index, open_index
from trainer.data.storage.store import open_store
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.errors import EXIT_USER, UserError, report
from trainer.faults.disk_space import AppendLog, write_file
from trainer.models.registry import build_model
from trainer.training.batch_plan import plan_batches
from trainer.training.checkpoint import Checkpoint, CheckpointManager

ENDLESS = "train.epochs=2147483647"


def _plan(digits: Path, out: Path, *overrides: str, ranks: int = 1) -> RunPlan:
    locations = [f"data.train={digits}/train", f"data.val={digits}/val", f"train.output_dir={out}"]
    return build_run_plan(
        "digits-resnet8", [*locations, "schedule.warmup_epochs=0", *overrides], ranks, False
    )


def _rejection(digits: Path, out: Path, *overrides: str, ranks: int = 1) -> str:
    with pytest.raises(UserError) as error:
        check_run(_plan(digits, out, *overrides, ranks=ranks), ranks)
    assert not out.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet8", 4), ("resnet8", 5), ("resnet18", 17), ("googlenet", 15), ("vgg11_bn", 32)],
)
def test_batch_norm_of_one_value_is_rejected_exactly_if_torch_rejects_it(
    digits: Path, tmp_path: Path, name: str, side: int
) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, side, width=2).train()
    settings = [
        f"model.name={name}",
        "model.width=2",
        f"data.image_size={side}",
        "batch.micro_size=1",
    ]
    torch_error = ""
    try:
        model(torch.randn(1, 3, side, side))
    except ValueError as error:
        torch_error = str(error)
    if torch_error:
        assert torch_error.startswith("Expected more than 1 value per channel")
        assert f"1 sample at data.image_size {side}" in _rejection(
            digits, tmp_path / "out", *settings
        )
    else:
        check_model(_plan(digits, tmp_path / "out", *settings))


def test_batch_norm_check_counts_ranks_only_if_synchronized(digits: Path, tmp_path: Path) -> None:
    settings = ["data.image_size=4", "batch.micro_size=1"]
    assert "one value per channel" in _rejection(digits, tmp_path / "out", *settings, ranks=2)
    check_model(_plan(digits, tmp_path, *settings, "train.sync_batch_norm=true", ranks=2))
    stages = ["train.sync_batch_norm=true", "parallel.pipeline_stages=2"]  # one data-parallel rank
    assert "one value" in _rejection(digits, tmp_path / "out", *settings, *stages, ranks=2)


def test_smallest_size_of_growing_images_is_checked(digits: Path, tmp_path: Path) -> None:
    growing = ["data.image_size=8", "data.grow_until=2", "data.size_step=1", "augment.padding=0"]
    rejection = _rejection(digits, tmp_path / "out", *growing, "data.initial_size=2")
    assert "data.initial_size: 2 is too small for resnet8" in rejection
    rejection = _rejection(
        digits, tmp_path / "out", *growing, "data.initial_size=4", "batch.micro_size=1"
    )
    assert "data.initial_size 4" in rejection


@pytest.mark.parametrize(
    "settings",
    [
        ["model.name=vgg16", "model.width=65536", "data.image_size=32"],
        [
            "model.width=8192",
            "model.num_classes=16777216",
            "model.name=resnet50",
            "data.image_size=32",
        ],
        ["data.image_size=16384", "batch.global_size=512", "batch.micro_size=512"],
        ["data.image_size=16384", "batch.eval_size=2147483647"],
    ],
)
def test_run_that_exceeds_memory_is_rejected(
    digits: Path, tmp_path: Path, settings: list[str]
) -> None:
    assert "memory: the run needs at least" in _rejection(digits, tmp_path / "out", *settings)


@pytest.mark.parametrize("key", ["train.output_dir", "checkpoint.url", "data.cache_dir"])
@pytest.mark.parametrize(
    "output", ["/proc/convoy/x", "file/x", "file", "x" * 300, "dangling/x"], ids=range(5)
)
def test_unwritable_output_is_rejected_with_its_key(
    digits: Path, tmp_path: Path, key: str, output: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("/proc/nowhere")
    folder = tmp_path / output
    rejection = _rejection(digits, tmp_path / "out", f"{key}={folder}")
    assert rejection.startswith(f"{key}: {folder} cannot be written: ")
    assert len(rejection.splitlines()) == 1


def test_all_unwritable_outputs_are_reported_together(digits: Path, tmp_path: Path) -> None:
    rejection = _rejection(
        digits, tmp_path / "out", "checkpoint.url=/proc/a", "data.cache_dir=/proc/b"
    )
    assert [line.partition(":")[0] for line in rejection.splitlines()] == [
        "checkpoint.url",
        "data.cache_dir",
    ]


def test_folder_with_the_name_of_an_output_file_is_rejected(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(UserError, match=r"result\.json is a folder"):
        check_run(_plan(digits, tmp_path), 1)


def test_preflight_checks_leave_no_files(digits: Path, tmp_path: Path) -> None:
    check_run(_plan(digits, tmp_path / "a" / "b", f"data.cache_dir={tmp_path}/c"), 1)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_larger_than_free_space_are_rejected_with_both_sizes(
    digits: Path, tmp_path: Path
) -> None:
    rejection = _rejection(digits, tmp_path / "out", ENDLESS, "checkpoint.keep=2147483647")
    assert "MiB needed" in rejection
    assert "MiB free" in rejection
    assert "checkpoint.keep=2147483647" in rejection
    rejection = _rejection(
        digits, tmp_path / "out", ENDLESS, "data.log_keys=true", "batch.global_size=512"
    )
    assert "for data.log_keys" in rejection


def test_estimated_checkpoint_space_matches_the_optimizer_state(
    digits: Path, tmp_path: Path
) -> None:
    """Compare with the number of state tensors of each optimizer."""
    from trainer.config.preflight import _checkpoint_bytes, _most_checkpoints

    for setting, tensors in (
        (["optimizer.name=sgd"], 2),
        (["optimizer.momentum=0", "optimizer.nesterov=false"], 2),  # a buffer of zeros
        (["optimizer.name=adamw"], 3),
        (["optimizer.name=lamb", "ema=0.9"], 4),
    ):
        run = _plan(digits, tmp_path, *setting)
        size = check_model(run)
        least = tensors * size.parameters
        assert least <= _checkpoint_bytes(run, size) <= least * 1.05 + 65536
    assert _most_checkpoints(_plan(digits, tmp_path, "train.epochs=2")) == 2
    assert _most_checkpoints(_plan(digits, tmp_path, "train.epochs=90", "checkpoint.keep=1")) == 3
    without = ["train.epochs=90", "checkpoint.keep=1", "data.val=null"]
    assert _most_checkpoints(_plan(digits, tmp_path, *without)) == 2


def test_existing_checkpoints_reduce_the_needed_space(digits: Path, tmp_path: Path) -> None:
    from trainer.config.preflight import _needs

    run = _plan(digits, tmp_path, "train.epochs=2")
    size = check_model(run)
    before = {need.key: need.bytes for need in _needs(run, size, 1)}
    write_file(tmp_path / "checkpoints/step-000000010/model.safetensors", bytes(500_000))
    after = {need.key: need.bytes for need in _needs(run, size, 1)}
    assert before["checkpoint.url"] - after["checkpoint.url"] == 500_000


@pytest.mark.parametrize(
    "setting",
    ["train.output_dir={}/train/x", "checkpoint.url=file://{}/val", "data.cache_dir={}/train"],
)
def test_outputs_inside_the_data_are_rejected(digits: Path, tmp_path: Path, setting: str) -> None:
    with pytest.raises(UserError, match="must not change"):
        _plan(digits, tmp_path, setting.format(digits))
    remote = ["data.train=s3://b/d/train", "data.val=s3://b/d/val", "checkpoint.url=s3://b/d/val/c"]
    with pytest.raises(UserError, match=r"is inside data\.val"):
        check_config(load_config("digits-resnet8", remote))
    sibling = [*remote[:2], "checkpoint.url=s3://b/d/validation"]
    check_config(load_config("digits-resnet8", sibling))


def test_other_spellings_of_an_output_inside_the_data_are_rejected(
    digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(digits)
    settings = (
        "train.output_dir={}/link/train/x",
        "checkpoint.url=FILE://{}/link/val",
        "checkpoint.url={}/x/../link/train",
    )
    for setting in settings:
        with pytest.raises(UserError, match="must not change"):
            _plan(digits, tmp_path, setting.format(tmp_path))
    for train, checkpoint in (
        ("S3://b/d", "s3://b/d/c"),
        ("s3://b/d/", "S3://b/d"),
        ("s3://b", "s3://b/c"),
    ):
        with pytest.raises(UserError, match=r"is inside data\.train"):
            check_config(
                load_config(
                    "digits-resnet8",
                    [f"data.train={train}", "data.val=s3://v/d", f"checkpoint.url={checkpoint}"],
                )
            )


def _split(folder: Path, source: Index, classes: list[str], ids: list[str]) -> str:
    """Write the index of a split with other class names; return its folder."""
    write_file(folder / "index.json", Index.of("val", classes, ids, source.shards).to_json())
    return str(folder)


def test_splits_with_different_class_names_are_rejected(digits: Path, tmp_path: Path) -> None:
    index, _ = open_index(f"{digits}/val")
    numbers = [str(number) for number in range(10)]
    names = [f"digit {number}" for number in numbers]
    train = _split(tmp_path / "train", index, names, numbers)
    swapped = _split(tmp_path / "swapped", index, [*names[:8], names[9], names[8]], numbers)
    unnamed = _split(tmp_path / "unnamed", index, numbers, numbers)
    settings = ["batch.global_size=64", f"data.train={train}"]
    with pytest.raises(UserError, match=r"class '8' is named 'digit 9' in .* and 'digit 8' in"):
        _plan(digits, tmp_path, *settings, f"data.val={swapped}")
    _plan(digits, tmp_path, *settings, f"data.val={unnamed}")
    one = Index.of("train", ["only"], ["only"], index.shards)
    write_file(tmp_path / "one/index.json", one.to_json())
    with pytest.raises(UserError, match="needs 2 classes or more"):
        _plan(digits, tmp_path, f"data.train={tmp_path}/one", "data.val=null")


def test_split_without_samples_is_rejected(digits: Path, tmp_path: Path) -> None:
    names = [str(number) for number in range(10)]
    write_file(tmp_path / "empty/index.json", Index.of("val", names, names, []).to_json())
    for key in ("data.val", "data.train"):
        with pytest.raises(UserError, match=r"empty/index\.json: holds no samples"):
            _plan(digits, tmp_path, f"{key}={tmp_path}/empty")


def test_validation_on_the_training_data_is_reported(digits: Path, tmp_path: Path) -> None:
    run = _plan(digits, tmp_path, f"data.val={digits}/train")
    assert any("does not measure generalization" in line for line in check_run(run, 1))


def test_huge_batch_sizes_are_factored_quickly() -> None:
    with pytest.raises(UserError, match="nearest valid sizes: 1 or 2147483647"):
        plan_batches(2**31 - 1, 3, 1, 2**62)


@pytest.fixture
def small_files() -> Iterator[int]:
    """Limit the file size, in bytes: a disk error that needs no privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield 100_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_error_of_a_store_is_not_retried(tmp_path: Path, small_files: int) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(
        UserError, match=r"a/b cannot be written: the file is larger than the limit"
    ):
        store.write("a/b", bytes(2 * small_files))
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    assert store.counts.retries == 0


def test_failed_checkpoint_is_counted_and_removed(
    tmp_path: Path, small_files: int, capsys: pytest.CaptureFixture
) -> None:
    checkpoints = CheckpointManager(str(tmp_path), 3)
    for step, numbers in ((1, 10), (2, small_files), (3, small_files)):
        state = TrainingState({"weight": torch.zeros(numbers)}, {}, step, 1, None)
        checkpoints.save(Checkpoint(state, {}, {}, None))
    checkpoints.wait()
    assert (checkpoints.failures, checkpoints.failures_in_a_row) == (2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert "the checkpoint of step 2 could not be written" in (printed := capsys.readouterr().err)
    assert "0.4 MiB needed" in printed
    checkpoints.save(Checkpoint(TrainingState({}, {}, 4, 1, None), {}, {}, None))
    checkpoints.wait()
    assert (checkpoints.failures, checkpoints.failures_in_a_row) == (2, 0)


def test_file_is_written_atomically(tmp_path: Path, small_files: int) -> None:
    write_file(tmp_path / "sub/file", "before")
    with pytest.raises(UserError, match=r"sub/file cannot be written"):
        write_file(tmp_path / "sub/file", bytes(2 * small_files))
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["file"]
    assert (tmp_path / "sub/file").read_text() == "before"


def test_log_keeps_lines_in_memory_while_the_disk_is_full(
    tmp_path: Path, small_files: int, capsys: pytest.CaptureFixture
) -> None:
    log = AppendLog(tmp_path / "log")
    lines = [f"{number:0999d}" for number in range(120)]
    for line in lines:
        log.write(line)
    assert capsys.readouterr().err.count("its lines are kept in memory") == 1
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10 * small_files, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )
    assert log.close() == 0
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_log_reports_the_number_of_lost_lines(capsys: pytest.CaptureFixture) -> None:
    log = AppendLog(Path("/dev/full"))
    for _ in range(3):
        log.write("line")
    assert log.close() == 3
    assert "/dev/full cannot be written: No space left on device" in capsys.readouterr().err


def test_disk_errors_are_reported_as_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(NotADirectoryError) as inside_a_file:
        Path("/proc/version/x").read_bytes()
    with pytest.raises(OSError, match="No space") as full:
        Path("/dev/full").write_bytes(b"x")
    for error in (inside_a_file, full):
        assert report(error.value, "convoy") == EXIT_USER
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_run_without_space_for_its_result_ends_with_one_error_line(
    digits: Path, tmp_path: Path
) -> None:
    """Checkpoints and weights are larger than a file may be; the other files are not."""
    locations = [f"data.train={digits}/train", "data.val=null", f"train.output_dir={tmp_path}/out"]
    settings = [
        "train.epochs=2",
        "schedule.warmup_epochs=0",
        "batch.global_size=300",
        "batch.micro_size=300",
    ]
    command = [sys.executable, "-m", "trainer", "digits-resnet8", *locations, *settings]
    done = subprocess.run(
        ["prlimit", "--fsize=100000", *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == EXIT_USER, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("training continues: ") == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"convoy: {tmp_path}/out/model.safetensors cannot be written"
    )
    (file,) = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    progress = json.loads(file.read_text())
    assert (file.name, progress["exit_code"]) == ("progress.json", EXIT_USER)


def test_unwritable_output_is_reported_once_for_all_ranks(
    convoy_refuses: RunText, digits: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        "train.output_dir=/proc/convoy",
    ]
    lines = convoy_refuses("train", "digits-resnet8", *settings, "--procs", 2).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("convoy: train.output_dir: /proc/convoy cannot be written: ")
