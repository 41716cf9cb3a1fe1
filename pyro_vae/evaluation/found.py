"""A batch of a loader, its result, and the text about the batch in an error."""

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Batch(NamedTuple):
    """A batch of the loader: its index, the position of its first datum, both from 0, and its number of data."""

    number: int
    first: int
    size: int
    data: Any


@dataclass(frozen=True)
class Found(Generic[T]):
    """The outcome of a batch: a result, or the message of the error for which it was skipped.

    :ivar digest: digest of the arguments of the batch; empty where it is not needed.
    """

    number: int
    first: int
    size: int
    result: T | None
    error: str = ""
    digest: str = ""


def in_words(one: Batch | Found) -> str:
    return f"batch {one.number} (data {one.first} to {one.first + one.size - 1}, counted from 0)"


def add_words(error: BaseException, *, before: str = "", after: str = "") -> None:
    """Add text before and after the message of an error; its class does not change."""
    if not error.args or (len(error.args) == 1 and isinstance(error.args[0], str)):
        message = str(error.args[0]) if error.args else ""
        error.args = (". ".join(part.removesuffix(".") for part in (f"{before}{message}", after) if part),)
    elif hasattr(error, "add_note"):  # from Python 3.11 on; the words of such an error are not ours to change
        error.add_note(f"{before}{after}")
