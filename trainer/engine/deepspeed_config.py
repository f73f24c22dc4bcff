"""What DeepSpeed is told."""

from typing import Any

from trainer.config import OptimizerConfig
from trainer.engine.batch import BatchPlan


def deepspeed_config(batch: BatchPlan, optimizer: OptimizerConfig) -> dict[str, Any]:
    """The engine's own dictionary: data parallelism without partitioning (ZeRO 0), fp32."""
    return {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        "gradient_clipping": optimizer.clip_grad_norm or 0.0,  # left out, it clips every gradient to norm 1
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
