"""Standard streams that cannot end a run: closed streams, hung-up terminals and broken pipes."""

import errno
import io
import os
import sys
from typing import Any

_CANNOT_BE_WRITTEN = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ENOSPC, errno.EDQUOT)


class _LossyOutput(io.FileIO):
    """A file descriptor whose writes succeed on a closed pipe, a hung-up terminal or a full disk.

    Data that cannot be written is discarded.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _CANNOT_BE_WRITTEN:
                raise
            return len(data)


def secure_standard_streams() -> None:
    """Opens closed standard streams on /dev/null and makes output errors harmless.

    Output that nobody reads or that cannot be encoded does not raise. A closed descriptor would be
    reused by the next opened file, such as a checkpoint or a connection, and everything that is
    printed would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _secured(sys.stdout, 1)
    sys.stderr = _secured(sys.stderr, 2)


def _secured(stream: object, descriptor: int) -> io.TextIOWrapper:
    old = stream if isinstance(stream, io.TextIOWrapper) else None
    raw = getattr(old.buffer, "raw", old.buffer) if old else None
    if old is not None and isinstance(raw, _LossyOutput):
        return old
    if old is not None:
        old.flush()
    buffered: Any = io.BufferedWriter(_LossyOutput(descriptor, "w", closefd=False))
    return io.TextIOWrapper(
        buffered,
        encoding=old.encoding if old else "utf-8",
        errors="backslashreplace",
        line_buffering=old.line_buffering or old.write_through if old else True,
        write_through=old.write_through if old else False,
    )
