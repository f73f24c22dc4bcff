"""The environment variables that give a process its rank."""

from dataclasses import dataclass

from trainer.process.launch_environment import check_rank_environment


@dataclass(frozen=True)
class DistEnv:
    """This process among all ranks."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_env(cls) -> "DistEnv":
        """As the launcher or torchrun set it; the only rank if neither started this process.

        Raises UserError for variables that another launcher left.
        """
        return cls(*check_rank_environment())

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0
