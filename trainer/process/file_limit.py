"""The limit on open files of this process and its ranks."""

import resource

from trainer.errors import UserError

# Libraries, shards, connections and pipes of a rank that reads from an object store.
_NEEDED = 256
_ENOUGH = 65_536


def raise_open_file_limit() -> None:
    """Raises the soft limit towards the hard limit.

    Raises UserError if the hard limit is too low for a rank.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if hard != resource.RLIM_INFINITY and hard < _NEEDED:
        raise UserError(
            f"ulimit -n: only {hard} files may be open at once, a rank needs {_NEEDED}; raise "
            "the hard limit"
        )
