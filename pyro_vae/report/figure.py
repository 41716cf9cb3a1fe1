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


@dataclass(frozen=True)
class Panel:
    """One picture: how it is drawn, and what to look for in it."""

    name: str
    draw: Callable[[Axes], Any]
    caption: str


def panels_of(measured: Measured) -> list[Panel]:
    """The pictures of all parts that were measured; images only where the data are images."""
    d = measured
    found = [
        Panel(
            "gaps",
            lambda ax: plots.plot_gaps(d.test, ax),
            "From the ELBO up to log p(x) on test data. Error bars: two Monte Carlo errors.",
        ),
        Panel(
            "gaps-per-datum",
            lambda ax: plots.plot_gaps_per_datum(d.test, ax),
            "The same for every test datum, sorted. A few high columns: data that the encoder does not know.",
        ),
        Panel(
            "pareto-k",
            lambda ax: plots.plot_pareto_k(d.test.evidence, ax),
            "Tail index of the weights behind log p(x), per test datum. Right of the line the estimate is likely too low.",
        ),
    ]
    if (units := d.units) is not None:
        caption = "What each latent unit says about the training data. Hollow: its mean does not move with the data."
        found.append(Panel("units", lambda ax: plots.plot_units(units, ax), caption))
    if (surgery := d.surgery) is not None:
        caption = "What the KL to the prior pays for: information about the datum, dependence of units, shape of each unit."
        found.append(Panel("surgery", lambda ax: plots.plot_surgery(surgery, ax), caption))
    if (calibration := d.calibration) is not None:
        caption = "Ranks of true latents among draws of the guide, on data of the model. Black: more than chance explains."
        found.append(Panel("calibration", lambda ax: plots.plot_calibration(calibration, ax), caption))
    if (samples := d.samples) is not None:
        found += [
            Panel(
                "likelihood-and-looks",
                lambda ax: plots.plot_likelihood_and_looks(samples, ax),
                "log p(x) against reconstruction error, per test datum. They measure different things.",
            ),
            Panel(
                "nearest-neighbours",
                lambda ax: plots.plot_nearest_neighbours(samples, ax),
                "Distance to the nearest training datum, of samples and of test data. Samples far to the left: copies.",
            ),
        ]
    if (reconstruction := d.reconstruction) is not None and is_image(reconstruction):
        caption = "Test data and what the model makes of one posterior draw for each."
        found.append(Panel("reconstructions", lambda ax: plots.plot_reconstructions(reconstruction, ax), caption))
    if (simulation := d.simulation) is not None and is_image(simulation):
        caption = "Means of the likelihood at draws from the prior."
        found.append(Panel("samples", lambda ax: plots.plot_samples(simulation, ax), caption))
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
