"""The rate-distortion plane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..latent import BetaSweep, RateDistortionCurve
from .axes import axes_or_new, check_has

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_rate_distortion(
    result: RateDistortionCurve | BetaSweep | Any, ax: Axes | None = None, *, label: str | None = None
) -> Axes:
    """The rate-distortion plane, nats per datum: what z says about x against what is lost of it.

    :param result: what `RateDistortion` or `beta_sweep` returned, or `LinearGaussian.rate_distortion` of `pyro_vae.exact`.
        Call again with the same `ax` to lay several over one another, that of `RateDistortion` first.
    :param ax: where to draw; a new figure by default.
    :param label: in the legend; by default what it is.

    Bars are two Monte Carlo errors. The curve of one model comes with the posterior (a disc), its guide (a cross) and the
    diagonals D + R on which they stand. Numbers at the points of a sweep are its betas. What lies far up towards the
    prior is left out.

    Example::

        ax = pv.plots.plot_rate_distortion(pv.RateDistortion(model, guide)(loader))
        pv.plots.plot_rate_distortion(pv.beta_sweep(make_pair, loader, (0.5, 1, 2), num_epochs=50), ax)
    """
    check_has(result, "rate", "distortion", "beta", made_by="what RateDistortion or beta_sweep returned")
    ax = axes_or_new(ax)
    one_model, sweep = isinstance(result, RateDistortionCurve), isinstance(result, BetaSweep)
    if label is None:
        label = "one model, best encoders (upper bound)" if one_model else "trained at each beta" if sweep else "exact"
    order = result.rate.argsort().cpu()
    rate, distortion, beta = (v.detach().cpu()[order].tolist() for v in (result.rate, result.distortion, result.beta))
    bars: dict[str, Any] = {}
    if one_model or sweep:
        errors = {name: (2 * error.cpu()[order]).tolist() for name, error in result.std_errors.items()}
        bars = {"xerr": errors["rate"], "yerr": errors["distortion"], "capsize": 2}
    line, marker = ("-", ".") if one_model else ("--", "s") if sweep else (":", "")
    ax.errorbar(rate, distortion, **bars, color="black", ls=line, marker=marker, markersize=5, lw=1.2, label=label)
    if sweep:
        for b, r, d in zip(beta, rate, distortion, strict=True):
            ax.annotate(f"{b:g}", (r, d), (5, 5), textcoords="offset points", fontsize="small")
    if isinstance(result, RateDistortionCurve):
        mark_own_points(result, ax)
    ax.set(xlabel="rate, nats per datum", ylabel="distortion, nats per datum", title="Rate and distortion")
    ax.legend(fontsize="small", frameon=False)
    return ax


def mark_own_points(curve: RateDistortionCurve, ax: Axes) -> None:
    """The posterior, the guide, and the diagonals D + R on which they stand; the axes leave the prior's heights out."""
    at_one = curve.beta.tolist().index(1.0)
    ax.plot(float(curve.rate[at_one]), float(curve.distortion[at_one]), "ko", markersize=7, label="beta 1: the posterior")
    own = curve.guide_rate, curve.guide_distortion
    x, y = (float(estimate.value) for estimate in own)
    xerr, yerr = (2 * float(estimate.std_error) for estimate in own)
    ax.errorbar(x, y, xerr=xerr, yerr=yerr, color="black", marker="x", ls="", markersize=9, label="the guide")
    right = 1.1 * max(float(curve.rate.max()), x)
    for total, style, name in ((curve.elbo, "--", "ELBO"), (curve.log_evidence, "-", "log p(x)")):
        height = -float(total.value)
        text = f"D + R = {height:.2f} = -{name}"
        ax.plot([0.0, right], [height, height - right], color="0.6", lw=0.8, ls=style, label=text)
    low, top = float(curve.distortion.min()), max(-float(curve.elbo.value), -float(curve.log_evidence.value))
    ax.set(xlim=(-0.03 * right, right), ylim=(low - 0.15 * (top - low), top + 0.6 * (top - low)))
