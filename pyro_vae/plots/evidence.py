"""Pictures of gaps and of estimates of log p(x)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, described
from ..evidence import KCurve
from ..gaps import Gaps
from .axes import axes_or_new, check_record, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_gaps(gaps: Gaps, ax: Axes | None = None) -> Axes:
    """From the ELBO up to log p(x): a waterfall of the mean gaps, in nats per datum.

    :param gaps: what `InferenceGaps` returned.
    :param ax: where to draw; a new figure by default.

    Bars carry their Monte Carlo error at two standard errors, unless more than 5% of the data are in doubt. Fills differ by
    hatch as well as by shade.

    Example::

        pv.plots.plot_gaps(pv.InferenceGaps(model, guide)(x))
    """
    check_record(gaps, Gaps, made_by="what InferenceGaps returned")
    ax = axes_or_new(ax)
    mean = gaps.summary()
    elbo, top = float(mean["elbo"].value), float(mean["log_evidence"].value)
    optimal = top if gaps.unsplit else float(mean["optimal_elbo"].value)
    steps = [
        ("amortization", elbo, optimal, "0.75", "//", "encoder"),
        ("approximation", optimal, top, "0.9", "..", "family"),
        ("inference", elbo, top, "1.0", "", "both"),
    ]
    steps = [step for step in steps if step[0] in mean]
    for position, (name, low, high, shade, hatch, _) in enumerate(steps):
        doubt = mean[name].doubt
        error = 0.0 if doubt else 2 * float(mean[name].std_error)
        ax.bar(position, high - low, bottom=low, width=0.6, color=shade, edgecolor="black", hatch=hatch)
        if not doubt:
            ax.errorbar(position, high, yerr=error, color="black", capsize=4)
        number = f"{high - low:.2f}" + ("\nin doubt" if doubt else "")
        ax.annotate(number, (position, max(low, high) + error), (0, 4), textcoords="offset points", ha="center")
    levels = [(elbo, "ELBO", "top"), (optimal, "optimal ELBO", "bottom"), (top, "log p(x)", "bottom")]
    for level, name, va in levels[::2] if gaps.unsplit else levels:
        ax.axhline(level, color="black", linewidth=0.8, linestyle=":")
        ax.annotate(
            f" {name} {level:.2f}",
            (len(steps) - 0.55, level),
            (0, -2 if va == "top" else 1),
            textcoords="offset points",
            va=va,
        )
    span = max(abs(top - elbo), 1e-3)
    ax.set(
        xlim=(-0.5, len(steps) + 1.0),
        ylim=(min(elbo, top) - 0.15 * span, max(elbo, optimal, top) + 0.2 * span),
        xticks=range(len(steps)),
        xticklabels=[f"{step[0]}\n({step[-1]})" for step in steps],
        ylabel="nats per datum",
        title=f"What the ELBO leaves out, {len(gaps)} data",
    )
    return ax


def plot_gaps_side_by_side(gaps: Mapping[str, Gaps], ax: Axes | None = None) -> Axes:
    """Amortization and approximation gap of several guides or data sets, one bar each, in nats per datum.

    :param gaps: what `InferenceGaps` returned, by the name below its bar.
    :param ax: where to draw; a new figure by default.

    The height is the inference gap. Bars carry the Monte Carlo errors of the two parts at two standard errors, unless more
    than 5% of the data are in doubt. Where the gap is not split the bar is white.

    Example::

        pv.plots.plot_gaps_side_by_side({"before": refit.test_before, "after": refit.test_after})
    """
    if not isinstance(gaps, Mapping) or not gaps:
        raise ArgumentError(f"expected a dict of Gaps by name, got {described(gaps)}: pass {{'a': gaps_a, 'b': gaps_b}}")
    for record in gaps.values():
        check_record(record, Gaps, made_by="what InferenceGaps returned")
    ax = axes_or_new(ax)
    for position, record in enumerate(gaps.values()):
        mean, bottom = record.summary(), 0.0
        parts = (
            [("inference", "1.0", "")]
            if record.unsplit
            else [("amortization", "0.75", "//"), ("approximation", "0.9", "..")]
        )
        for name, shade, hatch in parts:
            height, doubt = float(mean[name].value), mean[name].doubt
            label = {"amortization": "amortization (encoder)", "approximation": "approximation (family)"}.get(name, name)
            style: Any = {"color": shade, "edgecolor": "black", "hatch": hatch}
            ax.bar(position, height, bottom=bottom, width=0.6, **style, label="" if position else label)
            if not doubt:
                ax.errorbar(position, bottom + height, yerr=2 * float(mean[name].std_error), color="black", capsize=4)
            bottom += height
        doubted = "" if not mean["inference"].doubt else "\nin doubt"
        text = f"{float(mean['inference'].value):.2f}{doubted}"
        ax.annotate(text, (position, bottom), (0, 6), textcoords="offset points", ha="center")
    ax.set(
        xticks=range(len(gaps)),
        xticklabels=[literal(name) for name in gaps],
        ylabel="nats per datum",
        title="log p(x) minus the ELBO",
    )
    ax.margins(y=0.2)
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_k_curve(curve: KCurve, ax: Axes | None = None) -> Axes:
    """The mean estimate of log p(x) against the number of weights K: has it levelled off? Nats per datum.

    :param curve: `curve` of the `Evidence` that `ImportanceSampling` returned.
    :param ax: where to draw; a new figure by default.

    Bars are two Monte Carlo errors. The points share their draws, so the number at the end, what the last doubling
    of K has brought with one Monte Carlo error of its own, is far more exact than the bars. Sizes with a block whose
    weights are all zero, whose estimate is minus infinity, are left out.

    Example::

        evidence = pv.ImportanceSampling(model, guide)(x)
        pv.plots.plot_k_curve(evidence.curve)
    """
    check_record(curve, KCurve, made_by="evidence.curve of ImportanceSampling")
    ax = axes_or_new(ax)
    points = [(k, float(e.value), float(e.std_error)) for k, e in zip(curve.num_particles, curve.means(), strict=True)]
    points = [(k, value, 2 * error) for k, value, error in points if math.isfinite(value)]
    if not points:
        raise ValueError("the curve has no finite value to draw: for every size, some datum has a block of zero weights")
    sizes, values, errors = zip(*points, strict=True)
    ax.errorbar(sizes, values, yerr=errors, color="black", marker="o", markersize=4, linewidth=1.2, capsize=3)
    ax.set_xscale("log", base=2)
    step = math.ceil(len(sizes) / 8)  # every size has a point, about eight have a number
    ticks = sizes[::-1][::step][::-1]
    ax.set_xticks(ticks, [str(size) for size in ticks])
    ax.minorticks_off()
    rise = curve.last_difference()
    if math.isfinite(float(rise.value)):
        before, last = curve.num_particles[-2:]
        error = float(rise.std_error)
        digits = min(max(2, 1 - math.floor(math.log10(error))), 6) if error > 0 else 6
        text = f"K from {before} to {last}:\n{float(rise.value):+.{digits}f} \u00b1 {error:.{digits}f} nats"
        ax.annotate(text, (0.96, 0.06), xycoords="axes fraction", ha="right", va="bottom")
    ax.set(xlabel="weights per datum, K", ylabel="log p(x), nats per datum", title=f"Estimate against K, {len(curve)} data")
    return ax
