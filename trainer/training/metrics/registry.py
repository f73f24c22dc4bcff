"""Registry of the metrics that a run logs every ``train.log_every_steps``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.engine.engine import Engine
from trainer.training.metrics.meter import TrainState


@dataclass(frozen=True)
class MetricInputs:
    """What a metric is computed from.

    ``engine`` has just done step ``state.steps``. A metric may read both and must change neither.
    """

    engine: Engine
    state: TrainState


Metric = Callable[[MetricInputs], Mapping[str, float]]
"""Returns values by name; none if there is no value.

All ranks call it after the same step, so it may communicate. The values of rank 0 are logged.
"""

_METRICS: list[Metric] = []


def metric(function: Metric) -> Metric:
    """Decorator that logs what ``function`` returns."""
    _METRICS.append(function)
    return function


def compute_metrics(inputs: MetricInputs) -> dict[str, float]:
    """Return the values of all metrics. Raises ValueError if two of them have the same name."""
    values: dict[str, float] = {}
    for function in _METRICS:
        new = function(inputs)
        if repeated := values.keys() & new.keys():
            raise ValueError(f"two metrics have the name {', '.join(sorted(repeated))}")
        values |= new
    return values
