"""Base class of all records: files, rows as a DataFrame, one line of text, a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from numbers import Number
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from ..errors import MissingPackageError, RecordFileError

if TYPE_CHECKING:
    from pandas import DataFrame

R = TypeVar("R", bound="Result")
SHOWN = 5  # rows in a notebook
STYLE = "max-width: 100%; overflow-x: auto"


class Result:
    """Base class of all public records, which are dataclasses with `frozen=True, eq=False, repr=False`.

    A row is a datum if the record has numbers per datum, otherwise a unit, a beta, a step, or the whole record. The columns
    are the fields with a number per row, and the properties named in `_derived`, without the fields in `_hidden`.
    """

    _rows_are: ClassVar[str] = "data"  # the name of rows
    _derived: ClassVar[tuple[str, ...]] = ()
    _hidden: ClassVar[tuple[str, ...]] = ()
    _headline: ClassVar[str] = ""  # the number per datum whose mean is shown while a loader is iterated
    # Whether `cat` of joined parts equals `cat` of all of them, and uses each tensor once, by `torch.cat`.
    _joins_in_steps: ClassVar[bool] = False
    # fields that are not written to files, with their values in a loaded record
    _not_stored: ClassVar[Mapping[str, Any]] = {}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record into one file, an npz without pickle. `load` restores it exactly.

        The file is written under a temporary name and renamed: after a crash, or on a full disk, an old file is unchanged.

        :param path: path of the file; an existing file is replaced. No ending is added to the name.
        :raises RecordFileError: if the file cannot be written, or the record contains a value that cannot be stored, such as
            a function.

        Example::

            result = pv.evaluate(pv.ImportanceSampling(vae.model, vae.guide), loader)
            result.save("evidence.npz")
            result = pv.Evidence.load("evidence.npz")
        """
        from .storing import save_value  # which knows the records

        save_value(path, self)

    @classmethod
    def load(cls: type[R], path: str | PathLike[str]) -> R:
        """Load a record written by `save`, with tensors on the CPU; a subclass loads only records of its type.

        Classes are looked up by name among the record classes. Nothing in the file is imported, unpickled or run.

        :param path: path of the file.
        :raises RecordFileError: if the file is missing, of another type of record or a newer version, or damaged; its
            SHA-256 is checked first.

        Example::

            result = pv.evaluate(pv.ImportanceSampling(vae.model, vae.guide), loader)
            result.save("evidence.npz")
            result = pv.Evidence.load("evidence.npz")
        """
        from .storing import load_value  # which knows the records

        record = load_value(path)
        if not isinstance(record, cls):
            kind = type(record).__name__
            raise RecordFileError(f"'{path}' holds a {kind}, expected a {cls.__name__}: load it with {kind}.load")
        return record

    def to_dataframe(self) -> DataFrame:
        """The rows as a pandas `DataFrame`: one per datum, or per unit, beta or step.

        A mapping by name gives columns `std_errors[elbo]`, and an inner record `evidence.ess`. Numbers with further axes
        give `draws[z[0]]`, or `observed[x][0]`, `observed[x][1]` and so on, in the order of memory.

        :raises MissingPackageError: without pandas, which is an optional dependency.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingPackageError("to_dataframe() needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame(self._columns())

    def _num_rows(self) -> int:
        return len(self) if hasattr(self, "__len__") else 1

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        names = [f.name for f in fields(self) if f.name not in self._hidden]  # type: ignore[arg-type]
        about = self._num_rows(), tuple(getattr(self, "names", ())), not hasattr(self, "__len__")
        return dict(c for name in (*names, *self._derived) for c in columns_of(name, getattr(self, name), *about))

    def _in_short(self) -> str:
        """The text in the brackets of the one-line form."""
        if self._num_rows() != 1 or hasattr(self, "__len__"):
            return f"{self._num_rows()} {self._rows_are}"
        return ", ".join(f"{name}={shown(column[0])}" for name, column in self._columns().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._in_short()})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: the printed record, and its first rows behind a click."""
        columns, size = self._columns(), self._num_rows()
        text = f"<pre>{escape(str(self))}</pre>"
        if not columns or not size:
            return text
        count = min(size, max((len(column) for column in columns.values()), default=0), SHOWN)
        rows = [[str(row), *(shown(column[row]) for column in columns.values())] for row in range(count)]
        return (
            f'{text}<details><summary>{count} of {size} rows</summary><div style="{STYLE}">'
            f"<table><thead>{html_row(['', *columns], 'th')}</thead>"
            f"<tbody>{''.join(html_row(row, 'td') for row in rows)}</tbody></table></div></details>"
        )


def columns_of(name: str, value: Any, size: int, names: Sequence[str], single: bool) -> Iterator[tuple[str, list[Any]]]:
    """The columns of a value for `size` rows; none where it has no number per row.

    :param names: names of the last axis of numbers with two axes, where the lengths agree.
    :param single: whether the record is a single row, so that plain numbers are columns.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 and single:
            yield name, [value.item()]
        elif value.ndim == 1 and len(value) == size:
            yield name, value.tolist()
        elif value.ndim > 1 and len(value) == size:
            flat = value.flatten(1)
            labels = names if len(names) == flat.shape[1] else range(flat.shape[1])
            yield from ((f"{name}[{label}]", column.tolist()) for label, column in zip(labels, flat.T, strict=True))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from columns_of(f"{name}[{key}]", part, size, names, single)
    elif isinstance(value, Result):
        if hasattr(value, "__len__") and len(value) == size:
            yield from ((f"{name}.{part}", list(column)) for part, column in value._columns().items())
    elif isinstance(value, tuple) and len(value) == size and all(isinstance(part, (str, Number)) for part in value):
        yield name, list(value)
    elif single and isinstance(value, (str, Number)):
        yield name, [value]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def html_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
