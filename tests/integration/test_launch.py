"""A local run on a hostile machine, and runs that are ended at every moment and in every way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from mlflow.tracking import MlflowClient
from support.helpers import run_convoy, until

from trainer.config.schema import find_recipe
from trainer.errors import Preempted
from trainer.process.supervisor import python_command
from trainer.tracking.run_status import end_unfinished_run
from trainer.tracking.spool.spool import SpoolWriter, new_run_key
from trainer.tracking.spool.spool_reader import SpoolReader
from trainer.training.evaluator import evaluate

RECIPE = "digits-resnet8"


def _settings(digits: Path, out: Path, *more: str) -> list[str]:
    given = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        "model.width=4",
        "train.log_every_steps=1",
    ]
    return [
        *given,
        f"train.output_dir={out}",
        "schedule.warmup_epochs=0",
        f"name={out.name}",
        *more,
    ]


def _start(
    arguments: list[object], environment: dict[str, str], **options: object
) -> subprocess.Popen:
    plain = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*python_command("pipelines.cli.main"), "train", RECIPE, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_local_run_depends_on_nothing_in_its_directory_and_environment(
    digits: Path, tmp_path: Path
) -> None:
    """Two ranks, so that they must meet: modules that shadow, leftovers of launchers, a host
    without a name, a reader that goes.
    """
    place = tmp_path / "ein Verzeichnis mit Umläuten"
    place.mkdir()
    for name in (
        "trainer",
        "pipelines",
        "random",
        "torch",
        "yaml",
        "numpy",
        "deepspeed",
        "obstore",
        "typing",
        "signal",
    ):
        (place / f"{name}.py").write_text(
            f"raise SystemExit('{name}.py of the working directory was executed')\n"
        )
    (place / "mlflow").mkdir()
    (place / "mlflow/__init__.py").write_text(
        "raise SystemExit('mlflow of the working directory was executed')\n"
    )
    hostile = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "old", "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "4",
        "SLURM_NTASKS": "4", "GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7", "TORCH_DISTRIBUTED_DEBUG": "nonsense",
        "DS_ACCELERATOR": "nonsense", "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONPATH": f"{place}{os.pathsep}.",
        "HOME": "/nonexistent", "TMPDIR": "/nonexistent", "LC_ALL": "C", "OMP_NUM_THREADS": "nonsense",
        "http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "127.0.0.1:9",
    }  # fmt: skip
    (place / "my recipe.yaml").write_text(find_recipe(RECIPE).read_text())
    arguments = [
        "--procs",
        "2",
        *_settings(digits, Path("aus gabe"), "name=hostile", "train.max_steps=2"),
    ]
    command = [*python_command("pipelines.cli.main"), "train", "my recipe.yaml", *arguments]
    isolate = ["unshare", "--uts", "sh", "-c", 'hostname node17.corp.invalid && exec "$@"', "sh"]
    if (
        subprocess.run([*isolate[:2], "true"], capture_output=True, check=False).returncode == 0
    ):  # needs root
        command = [*isolate, *command]
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""} | hostile
    with subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        first = process.stdout.readline()
        assert first.startswith("ignored, of another launcher: RANK, LOCAL_RANK, WORLD_SIZE"), (
            process.stderr.read()
        )
        process.stdout.close()  # as `convoy train | head -1` does
        told = process.stderr.read()
        assert (process.wait(timeout=240), told) == (0, "")
    assert json.loads((place / "aus gabe/result.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGHUP, 129, "KILLED"), (signal.SIGKILL, 144, "FAILED")]
)
def test_a_run_that_is_ended_has_its_status_in_mlflow_and_no_process_left(
    number: int,
    code: int,
    status: str,
    digits: Path,
    service_env: dict[str, str],
    client: MlflowClient,
    tmp_path: Path,
) -> None:
    """A signal to the launcher; SIGKILL, as the kernel sends it when memory runs out, to the only
    rank.
    """
    out = tmp_path / "out"
    more = [
        "train.epochs=10000",
        "checkpoint.every_steps=10",
        "checkpoint.keep=1",
        f"tracking.experiment={tmp_path.name}",
    ]
    with _start([*_settings(digits, out, *more)], service_env, start_new_session=True) as process:
        until(lambda: any((out / "checkpoints").glob("*/checkpoint.json")))
        family = _family(process)
        if number == signal.SIGKILL:
            family[0].kill()
        else:
            process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert "Traceback" not in said
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    assert run.info.status == status
    if number == signal.SIGKILL:
        assert (
            "convoy: rank 0 was killed by SIGKILL; the kernel does that when memory runs out"
            in said
        )
        assert f"convoy: MLflow run {run.info.run_id} is now FAILED" in said
    else:
        assert "told to stop: checkpoint of step" in said


def test_a_rank_that_ends_early_with_exit_code_0_is_a_lost_peer(
    digits: Path, tmp_path: Path
) -> None:
    """As a library that calls exit() would end it."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ: os._exit(0)\n")
    arguments = _settings(digits, tmp_path / "out", "train.epochs=1")
    process = _start(arguments, {"PYTHONPATH": str(tmp_path)})
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 144, output
    assert "rank 0 ended with exit code 0, but before its work was done" in output


def test_a_signal_while_ranks_start_ends_them_at_once(digits: Path, tmp_path: Path) -> None:
    with _start(["--procs", "2", *_settings(digits, tmp_path / "out")], {}) as process:
        until(lambda: len(_family(process)) == 2)
        family = _family(process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (143, "")
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_nodes_without_a_rendezvous_are_refused_before_anything_is_written(
    digits: Path, tmp_path: Path
) -> None:
    environment = {
        "PET_NNODES": "2",
        "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29500",
        "PET_NODE_RANK": "0",
    }
    arguments = [RECIPE, *_settings(digits, tmp_path / "out", "train.max_steps=1")]
    done = run_convoy("train", *arguments, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "PET_NNODES=2" in done.stderr
    launcher = subprocess.run(
        [sys.executable, "-m", "trainer.launch", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (launcher.returncode, launcher.stderr) == (2, done.stderr)
    assert not list(tmp_path.iterdir())


def test_evaluation_ends_when_a_rank_was_told_to_stop() -> None:
    class Stop:
        received = True

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(Preempted):
            evaluate(
                torch.nn.Identity(),
                iter([object()]),
                torch.device("cpu"),
                [0.0],
                [1.0],
                Stop(),
                lambda: None,
            )  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


def test_the_status_of_a_killed_run_waits_in_the_spool_for_a_server_that_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spool, run_id = tmp_path / "tracking.jsonl", tmp_path / "run-id"
    writer = SpoolWriter(spool, new_run_key(), attempt=1)
    writer.append("metrics", step=1, time_ms=1, values={})
    writer.close()
    with spool.open("a") as file:
        file.write('{"kind": "met')  # a killed process left a partial line
    end_unfinished_run(run_id, "http://127.0.0.1:9", spool, "FAILED")
    assert spool.read_text().endswith('{"kind": "met'), "no run was left"
    run_id.write_text("0a1b")
    end_unfinished_run(run_id, "http://user:secret@127.0.0.1:9", spool, "FAILED")
    reader = SpoolReader(spool, {})
    entries = reader.read(writer.run_key, 10)
    assert [(entry.attempt, entry.seq, entry.kind) for entry in entries] == [
        (1, 0, "metrics"),
        (1, 1, "finish"),
    ]
    assert entries[-1].content["status"] == "FAILED"
    assert len(reader.corrupt) == 1, "the partial line is kept apart"
    told = capsys.readouterr().err
    assert "MLflow run 0a1b could not be set to FAILED" in told
    assert f"convoy sync {spool}" in told
    assert "secret" not in told


def test_a_deleted_working_directory_is_refused_by_every_command(tmp_path: Path) -> None:
    command = f"rmdir {tmp_path}; exec {' '.join(python_command('pipelines.cli.main'))} pack a b"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the working directory does not exist any more" in done.stderr
