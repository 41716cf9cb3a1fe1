"""The rate-distortion plane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..latent import BetaSweep, RateDistortionCurve
from .axes import axes_or_new, check_has, color_of, literal
from .style import BLUE, VERMILLION, clip_above, legend_over, take_legend_off, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POSTERIOR = "posterior"  # marks the point by which the curve of one model is found again


def plot_rate_distortion(
    result: RateDistortionCurve | BetaSweep | Any,
    ax: Axes | None = None,
    *,
    color: Any = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Distortion against rate, both in nats per datum: what is lost of x against what the latents say about it.

    :param result: what `RateDistortion` or `beta_sweep` returned, or `LinearGaussian.rate_distortion` of `pyro_vae.exact`.
        Call again with the same `ax` to lay several over one another, that of `RateDistortion` first.
    :param ax: where to draw; a new figure by default.
    :param color: of the line; blue for one model, red for a sweep and black for an exact curve by default.
    :param label: in the legend; by default what it is.
    :param kwargs: passed on to `Axes.errorbar`, such as `marker=`.

    Error bars are two Monte Carlo errors. The curve of one model is an upper bound on the distortion of its best encoders at
    each rate. Short chains leave it too high, so that the guide can lie below it. With the curve come the point of the
    posterior (a disc) and the point of the guide (a cross). On one diagonal D + R is minus the ELBO of the guide, on the
    other it is minus log p(x). The part near the prior, where the rate is zero and the distortion large, is left out.
    Numbers at the points of a sweep are its betas.

    Example::

        curve = pv.RateDistortion(model, guide)(loader)
        ax = pv.plots.plot_rate_distortion(curve)
        pv.plots.plot_rate_distortion(pv.beta_sweep(make_pair, loader, (0.5, 1, 2), num_epochs=50), ax)
    """
    check_has(result, "rate", "distortion", "beta", made_by="what RateDistortion or beta_sweep returned")
    color = color_of(color)
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
    line, marker, usual = ("-", ".", BLUE) if one_model else ("--", "s", VERMILLION) if sweep else (":", "", "black")
    style = {"color": color or usual, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.2}
    drawn = ax.errorbar(rate, distortion, label=literal(label), **{**style, **bars, **kwargs})
    if sweep:
        for b, r, d in zip(beta, rate, distortion, strict=True):
            ax.annotate(f"{b:g}", (r, d), (4, 4), textcoords="offset points", fontsize="small")
        ax.margins(0.1)  # for these numbers
    if isinstance(result, RateDistortionCurve):
        another = has_curve(ax)
        mark_own_points(result, ax, color or usual)
        limit_to_most(result, ax, another)
        clip_above(ax, drawn.get_children(), ax.get_ylim()[1])
    ax.set(xlabel="rate, nats per datum", ylabel="distortion, nats per datum")
    legend_over(ax, fit=not has_curve(ax))
    return wrap_labels(ax)


def has_curve(ax: Axes) -> bool:
    """Whether the curve of one model has been drawn, whose limits stay."""
    return any(line.get_gid() == POSTERIOR for line in ax.lines)


def mark_own_points(curve: RateDistortionCurve, ax: Axes, color: Any) -> None:
    """The posterior, the guide, and the diagonals D + R on which they would stand."""
    at_one = curve.beta.tolist().index(1.0)
    x, y = float(curve.rate[at_one]), float(curve.distortion[at_one])
    ax.plot(x, y, "o", color=color, markersize=7, label="posterior (beta 1)", gid=POSTERIOR)
    x, y = float(curve.guide_rate.value), float(curve.guide_distortion.value)
    xerr, yerr = 2 * float(curve.guide_rate.std_error), 2 * float(curve.guide_distortion.std_error)
    ax.errorbar(x, y, xerr=xerr, yerr=yerr, color="black", marker="x", ls="", markersize=9, label="guide")
    right = 1.05 * max(float((curve.rate + 2 * curve.std_errors["rate"].nan_to_num(0.0)).max()), x)
    ax.set_xlim(-0.03 * right, right)
    for total, style, name in ((curve.elbo, "--", "ELBO"), (curve.log_evidence, "-", "log p(x)")):
        height = -float(total.value)
        text = f"D + R = {height:.2f} = -{name}"
        ax.plot([0.0, right], [height, height - right], color="0.5", lw=0.8, ls=style, label=text)


def limit_to_most(curve: RateDistortionCurve, ax: Axes, another: bool) -> None:
    """Limit the axis to the points that are not near the prior, with their error bars; with another curve, to both."""
    low, top = float(curve.distortion.min()), max(-float(curve.elbo.value), -float(curve.log_evidence.value))
    error = 2 * curve.std_errors["distortion"].nan_to_num(0.0)
    shown = curve.distortion <= top + 0.6 * (top - low)
    low, high = float((curve.distortion - error)[shown].min()), float((curve.distortion + error)[shown].max())
    margin = 0.1 * (max(high, top) - low)
    low, high = low - margin, max(high, top) + margin
    if another:
        before = take_legend_off(ax)
        low, high = min(low, before[0]), max(high, before[1])
    ax.set_ylim(low, high)
