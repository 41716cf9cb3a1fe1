"""The progress of a run over a loader: the mean so far, its error, the share of data in doubt."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from ..records import FEW
from .found import Found

T = TypeVar("T")
FEWEST_BATCHES, FEWEST_DATA = 5, 100  # fewest batches and data for which the spread is known well enough to stop


class RunningMean:
    """The mean of the main number of records over their data, as draws from a population, in double precision.

    The spread of the estimates over data includes both the spread of the true values and the Monte Carlo noise, so that

        error = standard deviation over the data / sqrt(N)

    is the full error of the mean of a population.
    """

    def __init__(self) -> None:
        self.name = ""
        self.num_batches = self.num_data = self.num_doubted = 0
        self._mean = self._squares = 0.0

    def add(self, record: Any) -> None:
        name = getattr(type(record), "_headline", "")
        values = getattr(record, name).detach().double() if name else None
        if values is None or values.ndim != 1:
            return
        self.name, self.num_batches = name, self.num_batches + 1
        # Chan, Golub and LeVeque (1983): means and squares about them, joined; sums of squares would cancel.
        size, mean = len(values), float(values.mean())
        apart, total = mean - self._mean, self.num_data + len(values)
        self._squares += float((values - mean).square().sum()) + apart**2 * self.num_data * size / total
        self._mean += apart * size / total
        self.num_data = total
        self.num_doubted += int((~record.reliable).sum())

    @property
    def error(self) -> float:
        """NaN for one datum, and where a value is infinite."""
        if self.num_data < 2:
            return math.nan
        return math.sqrt(self._squares / (self.num_data - 1) / self.num_data)

    @property
    def share_doubted(self) -> float:
        return self.num_doubted / self.num_data if self.num_data else 0.0

    def is_within(self, tolerance: float) -> bool:
        """Whether the error is at most this, and reliable: enough data, and at most 5% of them in doubt."""
        enough = self.num_batches >= FEWEST_BATCHES and self.num_data >= FEWEST_DATA
        return enough and self.error <= tolerance and self.share_doubted <= FEW

    def __str__(self) -> str:
        if not self.name:
            return ""
        title = self.name.replace("_", " ")
        return f"{title} {self._mean:.3f} +- {self.error:.3f}, {self.share_doubted:.0%} in doubt"


class Bar:
    """A progress bar of batches; those read from a checkpoint do not count in the speed."""

    def __init__(self, title: str, loader: Iterable[Any], progress: bool, num_known: int = 0) -> None:
        shown: Any = {"desc": title, "unit": "batch", "disable": not progress}
        self._bar = tqdm(total=length_of(loader), initial=num_known, **shown)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def behind(self, found: Iterable[Found[T]], mean: RunningMean | None = None) -> Iterator[Found[T]]:
        """The same items; the bar advances once the consumer is done with one."""
        num_skipped = 0
        for place, one in enumerate(found):
            yield one
            num_skipped += bool(one.error)
            if not self._bar.disable:
                said = [str(mean or ""), f"{num_skipped} skipped" if num_skipped else ""]
                self._bar.set_postfix_str(", ".join(part for part in said if part), refresh=False)
                self._bar.update(place >= self._bar.initial)


def length_of(loader: Iterable[Any]) -> int | None:
    """The number of batches; `None` for an iterator, or a loader of an iterable data set."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
