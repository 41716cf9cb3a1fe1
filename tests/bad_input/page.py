"""The page docs/bad_input.md, from the outcomes: `python -m tests.bad_input` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .judge import Outcome
from .table import PLACES, Cell

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad_input.md"
OF_TORCH = re.compile(r"(\): \w+Error:) .*?(?=\. Argument |\. Its parameters |\. Data and |$)")
LONGEST = 200  # of a message

HEAD = """# Bad input

What every public entrance does with input that it should not get. This page is made by `python -m tests.bad_input` from the
cases in `tests/bad_input`, and a test compares it with what the library does. A cell is

- the name of an error in `pyro_vae.errors`, whose message says what was expected, what came, and a remedy;
- **its own**: the error that the user's model, guide or loader raised itself, unchanged;
- **right**: the numbers of the same data in good form, or finite numbers;
- **in doubt**: numbers whose record says that they are not to be trusted;
- **shown**: a loss or an ELBO that is not finite, and is given as such;
- empty: does not apply.

No call here changes parameters, buffers, modes, settings or, with a seed, the random state; steps of training change what
they train.
"""

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


def messages(found: Sequence[tuple[Cell, Outcome]]) -> list[str]:
    """One message of each error and place, the first that came."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for cell, outcome in found:
        if outcome.cell.endswith("Error"):
            first.setdefault((outcome.cell, cell.place), (cell.bad.row, outcome.message))
    lines = ["| error | after | message |", "|---|---|---|"]
    for (name, _), (row, message) in sorted(first.items()):
        text = re.sub(r"\s+", " ", message).replace("|", "\\|").replace("<", "&lt;")
        text = OF_TORCH.sub(r"\1 [what torch or Pyro said]", text)
        text = text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} [and so on]"
        lines.append(f"| `{name}` | {row} | {text} |")
    return lines


def page_of(found: Sequence[tuple[Cell, Outcome]]) -> str:
    parts = [HEAD]
    for place in PLACES:
        parts += [f"## In the place of {place}", "", *table_of(place, found), ""]
    parts += ["## Messages", "", "The beginning of one message of each error.", "", *messages(found)]
    return "\n".join(parts) + "\n"
