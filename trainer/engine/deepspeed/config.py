"""What DeepSpeed is told."""

from typing import Any

from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.training.batch_plan import BatchPlan

BUCKET_NUMEL = 4 * 2**20
"""Numbers that DeepSpeed reduces or gathers at once, or one layer's where it has more. Its defaults
of up to 1e9 take 2 GB for a bucket, and let ZeRO 3 keep every network here gathered.
"""
PARAM_PERSISTENCE_THRESHOLD = 100_000
"""ZeRO 3 does not partition weights of fewer numbers than this."""
LOSS_SCALE_WINDOW = 1000
"""Steps without an overflow after which fp16's loss scale is doubled."""


def validate_parallelism(config: RunConfig) -> None:
    """Refuse what cannot work, and what trains without an error and does not learn. Raises
    UserError with every fault.
    """
    stage, optimizer = config.parallel.zero_stage, config.optimizer.name
    faults = []
    if config.precision == "fp16" and stage == 0:
        # engine.backward scales the loss for ZeRO's optimizers alone; FP16_UnfusedOptimizer divides
        # by the scale all the same
        faults.append(
            "parallel.zero_stage: 0 does not learn with precision fp16: DeepSpeed divides its "
            "gradients by a loss scale "
            "that it did not apply; use 1"
        )
    if config.parallel.pipeline_stages > 1 and stage > 1:
        faults.append(
            f"parallel.zero_stage: {stage} does not go with pipeline stages, which need whole "
            "gradients; use 0 or 1"
        )
    if config.parallel.split is not None and config.parallel.pipeline_stages == 1:
        faults.append("parallel.split: needs parallel.pipeline_stages above 1")
    if optimizer in ("lars", "lamb") and (stage > 0 or config.precision != "fp32"):
        faults.append(
            f"optimizer.name: {optimizer} needs the norm of each layer's weights, which ZeRO "
            "and 16-bit precision keep in one flat "
            "piece; use precision fp32 with parallel.zero_stage 0, or another optimizer"
        )
    if faults:
        raise UserError(*faults)


def deepspeed_config(config: RunConfig, batch: BatchPlan) -> dict[str, Any]:
    """The engine's own dictionary."""
    settings: dict[str, Any] = {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm
        or 0.0,  # left out, it clips every gradient to norm 1
        "zero_optimization": _zero_settings(config),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a step
    }
    if (
        config.precision == "bf16"
    ):  # a gradient that is no number stops the run by its loss; looking for it waits for the GPU
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if config.precision == "fp16":  # 0: a dynamic scale (Micikevicius et al. 2018, 3.2)
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": LOSS_SCALE_WINDOW,
        }
    return settings


def _zero_settings(config: RunConfig) -> dict[str, Any]:
    """At stage 1 gradients are averaged in buffers of our own (``gradients.py``) but for pipelines,
    so DeepSpeed needs none.
    """
    settings: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "reduce_bucket_size": BUCKET_NUMEL,
        "allgather_bucket_size": BUCKET_NUMEL,
    }
    if config.parallel.zero_stage == 1 and config.parallel.pipeline_stages == 1:
        settings |= {"contiguous_gradients": False, "overlap_comm": False}
        clips = config.optimizer.clip_grad_norm is not None
        settings["compute_grad_norm"] = clips  # else ``grad_norm.py`` does, when it is logged
    if config.parallel.zero_stage == 3:
        settings |= {
            "stage3_prefetch_bucket_size": BUCKET_NUMEL,
            "stage3_max_reuse_distance": BUCKET_NUMEL,
        }
        settings["stage3_param_persistence_threshold"] = PARAM_PERSISTENCE_THRESHOLD
    return settings
