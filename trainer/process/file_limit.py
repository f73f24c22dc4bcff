"""The limit on open files of this process and its ranks."""

import resource

from trainer.errors import UserError

# Libraries, shards, connections and pipes of a rank that reads from an object store.
_MINIMUM = 256
_TARGET = 65_536


def raise_open_file_limit() -> None:
    """Raises the soft limit towards the hard limit.

    Raises UserError if the hard limit is too low for a rank.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _TARGET if hard == resource.RLIM_INFINITY else min(hard, _TARGET)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    if hard != resource.RLIM_INFINITY and hard < _MINIMUM:
        raise UserError(
            f"ulimit -n: the hard limit of {hard} open files is too low; a rank needs {_MINIMUM}; "
            "raise it"
        )
