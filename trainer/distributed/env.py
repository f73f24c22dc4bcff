"""Rank and world size from environment variables."""

from dataclasses import dataclass

from trainer.process.launch_environment import check_rank_environment


@dataclass(frozen=True)
class DistEnv:
    """Rank, world size and local rank of this process."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_env(cls) -> "DistEnv":
        """Read the variables set by the launcher or torchrun; without either this is the only rank.

        Raises UserError for variables that another launcher left behind.
        """
        return cls(*check_rank_environment())

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0
