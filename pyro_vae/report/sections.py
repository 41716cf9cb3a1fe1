"""The numbers of a diagnosis as tables of the page: data sets side by side, errors with two significant digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..ops import pareto_k_threshold
from ..records.doubts import TABLE
from .digits import decimals, plain
from .measured import Measured
from .numbers import IN_DOUBT, NATS, Number

MOST_DECIMALS = 4  # in a table
HEADS = {"value": "value", "std_error": "Monte Carlo error", "sampling_error": "sampling error"}
DATA = {"test": "test data", "train": "training data", "simulated": "simulated data", "test - train": "difference"}
NOT_TRUSTED = "not to be trusted"


@dataclass(frozen=True)
class Part:
    """A section of the page before its numbers.

    :ivar title: its heading.
    :ivar text: a sentence below it.
    :ivar folded: whether it opens on a click.
    :ivar panels: the names of its pictures.
    """

    title: str
    text: str = ""
    folded: bool = True
    panels: tuple[str, ...] = ()


PARTS = {
    "gaps": Part("Gaps", "ELBO + amortization gap = optimal ELBO; optimal ELBO + approximation gap = log p(x).", False),
    "held-out": Part(
        "Test data minus training data",
        "A lower log p(x) is what the model loses on new data, a larger amortization gap what the encoder loses.",
        False,
    ),
    "doubts": Part("Data in doubt", "How many data each check found, and what it means for them.", panels=("pareto-k",)),
    "surgery": Part(
        "What the KL to the prior is made of",
        "KL to the prior = mutual information + total correlation + dimension-wise KL.",
        panels=("surgery",),
    ),
    "units": Part("Latent units", "Largest KL to the prior first."),
    "self-check": Part(
        "Self-check: the estimate of log p(x) on simulated data",
        "A right estimate is not above the upper and not below the lower bound of log p(x), up to the errors.",
    ),
    "calibration": Part(
        "Calibration: the guide on simulated data", "For a right guide 0.9 of the 90% intervals contain the true latent."
    ),
    "samples": Part(
        "Reconstructions and samples",
        "log p(x) and the look of samples measure different things.",
        panels=("likelihood-and-looks", "nearest-neighbours"),
    ),
    "cost": Part("Cost", "How many decoder evaluations each analysis took per datum."),
}


@dataclass(frozen=True)
class Cell:
    """One text of a table, with the number behind it.

    :ivar place: of the `Number` among all numbers; `None` where there is none.
    :ivar field: of that number.
    :ivar head: what the column is called, with its data set.
    """

    text: str
    head: str
    place: int | None = None
    field: str = ""
    value: float = math.nan


@dataclass(frozen=True)
class Section:
    """A heading, a table and pictures.

    :ivar in_nats: whether rows that name no unit are in nats per datum.
    :ivar groups: data sets with the number of their columns.
    :ivar heads: of the columns.
    :ivar rows: name, unit, meaning and cells.
    """

    name: str
    part: Part
    in_nats: bool
    groups: list[tuple[str, int]]
    heads: list[str]
    rows: list[tuple[str, str, str, list[Cell]]]


def sections_of(measured: Measured, numbers: Sequence[Number]) -> list[Section]:
    """The sections of the page that have a number."""
    by_part: dict[str, list[tuple[int, Number]]] = {name: [] for name in PARTS}
    for place, row in enumerate(numbers):
        by_part["doubts" if row.part == "gaps" and row.unit != NATS else row.part].append((place, row))
    return [section_of(name, rows, measured) for name, rows in by_part.items() if rows]


def section_of(name: str, numbers: list[tuple[int, Number]], measured: Measured) -> Section:
    found = {(row.name, row.data): (place, row) for place, row in numbers}
    sets = list(dict.fromkeys(row.data for _, row in numbers))
    fields = {data: fields_of([row for _, row in numbers if row.data == data]) for data in sets}
    units = {row.name: row.unit for _, row in numbers}
    rows = []
    for label, unit in units.items():
        reason = label.removeprefix(IN_DOUBT)
        meaning = meaning_of(reason, measured) if reason != label else ""
        said = unit in label or unit == NATS or meaning  # of what is counted, the name says it
        cells = [cell for data in sets for cell in cells_of(found.get((label, data)), data, fields[data])]
        rows.append((reason, "" if said else unit, meaning, cells))
    groups = [(f"{DATA[data]} ({size_of(numbers, data)})", len(fields[data])) for data in sets]
    heads = [HEADS[field] for data in sets for field in fields[data]]
    return Section(name, PARTS[name], NATS in units.values(), groups, heads, rows)


def fields_of(rows: Sequence[Number]) -> list[str]:
    """Value, and the errors that any of the rows has."""
    return ["value", *(f for f in ("std_error", "sampling_error") if any(not math.isnan(getattr(row, f)) for row in rows))]


def size_of(numbers: list[tuple[int, Number]], data: str) -> str:
    """ "N = 297", or the range where rows have different numbers of data."""
    counts = [row.num_data for _, row in numbers if row.data == data]
    return f"N = {counts[0]}" if min(counts) == max(counts) else f"N = {min(counts)} to {max(counts)}"


def meaning_of(reason: str, measured: Measured) -> str:
    """What a doubt says about the data that have it."""
    threshold = f"{pareto_k_threshold(measured.test.evidence.num_particles):.2f}"
    return TABLE[reason].meaning.format(data="the counted data", off="low", threshold=threshold)


def cells_of(found: tuple[int, Number] | None, data: str, fields: Sequence[str]) -> list[Cell]:
    """One cell per field; where columns stand below one another, the first one is called by the data set."""
    heads = [DATA[data], *(HEADS[field] for field in fields[1:])]
    if found is None:
        return [Cell("", head) for head in heads]
    place, row = found
    texts = texts_of(row)
    return [Cell(texts[f], head, place, f, getattr(row, f)) for f, head in zip(fields, heads, strict=True)]


def texts_of(row: Number) -> dict[str, str]:
    """Value and errors as they are printed: two significant digits of each error, and as many decimals of the value."""
    errors = {"std_error": row.std_error, "sampling_error": row.sampling_error}
    known = [error for error in errors.values() if math.isfinite(error)]
    if not math.isfinite(row.value):
        value = "" if math.isnan(row.value) else str(row.value)
    elif known:
        finest = max(decimals(error, MOST_DECIMALS) for error in known if error or not any(known))
        value = f"{row.value:.{finest}f}"
    else:
        value = plain(row.value)
    shown = dict.fromkeys(errors, NOT_TRUSTED) if row.doubt else {name: error_text(e) for name, e in errors.items()}
    return {"value": value, **shown}


def error_text(error: float) -> str:
    if not math.isfinite(error):
        return "" if math.isnan(error) else str(error)
    if 0 < error < 0.5 * 10**-MOST_DECIMALS:
        return f"<{10.0**-MOST_DECIMALS:.{MOST_DECIMALS}f}"
    return f"{error:.{decimals(error, MOST_DECIMALS)}f}" if error else "0"
