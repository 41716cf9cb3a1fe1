"""The batches in the files of a checkpoint, read when they are needed."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from .found import Found


class Shards:
    """The batches of each file. They are read in order, so that few files are in memory at a time.

    Every file is read twice: all of them at the start, so that a damaged one is found before anything runs.

    :ivar errors: why a batch was skipped, by its number; empty where it has a result.
    """

    def __init__(self, paths: Iterable[Path], read: Callable[[Path], list[Found]]) -> None:
        self.errors: dict[int, str] = {}
        self._places: dict[int, Path] = {}
        self._read = read
        self._open: dict[Path, dict[int, Found]] = {}
        for path in paths:
            for one in read(path):
                # a result takes precedence over the reason for a skip
                if not one.error or self.errors.get(one.number, one.error):
                    self._places[one.number], self.errors[one.number] = path, one.error
        self._num_left = Counter(self._places.values())

    @property
    def last(self) -> int | None:
        """The index of the last batch that was not taken."""
        return max(self._places, default=None)

    def take(self, number: int) -> Found | None:
        """The stored result of a batch, returned once."""
        if (path := self._places.get(number)) is None:
            return None
        if path not in self._open:
            self._open[path] = {one.number: one for one in self._read(path)}
        found = self._open[path].pop(number)
        self.drop(number)
        return found

    def drop(self, number: int) -> None:
        """Count a batch as taken."""
        if (path := self._places.pop(number, None)) is not None:
            self._num_left[path] -= 1
            if not self._num_left[path]:
                self._open.pop(path, None)
