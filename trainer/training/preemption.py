"""SIGTERM on any rank stops all ranks at the same step."""

from typing import Any

import torch
import torch.distributed as dist


class PreemptionSignal:
    """SIGTERM, heard by all ranks at the end of the same step, whichever of them was told.

    The question goes round beside the step's own work, through the CPU, so that it costs a GPU no synchronization.
    """

    def __init__(self) -> None:
        self.told = False
        """This rank was."""
        self._group: Any = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._answer = torch.zeros(1)
        self._round: dist.Work | None = None

    def tell(self, number: int) -> None:
        """This rank received the signal ``number``."""
        self.told = True

    def ask(self) -> None:
        """Before a step."""
        self._answer.fill_(self.told)
        self._round = dist.all_reduce(self._answer, group=self._group, async_op=True) if self._group else None

    def agreed(self) -> bool:
        """After it: whether any rank had been told when the step began. All ranks take part."""
        if self._round is not None:
            self._round.wait()
        return bool(self._answer.item())
