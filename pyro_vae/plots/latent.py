"""Pictures of what the latents hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..latent import Surgery, UnitActivity
from ..options import whole_number
from .axes import axes_or_new, check_record, color_of, literal
from .style import BLUE, GREEN, ORANGE, SKY, legend_over, name_ticks, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ORANGE, SKY, GREEN  # of the parts of a KL


def plot_units(
    activity: UnitActivity,
    ax: Axes | None = None,
    *,
    num_units: int = 50,
    color: Any = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """The mean KL of each latent unit to its prior, largest first, in nats per datum; inactive units are hollow.

    :param activity: what `ActiveUnits` returned.
    :param ax: where to draw; a new figure by default. Draw several runs on one, each with its `color` and `label`.
    :param num_units: at most so many bars.
    :param color: of the bars of active units; blue by default.
    :param label: the name of the run in a legend.
    :param kwargs: passed on to `Axes.bar`, such as `width=` and `alpha=`.

    A unit is inactive where the variance of its posterior means is below the threshold of the record. Error bars are two
    sampling errors, which hold for the population of the data. Units whose site has no KL per unit are left out.

    Example::

        activity = pv.ActiveUnits(vae.model, vae.guide)(loader)
        pv.plots.plot_units(activity)
    """
    check_record(activity, UnitActivity, made_by="what ActiveUnits returned")
    num_units = whole_number("num_units", num_units)
    color = color_of(color)
    ax = axes_or_new(ax)
    order = [int(unit) for unit in activity.order if not bool(activity.kl[unit].isnan())][:num_units]
    kl = activity.kl[order].tolist()
    errors = (2 * activity.sampling_errors["kl"][order]).nan_to_num(0.0).tolist()
    fills = [(color or BLUE) if used else "white" for used in activity.active[order].tolist()]
    style = {"color": fills, "edgecolor": color or "black", "linewidth": 0.8, **kwargs}
    ax.bar(range(len(order)), kl, label=None if label is None else literal(label), **style)
    ax.errorbar(range(len(order)), kl, yerr=errors, fmt="none", color="black", capsize=2)
    ax.set(
        xlabel="unit, by KL (hollow: inactive)",
        ylabel="KL, nats per datum",
        title=literal(activity.verdict()),
    )
    if len(order) <= 25:
        name_ticks(ax, [activity.names[unit] for unit in order])
    if label is not None:
        legend_over(ax)
    return wrap_labels(ax)


def plot_surgery(surgery: Surgery, ax: Axes | None = None) -> Axes:
    """The parts of the mean KL as steps that add up to it, in nats per datum.

    :param surgery: what `ELBOSurgery` returned.
    :param ax: where to draw; a new figure by default.

    The dotted line is log N, the largest mutual information that N data can show. Error bars are two Monte Carlo errors.
    Where the guide's dimensions are not independent, the KL of the aggregated posterior q(z) is not divided.

    Example::

        surgery = pv.ELBOSurgery(vae.model, vae.guide)(loader)
        pv.plots.plot_surgery(surgery)
    """
    check_record(surgery, Surgery, made_by="what ELBOSurgery returned")
    ax = axes_or_new(ax)
    divided = not math.isnan(float(surgery.total_correlation.value))
    rest = [("total correlation", surgery.total_correlation), ("dimension-wise KL", surgery.dimension_wise_kl)]
    undivided = [("KL of q(z) to the prior", surgery.marginal_kl)]
    parts = dict([("mutual information", surgery.mutual_information), *(rest if divided else undivided)])
    bottom = 0.0
    for position, (part, color) in enumerate(
        zip([*parts.values(), surgery.kl], [*COLORS[: len(parts)], "0.75"], strict=True)
    ):
        height, start = float(part.value), bottom if position < len(parts) else 0.0
        error = 2 * float(part.std_error)
        ax.bar(position, height, bottom=start, width=0.6, color=color, edgecolor="black")
        ax.errorbar(position, start + height, yerr=error, color="black", capsize=4)
        top = start + max(height, 0.0) + (error if math.isfinite(error) else 0.0)
        ax.annotate(f"{height:.2f}", (position, top), (0, 4), textcoords="offset points", ha="center")
        bottom += height
    ceiling = math.log(surgery.num_data)
    label = f"limit of the information, log N = {ceiling:.2f}"
    ax.axhline(ceiling, color="black", linewidth=0.8, linestyle=":", label=label)
    name_ticks(ax, [*parts, "mean KL"])
    ax.set(ylabel="nats per datum", title=f"What the KL is made of, {surgery.num_data} data")
    legend_over(ax, lines=1)
    return wrap_labels(ax)
