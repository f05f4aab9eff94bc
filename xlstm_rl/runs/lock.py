"""A lock on a file that the operating system holds for a process and gives up with it, whatever ends the process."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class LockedError(RuntimeError):
    """Somebody else has the lock; the message is who."""


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock on a file, which is made and stays; its content is the holder, for others to read.

    Where the file system knows no locks, nobody is kept out.

    Raises:
        LockedError: another process, or another place in this one, holds it.
        OSError: the file cannot be written.
    """
    # a soft lock would outlast a process that is killed
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise LockedError(_holder(path) or "another process") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        # Windows keeps everybody from what is locked
        with suppress(PermissionError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    with suppress(FileNotFoundError, PermissionError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""
