"""The only file that uses internals of DeepSpeed: names that its documentation does not promise.

``check_installation`` and ``check_engine`` compare the installed version with the tables here
before training starts. An engine's ``optimizer`` is one of five classes, which `OptimizerKind`
lists; the functions here take it as it is.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.dependencies.process_patches import enter, log_level, on_undo, set_attribute, set_item
from trainer.dependencies.required_attributes import missing_in, require_attributes

MODULE_ATTRIBUTES = {
    "deepspeed.accelerator": ("get_accelerator", "set_accelerator"),
    "deepspeed.accelerator.cpu_accelerator": ("CPU_Accelerator",),
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.bf16_optimizer": ("BF16_Optimizer",),
    "deepspeed.runtime.engine": ("DeepSpeedEngine",),
    "deepspeed.runtime.fp16.loss_scaler": ("DynamicLossScaler",),
    "deepspeed.runtime.fp16.unfused_optimizer": ("FP16_UnfusedOptimizer",),
    "deepspeed.runtime.pipe.engine": ("PipelineEngine",),
    "deepspeed.runtime.pipe.module": ("PipelineModule",),
    "deepspeed.runtime.pipe.schedule": ("BackwardPass",),
    "deepspeed.runtime.pipe.topology": ("PipelineParallelGrid",),
    "deepspeed.runtime.zero.stage3": ("DeepSpeedZeroOptimizer_Stage3",),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "DeepSpeedZeroOptimizer",
        "GradPartitionBufferGroup",
        "all_gather_dp_groups",
    ),
    "deepspeed.utils": ("logger", "set_full_hp_param"),
}
"""Names that Convoy imports from DeepSpeed's internal modules."""

OBJECT_ATTRIBUTES = {
    "CPU_Accelerator": ("is_fp16_supported", "supported_dtypes"),
    "DeepSpeedEngine": (
        "clip_fp32_gradients",
        "device",
        "enable_backward_allreduce",
        "get_global_grad_norm",
        "optimizer",
        "zero_grad",
    ),
    "PipelineEngine": ("_INSTRUCTION_MAP", "grid", "is_first_stage", "loss", "pipe_buffers"),
    "PipelineModule": ("stage_id",),
    "PipelineParallelGrid": (
        "get_data_parallel_group",
        "get_pipe_parallel_group",
        "stage_to_global",
    ),
    "FP16_UnfusedOptimizer": ("fp16_groups", "fp32_groups", "optimizer", "overflow"),
    "BF16_Optimizer": (
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
        "optimizer",
        "overflow",
    ),
    "DeepSpeedZeroOptimizer": (
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
        "_link_all_hp_params",
        "_update_model_bit16_weights",
        "_update_scale",
        "averaged_gradients",
        "bit16_groups_flat",
        "loss_scaler",
        "optimizer",
        "overflow",
        "parallel_partitioned_bit16_groups",
        "real_dp_process_group",
        "refresh_fp32_params",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "scaled_global_norm",
        "single_partition_of_fp32_groups",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "_update_scale",
        "fp32_partitioned_groups_flat",
        "loss_scaler",
        "optimizer",
        "overflow",
    ),
    "DynamicLossScaler": (
        "cur_hysteresis",
        "cur_iter",
        "cur_scale",
        "last_overflow_iter",
        "update_scale",
    ),
}
"""Attributes that Convoy uses, by the class whose instances, or instances of a subclass, have them.

DeepSpeed sets many of them in ``__init__`` only, so they are checked on the objects.
"""

OptimizerKind = Enum("OptimizerKind", ["PLAIN", "UNFUSED", "BF16", "ZERO_1_2", "ZERO_3"])
"""How an engine's optimizer stores fp32 weights and optimizer state.

``PLAIN``: torch's optimizer itself, which updates the module's parameters (fp32, ZeRO 0).
``UNFUSED``: one fp32 copy per weight (bf16, ZeRO 0). ``BF16``: the same with pipeline stages, whose
copies are flat partitions. ``ZERO_1_2``, ``ZERO_3``: flat partitions of each parameter group.
"""

PARAMETER_ATTRIBUTES = {
    OptimizerKind.PLAIN: (),
    OptimizerKind.UNFUSED: (),
    OptimizerKind.BF16: ("_hp_mapping",),
    OptimizerKind.ZERO_1_2: ("_hp_mapping", "set_full_hp_param"),
    OptimizerKind.ZERO_3: ("ds_id", "ds_process_group", "ds_tensor"),
}
"""Attributes that DeepSpeed gives each parameter.

Without ``_hp_mapping`` and ``ds_id``, its functions for full tensors silently do nothing.
"""

SHARED_MEMORY_OP = "deepspeed_shm_comm"
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def check_installation() -> None:
    """Check that the installed DeepSpeed has every module and name of MODULE_ATTRIBUTES.

    Raises UserError that names what is missing and the installed version.
    """
    for name, attributes in MODULE_ATTRIBUTES.items():
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            raise missing_in("deepspeed", f"there is no module {error.name!r}") from None
        require_attributes("deepspeed", module, attributes)


def check_object(value: Any) -> None:
    """Check an object of DeepSpeed against OBJECT_ATTRIBUTES. Raises UserError."""
    for kind in type(value).__mro__:
        require_attributes("deepspeed", value, OBJECT_ATTRIBUTES.get(kind.__name__, ()))


def check_engine(engine: Any) -> None:
    """Check an engine and all of its objects that Convoy uses. Raises UserError."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    check_object(engine)
    check_object(engine.module)
    check_object(engine.optimizer)
    if isinstance(engine, PipelineEngine):
        check_object(engine.grid)
    kind = optimizer_kind(engine.optimizer)
    if kind in (OptimizerKind.ZERO_1_2, OptimizerKind.ZERO_3):
        check_object(engine.optimizer.loss_scaler)
    for parameter in engine.module.parameters():
        require_attributes("deepspeed", parameter, PARAMETER_ATTRIBUTES[kind])


# --- process-wide settings ------------------------------------------------------------------------


def import_deepspeed(allow_fp16_on_cpu: bool) -> None:
    """Import DeepSpeed quietly, check it, and change the defaults that do not suit Convoy.

    The changes are process-wide until ``undo_patches``. ``allow_fp16_on_cpu`` lets DeepSpeed train
    with fp16 without a GPU.
    """
    if not torch.cuda.is_available() and "DS_ACCELERATOR" not in os.environ:
        set_item(os.environ, "DS_ACCELERATOR", "cpu")
    enter(log_level("DeepSpeed", logging.WARNING))
    with _absent("mlflow"):  # DeepSpeed's autotuner imports it: 1 s and 100 MB per rank
        check_installation()
    from deepspeed.utils import logger

    # it warns about every optimizer that is not DeepSpeed's
    enter(log_level(logger.name, logging.ERROR))
    _disable_shared_memory_op()
    if allow_fp16_on_cpu and not torch.cuda.is_available():
        _allow_fp16_on_cpu()


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Make ``import package`` fail in this context, unless it was imported before."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules[package] is None:
            del sys.modules[package]


def _disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory reduction at startup.

    A pod has no compiler, and gloo does not need it. DeepSpeed has no setting for this.
    """
    from deepspeed.ops import __compatible_ops__

    # only the CPU accelerator has it
    if SHARED_MEMORY_OP not in __compatible_ops__ and not torch.cuda.is_available():
        raise missing_in("deepspeed", f"__compatible_ops__ has no key {SHARED_MEMORY_OP!r}")
    set_item(__compatible_ops__, SHARED_MEMORY_OP, False)


def _allow_fp16_on_cpu() -> None:
    """Replace DeepSpeed's CPU accelerator, which refuses fp16."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class HalfAccelerator(CPU_Accelerator):  # type: ignore[misc]
        """CPU accelerator with fp16: slow, but it allows testing every fp16 path without a GPU."""

        def is_fp16_supported(self) -> bool:
            return True

        def supported_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.float16, torch.bfloat16]

    require_attributes("deepspeed", CPU_Accelerator, OBJECT_ATTRIBUTES["CPU_Accelerator"])
    on_undo(set_accelerator, get_accelerator())
    set_accelerator(HalfAccelerator())


# --- engines --------------------------------------------------------------------------------------


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Create a DeepSpeed engine and check it. Raises UserError if an attribute is missing."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    check_engine(engine)
    return engine


def disable_gradient_averaging(engine: Any) -> None:
    """Keep the engine from averaging gradients over ranks; the caller does it.

    DeepSpeed has only a context for it, ``no_sync``, which ZeRO does not support.
    """
    engine.enable_backward_allreduce = False


def replace_clipping(engine: Any, clip: Callable[[], None]) -> None:
    """Clip with ``clip``, where the engine itself would clip the module's gradients.

    It does so for a PLAIN optimizer only, and counts only its own pipeline stage.
    """
    engine.clip_fp32_gradients = clip


def keep_gradients_after_step(engine: Any) -> None:
    """Keep the engine from releasing gradients after a step, where it has a PLAIN optimizer."""
    engine.zero_grad = lambda: None


def free_outputs_after_backward(engine: Any) -> None:
    """Free the outputs of the last pipeline stage after each backward pass.

    Through these outputs, DeepSpeed keeps their inputs and the gradients of those for some more
    micro-batches. Its schedule of instructions has no hook.
    """
    from deepspeed.runtime.pipe.schedule import BackwardPass

    backward = engine._INSTRUCTION_MAP[BackwardPass]

    def and_free(engine: Any, buffer_id: int) -> None:
        backward(engine, buffer_id)
        engine.pipe_buffers["outputs"][buffer_id] = None
        engine.loss = engine.loss.detach()

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {BackwardPass: and_free}


# --- optimizers -----------------------------------------------------------------------------------


def optimizer_kind(optimizer: Any) -> OptimizerKind:
    """Return how an engine's optimizer stores its state. Raises UserError for an unknown class."""
    kinds = _optimizer_kinds()
    for known, kind in kinds.items():
        if isinstance(optimizer, known):
            return kind
    known_names = ", ".join(known.__name__ for known in kinds)
    raise missing_in("deepspeed", f"{type(optimizer).__name__} is none of {known_names}")


@cache  # each step asks several times
def _optimizer_kinds() -> dict[type, OptimizerKind]:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return {
        torch.optim.Optimizer: OptimizerKind.PLAIN,
        FP16_UnfusedOptimizer: OptimizerKind.UNFUSED,
        BF16_Optimizer: OptimizerKind.BF16,
        DeepSpeedZeroOptimizer: OptimizerKind.ZERO_1_2,
        DeepSpeedZeroOptimizer_Stage3: OptimizerKind.ZERO_3,
    }


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer, which DeepSpeed's optimizer calls."""
    plain = optimizer_kind(optimizer) is OptimizerKind.PLAIN
    inner: torch.optim.Optimizer = optimizer if plain else optimizer.optimizer
    return inner


def gradients_overflowed(optimizer: Any) -> bool:
    """Return whether the last step was skipped, because gradients were NaN or Inf in fp16."""
    return optimizer_kind(optimizer) is not OptimizerKind.PLAIN and bool(optimizer.overflow)


def fp32_tensors(optimizer: Any) -> list[Tensor]:
    """Return this rank's fp32 weights as torch's optimizer sees them: flat partitions, or one each.

    With ZERO_3 they are not in its parameter groups between two steps.
    """
    if optimizer_kind(optimizer) is OptimizerKind.ZERO_3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return [
        tensor for group in inner_optimizer(optimizer).param_groups for tensor in group["params"]
    ]


def fp32_copies(optimizer: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the 16-bit parameters of an UNFUSED optimizer, each with its fp32 copy; else none."""
    if optimizer_kind(optimizer) is not OptimizerKind.UNFUSED:
        return []
    return [
        pair
        for parameters, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for pair in zip(parameters, copies, strict=True)
    ]


def link_optimizer_state(optimizer: Any) -> None:
    """Link each parameter to its part of the flat optimizer state, for DeepSpeed's full tensors.

    DeepSpeed does this in the first step, and only once. With ZERO_3 it needs no links.
    """
    if optimizer_kind(optimizer) in (OptimizerKind.BF16, OptimizerKind.ZERO_1_2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def zero3_shard(parameter: Any) -> tuple[int, Any]:
    """Return the elements of each rank's shard of a parameter under ZERO_3, and its process group.

    The last shard is padded.
    """
    return parameter.ds_tensor.numel(), parameter.ds_process_group


# --- loss scale -----------------------------------------------------------------------------------


def loss_scale(optimizer: Any) -> float:
    """Return the factor by which an fp16 optimizer's gradients are too large."""
    return float(optimizer.loss_scaler.cur_scale)


def loss_scaler_state(optimizer: Any) -> dict[str, float]:
    """Return the state of the dynamic loss scale; empty if the optimizer has none.

    DeepSpeed saves it only as a pickle of the whole object.
    """
    scaler = _dynamic_loss_scaler(optimizer)
    return {} if scaler is None else {name: getattr(scaler, name) for name in _SCALER_STATE}


def set_loss_scaler_state(optimizer: Any, state: Mapping[str, float]) -> None:
    """Set the state that ``loss_scaler_state`` returned; ignored without a dynamic loss scale."""
    scaler = _dynamic_loss_scaler(optimizer)
    for name, value in state.items() if scaler is not None else ():
        setattr(scaler, name, value)


def _dynamic_loss_scaler(optimizer: Any) -> Any | None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    if optimizer_kind(optimizer) not in (OptimizerKind.ZERO_1_2, OptimizerKind.ZERO_3):
        return None
    scaler = optimizer.loss_scaler
    return scaler if isinstance(scaler, DynamicLossScaler) else None


def separate_loss_scale_growth(optimizer: Any) -> Callable[[], None]:
    """Let a step of a ZeRO optimizer only reduce the loss scale, after an overflow.

    Returns the function that counts a step without overflow and increases the scale if it is time.
    DeepSpeed has no setting for when in a step it does this.
    """
    update: Callable[[bool], None] = optimizer.loss_scaler.update_scale

    def reduce_only(has_overflow: bool = False) -> None:
        if has_overflow:
            update(True)

    optimizer._update_scale = reduce_only
    return partial(update, False)


# --- ZeRO 1 and 2 ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlatGroup:
    """One parameter group of ZeRO 1 or 2, whose tensors are flat and padded at their end.

    ``weights`` are those of all ranks, in the training dtype, and ``partitions`` its views, one per
    rank. ``fp32_partition`` is this rank's. ``offsets`` holds the first element of each parameter
    in ``weights``, in ascending order.
    """

    offsets: dict[nn.Parameter, int]
    weights: Tensor
    partitions: Sequence[Tensor]
    fp32_partition: Tensor
    process_group: Any


def flat_groups(optimizer: Any) -> list[FlatGroup]:
    """Return the groups of a ZERO_1_2 optimizer. DeepSpeed gives access to single tensors only."""
    return [
        FlatGroup(dict(zip(parameters, offsets, strict=True)), *tensors)
        for parameters, offsets, *tensors in zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.bit16_groups_flat,
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.single_partition_of_fp32_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
    ]


def gradient_partitions(optimizer: Any) -> Iterator[Tensor]:
    """Yield this rank's part of the averaged gradients of ZERO_1_2, which the next step uses."""
    for partition in optimizer.averaged_gradients.values():
        yield from partition


def set_averaged_gradient(optimizer: Any, group: int, gradient: Tensor) -> None:
    """Let the next step of ZERO_1_2 use ``gradient``, flat, for its partition of a group."""
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

    optimizer.averaged_gradients[group] = GradPartitionBufferGroup([gradient], gradient)


def replace_gradient_norm(optimizer: Any, norm: Callable[[], Tensor]) -> None:
    """Let ZERO_1_2 clip by ``norm()``, which includes the loss scale."""
    optimizer.scaled_global_norm = norm


def link_fp32_weights(optimizer: Any) -> None:
    """Link each parameter to its part of the fp32 partition again, after that has moved.

    DeepSpeed does this only when it is constructed or loads a checkpoint.
    """
    optimizer._link_all_hp_params()


def copy_weights_to_fp32(optimizer: Any) -> None:
    """Set the fp32 partitions of ZERO_1_2 to the weights in the training dtype."""
    optimizer.refresh_fp32_params()


def keep_weight_layout(optimizer: Any) -> None:
    """Keep ZERO_1_2 from giving each parameter the default memory layout again in each step."""
    optimizer._update_model_bit16_weights = lambda group: None


def replace_weight_setter(
    parameter: nn.Parameter, set_full: Callable[[nn.Parameter, Tensor, str | None], None]
) -> None:
    """Let DeepSpeed set full tensors of a parameter by ``set_full(parameter, value, slot)``."""
    parameter.set_full_hp_param = MethodType(set_full, parameter)  # type: ignore[attr-defined]


def set_full_tensor(parameter: nn.Parameter, value: Tensor, slot: str | None) -> None:
    """Copy this rank's part of ``value`` to the fp32 weight, or to one slot of its state.

    ``value`` is in the order of the flat buffers. This is what ``replace_weight_setter`` replaces.
    """
    from deepspeed.utils import set_full_hp_param

    set_full_hp_param(parameter, value, slot)


def replace_weight_gathering(
    gather: Callable[[Sequence[Sequence[Tensor]], Sequence[Any]], None],
) -> None:
    """Let ZERO_1_2 distribute updated weights by ``gather(partitions, process_groups)``.

    ``partitions`` holds those of all ranks for each parameter group, as in `FlatGroup`.

    The replacement is process-wide until ``undo_patches``, because ZeRO calls a function of its
    module.
    """
    from deepspeed.runtime.zero import stage_1_and_2

    def all_gather_dp_groups(
        partitioned_param_groups: Sequence[Sequence[Tensor]],
        dp_process_group: Sequence[Any],
        **_: Any,
    ) -> None:
        gather(partitioned_param_groups, dp_process_group)

    set_attribute(stage_1_and_2, "all_gather_dp_groups", all_gather_dp_groups)
