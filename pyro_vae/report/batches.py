"""One progress bar over several passes."""

from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm


class Stages:
    """One progress bar over the batches of several passes, which says which pass it is."""

    def __init__(self, total: int, progress: bool) -> None:
        self._bar = tqdm(total=total, unit="batch", disable=not progress)

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def __call__(self, name: str, batches: Iterable[Any]) -> Iterator[Any]:
        self._bar.set_description(name)
        for batch in batches:
            yield batch
            self._bar.update()
