"""One progress bar over several passes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm


class Stages:
    """One progress bar over the batches of several passes, which says which pass it is.

    A batch counts by what it costs, so that the remaining time is right from the first batch on, however unequal the passes.

    :param costs: by the name of a pass, of one of its batches; in any unit.
    :param num_batches: by the same names.
    """

    def __init__(self, costs: Mapping[str, float], num_batches: Mapping[str, int], progress: bool) -> None:
        self._costs = costs
        total = sum(cost * num_batches[name] for name, cost in costs.items())
        shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        # The remaining time goes by the mean speed of all work so far: that of the last batches is another pass's.
        self._bar = tqdm(total=total, bar_format=shape, smoothing=0, disable=not progress)

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def __call__(self, name: str, batches: Iterable[Any]) -> Iterator[Any]:
        self._bar.set_description(name)
        for batch in batches:
            yield batch
            self._bar.update(self._costs[name])
