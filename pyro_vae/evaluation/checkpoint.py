"""A checkpoint: a folder with the results of the finished batches, valid at any moment, also after kill -9.

The manifest describes the call that made it. Each shard is a file with the batches that were finished since the shard
before. All files are written under a temporary name and renamed, and contain a SHA-256 of their content.
"""

import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptionError, RecordFileError
from ..noise import fresh_seed
from ..records import from_arrays, load_value, save_value, to_arrays
from .digests import about_call
from .found import Batch, Found, add_words, in_words
from .lock import WRITABLE, locked
from .processes import check_agreed, rank_0_first, rank_and_size
from .shards import Shards

FORMAT = 1  # of the folder; raised when older versions of the package would misread it
MANIFEST, LOCK = "manifest.npz", "lock"
SHARD = "batches-{first:08d}-{token}.npz"
PACKAGES = ("pyro_vae", "pyro-ppl", "torch")
# Seconds between two shards: a forced write must not slow down batches of milliseconds. The interval grows, so that long
# runs have at most thousands of files.
PAUSE, SHARE = 1.0, 1e-3
GO_ON = "Make the same call again to continue from the checkpoint"
OTHERWISE = "Make the same call as before, pass another path, or delete the folder to begin again"


class Checkpoint:
    """The results of the batches of one call, in a folder.

    The processes of a group each have one for the same folder and write separate files. Each knows all results.

    :param first: make the folder if there is none, and clean it up: for rank 0, before the others.
    :ivar seed: seed of the call; drawn once if none was given, and stored.
    """

    def __init__(self, folder: Path, call: Mapping[str, str], seed: int | None, first: bool = True) -> None:
        self.folder = folder
        self._pending: list[Found] = []
        # The first batch is written at once, so that errors of writing are found early.
        self._start, self._due = time.monotonic(), 0.0
        if first:
            for left in folder.glob(".*.tmp"):  # a file of a process that was killed while it wrote
                left.unlink(missing_ok=True)
        elif not (folder / MANIFEST).exists():
            raise CheckpointError(
                f"'{folder}' is not the folder of rank 0, which has made a checkpoint there: all ranks must see the same "
                "folder. Pass one on a disk that they share"
            )
        about = {**call, **{f"version of {name}": number for name, number in versions().items()}, "seed": repr(seed)}
        manifest = self._manifest(about, seed)
        self.seed, self.run = manifest["seed"], manifest["run"]
        self._shards = Shards(sorted(folder.glob("batches-*.npz")), self._read)
        self._on_disk = dict(self._shards.errors)

    @property
    def num_batches(self) -> int:
        return len(self._on_disk)

    def take(self, batch: Batch, digest: str, on_error: str | None) -> Found | None:
        """The stored result of a batch, returned once. A skipped batch counts as stored where batches may be skipped.

        :raises CheckpointError: if the batch had other data when the checkpoint was made.
        """
        kept = self._shards.take(batch.number)
        if kept is not None and kept.digest != digest:
            raise CheckpointError(
                f"{in_words(batch)} has other data than when the checkpoint '{self.folder}' was made: a call can "
                "continue only with the same batches in the same order. Pass the same loader, or another path. For a "
                "loader that shuffles, use seed=, or give it a generator with a fixed seed"
            )
        return None if kept is not None and kept.error and on_error != "skip" else kept

    def add(self, found: Found) -> None:
        """Store the result of a batch in the next shard, if it is new."""
        if found.number in self._on_disk and (found.error or not self._on_disk[found.number]):
            return
        self._on_disk[found.number] = found.error
        self._pending.append(found)
        if time.monotonic() >= self._due:
            self.write()

    def set_known(self, found: Found) -> None:
        """Count a batch that another process may have computed."""
        self._shards.drop(found.number)
        self._on_disk.setdefault(found.number, found.error)

    def check_all_taken(self, num_batches: int) -> None:
        """:raises CheckpointError: if the loader has ended before the batches of the checkpoint."""
        if self._shards.last is not None:
            raise CheckpointError(
                f"the loader ended after {num_batches} batches, but the checkpoint '{self.folder}' holds batch "
                f"{self._shards.last}: pass the same loader. An exhausted iterator must be created again"
            )

    def write(self) -> None:
        """Write all results that are not yet on the disk."""
        if self._pending:
            name = SHARD.format(first=self._pending[0].number, token=secrets.token_hex(8))
            self._save(name, {"run": self.run, "batches": [vars(found) for found in self._pending]})
            self._pending = []
        self._due = time.monotonic() + max(PAUSE, SHARE * (time.monotonic() - self._start))

    def how_to_go_on(self) -> str:
        held = f", which holds {self.num_batches} batches" if self.num_batches else ""
        return f"{GO_ON} '{self.folder}'{held}"

    def _manifest(self, about: Mapping[str, str], seed: int | None) -> Any:
        path = self.folder / MANIFEST
        if not path.exists():
            others = sorted(one.name for one in self.folder.iterdir() if one.name != LOCK)
            if others:
                raise CheckpointError(
                    f"'{self.folder}' is not a checkpoint: it has no {MANIFEST} and holds {others[0]}. Pass a new or "
                    "an empty folder"
                )
            manifest = {"format": FORMAT, "seed": fresh_seed() if seed is None else seed, "run": secrets.token_hex(8)}
            self._save(MANIFEST, {**manifest, "call": dict(about)})
            return manifest
        manifest = self._load(path, "Delete the folder to begin again")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"the checkpoint '{self.folder}' has format {manifest.get('format')}, expected {FORMAT}: it was made by "
                f"another version of pyro_vae. {OTHERWISE}"
            )
        check_same_call(self.folder, manifest["call"], about)
        return manifest

    def _read(self, path: Path) -> list[Found]:
        remedy = "Delete that file; then only its batches are run again"
        shard = self._load(path, remedy)
        if shard.get("run") != self.run:
            raise CheckpointError(f"'{path}' belongs to another checkpoint than its {MANIFEST}. {remedy}")
        return [Found(**one) for one in shard["batches"]]

    def _load(self, path: Path, remedy: str) -> Any:
        try:
            return load_value(path)
        except RecordFileError as error:
            raise CheckpointError(f"a file of the checkpoint cannot be read: {error}. {remedy}") from error

    def _save(self, name: str, value: Any) -> None:
        try:
            save_value(self.folder / name, value)
        except RecordFileError as error:
            raise CheckpointError(
                f"a file of the checkpoint cannot be written: {error}. Once there is room, the same call continues"
            ) from error


def storable(result: Any) -> Any:
    """A result as it is read from a file (tensors on the CPU), so that computed and read results are the same.

    :raises CheckpointError: if it cannot be stored in a file.
    """
    try:
        return from_arrays(*to_arrays(result))
    except RecordFileError as error:
        raise CheckpointError(f"a result cannot be stored in a checkpoint: {error}, or omit checkpoint=") from error


@contextmanager
def checkpoint_at(path: str | PathLike[str] | None, of: Any, seed: int | None) -> Iterator[Checkpoint | None]:
    """The checkpoint in this folder, created if there is none; `None` without a path. The folder is locked for other calls.

    On exit, also after an error, all results are on the disk. The error says how to continue.

    :param of: the source of the results, an estimator.
    """
    if path is None:
        yield None
        return
    if not isinstance(path, (str, PathLike)):
        raise OptionError(f"checkpoint must be the path of a folder, or None, got {path!r}: pass a string or a pathlib.Path")
    folder, is_first = Path(path), rank_and_size()[0] == 0
    with ExitStack() as stack:

        def opened() -> Checkpoint:
            if is_first:
                make_folder(folder)
                stack.enter_context(locked(folder / LOCK))
            return Checkpoint(folder, about_call(of), seed, is_first)

        checkpoint = rank_0_first("the checkpoint", opened)
        check_agreed({"checkpoint": checkpoint.run})
        try:
            yield checkpoint
        except CheckpointError:
            with suppress(CheckpointError):
                checkpoint.write()
            raise
        except BaseException as error:
            with suppress(CheckpointError):
                checkpoint.write()
                if GO_ON not in str(error):  # already added where one call is a part of another
                    add_words(error, after=checkpoint.how_to_go_on())
            raise
        checkpoint.write()


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder '{folder}' for a checkpoint: {error.strerror}. {WRITABLE}") from error


def check_same_call(folder: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise for a checkpoint of another call, with the differences."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not names:
        return
    said = [difference(name, then.get(name), now.get(name)) for name in names[:3]]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    raise CheckpointError(f"the checkpoint '{folder}' was made by another call: {', '.join(said)}{more}. {OTHERWISE}")


def difference(name: str, then: str | None, now: str | None) -> str:
    if then is None or now is None:
        return f"{name} was {'not there' if then is None else 'there'} and {'is' if then is None else 'is not'} now"
    if len(then) == len(now) == 64:  # digests
        return f"{name} is another one"
    return f"{name} was {then} and is {now}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    return {"python": ".".join(platform.python_version_tuple()[:2]), **{name: version_of(name) for name in PACKAGES}}


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"
