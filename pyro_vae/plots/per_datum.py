"""Pictures of all data: the gaps of each, and how far the weights of each can be trusted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..evidence import Evidence
from ..gaps import Gaps
from ..ops import pareto_k_threshold
from .axes import axes_or_new, check_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_STEPS = 200  # of the gaps per datum: what a picture can show side by side
FINITE_VARIANCE = 0.5  # the Pareto k up to which an error can be believed


def plot_gaps_per_datum(gaps: Gaps, ax: Axes | None = None) -> Axes:
    """The gaps of all data, smallest inference gap first: encoder's part below, family's part above, in nats.

    :param gaps: what `InferenceGaps` returned.
    :param ax: where to draw; a new figure by default.

    Beyond 200 data neighbours are taken together, and a step is their mean. Lines are the mean gaps over all data. A
    family's part below zero, which Monte Carlo error can make of a small one, lies under the edge of the encoder's. Data
    whose gaps are not finite are left out and counted.

    Example::

        pv.plots.plot_gaps_per_datum(pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), loader))
    """
    check_record(gaps, Gaps, made_by="what InferenceGaps returned")
    parts = (0 * gaps.inference if gaps.unsplit else gaps.amortization, gaps.inference)
    amortization, inference = (gap.detach().cpu().double().numpy() for gap in parts)
    finite = np.isfinite(amortization) & np.isfinite(inference)
    if not finite.any():
        raise ValueError(f"none of the {len(gaps)} data has finite gaps, so there is nothing to draw")
    order = np.flatnonzero(finite)[inference[finite].argsort(kind="stable")]
    steps = np.array_split(order, min(len(order), MOST_STEPS))
    edges = np.cumsum([0, *(len(step) for step in steps)])
    lower, upper = (np.array([gap[step].mean() for step in steps]) for gap in (amortization, inference))
    ax = axes_or_new(ax)
    encoder, family, both = (gap[order].mean() for gap in (amortization, inference - amortization, inference))
    if not gaps.unsplit:
        ax.stairs(lower, edges, fill=True, facecolor="0.7", edgecolor="0.35", linewidth=0.5, label="amortization (encoder)")
        ax.axhline(encoder, color="black", linewidth=1, linestyle="--", label=f"mean amortization gap {encoder:.2f}")
    ax.stairs(
        upper,
        edges,
        baseline=lower,
        fill=True,
        facecolor="1.0",
        edgecolor="0.35",
        hatch="....",
        linewidth=0.5,
        label="encoder and family" if gaps.unsplit else f"approximation (family), mean {family:.2f}",
    )
    ax.stairs(upper, edges, baseline=None, color="black", linewidth=1.2)
    ax.axhline(both, color="black", linewidth=1, linestyle=":", label=f"mean inference gap {both:.2f}")
    each = f"; steps of about {len(order) / len(steps):.0f}, and their means" if len(steps) < len(order) else ""
    left_out = f", {len(gaps) - len(order)} not finite left out" if len(order) < len(gaps) else ""
    ax.set(
        xlim=(0, len(order)),
        xlabel=f"data, by inference gap{each}",
        ylabel="nats",
        title=f"Gaps of {len(gaps)} data{left_out}",
    )
    ax.margins(y=0.25)  # for the legend
    ax.legend(loc="upper left", framealpha=0.9, edgecolor="none", fontsize="small")
    return ax


def plot_pareto_k(evidence: Evidence, ax: Axes | None = None) -> Axes:
    """How the Pareto k of all data are spread, and how many lie above what can be trusted.

    :param evidence: what an estimator of log p(x) returned; that of gaps is `gaps.evidence`.
    :param ax: where to draw; a new figure by default.

    Up to 0.5 the Monte Carlo error can be believed. Up to the threshold min(1 - 1/log10 K, 0.7) the estimate is usable and
    its error too small; above, where bars are dark, the estimate is likely off by more than its error (Vehtari et al., 2024,
    https://jmlr.org/papers/v25/19-556.html). What is not finite has no bar and is counted in words: `inf` (above every
    threshold), `-inf`, and `nan`, which is not judged.

    Example::

        pv.plots.plot_pareto_k(pv.ImportanceSampling(model, guide)(x))
    """
    check_record(evidence, Evidence, made_by="what an estimator of log p(x) returned")
    k = evidence.pareto_k.detach().cpu().double().numpy()
    threshold = pareto_k_threshold(evidence.num_particles)
    finite = k[np.isfinite(k)]
    ax = axes_or_new(ax)
    if len(finite):
        width = max(np.ptp(finite) / 25, 0.02)
        first, last = (finite.min() - threshold) // width, (finite.max() - threshold) // width
        edges = threshold + width * np.arange(first, last + 2)  # the threshold is one of them
        counts = np.histogram(finite, edges)[0]
        dark = edges[:-1] > threshold - width / 2
        for part, color in ((dark, "0.25"), (~dark, "0.8")):
            ax.bar(edges[:-1][part], counts[part], width, align="edge", color=color, edgecolor="black", linewidth=0.5)
    else:
        ax.set_yticks([])
    limits = {FINITE_VARIANCE: "--", threshold: "-"}  # one line where they are the same
    for limit, style in limits.items():
        if math.isfinite(limit):
            label = f"{limit:.2f}: {int((k > limit).sum())} of {len(k)} above"
            ax.axvline(limit, color="black", linewidth=1.2, linestyle=style, label=label)
    unlike = {
        "inf (a handful of weights is all)": k == math.inf,
        "-inf (all weights equal)": k == -math.inf,
        "nan (not judged)": np.isnan(k),
    }
    words = [f"no bar: {int(found.sum())} {what}" for what, found in unlike.items() if found.any()]
    for line in words:
        ax.plot([], [], " ", label=line)
    ax.set(
        xlabel="Pareto k of the weights",
        ylabel="data",
        title=f"Pareto k of {len(k)} data, K = {evidence.num_particles}",
    )
    ax.margins(y=0.2 + 0.1 * len(words))  # for the legend
    ax.legend(loc="upper right", framealpha=0.9, edgecolor="none", fontsize="small")
    return ax
