"""The number of files that this process and its ranks may open."""

import resource

from trainer.errors import UserError

_NEEDED = 256  # libraries, shards, connections and pipes of a rank that reads from an object store
_ENOUGH = 65_536


def raise_open_file_limit() -> None:
    """Raise the soft limit towards the hard one. Raises UserError if a rank cannot work within the
    hard one.
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
