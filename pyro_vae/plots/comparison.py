"""A picture of paired differences between models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..records import normal_quantile
from .axes import axes_or_new, check_has, literal
from .style import BLUE, ORANGE, SMALL, filled, height_of, legend_over, size_for, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # pairs drawn
WIDTHS = 18, 40  # letters of a label, beside which the axes still have room


class Differences(Protocol):
    """What is drawn of a `Comparison`, which knows its plot and so is not known here."""

    @property
    def pairs(self) -> Sequence[Any]: ...

    @property
    def level(self) -> float: ...

    def pair(self, one: str, other: str, *, elbo: bool = False) -> Any: ...

    def __len__(self) -> int: ...


def plot_comparison(comparison: Differences, ax: Axes | None = None) -> Axes:
    """Mean differences between models, in nats per datum: of log p(x) (circles) and of the ELBO below it (squares).

    :param comparison: what `compare` returned.
    :param ax: where to draw; a new figure by default.

    The thin line is the interval for the population of data (Student's t, paired, not corrected for the number of pairs).
    The thick line is the interval of Monte Carlo error on these data. The mark is filled where the two models are told apart
    and hollow where they are not. A cross is a difference that is not to be trusted, and has no interval. At most 12 pairs
    are drawn, those of the best model first.

    Example::

        gaps = {name: pv.InferenceGaps(vae.model, vae.guide)(x) for name, vae in models.items()}
        pv.compare(gaps).plot()
    """
    check_has(comparison, "pairs", "pair", "level", made_by="what compare returned")
    pairs = list(comparison.pairs)[:MOST]
    ax = axes_or_new(ax, size_for(letters=0, lines=8 + 2 * len(pairs)))
    for row, pair in enumerate(pairs):
        by_elbo = comparison.pair(pair.first, pair.second, elbo=True)
        for drawn, offset, color, name in ((pair, -0.14, BLUE, "log p(x)"), (by_elbo, 0.18, ORANGE, "ELBO")):
            sign = 1 if drawn.first == pair.first else -1
            mean = drawn.mean()
            value, y = sign * float(mean.value), row + offset
            if drawn.claim != "not to be trusted":
                half = normal_quantile(comparison.level) * float(mean.std_error)
                ax.plot([sign * end for end in drawn.confidence_interval()], [y, y], color=color, linewidth=1)
                ax.plot([value - half, value + half], [y, y], color=color, linewidth=4, solid_capstyle="butt")
            face = color if drawn.told_apart else "white"
            mark = "x" if drawn.claim == "not to be trusted" else "o" if name == "log p(x)" else "s"
            label = name if row == 0 else None
            ax.plot(value, y, mark, color=color, markerfacecolor=face, markersize=7, label=label, zorder=3)
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    name_pairs(ax, pairs)
    left_out = f", {len(comparison.pairs) - MOST} more pairs" if len(comparison.pairs) > MOST else ""
    ax.set(
        ylim=(len(pairs) - 0.5, -0.5),
        xlabel=f"mean difference, nats per datum\n{comparison.level:.0%} intervals: thin, other data; thick, Monte Carlo",
        title=f"Paired differences on {len(comparison)} data{left_out}",
    )
    ax.margins(x=0.1)
    legend_over(ax, fit=False)
    return wrap_labels(ax)


def name_pairs(ax: Axes, pairs: Sequence[Any]) -> None:
    """Both models of a pair on one line where that is short, else one below the other, wide enough for the lines to fit."""
    lines = int(1 / (SMALL * height_of(ax, len(pairs)))) if pairs else 1  # that a pair has room for
    for width in range(*WIDTHS):
        names = [
            literal(text)
            if len(text := f"{pair.first} - {pair.second}") <= width
            else filled(f"{pair.first}\n\u2212 {pair.second}", width)
            for pair in pairs
        ]
        if all(name.count("\n") < lines for name in names):
            break
    ax.set_yticks(range(len(pairs)), names, fontsize="small")
