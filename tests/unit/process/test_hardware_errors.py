"""Classification of device, driver, interconnect and memory errors, and the record of failing
nodes.

The messages are those of CUDA, cuDNN, cuBLAS, NCCL, NVML, gloo and the kernel, from users' reports.
"""

import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from trainer.config.schema import RunConfig
from trainer.data.storage.store import open_store
from trainer.distributed.pod_startup import check_restart_budget
from trainer.errors import EXIT_BUG, EXIT_RETRY, EXIT_USER, UserError, report
from trainer.faults import node_fault_log
from trainer.faults.hardware_errors import (
    GPUS_VARIABLE,
    NODE_VARIABLE,
    HardwareFault,
    LostPeer,
    check_gpus,
    classify_fault,
    describe_place,
    memory_advice,
)
from trainer.faults.node_fault_log import FOLDER, record_fault, repeated_faults

PLACE = "node gpu-17, GPU 3"
_NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n{}"
)


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # with a traceback, as in a run
        return caught


DEVICE_FAULTS = [
    torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be "
        "asynchronously"
    ),
    torch.AcceleratorError("CUDA error: uncorrectable NVLink error detected during the execution"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
    torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    torch.AcceleratorError("CUDA error: unknown error"),
    torch.AcceleratorError("CUDA error: misaligned address"),
    torch.AcceleratorError("CUDA error: hardware stack error"),
    torch.AcceleratorError("HIP error: unspecified launch failure"),
    RuntimeError("CUDA error: no CUDA-capable device is detected"),
    RuntimeError("CUDA error: initialization error"),
    RuntimeError("CUDA driver error: device not ready"),
    RuntimeError("cuda runtime error (214) : uncorrectable ECC error encountered at ../THC.cu:63"),
    RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\nYou can try to repro this exception"),
    RuntimeError(
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb)`"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    RuntimeError("No CUDA GPUs are available"),
    RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
    RuntimeError(
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"
    ),
    RuntimeError("Failed to initialize NVML: Driver/library version mismatch"),
    RuntimeError(
        "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost. Reboot the system"
    ),
    dist.DistBackendError(
        _NCCL.format("unhandled system error", "ncclSystemError: System call failed")
    ),
    dist.DistBackendError(
        _NCCL.format(
            "unhandled cuda error",
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n",
        )
        + "Cuda failure 214 'uncorrectable ECC error encountered'"
    ),
    dist.DistBackendError(
        _NCCL.format(
            "internal error", "ncclInternalError: Internal check failed.\nLast error:\nNet/IB"
        )
    ),
    OSError(errno.EIO, os.strerror(errno.EIO), "/data/train-000003.tar"),
    OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/mnt/nfs/index.json"),
]

LOST_PEERS = [
    dist.DistBackendError(
        _NCCL.format(
            "remote process exited or there was a network error", "ncclRemoteError: A call failed"
        )
    ),
    dist.DistBackendError(
        "NCCL communicator was aborted on rank 3. Original reason: watchdog timeout"
    ),
    dist.DistNetworkError("The client socket has timed out after 600000ms while trying to connect"),
    dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0"),
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
        "[127.0.0.1]:4711"
    ),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
    RuntimeError("Connection reset by peer"),
    RuntimeError("Socket Timeout"),
    RuntimeError("Timed out initializing process group in store based barrier on rank: 0"),
]

PROGRAM_ERRORS = [
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: invalid argument"),
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    torch.AcceleratorError("CUDA error: too many resources requested for launch"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
        "and cpu!"
    ),
    dist.DistBackendError(
        _NCCL.format(
            "invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL"
        )
    ),
    RuntimeError("ProcessGroupGloo::allreduce: unsupported layout"),
    RuntimeError("ProcessGroupNCCL does not support gather of bool tensors"),
    RuntimeError(
        "[enforce fail at ../gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. "
        "2048 vs 1024"
    ),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ValueError("CUDA error: quoted in another error's text"),
    KeyError("out of memory"),
]


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:60]


@pytest.mark.parametrize("error", DEVICE_FAULTS, ids=_text)
def test_device_fault_exits_for_retry_and_names_node_gpu_and_error(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    found = classify_fault(_raised(error), PLACE)
    assert isinstance(found, HardwareFault)
    assert report(found, "convoy: rank 5") == EXIT_RETRY
    stderr = capsys.readouterr().err
    first = (error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]) or ""
    assert PLACE in stderr
    assert first in stderr
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1


def test_message_contains_the_last_error_of_nccl() -> None:
    text = (
        "NCCL error in: NCCLUtils.cpp:94, unhandled system error\n"
        "ncclSystemError: System call failed.\nLast error:\n"
    )
    found = classify_fault(
        dist.DistBackendError(text + "NET/IB: ibv_reg_mr_iova2 failed: Cannot allocate memory"),
        PLACE,
    )
    assert isinstance(found, HardwareFault)
    assert "ibv_reg_mr_iova2 failed" in str(found)


@pytest.mark.parametrize("error", LOST_PEERS, ids=_text)
def test_lost_peer_is_not_a_hardware_fault(error: Exception) -> None:
    found = classify_fault(_raised(error), PLACE)
    assert isinstance(found, LostPeer)
    assert not isinstance(found, HardwareFault)


@pytest.mark.parametrize("error", PROGRAM_ERRORS, ids=_text)
def test_program_errors_remain_bugs_with_a_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    found = classify_fault(_raised(error), PLACE)
    assert found is error
    assert report(found, "convoy") == EXIT_BUG
    assert "Traceback" in capsys.readouterr().err


def _real_allocation_failures() -> list[Exception]:
    errors: list[Exception] = []
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**60)):
        try:
            allocate()
        except Exception as error:
            errors.append(error)
    assert len(errors) == 3
    return errors


def test_out_of_memory_is_a_user_error_with_advice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {
        "model": {"name": "resnet8"},
        "data": {"train": "none", "val": "none"},
        "train": {"max_steps": 1},
    }
    config = RunConfig.model_validate(values)
    advice = memory_advice(config, 64)
    assert "batch.micro_size than 64" in advice
    assert "precision=bf16" in advice
    gpu = [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
            "79.10 GiB"
        ),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        dist.DistBackendError(
            _NCCL.format("unhandled cuda error", "Last error:\nCuda failure 2 'out of memory'")
        ),
        dist.DistBackendError(
            _NCCL.format(
                "unhandled cuda error", "Last error:\nFailed to CUDA calloc async 608 bytes"
            )
        ),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        RuntimeError("cudaErrorMemoryAllocation: cannot allocate"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    ]
    no_memory = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))  # of fork or mmap
    for error in [*gpu, *_real_allocation_failures(), no_memory]:
        found = classify_fault(_raised(error), PLACE, advice)
        assert isinstance(found, UserError), error
        assert report(found, "convoy: rank 5") == EXIT_USER
        stderr = capsys.readouterr().err
        assert ("out of GPU memory" in stderr) == (error in gpu), error
        assert PLACE in stderr
        assert "batch.micro_size" in stderr
        assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),
        (
            RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
            "/dev/shm",
        ),
        (
            dist.DistBackendError(
                _NCCL.format("unhandled system error", "ncclSystemError: x\nLast error:\n")
                + "Error while creating shared memory segment /dev/shm/nccl-fHvkLj (size 9637888)"
            ),
            "/dev/shm",
        ),
        (
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
            "driver",
        ),
    ],
    ids=["thread", "process", "shared memory", "shared memory of NCCL", "driver"],
)
def test_machine_limits_are_user_errors_with_advice(
    error: Exception, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(classify_fault(_raised(error), PLACE), "convoy") == EXIT_USER
    stderr = capsys.readouterr().err
    assert PLACE in stderr
    assert advice in stderr
    assert len(stderr.splitlines()) == 1


def test_memory_advice_omits_options_in_use() -> None:
    values = {
        "model": {"name": "resnet8"},
        "data": {"train": "none"},
        "precision": "bf16",
        "parallel": {"zero_stage": 1},
        "train": {"max_steps": 1, "activation_checkpointing": True},
    }
    advice = memory_advice(RunConfig.model_validate(values), 1)
    for key in ("micro_size", "activation_checkpointing", "precision", "zero_stage", "eval_size"):
        assert key not in advice
    assert "pipeline_stages" in advice


def test_fault_is_found_in_the_cause_of_an_exception() -> None:
    def copy_batch() -> None:
        try:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        except torch.AcceleratorError as error:
            raise ValueError("the batch could not be copied") from error

    with pytest.raises(ValueError, match="could not be copied") as raised:
        copy_batch()
    assert isinstance(classify_fault(raised.value, PLACE), HardwareFault)
    known = UserError("data.train: missing")
    assert classify_fault(known, PLACE) is known


def test_unsupported_gpu_is_a_user_error() -> None:
    error = torch.AcceleratorError(
        "CUDA error: no kernel image is available for execution on the device"
    )
    found = classify_fault(error, PLACE)
    assert isinstance(found, UserError)
    assert "does not support the GPU" in str(found)


def test_pod_with_fewer_gpus_than_requested_is_a_hardware_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(GPUS_VARIABLE, "8")
    monkeypatch.setenv(NODE_VARIABLE, "gpu-17")
    for visible in (0, 7):
        with pytest.raises(
            HardwareFault, match=f"node gpu-17 .*: the driver reports {visible} of the 8 GPUs"
        ):
            check_gpus(visible, 8)
    check_gpus(8, 8)
    monkeypatch.delenv(GPUS_VARIABLE)
    check_gpus(0, 2)
    with pytest.raises(UserError, match="2 ranks on a machine with 1 GPUs"):
        check_gpus(1, 2)


# --- nodes that fail repeatedly -----------------------------------------------------------------


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(NODE_VARIABLE, "gpu-17")
    return "gpu-17"


def _write(
    url: str, node: str, seconds_ago: float, rank: int, fault: str = "CUDA error: ECC"
) -> None:
    record = {"node": node, "rank": rank, "time": time.time() - seconds_ago, "fault": fault}
    open_store(url, create=True).write(
        f"{FOLDER}/{1e9 - seconds_ago:.0f}-{node}-rank-{rank}.json", json.dumps(record).encode()
    )


def test_repeated_faults_of_a_node_are_counted_and_cordoning_is_suggested(
    node: str, tmp_path: Path
) -> None:
    url = str(tmp_path)
    assert record_fault(url, 3, "CUDA error: uncorrectable ECC error encountered") == ""
    assert repeated_faults(open_store(url)) == []
    assert record_fault(url, 4, "CUDA error: uncorrectable ECC error encountered") == "", (
        "simultaneous faults of several ranks are one incident"
    )
    _write(url, node, 3600, 3)
    _write(url, "gpu-4", 7200, 0)
    advice = record_fault(url, 3, "CUDA error: unknown error")
    assert "hardware fault 2 of node gpu-17" in advice
    assert "kubectl cordon gpu-17" in advice
    (line,) = repeated_faults(open_store(url))
    assert line.startswith("node gpu-17: 2 hardware faults")
    assert "ECC" in line


def test_restart_and_exhausted_budget_name_the_failing_node(
    node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path)
    _write(url, node, 3600, 3)
    _write(url, node, 1800, 3)
    check_restart_budget(url, 1)
    assert "kubectl cordon gpu-17" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"started 1 times[^\n]*\nnode gpu-17: 2 hardware faults"):
        check_restart_budget(url, 1)


def test_records_do_not_count_as_checkpoints_and_corrupt_ones_are_skipped(
    node: str, tmp_path: Path
) -> None:
    from trainer.training.checkpoint import CheckpointManager

    url = str(tmp_path)
    record_fault(url, 0, "CUDA error: unknown error")
    open_store(url).write(f"{FOLDER}/1-bad-rank-0.json", b"{")
    open_store(url).write(f"{FOLDER}/2-bad-rank-0.json", b'{"node": 1}')
    assert repeated_faults(open_store(url)) == []
    assert CheckpointManager(url, 3).load_latest({}, print) is None


def test_unwritable_store_does_not_block_record_fault(node: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert record_fault(str(file / "below"), 0, "CUDA error: unknown error") == ""


def test_old_fault_records_are_deleted(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_fault_log, "_MAX_RECORDS", 5)
    for number in range(9):
        _write(str(tmp_path), node, 1000.0 * (9 - number), number)
    assert "5 hardware faults" in repeated_faults(open_store(str(tmp_path)))[0]
    assert len(list((tmp_path / FOLDER).iterdir())) == 5


def test_describe_place_names_node_and_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_VARIABLE, "gpu-17")
    assert describe_place("GPU 3").startswith("node gpu-17 (pod ")
    assert describe_place("GPU 3").endswith(", GPU 3")
    monkeypatch.delenv(NODE_VARIABLE)
    assert "pod" not in describe_place()
