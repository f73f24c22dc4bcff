"""Environments of ranks, several nodes without a rendezvous, proxies and stop signals."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import requests.utils
from botocore.httpsession import ProxyConfiguration
from botocore.utils import should_bypass_proxies
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.distributed.pod_startup import pod_from_environment
from trainer.errors import Preempted, UserError
from trainer.process.launch_environment import (
    check_rank_environment,
    check_single_node,
    local_rank_environment,
    loopback_interface,
)
from trainer.process.proxies import bypass_proxies_for_local_services
from trainer.process.stop_signals import StopSignals
from trainer.process.supervisor import exit_code

_NAMES = [
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_RESTART_COUNT", "TORCH_DISTRIBUTED_DEBUG", "PET_NNODES", "PET_NODE_RANK",
    "PET_MASTER_ADDR", "PET_MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "SLURM_PROCID",
    "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
    "LOCAL_SIZE", "NCCL_SOCKET_IFNAME", "NCCL_COMM_ID", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME",
    "DS_ACCELERATOR", "DEEPSPEED_ENV_FILE", "AZ_BATCH_MASTER_NODE", "AZUREML_EXPERIMENT_ID",
    "JOB_COMPLETION_INDEX", "PYTHONOPTIMIZE", "PYTHONINSPECT", "OMP_NUM_THREADS",
    "CONVOY_STORE_FD", "CONVOY_RUN_ID_FILE", "CONVOY_LAUNCHER_PID", "USE_LIBUV",
]  # fmt: skip
_VALUES = st.sampled_from(
    [
        "",
        "0",
        "1",
        "2",
        "17",
        "-1",
        "nonsense",
        "127.0.0.1",
        "10.0.0.7",
        "node17.corp.invalid",
        "eth7",
    ]
)


@settings(max_examples=40 if settings.default.derandomize else 2000, deadline=None)
@given(
    st.dictionaries(st.sampled_from(_NAMES), _VALUES | st.text("0123456789abc:.", max_size=8)),
    st.integers(1, 4),
)
def test_local_rank_environment_is_independent_of_leftover_variables(
    leftover: dict[str, str], world_size: int
) -> None:
    plain = {
        "PATH": "/usr/bin",
        "CUDA_VISIBLE_DEVICES": "",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "CONVOY_CPUS": "8",
    }
    for rank in range(world_size):
        clean = local_rank_environment(plain, rank, world_size, 1234)
        dirty = local_rank_environment(plain | leftover, rank, world_size, 1234)
        if (
            not leftover.get("OMP_NUM_THREADS", "").isdigit()
            or int(leftover["OMP_NUM_THREADS"]) == 0
        ):
            assert dirty == clean
        else:
            assert dirty | {"OMP_NUM_THREADS": ""} == clean | {"OMP_NUM_THREADS": ""}
        assert clean.items() >= plain.items()
        assert (clean["RANK"], clean["WORLD_SIZE"], clean["MASTER_ADDR"]) == (
            str(rank),
            str(world_size),
            "127.0.0.1",
        )
        assert (
            clean["GLOO_SOCKET_IFNAME"]
            == clean["NCCL_SOCKET_IFNAME"]
            == loopback_interface()
            == "lo"
        )


@settings(max_examples=60 if settings.default.derandomize else 5000, deadline=None)
@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES))
def test_leftover_variables_are_ignored_or_rejected_by_name(leftover: dict[str, str]) -> None:
    """A process without a launcher is the only rank, or the error names a variable to unset."""
    leftover.pop("CONVOY_LAUNCHER_PID", None)
    try:
        ranks = check_rank_environment(leftover)
    except UserError as error:
        message = str(error)
    else:
        assert ranks == (0, 1, 0)
        return
    assert any(f"{name}={value}" in message for name, value in leftover.items()), message


_TRAINER_V2 = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "0",
    "PET_MASTER_ADDR": "job-node-0-0.job",
}
_TRAINER_V2 |= {"PET_MASTER_PORT": "29500", "JOB_COMPLETION_INDEX": "0"}
_PYTORCH_JOB = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "23456", "PET_NPROC_PER_NODE": "1"}


@pytest.mark.parametrize(
    "environment",
    [
        _TRAINER_V2,
        _TRAINER_V2 | {"PET_NODE_RANK": "1", "JOB_COMPLETION_INDEX": "1"},
        {"PET_NNODES": "1:4"},
        {"PET_NNODES": "2:2"},
        {"PET_NODE_RANK": "1"},
        {"PET_MASTER_ADDR": "10.0.0.7"},
        _PYTORCH_JOB | {"MASTER_ADDR": "job-master-0"},
        _PYTORCH_JOB | {"MASTER_ADDR": "localhost"},
        _PYTORCH_JOB | {
            "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        },
        {
            "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0", "RANK": "0",
            "MASTER_ADDR": "10.0.0.7",
        },
        {"JOB_COMPLETION_INDEX": "3"},
        {"SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_RANK": "1"},
    ],
)  # fmt: skip
def test_several_nodes_or_tasks_without_a_rendezvous_are_rejected(
    environment: dict[str, str],
) -> None:
    assert pod_from_environment(environment) is None
    with pytest.raises(
        UserError, match=r"\w+=\S+.*several nodes or tasks.*PET_RDZV_ENDPOINT.*unset"
    ) as error:
        check_single_node(environment)
    assert len(error.value.faults) == 1


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
        },
        {"RANK": "1", "WORLD_SIZE": "2"},
        {
            "RANK": "3",
            "LOCAL_RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": socket.gethostname(),
        },
        {
            "PET_NNODES": "1",
            "PET_MASTER_ADDR": "job-node-0-0.job",
            "PET_NODE_RANK": "0",
            "JOB_COMPLETION_INDEX": "0",
        },
        {
            "SLURM_NNODES": "1",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "1",
            "SLURM_STEP_NUM_TASKS": "1",
        },
        {"SLURM_NNODES": "2", "SLURM_JOB_ID": "1"},
        {
            "SLURM_PROCID": "0",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NUM_NODES": "1",
        },
    ],
)
def test_single_node_is_accepted_with_leftover_variables(environment: dict[str, str]) -> None:
    check_single_node(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "old"},
            "torchrun did not start",
        ),
        (
            {"CONVOY_LAUNCHER_PID": "1", "RANK": "0", "WORLD_SIZE": "2"},
            "LOCAL_RANK, MASTER_ADDR, MASTER_PORT: missing",
        ),
        (
            {
                "CONVOY_LAUNCHER_PID": "1", "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                "MASTER_ADDR": "x", "MASTER_PORT": "1",
            },
            "inconsistent",
        ),
    ],
)  # fmt: skip
def test_incomplete_rank_environment_is_rejected_with_one_line(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        check_rank_environment(environment)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_exit_code_of_a_run_is_the_most_informative_of_its_ranks() -> None:
    assert exit_code([0, 0], None) == 0
    assert exit_code([0, 0], signal.SIGTERM) == 0, "training was already complete"
    assert exit_code([144, 2], None) == exit_code([-9, 2], signal.SIGTERM) == 2
    assert exit_code([1, 144], None) == 1
    assert exit_code([143, 143], None) == 143
    assert (
        exit_code([-9, 144], None) == exit_code([143, 144], None) == exit_code([-11], None) == 144
    )
    assert exit_code([143, 144], signal.SIGTERM) == 143
    assert exit_code([143, -9], signal.SIGINT) == 130
    assert exit_code([143], signal.SIGHUP) == 129


_LOCAL = [
    "http://127.0.0.1:9000",
    "http://localhost:9000",
    "http://[::1]:9000",
    "http://mlflow:5000",
    "http://s3.storage.svc:1",
]


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "proxy.corp.invalid:3128"])
@pytest.mark.parametrize(
    "old", [{}, {"no_proxy": "corp.invalid"}, {"NO_PROXY": "corp.invalid"}, {"no_proxy": "*"}]
)
def test_proxies_are_bypassed_for_local_services_only(
    old: dict[str, str], proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        {"http_proxy": proxy, "HTTPS_PROXY": proxy, "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
        | old
    ).items():
        monkeypatch.setenv(name, value)
    bypass_proxies_for_local_services(os.environ)
    everything = old.get("no_proxy") == "*"
    for url in _LOCAL:
        assert requests.utils.should_bypass_proxies(url, None), url
        assert should_bypass_proxies(url), url
        assert urllib.request.proxy_bypass(url.split("//")[1]), url
    for url, proxied in (("http://s3.example.com", True), ("http://a.corp.invalid", not old)):
        assert requests.utils.should_bypass_proxies(url, None) == (everything or not proxied)
        assert bool(should_bypass_proxies(url)) == (everything or not proxied)
    assert (
        ProxyConfiguration({"http": proxy}).proxy_url_for("http://s3.example.com")
        == f"http://{proxy.split('//')[-1]}"
    )


def test_environment_is_unchanged_without_a_proxy() -> None:
    environment = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "no_proxy": "a"}
    bypass_proxies_for_local_services(environment)
    assert environment == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "no_proxy": "a"}


def _run_with_signals(code: str) -> subprocess.CompletedProcess:
    program = "import os, signal, sys, time\nfrom trainer.process.stop_signals import StopSignals\n"
    program += "from trainer.errors import Preempted\n"
    return subprocess.run(
        [sys.executable, "-c", program + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_deferred_stop_signals_are_recorded_and_ignored_ones_stay_ignored() -> None:
    done = _run_with_signals("""
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signals = StopSignals(); signals.install()
os.kill(os.getpid(), signal.SIGHUP)
assert signals.received is None
signals.defer()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
assert signals.received == 15
assert not signals.forced, 'two signals at the same time, as sent by `timeout`, do not force'
try:
    signals.resume()
except Preempted as error:
    sys.exit(128 + error.number)
""")
    assert (done.returncode, done.stderr) == (143, "")


def test_process_blocked_in_native_code_exits_on_a_signal() -> None:
    """Locking a mutex twice blocks in spite of signals, as a connection attempt can."""
    done = _run_with_signals("""
import ctypes, threading, trainer.process.stop_signals as module
module._STUCK_SECONDS = 0.5
StopSignals().install()
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
lock(mutex); lock(mutex)
""")
    assert (done.returncode, done.stderr) == (130, "")


def test_signal_before_defer_raises_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = StopSignals()
    with pytest.raises(Preempted) as error:
        signals._handle(signal.SIGHUP, None)
    assert error.value.number == signal.SIGHUP
