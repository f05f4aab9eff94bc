"""A lock on a file that the operating system holds for a process and gives up with it, whatever ends the process."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
# Windows keeps others from reading what is locked, and the name of the holder is at the start.
_FAR = 2**30


class LockedError(RuntimeError):
    """Somebody else has the lock; the message is who."""


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock on a file, which is made and stays; its content is the holder, for others to read.

    Where the file system knows no locks, nobody is kept out.

    Raises:
        LockedError: another process, or another place in this one, holds it.
    """
    # not "w": what the holder wrote must stay; not "a": it would not be written over
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _TAKEN:
                raise LockedError(file.read().strip() or "another process") from error
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        # closing the file gives the lock back
        yield


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(file.fileno(), 0, os.SEEK_SET)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
