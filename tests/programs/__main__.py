"""Write the table of docs/programs.md: `python -m tests.programs`; `--check` compares it with what is there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from . import models, vaes
from .columns import COLUMNS, HELD, cell
from .program import Program

PAGE = Path(__file__).parents[2] / "docs" / "programs.md"
START, END = "<!-- table -->", "<!-- end of the table -->"
PROGRAMS: tuple[Callable[[], Program], ...] = (
    vaes.vae,
    vaes.conditional_vae,
    vaes.semi_supervised_vae,
    vaes.mixture_vae,
    vaes.deep_markov_model,
    vaes.prod_lda,
    vaes.student_t_vae,
    vaes.flow_prior_vae,
    vaes.flow_guide_zuko,
    vaes.multimodal_vae,
    vaes.boosting_mixture_guide,
    models.lda_enumerated_words,
    models.gaussian_mixture_map,
    models.gaussian_mixture_enumerated,
    models.hidden_markov_model,
    models.capture_recapture,
    models.cevae,
    models.scanvi_like,
    models.air_like_switch,
    models.sparse_gamma_easyguide,
    models.eight_schools,
    models.bayesian_regression,
    models.sequence_world_model,
    models.coin_svi_part_i,
)


def table(cells: dict[tuple[str, str], str]) -> str:
    """Refusals are numbered below the table."""
    reasons: dict[str, int] = {}
    lines = ["| program | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title in dict.fromkeys(title for title, _ in cells):
        row = [title]
        for column in COLUMNS:
            found = cells[title, column]
            refusal = ":" in found
            row.append(f"[{reasons.setdefault(found, len(reasons) + 1)}]" if refusal else "yes" if found == HELD else found)
        lines.append("| " + " | ".join(row) + " |")
    notes = (f"{number}. {said(reason)}." for reason, number in reasons.items())
    return "\n".join([*lines, "", *notes])


def said(reason: str) -> str:
    name, _, rest = reason.partition(": ")
    return rest[0].upper() + rest[1:] if name == "Other" else f"`{name}`: {rest}"


def written(text: str, new: str) -> str:
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{new}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the table is up to date")
    check = parser.parse_args().check
    cells = {}
    for make in PROGRAMS:
        program = make()
        for column in COLUMNS:
            cells[program.title, column] = cell(program, column)
    text = PAGE.read_text()
    new = written(text, table(cells))
    if not check:
        PAGE.write_text(new)
    return int(check and new != text)


if __name__ == "__main__":
    sys.exit(main())
