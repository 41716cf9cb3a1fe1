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
from .axes import axes_or_new, check_record, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_training(history: TrainingHistory, ax: Axes | None = None, *, window: int | None = None) -> Axes:
    """Training curves: distortion, rate and their sum, which is minus the true ELBO, in nats per datum; beta below.

    :param history: what `Monitor.history()` returned.
    :param ax: where to draw; a new figure by default. Its lower sixth becomes the panel of beta.
    :param window: steps of the running mean that is drawn over the faint values themselves; by default a fiftieth of the
        run. 1 draws the values alone.

    With several latent sites the rate of each is drawn too. The vertical axis leaves out the highest 5 % of every curve, so
    that the first steps do not flatten the rest. Crosses at the foot mark steps that are not finite, which the running mean
    leaves out.

    :raises ValueError: if the history is empty.
    :raises OptionError: if `window` is less than 1.

    Example::

        pv.plots.plot_training(monitor.history())
    """
    check_record(history, TrainingHistory, made_by="monitor.history()")
    if not len(history):
        raise ValueError("the history has no step to draw: record some with Monitor.watch or Monitor.record")
    if window is None:
        window = max(1, len(history) // 50)
    window = min(whole_number("window", window, why="1 draws the values alone"), 2 * len(history))  # beyond it: all steps
    ax = axes_or_new(ax)
    curves: dict[str, tuple[Tensor, Any, float]] = {
        "$-$ELBO": (-history.elbo, "-", 2.0),
        "distortion": (history.distortion, "--", 1.5),
        "rate": (history.rate, "-.", 1.5),
    }
    if len(history.kl) > 1:
        sites = enumerate(history.kl.items(), 1)
        curves |= {literal(f"rate of {site}"): (kl, (0, (1, gap)), 1.2) for gap, (site, kl) in sites}
    for name, (values, style, width) in curves.items():
        if window > 1:
            ax.plot(history.step, values, color="0.8", linewidth=0.5)
        steps, means = running_mean(history.step, values, window)
        ax.plot(steps, means, color="black", linestyle=style, linewidth=width, label=name)
    if len(lost := history.step[history.not_finite]):
        ax.plot(lost, torch.zeros(len(lost)), "kx", transform=ax.get_xaxis_transform(), clip_on=False, label="not finite")
    leave_out_the_highest(ax, [values for values, _, _ in curves.values()])
    ax.set(ylabel=history.unit, title=f"Training, {len(history)} steps")
    ax.legend(loc="upper right", ncol=3, fontsize="small", frameon=False)
    draw_beta(panel_below(ax), history)
    return ax


def plot_held_out(history: HeldOutHistory, ax: Axes | None = None) -> Axes:
    """The held-out ELBO at every look of an `EarlyStopping`, in nats per datum, and the best one.

    :param history: what `EarlyStopping.history()` returned.
    :param ax: where to draw; a new figure by default.

    Filled points improved on the look before them that had last done so, open ones did not; their bars are two errors of
    that difference. Crosses are looks before beta had reached its end, which do not count.

    :raises ValueError: if the history is empty.

    Example::

        pv.plots.plot_held_out(stopping.history())
    """
    check_record(history, HeldOutHistory, made_by="stopping.history()")
    if not len(history):
        raise ValueError("the history has no look to draw: call the EarlyStopping after an update first")
    ax = axes_or_new(ax)
    counts, improved = history.at_rest, history.improved
    ax.plot(history.step, history.elbo, color="0.7", linewidth=1)
    ax.errorbar(
        history.step, history.elbo, yerr=2 * history.gain_error.nan_to_num(0.0), color="black", fmt="none", capsize=3
    )
    for which, marker, face, label in (
        (counts & improved, "o", "black", "improved"),
        (counts & ~improved, "o", "white", "no more than its error"),
        (~counts, "x", "black", "beta still moving"),
    ):
        if bool(which.any()):
            style: Any = {"color": "black", "marker": marker, "markerfacecolor": face, "linestyle": "none"}
            ax.plot(history.step[which], history.elbo[which], **style, label=label)
    if history.best is not None:
        ax.axvline(int(history.step[history.best]), color="black", linestyle=":", linewidth=1, label="kept")
    ax.set(xlabel="update", ylabel="nats per datum", title=f"Held-out ELBO, {history.num_data} data")
    ax.legend(frameon=False, fontsize="small")
    return ax


def running_mean(steps: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Means over windows around a step, shorter at both ends; NaN where a window has no finite value."""
    stride = max(1, window // 10)
    finite = values.where(values.isfinite(), math.nan)
    padded = torch.nn.functional.pad(finite, (window // 2, window - 1 - window // 2), value=math.nan)
    return steps[::stride], padded.unfold(0, window, stride).nanmean(-1)


def leave_out_the_highest(ax: Axes, curves: Sequence[Tensor]) -> None:
    """Limit the vertical axis to the lower 95 % of every curve, with room for a legend above."""
    finite = [values[values.isfinite()] for values in curves]
    ends = [values.quantile(values.new_tensor([0.005, 0.95])).tolist() for values in finite if len(values)]
    if ends:
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        span = (high - low) or 1.0
        ax.set_ylim(low - 0.05 * span, high + 0.25 * span)


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
    return panel


def draw_beta(panel: Axes, history: TrainingHistory) -> None:
    by_site = history.beta if isinstance(history.beta, Mapping) else {"": history.beta}
    for (site, beta), style in zip(by_site.items(), itertools.cycle(["-", "--", "-.", ":"]), strict=False):
        panel.plot(
            history.step,
            beta,
            color="black",
            linewidth=1,
            linestyle=style,
            drawstyle="steps-post",
            label=literal(f"of {site}"),
        )
    if len(by_site) > 1:
        panel.legend(loc="lower right", ncol=3, fontsize="x-small", frameon=False)
    finite = [beta[beta.isfinite()] for beta in by_site.values()]
    top = max((float(beta.max()) for beta in finite if len(beta)), default=0.0)
    panel.set(xlabel="step", ylabel="beta", ylim=(0, 1.15 * top or 1.0))
    panel.locator_params(axis="y", nbins=3)
