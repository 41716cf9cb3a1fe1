"""Results of batches in their order, held until they are joined."""

from typing import Any

STEP = 100  # results that are joined at a time


class Parts:
    """Results of batches, in their order, for one `cat`.

    Thousands of small tensors between others that come and go leave holes in memory, half as large again as what they hold.
    So results are joined by the hundred where their class says that this changes nothing (`Result._joins_in_steps`).
    """

    def __init__(self) -> None:
        self._blocks: list[Any] = []
        self._recent: list[Any] = []

    def add(self, result: Any) -> None:
        self._recent.append(result)
        if len(self._recent) == STEP and getattr(type(result), "_joins_in_steps", False):
            self._blocks.append(type(result).cat(self._recent))
            self._recent = []

    def joined(self) -> Any:
        """One record of all; the parts are let go."""
        results = [*self._blocks, *self._recent]
        self._blocks, self._recent = [], []
        return type(results[0]).cat(results)
