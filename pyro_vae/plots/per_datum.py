"""Pictures of all data: the gaps of each, and how far the weights of each can be trusted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evidence import Evidence
from ..gaps import Gaps
from ..ops import pareto_k_threshold
from .axes import axes_or_new, check_record, color_of, prefixed
from .style import BOTH, ENCODER, FAMILY, SKY, VERMILLION, count_in_wholes, legend_over, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_STEPS = 200  # of the gaps per datum: what a picture can show side by side
FINITE_VARIANCE = 0.5  # the Pareto k up to which an error can be believed


def plot_gaps_per_datum(
    gaps: Gaps, ax: Axes | None = None, *, color: Any = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """The gaps of every datum in nats, smallest inference gap first: the encoder's part below, the family's part above.

    :param gaps: what `InferenceGaps` returned.
    :param ax: where to draw; a new figure by default. Draw several runs on one, each with its `color` and `label`.
    :param color: of the encoder's part and of the upper edge; orange and black by default.
    :param label: the name of the run in the legend.
    :param kwargs: passed on to `Axes.stairs` for both parts, such as `alpha=`.
    :raises ValueError: where no datum has finite gaps.

    The horizontal lines are the mean gaps over all data. With more than 200 data, neighbours are taken together and a step
    is their mean. Monte Carlo error can make the family's part negative where it is small; it then lies below the upper edge
    of the encoder's part. Data whose gaps are not finite are left out and counted.

    Example::

        gaps = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), loader)
        pv.plots.plot_gaps_per_datum(gaps)
    """
    check_record(gaps, Gaps, made_by="what InferenceGaps returned")
    color = color_of(color)
    parts = (0 * gaps.inference if gaps.unsplit else gaps.amortization, gaps.inference)
    amortization, inference = (gap.detach().cpu().double().numpy() for gap in parts)
    finite = np.isfinite(amortization) & np.isfinite(inference)
    if not finite.any():
        raise ValueError(f"none of the {len(gaps)} data has finite gaps, so there is nothing to draw")
    order = np.flatnonzero(finite)[inference[finite].argsort(kind="stable")]
    together = math.ceil(len(order) / MOST_STEPS)
    steps = np.array_split(order, math.ceil(len(order) / together))
    edges = np.cumsum([0, *(len(step) for step in steps)])
    lower, upper = (np.array([gap[step].mean() for step in steps]) for gap in (amortization, inference))
    encoder, family, both = (gap[order].mean() for gap in (amortization, inference - amortization, inference))
    ax = axes_or_new(ax)
    fill: dict[str, Any] = {"fill": True, "linewidth": 0.5}
    line: dict[str, Any] = {"color": color or "black", "linewidth": 1}
    if gaps.unsplit:
        ax.stairs(upper, edges, label=prefixed(label, "encoder and family"), **{**BOTH, **fill, **kwargs})
    else:
        name = prefixed(label, f"amortization (encoder), mean {encoder:.2f}")
        own = {} if color is None else {"facecolor": color}
        ax.stairs(lower, edges, label=name, **{**ENCODER, **fill, **own, "hatch": None, **kwargs})
        name = prefixed(label, f"approximation (family), mean {family:.2f}")
        ax.stairs(upper, edges, baseline=lower, label=name, **{**FAMILY, **fill, "hatch": "....", **kwargs})
        ax.axhline(encoder, linestyle="--", label="mean amortization gap" if label is None else None, **line)
    ax.stairs(upper, edges, baseline=None, **{**line, "linewidth": 1.2})
    ax.axhline(both, linestyle=":", label=prefixed(label, f"mean inference gap {both:.2f}"), **line)
    each = f" (each step: mean of {together} data)" if together > 1 else ""
    left_out = f", {len(gaps) - len(order)} not finite left out" if len(order) < len(gaps) else ""
    ax.set(
        xlim=(0, len(order)),
        xlabel=f"data, sorted by inference gap{each}",
        ylabel="gap, nats",
        title=f"Gaps of {len(gaps)} data{left_out}",
    )
    legend_over(ax)
    return wrap_labels(ax)


def plot_pareto_k(
    evidence: Evidence, ax: Axes | None = None, *, color: Any = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """A histogram of the Pareto k of all data: how many can be trusted?

    :param evidence: what an estimator of log p(x) returned; that of gaps is `gaps.evidence`.
    :param ax: where to draw; a new figure by default. Draw several runs on one, each with its `color` and `label`.
    :param color: of all bars; by default bars above the threshold are red and the others blue.
    :param label: the name of the run in the legend.
    :param kwargs: passed on to `Axes.bar`, such as `alpha=`.

    The Pareto k of a datum says how heavy the tail of its importance weights is. Up to 0.5 (dashed line) the Monte Carlo
    error can be believed. Up to the threshold min(1 - 1/log10 K, 0.7) (solid line) the estimate is usable and its error too
    small. Above it, where bars are red, the estimate is likely off by more than its error (Vehtari et al., 2024,
    https://jmlr.org/papers/v25/19-556.html). Values that are not finite have no bar and are counted in the legend: `inf`
    (above every threshold), `-inf`, and `nan`, which is not judged.

    Example::

        evidence = pv.ImportanceSampling(model, guide)(x)
        pv.plots.plot_pareto_k(evidence)
    """
    check_record(evidence, Evidence, made_by="what an estimator of log p(x) returned")
    color = color_of(color)
    k = evidence.pareto_k.detach().cpu().double().numpy()
    threshold = pareto_k_threshold(evidence.num_particles)
    finite = k[np.isfinite(k)]
    ax = axes_or_new(ax)
    if len(finite):
        width = max(np.ptp(finite) / 25, 0.02)
        first, last = (finite.min() - threshold) // width, (finite.max() - threshold) // width
        edges = threshold + width * np.arange(first, last + 2)  # the threshold is one of them
        counts = np.histogram(finite, edges)[0]
        above = edges[:-1] > threshold - width / 2
        for part, fill in ((above, VERMILLION), (~above, SKY)):
            style = {"color": color or fill, "edgecolor": "black", "linewidth": 0.5, **kwargs}
            ax.bar(edges[:-1][part], counts[part], width, align="edge", **style)
        count_in_wholes(ax)
    else:
        ax.set_yticks([])
    limits = {FINITE_VARIANCE: "--", threshold: "-"}  # one line where they are the same
    for limit, dashes in limits.items():
        if math.isfinite(limit):
            text = f"{int((k > limit).sum())} of {len(k)} above {limit:.2f}"
            ax.axvline(limit, color=color or "black", linewidth=1.2, linestyle=dashes, label=prefixed(label, text))
    unlike = {
        "inf (a handful of weights is all)": k == math.inf,
        "-inf (all weights equal)": k == -math.inf,
        "nan (not judged)": np.isnan(k),
    }
    words = [f"no bar: {int(found.sum())} {what}" for what, found in unlike.items() if found.any()]
    for line in words:
        ax.plot([], [], " ", label=prefixed(label, line))
    ax.set(
        xlabel="Pareto k of the weights",
        ylabel="number of data",
        title=f"Pareto k of {len(k)} data, K = {evidence.num_particles}",
    )
    legend_over(ax)
    return wrap_labels(ax)
