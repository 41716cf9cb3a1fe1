"""Pictures of results: each takes a record and an optional matplotlib `ax`, and returns the `ax`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import OptionError
from .estimates import Gaps, KCurve, TrainingHistory
from .simulate import Reconstruction, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_gaps", "plot_k_curve", "plot_reconstructions", "plot_samples", "plot_training"]


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # here, so that importing the package starts no graphics

    return plt.subplots()[1]


def plot_gaps(gaps: Gaps, ax: Axes | None = None) -> Axes:
    """From the ELBO up to log p(x): a waterfall of the mean gaps, in nats per datum.

    :param gaps: what `InferenceGaps` returned.
    :param ax: where to draw; a new figure by default.

    Bars carry their Monte Carlo error at two standard errors. Fills differ by hatch as well as by shade.

    Example::

        pv.plots.plot_gaps(pv.InferenceGaps(model, guide)(x))
    """
    ax = _axes(ax)
    mean = gaps.summary()
    elbo, optimal, top = (float(mean[name].value) for name in ("elbo", "optimal_elbo", "log_evidence"))
    steps = [
        ("amortization", elbo, optimal, "0.75", "//"),
        ("approximation", optimal, top, "0.9", ".."),
        ("inference", elbo, top, "1.0", ""),
    ]
    for position, (name, low, high, shade, hatch) in enumerate(steps):
        error = 2 * float(mean[name].std_error)
        ax.bar(position, high - low, bottom=low, width=0.6, color=shade, edgecolor="black", hatch=hatch)
        ax.errorbar(position, high, yerr=error, color="black", capsize=4)
        ax.annotate(f"{high - low:.2f}", (position, max(low, high) + error), (0, 4), textcoords="offset points", ha="center")
    for level, name, va in ((elbo, "ELBO", "top"), (optimal, "optimal ELBO", "bottom"), (top, "log p(x)", "bottom")):
        ax.axhline(level, color="black", linewidth=0.8, linestyle=":")
        ax.annotate(f" {name} {level:.2f}", (2.45, level), (0, -2 if va == "top" else 1), textcoords="offset points", va=va)
    span = max(abs(top - elbo), 1e-3)
    ax.set(
        xlim=(-0.5, 4.0),
        ylim=(min(elbo, top) - 0.15 * span, max(elbo, optimal, top) + 0.2 * span),
        xticks=range(3),
        xticklabels=["amortization\n(encoder)", "approximation\n(family)", "inference\n(both)"],
        ylabel="nats per datum",
        title=f"What the ELBO leaves out, {len(gaps)} data",
    )
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
    ax = _axes(ax)
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


def plot_reconstructions(reconstruction: Reconstruction, ax: Axes | None = None, *, num_images: int = 10) -> Axes:
    """Data above, reconstructions below.

    :param reconstruction: what `reconstruct` returned; its first observed site is drawn.
    :param ax: where to draw; a new figure by default.
    :param num_images: how many of the data.
    """
    ax = _axes(ax)
    name = _first_site(reconstruction.means)
    data, means = (_images(side[name])[:num_images] for side in (reconstruction.observed, reconstruction.means))
    _show(ax, torch.cat([data, means]), num_columns=len(data))
    ax.set(title="data (top), reconstructions (bottom)")
    return ax


def plot_samples(simulation: Simulation, ax: Axes | None = None, *, num_images: int = 20) -> Axes:
    """Means of the likelihood at draws from the prior.

    :param simulation: what `simulate` returned; its first observed site is drawn.
    :param ax: where to draw; a new figure by default.
    :param num_images: how many of the draws.
    """
    ax = _axes(ax)
    images = _images(simulation.means[_first_site(simulation.means)])[:num_images]
    _show(ax, images, num_columns=math.ceil(len(images) / 2))
    ax.set(title="samples from the model")
    return ax


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
    if not len(history):
        raise ValueError("the history has no step to draw: record some with Monitor.watch or Monitor.record")
    if window is None:
        window = max(1, len(history) // 50)
    if window < 1:
        raise OptionError(f"window must be a number of steps of at least 1, got {window}: 1 draws the values alone")
    ax = _axes(ax)
    curves: dict[str, tuple[Tensor, Any, float]] = {
        "$-$ELBO": (-history.elbo, "-", 2.0),
        "distortion": (history.distortion, "--", 1.5),
        "rate": (history.rate, "-.", 1.5),
    }
    if len(history.kl) > 1:
        sites = enumerate(history.kl.items(), 1)
        curves |= {f"rate of {site}": (kl, (0, (1, gap)), 1.2) for gap, (site, kl) in sites}
    for name, (values, style, width) in curves.items():
        if window > 1:
            ax.plot(history.step, values, color="0.8", linewidth=0.5)
        steps, means = _running_mean(history.step, values, window)
        ax.plot(steps, means, color="black", linestyle=style, linewidth=width, label=name)
    if len(lost := history.step[history.not_finite]):
        ax.plot(lost, torch.zeros(len(lost)), "kx", transform=ax.get_xaxis_transform(), clip_on=False, label="not finite")
    _leave_out_the_highest(ax, [values for values, _, _ in curves.values()])
    ax.set(ylabel=history.unit, title=f"Training, {len(history)} steps")
    ax.legend(loc="upper right", ncol=3, fontsize="small", frameon=False)
    _draw_beta(_panel_below(ax), history)
    return ax


def _running_mean(steps: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Means over windows around a step, shorter at both ends; NaN where a window has no finite value."""
    stride = max(1, window // 10)
    finite = values.where(values.isfinite(), math.nan)
    padded = torch.nn.functional.pad(finite, (window // 2, window - 1 - window // 2), value=math.nan)
    return steps[::stride], padded.unfold(0, window, stride).nanmean(-1)


def _leave_out_the_highest(ax: Axes, curves: Sequence[Tensor]) -> None:
    """Limit the vertical axis to the lower 95 % of every curve, with room for a legend above."""
    finite = [values[values.isfinite()] for values in curves]
    ends = [values.quantile(values.new_tensor([0.005, 0.95])).tolist() for values in finite if len(values)]
    if ends:
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        span = (high - low) or 1.0
        ax.set_ylim(low - 0.05 * span, high + 0.25 * span)


def _panel_below(ax: Axes) -> Axes:
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


def _draw_beta(panel: Axes, history: TrainingHistory) -> None:
    by_site = history.beta if isinstance(history.beta, Mapping) else {"": history.beta}
    for (site, beta), style in zip(by_site.items(), itertools.cycle(["-", "--", "-.", ":"]), strict=False):
        panel.plot(
            history.step, beta, color="black", linewidth=1, linestyle=style, drawstyle="steps-post", label=f"of {site}"
        )
    if len(by_site) > 1:
        panel.legend(loc="lower right", ncol=3, fontsize="x-small", frameon=False)
    finite = [beta[beta.isfinite()] for beta in by_site.values()]
    top = max((float(beta.max()) for beta in finite if len(beta)), default=0.0)
    panel.set(xlabel="step", ylabel="beta", ylim=(0, 1.15 * top or 1.0))
    panel.locator_params(axis="y", nbins=3)


def _first_site(means: Mapping[str, Tensor]) -> str:
    if not means:
        raise ValueError("no observed site has a likelihood with a mean, so there is nothing to draw")
    return next(iter(means))


def _images(data: Tensor) -> Tensor:
    """(B, H, W) from flat squares, (B, H * W), from (B, H, W) or from (B, 1, H, W)."""
    data = data.detach().cpu()
    if data.ndim == 4 and data.shape[1] == 1:
        data = data[:, 0]
    side = math.isqrt(data.shape[-1])
    if data.ndim == 2 and side**2 == data.shape[-1]:
        data = data.reshape(-1, side, side)
    if data.ndim != 3:
        raise ValueError(f"images must be (B, H, W), (B, 1, H, W) or flat squares (B, H * H), got {tuple(data.shape)}")
    return data


def _show(ax: Axes, images: Tensor, num_columns: int) -> None:
    num_images, height, width = images.shape
    num_rows = math.ceil(num_images / num_columns)
    sheet = images.new_full((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1), float("nan"), dtype=torch.float)
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        top, left = row * (height + 1), column * (width + 1)
        sheet[top : top + height, left : left + width] = image
    ax.imshow(sheet.numpy(), cmap="gray_r", interpolation="nearest")
    ax.set_axis_off()
