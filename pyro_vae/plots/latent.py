"""Pictures of what the latents hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..estimates import UnitActivity
from .axes import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_units(activity: UnitActivity, ax: Axes | None = None, *, num_units: int = 50) -> Axes:
    """The mean KL of each latent unit, largest first, in nats per datum; inactive units are hollow.

    :param activity: what `ActiveUnits` returned.
    :param ax: where to draw; a new figure by default.
    :param num_units: at most so many bars.

    Bars carry their error as a statement about the population of data, at two standard errors. Units whose site has no KL
    per unit are left out.

    Example::

        pv.plots.plot_units(pv.ActiveUnits(vae.model, vae.guide)(loader))
    """
    ax = axes_or_new(ax)
    order = [int(unit) for unit in activity.order if not bool(activity.kl[unit].isnan())][:num_units]
    kl = activity.kl[order].tolist()
    errors = (2 * activity.sampling_errors["kl"][order]).nan_to_num(0.0).tolist()
    colors = ["0.4" if used else "1.0" for used in activity.active[order].tolist()]
    ax.bar(range(len(order)), kl, color=colors, edgecolor="black", linewidth=0.8)
    ax.errorbar(range(len(order)), kl, yerr=errors, fmt="none", color="black", capsize=2)
    ax.set(
        xlabel=f"unit, by KL; hollow: variance of means below {activity.threshold:g}",
        ylabel="KL to the prior, nats per datum",
        title=activity.verdict(),
    )
    if len(order) <= 25:
        ax.set_xticks(range(len(order)), [activity.names[unit] for unit in order], rotation=90)
    return ax
