"""The environment variables that give a process its rank."""

from dataclasses import dataclass

from trainer.process.launch_environment import check_rank_environment


@dataclass(frozen=True)
class DistEnv:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> DistEnv:
    """As the launcher or torchrun set it; alone if neither started this process. Raises UserError for leftovers."""
    return DistEnv(*check_rank_environment())
