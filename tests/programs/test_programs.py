"""Every cell of the table in docs/programs.md."""

import importlib.util
import re

import pytest
import torch

from .__main__ import END, PAGE, PROGRAMS, START, table, written
from .columns import COLUMNS, cell

if HAS_ZUKO := importlib.util.find_spec("zuko") is not None:
    checks = torch.distributions.Distribution._validate_args
    import zuko  # noqa: F401  turns the argument checks of torch off as it is imported

    torch.distributions.Distribution.set_default_validate_args(checks)

FOUND: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_a_row(make):
    """False-alarm rate: a few thousand numbers at five errors each, below one in a hundred over the whole table."""
    if make.__name__ == "flow_guide_zuko" and not HAS_ZUKO:
        pytest.skip("zuko is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        program = make()
        for column in COLUMNS:
            FOUND[program.title, column] = cell(program, column)
    finally:
        torch.set_num_threads(threads)


def test_the_table_is_what_was_found():
    """Every row and note that was found stands there; without zuko one row less is found."""
    text = PAGE.read_text()
    assert START in text and END in text
    found, page = ({re.sub(r"\[\d+\]|^\d+\.", "[]", line) for line in part.splitlines()} for part in (table(FOUND), text))
    assert found <= page, "run python -m tests.programs"  # notes are counted anew where a process has found some rows only
    if len(FOUND) == len(PROGRAMS) * len(COLUMNS):
        assert written(text, table(FOUND)) == text, "run python -m tests.programs"
