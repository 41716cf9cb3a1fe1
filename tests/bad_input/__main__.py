"""Write docs/bad_input.md: `python -m tests.bad_input`. Prints the faults, and ends with exit code 1 where there are any."""

import logging
import sys

from .entrances import ENTRANCES
from .options import option_outcomes
from .others import OTHERS, other_outcomes
from .page import PAGE, page_of
from .table import outcomes


def main() -> int:
    logging.disable(logging.WARNING)  # of Pyro, about guessed plates
    found = [pair for entrance in ENTRANCES for pair in outcomes(entrance)]
    options = [pair for entrance in ENTRANCES for pair in option_outcomes(entrance)]
    others = [pair for other in OTHERS for pair in other_outcomes(other)]
    faults = [(cell, outcome) for cell, outcome in (*found, *options, *others) if outcome.is_fault]
    for cell, outcome in faults:
        print(f"{cell}: {outcome.cell}")
    if not faults:
        PAGE.write_text(page_of(found, options, others))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
