"""The DeepSpeed configuration of a run."""

from typing import Any

from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.training.batch_plan import BatchPlan
from trainer.training.optimizers.registry import OPTIMIZERS

BUCKET_NUMEL = 4 * 2**20
"""Elements that DeepSpeed reduces or gathers at once, or one layer's if it has more.

DeepSpeed's defaults of up to 1e9 use 2 GB per bucket, and let ZeRO 3 keep every model here
gathered.
"""
PARAM_PERSISTENCE_THRESHOLD = 100_000
"""ZeRO 3 does not partition parameters with fewer elements than this."""
LOSS_SCALE_WINDOW = 1000
"""Steps without overflow after which the fp16 loss scale is doubled."""


def validate_parallelism(config: RunConfig) -> None:
    """Reject configurations that cannot work, or that run without an error and do not learn.

    Raises UserError that lists every problem.
    """
    stage, optimizer = config.parallel.zero_stage, OPTIMIZERS[config.optimizer.name]
    faults = []
    if config.precision == "fp16" and stage == 0:
        # engine.backward scales the loss for ZeRO's optimizers only; FP16_UnfusedOptimizer divides
        # by the scale nevertheless
        faults.append(
            "parallel.zero_stage: 0 cannot train with precision fp16: DeepSpeed divides the "
            "gradients by a loss scale that it did not apply; use 1"
        )
    if config.parallel.pipeline_stages > 1 and stage > 1:
        faults.append(
            f"parallel.zero_stage: {stage} cannot be combined with pipeline stages, which need "
            "full gradients; use 0 or 1"
        )
    if config.parallel.split is not None and config.parallel.pipeline_stages == 1:
        faults.append("parallel.split: needs parallel.pipeline_stages above 1")
    if stage not in optimizer.zero_stages or config.precision not in optimizer.precisions:
        faults.append(
            f"optimizer.name: {optimizer.name} {optimizer.limitation}; use precision "
            f"{' or '.join(optimizer.precisions)} with parallel.zero_stage "
            f"{' or '.join(map(str, optimizer.zero_stages))}, or another optimizer"
        )
    if faults:
        raise UserError(*faults)


def deepspeed_config(config: RunConfig, batch: BatchPlan) -> dict[str, Any]:
    """Return DeepSpeed's configuration dictionary."""
    settings: dict[str, Any] = {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        # if omitted, DeepSpeed clips every gradient to norm 1
        "gradient_clipping": config.optimizer.clip_grad_norm or 0.0,
        "zero_optimization": _zero_settings(config),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        # the throughput timer would synchronize with the GPU twice per step
        "timers": {"throughput": {"enabled": False}},
    }
    # a NaN or Inf gradient stops the run through its loss; checking gradients waits for the GPU
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if config.precision == "fp16":  # 0: dynamic (Micikevicius et al. 2018, 3.2)
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": LOSS_SCALE_WINDOW,
        }
    return settings


def _zero_settings(config: RunConfig) -> dict[str, Any]:
    """Return the ``zero_optimization`` section.

    At stage 1 without pipeline stages, gradients are averaged in our own buffers
    (``grad_reducer.py``), so DeepSpeed needs none.
    """
    settings: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "reduce_bucket_size": BUCKET_NUMEL,
        "allgather_bucket_size": BUCKET_NUMEL,
    }
    if config.parallel.zero_stage == 1 and config.parallel.pipeline_stages == 1:
        settings |= {"contiguous_gradients": False, "overlap_comm": False}
        clips = config.optimizer.clip_grad_norm is not None
        settings["compute_grad_norm"] = clips  # otherwise ``grad_norm.py`` computes it to log it
    if config.parallel.zero_stage == 3:
        settings |= {
            "stage3_prefetch_bucket_size": BUCKET_NUMEL,
            "stage3_max_reuse_distance": BUCKET_NUMEL,
        }
        settings["stage3_param_persistence_threshold"] = PARAM_PERSISTENCE_THRESHOLD
    return settings
