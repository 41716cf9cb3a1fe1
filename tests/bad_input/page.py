"""The page docs/bad_input.md, from the outcomes: `python -m tests.bad_input` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .judge import Outcome
from .options import LEFT_OUT as NOT_TRIED
from .options import OptionCell
from .others import OtherCell
from .table import PLACES, Cell
from .values import OF_OPTIONS as OPTION_ROWS
from .values import VALUES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad_input.md"
OF_TORCH = re.compile(r"(\): \w+Error:) .*?(?=\. Argument |\. Its parameters |\. Data and |$)")
LONGEST = 200  # of a message

HEAD = """# Bad input

This page shows what every public function and class does with input that it should not get. It is made by
`python -m tests.bad_input` from the cases in `tests/bad_input`, and a test compares it with what the library does.
[What is refused](refused.md) has the remedy for each error. A cell is one of these:

- The name of an error in `pyro_vae.errors`. Its message says what was expected, what came, and what to do.
- **its own**: the error that your model, guide or loader raised itself, unchanged.
- **right**: the numbers of the same data in good form, or finite numbers.
- **in doubt**: numbers whose record says that they are not to be trusted.
- **shown**: a loss that is not finite, and is returned as such.
- An empty cell does not apply.

No call here changes parameters, buffers, modes, settings or, with a seed, the random state. Only steps of training
change the parameters that they train.
"""

LIST_OF_LEFT_OUT = "\n".join(f"- `{option}` {row}, which {why}" for (option, row), why in NOT_TRIED.items())
OF_OPTIONS = f"""Every option of all these functions and classes was given {len(OPTION_ROWS)} values, one at a time:
{", ".join(OPTION_ROWS)}.

An option of several estimators is one row. So a value may stand under "taken" because one estimator takes it, and another
may refuse it: 0.5 for a tolerance, say. These cells were left out:

{LIST_OF_LEFT_OUT}"""

OF_OTHERS = f"""Functions that take no pair of model and guide, and arguments beside the pair, were given {len(VALUES)}
values, one at a time:
{", ".join(VALUES)}.

`TypeError`, `ValueError` and `KeyError` are raised by the package, with a message of its own."""

WORDS = {
    "the program's own error": "its own",
    "right answer": "right",
    "not finite, and shown": "shown",
}


def table_of(place: str, found: Sequence[tuple[Cell, Outcome]]) -> list[str]:
    groups = list(dict.fromkeys(cell.entrance.group for cell, _ in found if cell.place == place))
    lines = [f"| {place} | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for bad in PLACES[place]:
        cells = [
            [outcome.cell for cell, outcome in found if cell.bad is bad and cell.entrance.group == group] for group in groups
        ]
        lines.append(f"| {bad.row} | {' | '.join(map(in_words, cells))} |")
    return lines


def in_words(cells: Iterable[str]) -> str:
    words = [WORDS.get(cell, cell) for cell in cells]
    return ", ".join(f"`{word}`" if word.endswith("Error") else word for word in dict.fromkeys(words))


def messages(found: Iterable[tuple[str, str, Outcome]]) -> list[str]:
    """One message of each error and place, the first that came, from (place, what was put there, what became of it)."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for place, row, outcome in found:
        if outcome.cell.endswith("Error"):
            first.setdefault((outcome.cell, place), (row, outcome.message))
    lines = ["| error | after | message |", "|---|---|---|"]
    for (name, _), (row, message) in sorted(first.items()):
        text = re.sub(r"\s+", " ", message).replace("|", "\\|").replace("<", "&lt;")
        text = OF_TORCH.sub(r"\1 [what torch or Pyro said]", text)
        text = text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} [and so on]"
        lines.append(f"| `{name}` | {row} | {text} |")
    return lines


def sorted_by_name(rows: list[tuple[tuple[str, ...], str, Outcome]]) -> list[tuple[tuple[str, ...], str, Outcome]]:
    return sorted(rows, key=lambda row: row[0])


def one_by_one(rows: Iterable[tuple[tuple[str, ...], str, Outcome]], *names: str) -> list[str]:
    """A table with what refuses one argument or option, and which values are right in its place.

    :param rows: the argument, by the columns `names`; the value; what became of it.
    """
    by_argument: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for argument, value, outcome in rows:
        by_argument.setdefault(argument, []).append((value, outcome.cell))
    lines = [f"| {' | '.join(names)} | refused by | taken |", "|---" * (len(names) + 2) + "|"]
    for argument, cells in by_argument.items():
        refused = in_words(cell for _, cell in cells if cell.endswith("Error"))
        taken = ", ".join(dict.fromkeys(value for value, cell in cells if not cell.endswith("Error")))
        names_of = " | ".join(f"`{name}`" for name in argument)
        lines.append(f"| {names_of} | {refused} | {taken if refused else 'anything'} |")
    return lines


def page_of(
    found: Sequence[tuple[Cell, Outcome]],
    options: Sequence[tuple[OptionCell, Outcome]],
    others: Sequence[tuple[OtherCell, Outcome]],
) -> str:
    parts = [HEAD]
    for place in PLACES:
        parts += [f"## In the place of {place}", "", *table_of(place, found), ""]
    of_options = [((cell.option,), cell.row, outcome) for cell, outcome in options]
    parts += ["## In the place of an option", "", OF_OPTIONS, "", *one_by_one(sorted_by_name(of_options), "option"), ""]
    parts += ["## In the place of other arguments", "", OF_OTHERS, ""]
    for group in dict.fromkeys(cell.other.group for cell, _ in others):
        rows = [((c.other.name, c.argument), c.row, outcome) for c, outcome in others if c.other.group == group]
        parts += [f"### {group.capitalize()}", "", *one_by_one(rows, "call", "argument"), ""]
    everything = [
        *((cell.place, cell.bad.row, outcome) for cell, outcome in found),
        *(("an option", f"`{cell.option}`: {cell.row}", outcome) for cell, outcome in options),
        *((cell.other.group, f"`{cell.other.name}`, `{cell.argument}`: {cell.row}", outcome) for cell, outcome in others),
    ]
    parts += ["## Messages", "", "The table has the beginning of one message of each error.", "", *messages(everything)]
    return "\n".join(parts) + "\n"
