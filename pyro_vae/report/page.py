"""A diagnosis as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .figure import Panel, panels_of
from .glossary import TERMS, linked
from .numbers import Number
from .sections import DATA, sections_of

DPI = 160
BADGES = {"fine": "OK", "fault": "Problem", "undecided": "Unclear"}
TOPICS = {
    "latents": "Latents",
    "estimate": "Estimate of log p(x)",
    "gap": "Gap between ELBO and log p(x)",
    "calibration": "Guide on simulated data",
    "held-out": "Test against training data",
    "samples": "Samples of the model",
}


def render(diagnosis: Any, numbers: list[Number], title: str) -> str:
    """The page of a `Diagnosis` as text."""
    pages = Environment(loader=PackageLoader(__name__.rpartition(".")[0], ""), autoescape=True, undefined=StrictUndefined)
    pages.filters["linked"] = linked
    sections = sections_of(diagnosis, numbers)
    pictures = {panel.name: (panel, picture(panel)) for panel in panels_of(diagnosis)}
    in_sections = {name for section in sections for name in section.part.panels}
    page = pages.get_template("page.html").render(
        title=title,
        diagnosis=diagnosis,
        about=about(diagnosis),
        badges=BADGES,
        topics=TOPICS,
        sections=sections,
        sets=set(DATA.values()),
        pictures=pictures,
        first_pictures=[name for name in pictures if name not in in_sections],
        terms=TERMS,
    )
    return page.replace(" +- ", " \u00b1 ")


def about(diagnosis: Any) -> list[tuple[str, str]]:
    """What was diagnosed, by what, and when; a word and its value each."""
    named = dict(diagnosis.about)
    parts = [part for part in (diagnosis.surgery, diagnosis.units) if part is not None]
    rest = f", {parts[0].num_data} for all else" if parts else ""
    sizes = {"training data": f"{len(diagnosis.train)} for the gaps{rest}", "test data": f"{len(diagnosis.test)} data"}
    for name, size in sizes.items():
        named[name] = f"{named[name]}, {size}" if name in named else size
    return [*named.items(), *((name, str(value)) for name, value in {**diagnosis.settings, **diagnosis.versions}.items())]


def picture(panel: Panel) -> str:
    """A PNG as a data URI. Drawn without pyplot, so that no figure of the user's is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=panel.size, layout="constrained")
    FigureCanvasAgg(figure)
    panel.draw(figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
