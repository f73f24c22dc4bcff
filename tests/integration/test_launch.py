"""Local runs: independence of environment and working directory, signals and killed ranks."""

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
from support.helpers import run_convoy, start_train, until

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


def _descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_local_run_is_independent_of_working_directory_and_environment(
    digits: Path, tmp_path: Path
) -> None:
    """Two ranks rendezvous in spite of modules that shadow the project's, variables of other
    launchers, a host name that does not resolve and a closed stdout.
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
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "old", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "LOCAL_WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "4", "SLURM_NTASKS": "4",
        "GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7",
        "TORCH_DISTRIBUTED_DEBUG": "nonsense", "DS_ACCELERATOR": "nonsense",
        "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONPATH": f"{place}{os.pathsep}.",
        "HOME": "/nonexistent", "TMPDIR": "/nonexistent", "LC_ALL": "C",
        "OMP_NUM_THREADS": "nonsense", "http_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "127.0.0.1:9",
    }  # fmt: skip
    (place / "my recipe.yaml").write_text(find_recipe(RECIPE).read_text())
    arguments = [
        "--procs",
        "2",
        *_settings(digits, Path("aus gabe"), "name=hostile", "train.max_steps=2"),
    ]
    command = [*python_command("pipelines.cli.main"), "train", "my recipe.yaml", *arguments]
    isolate = ["unshare", "--uts", "sh", "-c", 'hostname node17.corp.invalid && exec "$@"', "sh"]
    unshare = subprocess.run([*isolate[:2], "true"], capture_output=True, check=False)
    if unshare.returncode == 0:  # needs root
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
        assert first.startswith(
            "ignoring variables of another launcher: RANK, LOCAL_RANK, WORLD_SIZE"
        ), process.stderr.read()
        process.stdout.close()  # as `convoy train | head -1` does
        stderr = process.stderr.read()
        assert (process.wait(timeout=240), stderr) == (0, "")
    assert json.loads((place / "aus gabe/result.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGHUP, 129, "KILLED"), (signal.SIGKILL, 144, "FAILED")]
)
def test_killed_run_has_final_status_in_mlflow_and_leaves_no_processes(
    number: int,
    code: int,
    status: str,
    digits: Path,
    service_env: dict[str, str],
    client: MlflowClient,
    tmp_path: Path,
) -> None:
    """SIGHUP goes to the launcher; SIGKILL, as sent by the kernel out of memory, to the rank."""
    out = tmp_path / "out"
    more = [
        "train.epochs=10000",
        "checkpoint.every_steps=10",
        "checkpoint.keep=1",
        f"tracking.experiment={tmp_path.name}",
    ]
    with start_train(
        [RECIPE, *_settings(digits, out, *more)], service_env, start_new_session=True
    ) as process:
        until(lambda: any((out / "checkpoints").glob("*/checkpoint.json")))
        descendants = _descendants(process)
        if number == signal.SIGKILL:
            descendants[0].kill()
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert not psutil.wait_procs(descendants, timeout=5)[1]
    assert "Traceback" not in output
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    assert run.info.status == status
    if number == signal.SIGKILL:
        assert "convoy: rank 0 was killed by SIGKILL; the host may be out of memory" in output
        assert f"convoy: MLflow run {run.info.run_id} is now FAILED" in output
    else:
        assert "stop signal received: checkpoint of step" in output


def test_rank_exiting_early_with_code_0_fails_the_run_with_144(
    digits: Path, tmp_path: Path
) -> None:
    """For example, because a library calls exit()."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ: os._exit(0)\n")
    arguments = _settings(digits, tmp_path / "out", "train.epochs=1")
    process = start_train([RECIPE, *arguments], {"PYTHONPATH": str(tmp_path)})
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 144, output
    assert "rank 0 exited with code 0 before training was complete" in output


def test_signal_during_startup_ends_ranks_immediately(digits: Path, tmp_path: Path) -> None:
    with start_train([RECIPE, "--procs", "2", *_settings(digits, tmp_path / "out")], {}) as process:
        until(lambda: len(_descendants(process)) == 2)
        descendants = _descendants(process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (143, "")
    assert not psutil.wait_procs(descendants, timeout=5)[1]


def test_several_nodes_without_rendezvous_are_rejected_before_writing(
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


def test_evaluation_raises_preempted_after_a_stop_signal() -> None:
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


def test_status_of_killed_run_is_spooled_while_the_server_is_unreachable(
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
    assert spool.read_text().endswith('{"kind": "met'), "there is no unfinished run"
    run_id.write_text("0a1b")
    end_unfinished_run(run_id, "http://user:secret@127.0.0.1:9", spool, "FAILED")
    reader = SpoolReader(spool, {})
    entries = reader.read(writer.run_key, 10)
    assert [(entry.attempt, entry.seq, entry.kind) for entry in entries] == [
        (1, 0, "metrics"),
        (1, 1, "finish"),
    ]
    assert entries[-1].content["status"] == "FAILED"
    assert len(reader.corrupt) == 1, "the partial line is not part of an entry"
    stderr = capsys.readouterr().err
    assert "MLflow run 0a1b could not be set to FAILED" in stderr
    assert f"convoy sync {spool}" in stderr
    assert "secret" not in stderr


def test_deleted_working_directory_is_rejected_by_every_command(tmp_path: Path) -> None:
    command = f"rmdir {tmp_path}; exec {' '.join(python_command('pipelines.cli.main'))} pack a b"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the working directory was deleted" in done.stderr
