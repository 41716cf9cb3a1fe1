"""A lock on a file for one process at a time; the system releases it when the process ends, also by kill -9."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked; files are still complete or absent
    fcntl = None  # type: ignore[assignment]

WRITABLE = "Pass a path in a folder that exists and may be written"
# The lock of the system belongs to a process, so the locks of this process are recorded here. A forked process has none.
_held: set[tuple[int, str]] = set()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the file at this path, which is created if there is none.

    The lock belongs to the process, not to an open file: workers of a DataLoader, which are forked from it and may live some
    seconds longer after kill -9, do not hold it.

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
            os.close(file)  # releases the lock


def in_use(path: Path) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint '{path.parent}' is in use by another call: wait until it ends, or pass another path. To share "
        "one call among processes, use a group of torch.distributed"
    )
