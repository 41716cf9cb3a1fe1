"""Pictures of a training run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..options import whole_number
from ..training import HeldOutHistory, TrainingHistory
from .axes import axes_or_new, check_record, color_of, literal, prefixed
from .style import BLUE, GREEN, VERMILLION, clip_above, legend_beside, legend_over, take_legend_off, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = "beta of a training history"  # by which its axes are found again


def plot_training(
    history: TrainingHistory,
    ax: Axes | None = None,
    *,
    window: int | None = None,
    color: Any = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Training curves, in nats per datum: distortion, rate, and their sum, which is minus the true ELBO; beta below.

    :param history: what `Monitor.history()` returned.
    :param ax: where to draw; a new figure by default. Its lower sixth becomes the panel of beta. Draw several runs on one,
        each with its `color` and `label`.
    :param window: steps of the running mean that is drawn over the faint values themselves; by default a fiftieth of the
        run. 1 draws the values alone.
    :param color: of all curves of the run; by default each has its own.
    :param label: the name of the run in the legend.
    :param kwargs: passed on to `Axes.plot` for the curves.
    :raises ValueError: if the history is empty.
    :raises OptionError: if `window` is less than 1.

    With several latent sites the rate of each is drawn too. The vertical axis leaves out the highest 5% of every curve, so
    that the first steps do not flatten the rest. Crosses at the foot mark steps whose values are not finite; the running
    mean leaves them out.

    Example::

        history = monitor.history()
        pv.plots.plot_training(history)
    """
    check_record(history, TrainingHistory, made_by="monitor.history()")
    if not len(history):
        raise ValueError("the history has no step to draw: record some with Monitor.watch or Monitor.record")
    color = color_of(color)
    if window is None:
        window = max(1, len(history) // 50)
    window = min(whole_number("window", window, why="1 draws the values alone"), 2 * len(history))  # beyond it: all steps
    ax = axes_or_new(ax)
    curves: dict[str, tuple[Tensor, Any, float, str]] = {
        "$-$ELBO": (-history.elbo, "-", 2.0, "black"),
        "distortion": (history.distortion, "--", 1.5, BLUE),
        "rate": (history.rate, "-.", 1.5, VERMILLION),
    }
    if len(history.kl) > 1:
        sites = enumerate(history.kl.items(), 1)
        curves |= {f"rate of {literal(site)}": (kl, (0, (1, gap)), 1.2, GREEN) for gap, (site, kl) in sites}
    drawn: list[Any] = []
    run = "" if label is None else literal(f"{label}: ")
    for name, (values, dashes, width, usual) in curves.items():
        if window > 1:
            drawn += ax.plot(history.step, values, color=color or "0.8", linewidth=0.5, alpha=0.3 if color else None)
        style = {"color": color or usual, "linestyle": dashes, "linewidth": width, **kwargs}
        drawn += ax.plot(*running_mean(history.step, values, window), label=run + name, **style)
    if len(lost := history.step[history.not_finite]):
        foot: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        ax.plot(lost, torch.zeros(len(lost)), "x", color=color or "black", label=f"{run}not finite", **foot)
    limit_to_most(ax, [values for values, *_ in curves.values()])
    clip_above(ax, drawn, ax.get_ylim()[1])
    ax.set(ylabel=history.unit, title=f"Training, {len(history)} steps")
    draw_beta(panel_of(ax) or panel_below(ax), history, color)
    legend_over(ax, fit=False)
    return wrap_labels(ax)


def plot_held_out(
    history: HeldOutHistory, ax: Axes | None = None, *, color: Any = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """The ELBO of held-out data each time that an `EarlyStopping` looked, in nats per datum, and which one it kept.

    :param history: what `EarlyStopping.history()` returned.
    :param ax: where to draw; a new figure by default. Draw several runs on one, each with its `color` and `label`.
    :param color: of the run; black by default.
    :param label: the name of the run in the legend.
    :param kwargs: passed on to `Axes.plot` for the line.
    :raises ValueError: if the history is empty.

    Filled points improved on the last filled point before them by more than the error of the difference, and hollow points
    did not. Bars are two errors of that difference. Crosses are looks before beta had reached its final value, which do not
    count. The vertical line is the look whose parameters are kept.

    Example::

        history = stopping.history()
        pv.plots.plot_held_out(history)
    """
    check_record(history, HeldOutHistory, made_by="stopping.history()")
    color = color_of(color)
    if not len(history):
        raise ValueError("the history has no look to draw: call the EarlyStopping after an update first")
    ax = axes_or_new(ax)
    counts, improved = history.at_rest, history.improved
    main = color or "black"
    ax.plot(history.step, history.elbo, **{"color": color or "0.7", "linewidth": 1, **kwargs})
    errors = 2 * history.gain_error.nan_to_num(0.0)
    ax.errorbar(history.step, history.elbo, yerr=errors, color=main, fmt="none", capsize=3)
    for which, marker, face, name in (
        (counts & improved, "o", main, "improved"),
        (counts & ~improved, "o", "white", "no more than its error"),
        (~counts, "x", main, "beta still moving"),
    ):
        if bool(which.any()):
            style: dict[str, Any] = {"color": main, "marker": marker, "markerfacecolor": face, "linestyle": "none"}
            ax.plot(history.step[which], history.elbo[which], label=prefixed(label, name), **style)
    if history.best is not None:
        kept = int(history.step[history.best])
        ax.axvline(kept, color=main, linestyle=":", linewidth=1, label=prefixed(label, "kept"))
    ax.set(xlabel="update", ylabel="ELBO, nats per datum", title=f"Held-out ELBO, {history.num_data} data")
    legend_over(ax)
    return wrap_labels(ax)


def running_mean(steps: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Means over windows around a step, shorter at both ends; NaN where a window has no finite value."""
    stride = max(1, window // 10)
    finite = values.where(values.isfinite(), math.nan)
    padded = torch.nn.functional.pad(finite, (window // 2, window - 1 - window // 2), value=math.nan)
    return steps[::stride], padded.unfold(0, window, stride).nanmean(-1)


def limit_to_most(ax: Axes, curves: Sequence[Tensor]) -> None:
    """Limit the vertical axis to the lower 95 % of every curve; on axes with a panel, to what they show as well."""
    finite = [values[values.isfinite()] for values in curves]
    ends = [values.quantile(values.new_tensor([0.005, 0.95])).tolist() for values in finite if len(values)]
    if not ends:
        return
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    margin = 0.05 * ((high - low) or 1.0)
    low, high = low - margin, high + margin
    if panel_of(ax) is not None:
        before = take_legend_off(ax)
        low, high = min(low, before[0]), max(high, before[1])
    ax.set_ylim(low, high)


def panel_of(ax: Axes) -> Axes | None:
    """The panel of beta below, where a run has been drawn before."""
    shared = ax.get_shared_x_axes().get_siblings(ax)
    return next((other for other in shared if other.get_label() == PANEL), None)


def panel_below(ax: Axes) -> Axes:
    """Split off the lower sixth of the place of `ax`, with the same horizontal axis."""
    figure, cell = ax.figure, ax.get_subplotspec()
    if cell is not None:
        cells = cell.subgridspec(2, 1, height_ratios=(5, 1), hspace=0.08)
        ax.set_subplotspec(cells[0])
        panel = figure.add_subplot(cells[1], sharex=ax)
    else:
        left, bottom, width, height = ax.get_position().bounds
        ax.set_position((left, bottom + 0.2 * height, width, 0.8 * height))
        panel = figure.add_axes((left, bottom, width, 0.16 * height), sharex=ax)
    ax.tick_params(labelbottom=False)
    panel.set_label(PANEL)
    return panel


def draw_beta(panel: Axes, history: TrainingHistory, color: Any) -> None:
    by_site = history.beta if isinstance(history.beta, Mapping) else {"": history.beta}
    dashes = itertools.cycle(["-", "--", "-.", ":"])
    for (site, beta), dash in zip(by_site.items(), dashes, strict=False):
        style: dict[str, Any] = {"color": color or "black", "linewidth": 1, "linestyle": dash, "drawstyle": "steps-post"}
        panel.plot(history.step, beta, label=literal(f"of {site}"), **style)
    finite = [beta[beta.isfinite()] for beta in by_site.values()]
    top = max((float(beta.max()) for beta in finite if len(beta)), default=0.0)
    if len(panel.lines) > len(by_site):  # of another run
        top = max(top, panel.get_ylim()[1] / 1.15)
    panel.set(xlabel="step", ylabel="beta", ylim=(0, 1.15 * top or 1.0))
    panel.locator_params(axis="y", nbins=3)
    if len(by_site) > 1:
        legend_beside(panel)
