"""Pictures of mean gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ArgumentError, described
from ..gaps import Gaps
from .axes import axes_or_new, check_record
from .style import BOTH, ENCODER, FAMILY, SHRINK, legend_over, name_ticks, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_gaps(gaps: Gaps, ax: Axes | None = None) -> Axes:
    """The mean gaps as steps from the ELBO up to log p(x), in nats per datum.

    :param gaps: what `InferenceGaps` returned.
    :param ax: where to draw; a new figure by default.

    The amortization gap is the encoder's part and the approximation gap the part of the variational family; the inference
    gap is both together. Error bars are two Monte Carlo errors. Where more than 5% of the data are in doubt a bar has none,
    and says so. To compare several guides use `plot_gaps_side_by_side`.

    Example::

        gaps = pv.InferenceGaps(model, guide)(x)
        pv.plots.plot_gaps(gaps)
    """
    check_record(gaps, Gaps, made_by="what InferenceGaps returned")
    ax = axes_or_new(ax)
    mean = gaps.summary()
    elbo, top = float(mean["elbo"].value), float(mean["log_evidence"].value)
    optimal = top if gaps.unsplit else float(mean["optimal_elbo"].value)
    steps = [
        ("amortization", elbo, optimal, ENCODER, "(encoder)"),
        ("approximation", optimal, top, FAMILY, "(family)"),
        ("inference", elbo, top, BOTH, "(both)"),
    ]
    steps = [step for step in steps if step[0] in mean]
    for position, (name, low, high, style, _) in enumerate(steps):
        doubt = mean[name].doubt
        error = 0.0 if doubt else 2 * float(mean[name].std_error)
        ax.bar(position, high - low, bottom=low, width=0.6, **style)
        if not doubt:
            ax.errorbar(position, high, yerr=error, color="black", capsize=4)
        number = f"{high - low:.2f}" + ("\nin doubt" if doubt else "")
        ax.annotate(number, (position, max(low, high) + error), (0, 4), textcoords="offset points", ha="center")
    levels = {"log p(x)": top, "optimal ELBO": optimal, "ELBO": elbo}
    if gaps.unsplit:
        del levels["optimal ELBO"]
    share = name_levels(ax, levels, len(steps))
    name_ticks(ax, [f"{name} {whose}" for name, *_, whose in steps], share=share)
    ax.set(ylabel="nats per datum", title=f"What the ELBO leaves out, {len(gaps)} data")
    return wrap_labels(ax)


def name_levels(ax: Axes, levels: Mapping[str, float], num_bars: int) -> float:
    """A dotted line at each level, named to the right of the bars; returns the share of the width that the bars keep.

    Names are kept a line apart, however close their levels are.
    """
    texts = [
        ax.text(num_bars - 0.55, level, f"{name}\n{level:.2f}", fontsize="small", va="center", linespacing=1.0)
        for name, level in levels.items()
    ]
    boxes = [text.get_window_extent() for text in texts]
    share = 1 - min(1.1 * max(box.width for box in boxes) / ax.bbox.width, 0.5)
    low, high = min(levels.values()), max(levels.values())
    span = max(high - low, 1e-3)
    line = 1.1 * max(box.height for box in boxes) / (SHRINK * ax.bbox.height)  # of the height of the axes
    scale = span / max(1 - 2.6 * line, 0.3)  # what the axes hold from end to end: a name below, a number above
    bottom = low - line * scale
    ax.set(xlim=(-0.5, -0.5 + num_bars / share), ylim=(bottom, bottom + scale))
    ceiling = math.inf
    floors = line * scale * (len(texts) - 1)
    for text, level in zip(texts, levels.values(), strict=True):
        ax.hlines(level, -0.5, num_bars - 0.6, color="black", linewidth=0.8, linestyle=":")
        y = min(max(level, low - 0.45 * line * scale + floors), ceiling - line * scale)
        text.set_position((num_bars - 0.55, y))
        ceiling, floors = y, floors - line * scale
    return share


def plot_gaps_side_by_side(gaps: Mapping[str, Gaps], ax: Axes | None = None) -> Axes:
    """Amortization and approximation gap of several guides or data sets, one bar each, in nats per datum.

    :param gaps: what `InferenceGaps` returned, by the name below its bar.
    :param ax: where to draw; a new figure by default.

    The height of a bar is the inference gap. Error bars are two Monte Carlo errors of each part. Where more than 5% of the
    data are in doubt there is none, and the number says so. Where the gap is not split the bar is white.

    Example::

        gaps = {name: pv.InferenceGaps(vae.model, vae.guide)(x) for name, vae in models.items()}
        pv.plots.plot_gaps_side_by_side(gaps)
    """
    if not isinstance(gaps, Mapping) or not gaps:
        raise ArgumentError(f"expected a dict of Gaps by name, got {described(gaps)}: pass {{'a': gaps_a, 'b': gaps_b}}")
    for record in gaps.values():
        check_record(record, Gaps, made_by="what InferenceGaps returned")
    ax = axes_or_new(ax)
    split = [("amortization", "amortization (encoder)", ENCODER), ("approximation", "approximation (family)", FAMILY)]
    for position, record in enumerate(gaps.values()):
        mean, bottom = record.summary(), 0.0
        for name, label, style in [("inference", "inference (both)", BOTH)] if record.unsplit else split:
            height, doubt = float(mean[name].value), mean[name].doubt
            ax.bar(position, height, bottom=bottom, width=0.6, **style, label=label)
            if not doubt:
                ax.errorbar(position, bottom + height, yerr=2 * float(mean[name].std_error), color="black", capsize=4)
            bottom += height
        doubted = "" if not mean["inference"].doubt else "\nin doubt"
        text = f"{float(mean['inference'].value):.2f}{doubted}"
        ax.annotate(text, (position, bottom), (0, 6), textcoords="offset points", ha="center")
    name_ticks(ax, [str(name) for name in gaps])
    ax.set(ylabel="nats per datum", title="log p(x) minus the ELBO")
    legend_over(ax, lines=1 + any(record.summary()["inference"].doubt for record in gaps.values()))
    return wrap_labels(ax)
