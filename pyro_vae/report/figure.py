"""Pictures of a diagnosis: single ones for the page, and all in one figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import plots
from ..plots.axes import literal
from ..plots.images import as_images
from .measured import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLUMNS = 3
SIZE = 5.2, 3.6  # inches of one picture
STRIP = 5.2, 1.6  # of two rows of small images


@dataclass(frozen=True)
class Panel:
    """One picture: how it is drawn, what to look for in it, and its size on the page."""

    name: str
    draw: Callable[[Axes], Any]
    caption: str
    size: tuple[float, float] = SIZE


def panels_of(measured: Measured) -> list[Panel]:
    """The pictures of all parts that were measured; images only where the data are images."""
    d = measured
    found = [
        Panel(
            "gaps",
            lambda ax: plots.plot_gaps(d.test, ax),
            "ELBO, optimal ELBO and log p(x), means over the test data, and the gaps. Error bars: two Monte Carlo errors.",
        ),
        Panel(
            "gaps-per-datum",
            lambda ax: plots.plot_gaps_per_datum(d.test, ax),
            "The gaps of each test datum, sorted. A few tall columns: data for which the encoder fails.",
        ),
        Panel(
            "pareto-k",
            lambda ax: plots.plot_pareto_k(d.test.evidence, ax),
            "Pareto k of the importance weights of each test datum. Right of the solid line log p(x) is likely too low.",
        ),
    ]
    if (units := d.units) is not None:
        caption = "KL to the prior of each latent unit on training data. A hollow bar: its mean does not vary with the data."
        found.append(Panel("units", lambda ax: plots.plot_units(units, ax), caption))
    if (surgery := d.surgery) is not None:
        caption = "KL to the prior, and its parts: mutual information, total correlation and dimension-wise KL."
        found.append(Panel("surgery", lambda ax: plots.plot_surgery(surgery, ax), caption))
    if (calibration := d.calibration) is not None:
        caption = "Ranks of true latents among draws of the guide, on simulated data. Outside the band: not calibrated."
        found.append(Panel("calibration", lambda ax: plots.plot_calibration(calibration, ax), caption))
    if (samples := d.samples) is not None:
        found += [
            Panel(
                "likelihood-and-looks",
                lambda ax: plots.plot_likelihood_and_looks(samples, ax),
                "log p(x) against reconstruction error of each test datum. The two measure different things.",
            ),
            Panel(
                "nearest-neighbours",
                lambda ax: plots.plot_nearest_neighbours(samples, ax),
                "Distance to the nearest training datum, of samples and test data. Samples far to the left may be copies.",
            ),
        ]
    if (reconstruction := d.reconstruction) is not None and is_image(reconstruction):
        caption = "Test data, and their reconstructions from one draw of the guide each."
        found.append(Panel("reconstructions", lambda ax: plots.plot_reconstructions(reconstruction, ax), caption, STRIP))
    if (simulation := d.simulation) is not None and is_image(simulation):
        caption = "Samples: means of the likelihood at draws from the prior."
        found.append(Panel("samples", lambda ax: plots.plot_samples(simulation, ax), caption, STRIP))
    return found


def is_image(drawn: Any) -> bool:
    """Whether the first observed site can be shown as images."""
    try:
        as_images(next(iter(drawn.means.values())))
    except (StopIteration, ValueError):
        return False
    return True


def draw(measured: Measured, headline: str, figure: Figure | None = None) -> Figure:
    """All panels on one figure."""
    panels = panels_of(measured)
    rows = -(-len(panels) // COLUMNS)
    if figure is None:
        import matplotlib.pyplot as plt  # here, so that importing the package starts no graphics

        figure = plt.figure(figsize=(COLUMNS * SIZE[0], rows * SIZE[1] + 0.5), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        panel.draw(figure.add_subplot(rows, COLUMNS, place))
    figure.suptitle(literal(headline))
    return figure
