"""A picture of paired differences between models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..records import normal_quantile
from .axes import axes_or_new, check_has, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # pairs drawn


class Differences(Protocol):
    """What is drawn of a `Comparison`, which knows its plot and so is not known here."""

    @property
    def pairs(self) -> Sequence[Any]: ...

    @property
    def level(self) -> float: ...

    def pair(self, one: str, other: str, *, elbo: bool = False) -> Any: ...

    def __len__(self) -> int: ...


def plot_comparison(comparison: Differences, ax: Axes | None = None) -> Axes:
    """Mean differences between models with both intervals, in nats per datum: log p(x) in black, the ELBO below it in grey.

    :param comparison: what `compare` returned.
    :param ax: where to draw; a new figure by default.

    The thin line is the interval for the population of data (Student's t, paired, not corrected for the number of pairs),
    the thick one that of Monte Carlo error on these data. A filled mark is a pair told apart, a hollow one is not, a cross
    is not to be trusted and has no interval. At most 12 pairs are drawn, those of the best model first.

    Example::

        gaps = {name: pv.InferenceGaps(vae.model, vae.guide)(x) for name, vae in models.items()}
        pv.compare(gaps).plot()
    """
    check_has(comparison, "pairs", "pair", "level", made_by="what compare returned")
    ax = axes_or_new(ax)
    pairs = list(comparison.pairs)[:MOST]
    for row, pair in enumerate(pairs):
        by_elbo = comparison.pair(pair.first, pair.second, elbo=True)
        for drawn, offset, color, name in ((pair, -0.12, "black", "log p(x)"), (by_elbo, 0.16, "0.55", "ELBO")):
            sign = 1 if drawn.first == pair.first else -1
            mean = drawn.mean()
            value, y = sign * float(mean.value), row + offset
            if drawn.claim != "not to be trusted":
                half = normal_quantile(comparison.level) * float(mean.std_error)
                ax.plot([sign * end for end in drawn.confidence_interval()], [y, y], color=color, linewidth=1)
                ax.plot([value - half, value + half], [y, y], color=color, linewidth=4, solid_capstyle="butt")
            face = color if drawn.told_apart else "white"
            mark = "x" if drawn.claim == "not to be trusted" else "o"
            label = name if row == 0 else None
            ax.plot(value, y, mark, color=color, markerfacecolor=face, markersize=7, label=label, zorder=3)
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(pairs)), [literal(f"{pair.first} - {pair.second}") for pair in pairs])
    left_out = f", {len(comparison.pairs) - MOST} more pairs" if len(comparison.pairs) > MOST else ""
    ax.set(
        ylim=(len(pairs) - 0.5, -0.5),
        xlabel=f"mean difference, nats per datum\n{comparison.level:.0%} intervals: other data (thin), Monte Carlo (thick)",
        title=f"Paired differences on {len(comparison)} data{left_out}",
    )
    ax.margins(x=0.1)
    ax.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize="small")
    return ax
