"""The axes to draw on, and names of the user on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # here, so that importing the package starts no graphics

    return plt.subplots()[1]


def literal(name: object) -> str:
    """A name of the user as a label that shows it letter by letter.

    To matplotlib a dollar sign begins a formula, and a label that begins with an underscore is left out of the legend.
    """
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
