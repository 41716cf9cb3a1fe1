"""One process at a time: a lock on a file, which the system gives back when its process ends, by kill -9 too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and files are whole or absent all the same
    fcntl = None  # type: ignore[assignment]

WRITABLE = "Pass a path in a folder that exists and may be written"
# The lock of the system is one of processes: what this one has must be known here. A forked process has none of it.
_held: set[tuple[int, str]] = set()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file at this path, which is made where there is none.

    The lock belongs to the process, not to an open file: workers of a DataLoader, which are forked from it and outlive it by
    some seconds after kill -9, do not keep it.

    :raises CheckpointError: if another call holds it, or the file cannot be written.
    """
    mine = os.getpid(), os.path.realpath(path)
    if mine in _held:
        raise in_use(path)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}' for a checkpoint: {error.strerror}. {WRITABLE}") from error
    try:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise in_use(path) from error
            except OSError:  # a file system without locks
                pass
        _held.add(mine)
        try:
            yield
        finally:
            _held.discard(mine)
    finally:
        with suppress(OSError):
            os.close(file)  # gives the lock back


def in_use(path: Path) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint '{path.parent}' is in use by another call: wait until it ends, or pass another path. Processes "
        "that share one call out among them belong to a group of torch.distributed"
    )
