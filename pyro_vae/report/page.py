"""A diagnosis as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .figure import SIZE, Panel, panels_of
from .measured import Measured
from .numbers import Number

DPI = 160
TITLES = {
    "gaps": "Gaps",
    "held-out": "Test data against training data",
    "surgery": "What the KL is made of",
    "units": "Latent units",
    "self-check": "The estimate on trial, on data simulated from the model",
    "calibration": "The guide on trial, on data simulated from the model",
    "samples": "Likelihood and looks",
    "cost": "Cost",
}


def render(measured: Measured, numbers: list[Number]) -> str:
    """The page of a `Diagnosis` as text."""
    pages = Environment(loader=PackageLoader(__name__.rpartition(".")[0], ""), autoescape=True, undefined=StrictUndefined)
    pages.filters["shown"] = shown
    sections = [
        (title, rows)
        for part, title in TITLES.items()
        if (rows := [(row_id, row) for row_id, row in enumerate(numbers) if row.part == part])
    ]
    page = pages.get_template("page.html").render(
        diagnosis=measured, sections=sections, pictures=[(panel, picture(panel)) for panel in panels_of(measured)]
    )
    return page.replace(" +- ", " \u00b1 ")


def picture(panel: Panel) -> str:
    """A PNG as a data URI. Drawn without pyplot, so that no figure of the user's is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    panel.draw(figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(value: Any) -> str:
    """Format a number for the page: whole numbers whole, others with digits that suit their size."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "" if math.isnan(value) else str(value)
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.2g}"
