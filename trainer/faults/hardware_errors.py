"""Classifies errors caused by a GPU, its driver, the interconnect or the host's memory.

Such a fault is not a bug of the program. A device fault ends the rank with exit code 144, so that
the job restarts on another node; running out of memory is for the user to fix and ends with exit
code 2. Errors are classified by exception type and message, because CUDA, cuDNN, cuBLAS and NCCL
report many of them as plain ``RuntimeError``. This module does not import torch, because the
command line uses it too.
"""

import errno
import os
import re
import socket
from collections.abc import Iterator

from trainer.config.schema import RunConfig
from trainer.errors import RetryableError, UserError

NODE_VARIABLE = "CONVOY_NODE"
"""Environment variable with the name of the Kubernetes node, set by the job's manifest."""
GPUS_VARIABLE = "CONVOY_GPUS"
"""Environment variable with the number of GPUs that the pod requests, set by the job's manifest."""


class HardwareFault(RetryableError):
    """A device, driver or interconnect failed on this node; a retry on another node may succeed.

    ``fault``: the error message of the driver or library, on one line.
    """

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(f"hardware fault on {place}: {fault}")
        self.fault = fault


class LostPeer(RetryableError):
    """A collective failed because another rank exited or became unreachable."""


# Prefixes before the error name in messages of CUDA, HIP, their drivers, Triton and NCCL.
_RUNTIME_ERROR = re.compile(
    r"(?:(?:CUDA|HIP)(?: (?:driver|runtime))? error: |Triton Error \[(?:CUDA|HIP)\]: "
    r"|cuda runtime error \(\d+\) : |(?:Cuda|Hip) failure (?:\d+ )?')([^\n]*)"
)
_OUT_OF_DEVICE_MEMORY = re.compile(
    r"\bout of memory\b|OUT_OF_MEMORY|(?:cuda|hip)Error(?:MemoryAllocation|OutOfMemory)"
    r"|CU(?:DNN|BLAS|SOLVER|SPARSE)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|Failed to CUDA "
    r"(?:host )?[mc]?alloc"
    r"|Unable to find a valid cuDNN algorithm",  # every algorithm needs more workspace than is free
    re.IGNORECASE,
)
_OUT_OF_HOST_MEMORY = re.compile(r"DefaultCPUAllocator: |Cannot allocate memory|std::bad_alloc")
_OUT_OF_SHARED_MEMORY = re.compile(
    r"shared memory segment /dev/shm|out of shared memory|</torch_\S*>: No space "
    r"left|posix_fallocate failed"
)
_OUT_OF_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable")

# CUDA and HIP runtime errors that the program causes; every other one is a device fault.
_PROGRAM_ERRORS = re.compile(
    r"device-side assert|invalid argument|invalid configuration argument|invalid device function"
    r"|invalid resource handle|invalid value|too many resources requested|not permitted"
    r"|operation not supported|named symbol not found"
    r"|CU(?:BLAS|SOLVER|SPARSE)_STATUS_(?:INVALID|NOT_SUPPORTED|ARCH_MISMATCH)",
    re.IGNORECASE,
)
_UNSUPPORTED_GPU = re.compile(
    r"no kernel image is available|is not compatible with the current PyTorch"
    r"|NVIDIA driver on your system is too old|driver version is insufficient",
    re.IGNORECASE,
)

_LIBRARY_FAULTS = re.compile(
    r"CU(?:DNN|BLAS|SOLVER|SPARSE|FFT)_STATUS_"
    r"(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|NOT_INITIALIZED)\w*"
    r"|CUDNN_STATUS_EXECUTION_FAILED\w*|CUFFT_(?:EXEC|INTERNAL|SETUP)\w*"
)
_DRIVER_FAULTS = re.compile(
    r"Found no NVIDIA driver|No CUDA GPUs are available|No HIP GPUs are available|CUDA unknown "
    r"error"
    r"|Unexpected error from cudaGetDeviceCount|Driver/library version mismatch|GPU is lost"
    r"|fallen off the bus|nvml\w*(?:\(\))? failed|NVML_ERROR|NVMLError|can't communicate with "
    r"the NVIDIA driver"
    r"|uncorrectable (?:ECC|NVLink) error|NVRM: Xid",
    re.IGNORECASE,
)
_COLLECTIVE = re.compile(
    r"NCCL|RCCL|gloo|Connection (?:reset|closed) by peer|Broken pipe|Socket Timeout|Timed out "
    r"initializing process group",
    re.IGNORECASE,
)
_WRONG_USE_OF_COLLECTIVES = re.compile(
    r"Invalid(?:Usage|Argument)|invalid usage|Duplicate GPU|unsupported|not support|invalid "
    r"tensor|invalid root"
    r"|must be|mismatch|op\.preamble\.length",
    re.IGNORECASE,
)
_INTERCONNECT_FAULTS = re.compile(
    r"ncclSystemError|ncclInternalError|ncclUnhandledCudaError|unhandled (?:system|cuda) error"
    r"|ibv_\w+|IBV_\w+|local catastrophic|Got async event",
    re.IGNORECASE,
)
_FAILED_DEVICES = frozenset(
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "ENODEV",
        "ENXIO",
        "EREMOTEIO",
        "ENOLINK",
        "ECOMM",
        "ENOMEDIUM",
        "EUCLEAN",
    )
    if hasattr(errno, name)
)
_FAILED_CONNECTIONS = frozenset(
    (
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
    )
)

_LINE_LENGTH = 300


def node_name() -> str:
    """Returns the Kubernetes node's name if the manifest passes it, else this machine's name."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()


def describe_place(gpu: str | None = None) -> str:
    """Describes the node, pod and GPU for an error message."""
    node, host = node_name(), socket.gethostname()
    pod = f" (pod {host})" if node != host else ""
    return f"node {node}{pod}" + (f", {gpu}" if gpu else "")


def check_gpus(visible: int, procs: int) -> None:
    """Compares the GPUs that the driver reports with those that this machine's ranks need.

    Raises HardwareFault if a pod sees fewer GPUs than it requested: a GPU fell off the bus or the
    driver does not start, and training would fail or continue on the CPU. Raises UserError if there
    are more ranks than GPUs.
    """
    requested = int(os.environ.get(GPUS_VARIABLE) or 0)
    if visible < requested:
        raise HardwareFault(
            describe_place(),
            f"the driver reports {visible} of the {requested} GPUs that the pod requested",
        )
    if 0 < visible < procs:
        raise UserError(
            f"{procs} ranks on a machine with {visible} GPUs; start at most {visible} ranks, or "
            "set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def memory_advice(config: RunConfig, micro_size: int) -> str:
    """Suggests how to reduce the memory of a training run, omitting options already in use."""
    options = []
    if micro_size > 1:
        options.append(
            f"a smaller batch.micro_size than {micro_size} (the global batch stays the same)"
        )
    if not config.train.activation_checkpointing:
        options.append("train.activation_checkpointing=true")
    if config.precision == "fp32":
        options.append("precision=bf16")
    if config.parallel.zero_stage == 0:
        options.append("parallel.zero_stage=1")
    options.append("more parallel.pipeline_stages")
    if config.data.val:
        options.append(f"a smaller batch.eval_size than {config.batch.eval_size} in evaluation")
    return (
        f"try {', '.join(options)}; to reduce host memory, lower "
        f"data.prefetch_mb={config.data.prefetch_mb} or data.workers={config.data.workers}, or "
        "raise the pod's memory limit"
    )


def classify_fault(error: BaseException, place: str, advice: str = "") -> BaseException:
    """Returns the exception to report for ``error``: ``error`` itself if it is not such a fault.

    Returns UserError if memory ran out, with ``advice`` on how to need less; HardwareFault for a
    failed device, driver, disk or interconnect; LostPeer for a collective that failed because of
    another rank. Exceptions from which ``error`` was raised are examined as well.
    """
    if isinstance(error, UserError | RetryableError):
        return error
    for cause in _chain(error):
        found = _classify(cause, place, advice)
        if found is not None:
            found.__cause__ = error
            return found
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields ``error`` and the exceptions from which it was raised, at most eight."""
    current: BaseException | None = error
    for _ in range(8):
        if current is None:
            return
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def _classify(error: BaseException, place: str, advice: str) -> UserError | RetryableError | None:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    runtime = _RUNTIME_ERROR.search(text)
    runtime_message = runtime[1].strip(" '.") if runtime else ""
    is_runtime_error = "RuntimeError" in kinds
    out_of_device_memory = is_runtime_error and _OUT_OF_DEVICE_MEMORY.search(text)
    if "OutOfMemoryError" in kinds or out_of_device_memory:
        return _out_of_memory("GPU memory", place, text, advice)
    if is_runtime_error and _OUT_OF_SHARED_MEMORY.search(text):
        return _out_of_memory(
            "shared memory", place, text, "give the pod or container a larger /dev/shm"
        )
    collective = "DistError" in kinds or (is_runtime_error and _COLLECTIVE.search(text))
    allocates = is_runtime_error and not collective and _OUT_OF_HOST_MEMORY.search(text)
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or allocates or no_memory:
        return _out_of_memory("host memory", place, text, advice)
    no_thread = is_runtime_error and not collective and _OUT_OF_THREADS.search(text)
    if no_thread or isinstance(error, BlockingIOError):
        return UserError(
            f"no more threads or processes can be started on {place}: {_first_line(text)}; "
            "raise the limit (ulimit -u, or the pod's limit of process ids), or use fewer "
            "data.workers"
        )
    if isinstance(error, OSError):
        return _classify_os_error(error, place)
    if not is_runtime_error and not any(name.startswith("NVML") for name in kinds):
        return None
    if _UNSUPPORTED_GPU.search(text):
        return UserError(
            f"{place}: this build of PyTorch does not support the GPU: {_first_line(text)}"
        )
    if runtime and _PROGRAM_ERRORS.search(runtime_message):
        return None
    if collective and _WRONG_USE_OF_COLLECTIVES.search(text):
        return None
    if (
        runtime
        or "AcceleratorError" in kinds
        or _LIBRARY_FAULTS.search(text)
        or _DRIVER_FAULTS.search(text)
    ):
        return HardwareFault(place, _fault_line(text))
    if collective and _INTERCONNECT_FAULTS.search(text):
        return HardwareFault(place, _fault_line(text))
    if collective:
        return LostPeer(f"lost the connection to another rank ({_first_line(text)[:120]})")
    return None


def _out_of_memory(memory: str, place: str, text: str, advice: str) -> UserError:
    return UserError(
        f"out of {memory} on {place}: {_first_line(text)}" + (f"; {advice}" if advice else "")
    )


def _classify_os_error(error: OSError, place: str) -> RetryableError | None:
    if error.errno in _FAILED_DEVICES:
        file = f": {error.filename}" if error.filename else ""
        return HardwareFault(place, f"{error.strerror}{file}")
    if isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError):
        return LostPeer(f"a connection was lost ({_first_line(str(error))[:120]})")
    if error.errno in _FAILED_CONNECTIONS:
        return LostPeer(f"a connection was lost ({_first_line(str(error))[:120]})")
    return None


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:_LINE_LENGTH] if lines else "no message"


def _fault_line(text: str) -> str:
    """Returns the first line, and NCCL's "Last error", which names the device or the peer."""
    last = re.search(r"Last error:\s*(.+)", text)
    first = _first_line(text)
    return (
        f"{first} ({last[1].strip()[:_LINE_LENGTH]})"
        if last and last[1].strip() not in first
        else first
    )
