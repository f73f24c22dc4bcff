"""Environment variables of ranks and nodes: set by launchers, left over, or set by Convoy."""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from trainer.errors import UserError
from trainer.process.proxies import is_loopback

LAUNCHER_PID = "CONVOY_LAUNCHER_PID"
"""Process ID of the launcher that started this rank and will end it."""
STORE_FD = "CONVOY_STORE_FD"
"""File descriptor of rank 0's listening socket for the rendezvous store, at
MASTER_ADDR:MASTER_PORT; empty for other ranks on this machine.
"""
RUN_ID_FILE = "CONVOY_RUN_ID_FILE"
"""File in which rank 0 stores the ID of an MLflow run that it has not ended yet.

Its folder also contains one file per local rank, which the rank removes when its work is done.
"""

_LAUNCHER_PREFIXES = (
    "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCHCOMM_", "TORCH_DIST_", "TORCH_DISTRIBUTED_", "PET_",
    "OMPI_", "PMI_", "PMI2_", "PMIX_", "MV2_", "MPICH_", "I_MPI_", "HYDRA_", "HYDI_", "ORTE_",
    "PRTE_", "MPI_", "SLURM_", "SLURMD_", "LSB_", "PBS_", "FLUX_", "JSM_", "PALS_", "HOROVOD_",
    "ACCELERATE_", "FSDP_", "DEEPSPEED_", "DS_", "DLTS_", "AZ_BATCH", "AZUREML_", "CONVOY_LAUNCHER",
    "CONVOY_STORE", "CONVOY_RUN_ID",
)  # fmt: skip
_LAUNCHER_NAMES = frozenset(
    {
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
        "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "NODE_RANK", "GLOBAL_RANK", "LOCAL_SIZE",
        "CROSS_RANK", "CROSS_SIZE", "NNODES", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT",
        "USE_LIBUV", "JOB_COMPLETION_INDEX", "GLOO_SOCKET_IFNAME", "GLOO_DEVICE_TRANSPORT",
        "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY", "NCCL_COMM_ID",
        "NCCL_HOSTID", "UCX_NET_DEVICES", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONOPTIMIZE",
    }
)  # fmt: skip
_REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns ``environment`` without variables that launchers set for their ranks.

    Python options that change how a program behaves are removed as well.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    filters = [
        entry
        for entry in kept.pop("PYTHONWARNINGS", "").split(",")
        if entry and not entry.startswith("error")
    ]
    return kept | ({"PYTHONWARNINGS": ",".join(filters)} if filters else {})


def local_rank_environment(
    environment: Mapping[str, str], rank: int, world_size: int, port: int
) -> dict[str, str]:
    """Returns the complete environment of a rank of a local run, regardless of leftover variables.

    ``port``: port of the rendezvous store on 127.0.0.1. The ranks connect over the loopback
    interface, so the host name and its networks do not matter.
    """
    threads = _thread_limit(environment) or str(max(1, cpus(environment) // world_size))
    loopback = loopback_interface()
    interfaces = (
        {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback} if loopback else {}
    )
    return without_launcher_variables(environment) | interfaces | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        # the same default as torchrun
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": environment.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        # a lost peer is reported by its own error message; stack traces of the ranks that wait
        # for it would only hide that
        "TORCH_CPP_LOG_LEVEL": environment.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "PYTHONSAFEPATH": "1",
    }  # fmt: skip


def become_only_rank() -> None:
    """Sets the environment of the only rank of a local run. No launcher started this process."""
    _replace_environment(local_rank_environment(os.environ, 0, 1, 0))


def drop_leftovers() -> None:
    """Removes from this process's environment the variables that a local run must not depend on.

    Needed in the launcher as well, because it imports torch.
    """
    environment = without_launcher_variables(os.environ)
    if _thread_limit(environment) is None:
        environment.pop("OMP_NUM_THREADS", None)
    _replace_environment(environment)


def _thread_limit(environment: Mapping[str, str]) -> str | None:
    threads = environment.get("OMP_NUM_THREADS", "")
    return threads if re.fullmatch(r"[1-9]\d*", threads) else None


def _replace_environment(environment: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def cpus(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the number of CPUs that the pod requested, rounded up, or else this process's CPUs.

    Ranks that assume they have all of the node's CPUs spin while they wait for each other.
    """
    requested = environment.get("CONVOY_CPUS", "")
    return int(requested) if re.fullmatch(r"[1-9]\d*", requested) else len(os.sched_getaffinity(0))


def loopback_interface() -> str | None:
    """Returns ``lo`` on Linux; None if no interface has a known loopback name."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def check_single_node(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError if several nodes or tasks run this command.

    Each of them would train alone and write to the same output and checkpoints.
    """
    described = _several_nodes(environment) or _several_tasks(environment)
    if described:
        raise UserError(
            f"{described}: this environment describes several nodes or tasks, but no rendezvous "
            "that Convoy supports (PET_RDZV_ENDPOINT, as the training-operator sets it for a job "
            "with an elasticPolicy); each would train alone. Start one `convoy train --procs N` "
            "per machine, submit the job with `convoy submit`, or unset these variables"
        )
    if "TORCHELASTIC_RUN_ID" in environment and started_by_torchrun():
        raise UserError(
            "torchrun started this launcher, once per rank; start the ranks with `convoy train "
            "--procs N`, or run `torchrun -m trainer RECIPE`"
        )


def check_working_directory() -> None:
    """Raises UserError if the working directory was deleted.

    Relative paths would be invalid, and libraries would fail to load.
    """
    try:
        os.getcwd()
    except OSError:
        raise UserError(
            "the working directory was deleted; change to an existing directory"
        ) from None


def leftovers(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the names of another launcher's variables that a local run ignores.

    The user is informed of them.
    """
    return [name for name in (*_REQUIRED, "LOCAL_WORLD_SIZE") if name in environment]


def _several_nodes(environment: Mapping[str, str]) -> str | None:
    value = environment.get("PET_NNODES", "").strip()
    if value and not re.fullmatch(r"(\d+:)?0*1", value):
        return f"PET_NNODES={value}"
    if not value and _is_remote(environment.get("PET_MASTER_ADDR", "")):
        return f"PET_MASTER_ADDR={environment['PET_MASTER_ADDR']}"
    for name in ("PET_NODE_RANK", "JOB_COMPLETION_INDEX", "GROUP_RANK"):
        if _number(environment, name) > 0:
            return f"{name}={environment[name]}"
    if _number(environment, "GROUP_WORLD_SIZE") > 1:
        return f"GROUP_WORLD_SIZE={environment['GROUP_WORLD_SIZE']}"
    address, world_size = environment.get("MASTER_ADDR", ""), _number(environment, "WORLD_SIZE")
    # A PyTorchJob without an elasticPolicy sets no LOCAL_RANK, and its master's address is
    # localhost in the master's pod.
    by_operator = "LOCAL_RANK" not in environment or "KUBERNETES_SERVICE_HOST" in environment
    several = world_size > 1 and world_size != _number(environment, "LOCAL_WORLD_SIZE")
    if address and several and (by_operator or _is_remote(address)):
        return f"WORLD_SIZE={world_size} and MASTER_ADDR={address}"
    return None


def _several_tasks(environment: Mapping[str, str]) -> str | None:
    """Returns the variable that shows that SLURM's srun or MPI's mpirun started several tasks.

    Both start the same command once per task.
    """
    started_by_slurm = any(
        name in environment for name in ("SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID")
    )
    step = ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"]
    # Within a step (srun) the job's counts cover all steps, so they are ignored there:
    # `srun --nodes=1 --ntasks=1 convoy train ...` is one task.
    job = (
        [] if any(name in environment for name in step) else ["SLURM_NNODES", "SLURM_JOB_NUM_NODES"]
    )
    counts = [*step, *job] if started_by_slurm else []
    counts += ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]
    ranks = [
        "SLURM_PROCID",
        "SLURM_NODEID",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
        "PMIX_RANK",
        "MV2_COMM_WORLD_RANK",
    ]
    several = [name for name in counts if _number(environment, name) > 1]
    several += [name for name in ranks if _number(environment, name) > 0]
    return f"{several[0]}={environment[several[0]]}" if several else None


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "").strip()
    return int(value) if re.fullmatch(r"\d{1,9}", value) else 0


def _is_remote(address: str) -> bool:
    """Returns whether ``address`` is neither loopback nor this machine's name."""
    host = socket.gethostname()
    if address.strip() in ("", host, host.partition(".")[0]):
        return False
    return not is_loopback(address)


def check_rank_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Returns rank, world size and local rank of this process: (0, 1, 0) if no launcher started it.

    Raises UserError if a launcher's variables are incomplete, inconsistent or left over from
    another process, because waiting for ranks that do not exist would never end.
    """
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment]
    by_torchrun = bool(given) and "TORCHELASTIC_RUN_ID" in environment and started_by_torchrun()
    if LAUNCHER_PID not in environment and not by_torchrun:
        check_single_node(environment)
        values = {name: environment[name].strip() for name in given}
        if values.items() - {("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")}:
            raise UserError(
                f"{', '.join(f'{name}={value}' for name, value in values.items())}: set, but "
                "torchrun did not start this process; unset these variables, or start ranks with "
                "`convoy train --procs N` or `torchrun -m trainer RECIPE`"
            )
        return 0, 1, 0
    missing = [name for name in _REQUIRED if name not in environment]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: missing; start ranks with `convoy train --procs N` or "
            "`torchrun -m trainer`"
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not re.fullmatch(r"\d{1,9}", environment[name].strip()):
            raise UserError(f"{name}: {environment[name]!r} is not a number")
    rank, world_size, local_rank = (
        int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    if not local_rank <= rank < world_size:
        raise UserError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world_size}: inconsistent; "
            "LOCAL_RANK <= RANK < WORLD_SIZE must hold"
        )
    return rank, world_size, local_rank


def started_by_torchrun() -> bool:
    """Returns whether an ancestor process is torchrun or runs torch's launcher as a module."""
    return any(_is_torchrun(command) for command in _ancestor_commands())


def _is_torchrun(command: list[str]) -> bool:
    names = {Path(word).name for word in command[:3]}
    modules = {"torch.distributed.run", "torch.distributed.launch", "torch.distributed.launcher"}
    return "torchrun" in names or bool(modules & set(command)) or "torchrun" in command


def _ancestor_commands() -> list[list[str]]:
    import psutil

    commands = []
    for process in psutil.Process().parents():
        with suppress(psutil.Error):  # the process has ended or belongs to another user
            commands.append(process.cmdline())
    return commands
