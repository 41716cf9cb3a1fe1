"""Write docs/bad_input.md: `python -m tests.bad_input`. Prints the faults, and ends with exit code 1 where there are any."""

import logging
import sys

from .entrances import ENTRANCES
from .page import PAGE, page_of
from .table import outcomes


def main() -> int:
    logging.disable(logging.WARNING)  # of Pyro, about guessed plates
    found = [pair for entrance in ENTRANCES for pair in outcomes(entrance)]
    faults = [(cell, outcome) for cell, outcome in found if outcome.is_fault]
    for cell, outcome in faults:
        print(f"{cell.entrance.name}, {cell.place}, {cell.bad.row}: {outcome.cell}")
    if not faults:
        PAGE.write_text(page_of(found))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
