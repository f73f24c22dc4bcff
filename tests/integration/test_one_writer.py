"""The run lock: a second run is rejected, and the lock of a killed run is taken over."""

from pathlib import Path

from support.helpers import RunText, ranks_of, started, until

from trainer.locks.run_lock import LOCK_NAME

RECIPE = "digits-resnet8"


def _settings(digits: Path, out: Path, *more: str) -> list[str]:
    given = [
        f"data.train={digits}/train",
        "data.val=null",
        "model.width=4",
        "train.epochs=1000",
        "checkpoint.keep=2",
    ]
    return [
        *given,
        "batch.global_size=60",
        "batch.micro_size=30",
        f"train.output_dir={out}",
        f"name={out.name}",
        *more,
    ]


def test_second_run_is_rejected_and_killed_run_is_resumed_immediately(
    digits: Path,
    convoy_ok: RunText,
    convoy_refuses: RunText,
    service_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """The resumed run has another world size."""
    out, url = tmp_path / "first", tmp_path / "kept"
    settings = _settings(digits, out, f"checkpoint.url={url}")
    with started(RECIPE, settings, service_env, procs=1) as process:
        until(lambda: len(list(url.glob("*/checkpoint.json"))) == 2)
        clearing = _settings(
            digits, tmp_path / "second", f"checkpoint.url={url}", "checkpoint.resume=never"
        )
        (line,) = convoy_refuses("train", RECIPE, "--procs", 2, *clearing).splitlines()
        assert f"{url}: in use by run 'first' (host " in line
        (rank,) = ranks_of(process, 1)
        assert f", pid {rank.pid}, user " in line
        assert "use another checkpoint.url, or wait" in line
        assert not (tmp_path / "second").exists()
        assert process.poll() is None
        assert list(url.glob("*/checkpoint.json"))
        for killed in (process, rank):
            killed.kill()
        process.communicate(timeout=60)
    assert (out / LOCK_NAME).exists()
    output = convoy_ok(
        "train", RECIPE, "--procs", 2, *settings, "train.max_steps=1", env=service_env
    )
    assert "waiting" not in output
    assert f"resuming from {url}/step-" in output
    assert not list(tmp_path.rglob(f"*{LOCK_NAME}*"))
