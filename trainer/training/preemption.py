"""Stops all ranks at the same step if any rank receives SIGTERM."""

from typing import Any

import torch
import torch.distributed as dist


class PreemptionSignal:
    """Flag that any rank received SIGTERM, known to all ranks at the end of the same step.

    The flag is all-reduced asynchronously on the CPU while the step runs, so it costs no GPU
    synchronization.
    """

    def __init__(self) -> None:
        self.received = False
        """Whether this rank received the signal."""
        self._group: Any = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None

    def receive(self, number: int) -> None:
        """Record that this rank received the signal ``number`` (a signal handler)."""
        self.received = True

    def start_all_reduce(self) -> None:
        """Start the all-reduce of the flag. Call before each step."""
        self._flag.fill_(self.received)
        self._work = (
            dist.all_reduce(self._flag, group=self._group, async_op=True) if self._group else None
        )

    def any_rank_received(self) -> bool:
        """Return whether any rank had received the signal when the step began.

        Call after each step. All ranks must take part.
        """
        if self._work is not None:
            self._work.wait()
        return bool(self._flag.item())
