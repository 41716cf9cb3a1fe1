"""Pictures of results: each takes a record and an optional matplotlib `ax`, and returns the `ax`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .estimates import Gaps
from .simulate import Reconstruction, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_gaps", "plot_reconstructions", "plot_samples"]


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
