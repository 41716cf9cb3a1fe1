"""A picture of the estimate of log p(x) against the number of weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..evidence import KCurve
from .axes import axes_or_new, check_record, color_of, literal
from .style import legend_over, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_k_curve(
    curve: KCurve, ax: Axes | None = None, *, color: Any = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """The mean estimate of log p(x) against the number of weights K, in nats per datum: has it levelled off?

    :param curve: `curve` of the `Evidence` that `ImportanceSampling` returned.
    :param ax: where to draw; a new figure by default. Draw several runs on one, each with its `color` and `label`.
    :param color: of the line; black by default.
    :param label: the name of the run in a legend.
    :param kwargs: passed on to `Axes.errorbar`.

    Bars are two Monte Carlo errors. The number in the corner, or in the legend, is what the last doubling of K has brought,
    with one Monte Carlo error. It is far more exact than the bars, since the points share their draws. Sizes with a block
    whose weights are all zero, whose estimate is minus infinity, are left out.

    Example::

        evidence = pv.ImportanceSampling(model, guide)(x)
        pv.plots.plot_k_curve(evidence.curve)
    """
    check_record(curve, KCurve, made_by="evidence.curve of ImportanceSampling")
    color = color_of(color)
    ax = axes_or_new(ax)
    points = [(k, float(e.value), float(e.std_error)) for k, e in zip(curve.num_particles, curve.means(), strict=True)]
    points = [(k, value, 2 * error) for k, value, error in points if math.isfinite(value)]
    if not points:
        raise ValueError("the curve has no finite value to draw: for every size, some datum has a block of zero weights")
    sizes, values, errors = zip(*points, strict=True)
    note = last_doubling(curve)
    if label is not None:
        label, note = literal(f"{label}; last doubling {note}" if note else label), ""
    style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 3, "color": color or "black", **kwargs}
    ax.errorbar(sizes, values, yerr=errors, label=label, **style)
    number_sizes(ax, largest=max(sizes))
    if note:
        before, last = curve.num_particles[-2:]
        note = f"K from {before} to {last}:\n{note} nats"
        ax.annotate(note, (0.96, 0.06), xycoords="axes fraction", ha="right", va="bottom")
    ax.set(
        xlabel="number of weights per datum, K",
        ylabel="log p(x), nats per datum",
        title=f"Estimate against K, {len(curve)} data",
    )
    if label is not None:
        legend_over(ax)
    return wrap_labels(ax)


def last_doubling(curve: KCurve) -> str:
    """What the last doubling of K has brought, to two digits of its error; nothing where that is not known."""
    rise = curve.last_difference()
    if not math.isfinite(float(rise.value)):
        return ""
    error = float(rise.std_error)
    digits = min(max(2, 1 - math.floor(math.log10(error))), 6) if error > 0 else 6
    return f"{float(rise.value):+.{digits}f} \u00b1 {error:.{digits}f}"


def number_sizes(ax: Axes, largest: int) -> None:
    """A logarithmic axis with round numbers: powers of ten, and 2 and 5 between them where there is room."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest <= 100 else (1,)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
