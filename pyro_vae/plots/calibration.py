"""Picture of the ranks of true latents among draws of the guide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import axes_or_new, check_has, literal
from .style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, legend_beside, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", "-.", ":", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
STYLES = tuple(zip((VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY), DASHES, strict=True))  # of the worst rows


def plot_calibration(calibration: Any, ax: Axes | None = None) -> Axes:
    """How the ranks of the true latents deviate from uniform ranks, and the band in which those of a right guide stay.

    :param calibration: what `GuideCalibration` returned.
    :param ax: where to draw; a new figure by default.

    Each line is the distribution function of the ranks of one latent, minus that of uniform ranks. Coloured lines leave the
    band and grey ones stay inside. A guide that is too narrow is high on the left and low on the right, and one that is too
    wide the other way round. A guide that lies too high is high all over, and one that lies too low is low.

    Example::

        calibration = pv.GuideCalibration(model, guide)(x)
        pv.plots.plot_calibration(calibration)
    """
    check_has(calibration, "rows", "band", "faulty", made_by="what GuideCalibration returned")
    ax = axes_or_new(ax)
    rows = [row for row in calibration.rows if row.num_data]
    if not rows:
        raise ValueError("none of the latents has a place in any datum, so there is nothing to draw")
    faulty = [row for row in calibration.faulty if row.num_data]
    points, low, high = (part.numpy() for part in calibration.band(max(rows, key=lambda row: row.num_data)))
    z = np.array([0.0, *points, 1.0])
    ax.fill_between(z, np.array([0, *(low - points), 0]), np.array([0, *(high - points), 0]), color="0.88", label="band")
    ax.axhline(0, color="0.6", linewidth=0.8)

    def line(row: Any, **style: Any) -> None:
        below = np.searchsorted(np.sort(row.ranks.numpy()), points) / row.num_data
        ax.plot(z, np.array([0, *(below - points), 0]), **style)

    fine = [row for row in rows if not row.faulty]
    for number, row in enumerate(fine):
        line(row, color="0.55", linewidth=0.8, label=f"{len(fine)} inside the band" if not number else None)
    for row, (color, dashes) in zip(faulty, STYLES, strict=False):
        line(row, color=color, linewidth=1.5, linestyle=dashes, label=literal(row.name))
    for number, row in enumerate(faulty[len(STYLES) :]):
        rest = f"{len(faulty) - len(STYLES)} more outside"
        line(row, color="black", linewidth=0.5, label=rest if not number else None)
    ax.set(
        xlim=(0, 1),
        xlabel="rank of the true latent among draws",
        ylabel="share below, minus uniform",
        title=f"Guide on {len(calibration)} simulated data: {len(faulty)} of {len(rows)} outside",
    )
    legend_beside(ax)
    return wrap_labels(ax)
