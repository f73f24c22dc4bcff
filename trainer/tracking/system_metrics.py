"""Logs CPU, memory, disk, network and GPU metrics of rank 0's machine."""

import threading
import time
from contextlib import suppress
from typing import Any

from trainer.tracking.spool.spool import start_ms
from trainer.tracking.tracker import Tracker


class SystemMetrics:
    """Logs system metrics every ``interval`` seconds, under the names that MLflow uses.

    Steps count intervals since the run's first start, so that a resumed run continues the sequence.
    """

    def __init__(self, tracker: Tracker, interval: float = 10.0) -> None:
        self._tracker = tracker
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _work(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no GPU, or none that NVML supports
            monitors.append(GPUMonitor())
        started = start_ms(self._tracker.run_key or "0")
        step = -1
        while True:
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics = monitor.aggregate_metrics()
                values |= {f"system/{name}": value for name, value in metrics.items()}
                monitor.clear_metrics()
            step = max(step + 1, int((time.time() * 1000 - started) // (self._interval * 1000)))
            self._tracker.log_metrics(values, step)
            if self._stop.wait(self._interval):
                return
