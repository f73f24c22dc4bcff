"""Operating system errors that a person must fix: a retry cannot help a full or read-only disk."""

import errno
import os
import re

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_OF_A_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
}
_IN_TEXT = re.compile(r"\(os error (\d+)\)")  # in errors of object_store and safetensors


def disk_fault(error: BaseException) -> str | None:
    """Describes a full, read-only or forbidden disk or path in a few words.

    Returns None for any other error.
    """
    number = error.errno if isinstance(error, OSError) else None
    of_a_network = "error sending request" in str(error)
    if number is None and not of_a_network and (found := _IN_TEXT.search(str(error))):
        number = int(found[1])
    if number == errno.EFBIG:
        return "the file is larger than the limit (ulimit -f)"
    if number in _OF_THE_DISK or number in _OF_A_PATH:
        return os.strerror(number)
    return None
