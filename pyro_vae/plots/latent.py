"""Pictures of what the latents hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..latent import Surgery, UnitActivity
from ..options import whole_number
from .axes import axes_or_new, check_record, literal

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
    check_record(activity, UnitActivity, made_by="what ActiveUnits returned")
    num_units = whole_number("num_units", num_units)
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
        title=literal(activity.verdict()),
    )
    if len(order) <= 25:
        ax.set_xticks(range(len(order)), [literal(activity.names[unit]) for unit in order], rotation=90)
    return ax


def plot_surgery(surgery: Surgery, ax: Axes | None = None) -> Axes:
    """What the mean KL is made of: its parts stacked from zero, and log N, the ceiling of the first; nats per datum.

    :param surgery: what `ELBOSurgery` returned.
    :param ax: where to draw; a new figure by default.

    Bars carry their Monte Carlo error at two standard errors. Where the guide's dimensions are not independent, the KL of
    the aggregated posterior stands undivided.

    Example::

        pv.plots.plot_surgery(pv.ELBOSurgery(vae.model, vae.guide)(loader))
    """
    check_record(surgery, Surgery, made_by="what ELBOSurgery returned")
    ax = axes_or_new(ax)
    divided = not math.isnan(float(surgery.total_correlation.value))
    rest = [("total\ncorrelation", surgery.total_correlation), ("dimension-wise\nKL", surgery.dimension_wise_kl)]
    undivided = [("KL of q(z)\nto the prior", surgery.marginal_kl)]
    parts = dict([("mutual\ninformation", surgery.mutual_information), *(rest if divided else undivided)])
    bottom = 0.0
    for position, part in enumerate([*parts.values(), surgery.kl]):
        height, start = float(part.value), bottom if position < len(parts) else 0.0
        ax.bar(position, height, bottom=start, width=0.6, color=f"{0.9 - 0.15 * position}", edgecolor="black")
        ax.errorbar(position, start + height, yerr=2 * float(part.std_error), color="black", capsize=4)
        ax.annotate(f"{height:.2f}", (position, start + height), (0, 5), textcoords="offset points", ha="center")
        bottom += height
    ceiling = math.log(surgery.num_data)
    ax.axhline(
        ceiling, color="black", linewidth=0.8, linestyle=":", label=f"log N = {ceiling:.2f}, the information's ceiling"
    )
    ax.legend(loc="upper left", frameon=False)
    ax.set(ylabel="nats per datum", title=f"What the KL is made of, {surgery.num_data} data")
    ax.set_xticks(range(len(parts) + 1), [*parts, "mean KL"])
    ax.margins(y=0.25)
    return ax
