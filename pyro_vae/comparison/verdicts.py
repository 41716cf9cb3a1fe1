"""The sentences of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..errors import quoted
from .paired_difference import PairedDifference

if TYPE_CHECKING:
    from .comparison import Comparison

SHOWN = 10  # indices of data in a sentence


def verdict_of(comparison: Comparison) -> list[str]:
    """Sentences about the best model, the order of the ELBO, what holds for these data only, and few deciding data."""
    return [best(comparison), *where_the_elbo_differs(comparison), *these_data(comparison), *few_data(comparison)]


def best(comparison: Comparison) -> str:
    pairs = comparison.pairs
    if len(pairs) == 1:
        return f"By log p(x) {pairs[0]}."
    winner = comparison.ranking[0]
    mine = [pair for pair in pairs if winner in (pair.first, pair.second)]
    open_to = {
        claim: [p.second if p.first == winner else p.first for p in mine if p.claim == claim]
        for claim in ("told apart", "cannot be told apart", "not to be trusted")
    }
    if len(open_to["told apart"]) == len(mine):
        return f"By log p(x) '{winner}' is the best, told apart from all others."
    parts = []
    if names := open_to["told apart"]:
        parts.append(f"told apart from {quoted(names)}")
    if names := open_to["cannot be told apart"]:
        parts.append(f"it cannot be told apart from {quoted(names)}")
    if names := open_to["not to be trusted"]:
        parts.append(f"its difference to {quoted(names)} is not to be trusted")
    return f"By log p(x) '{winner}' is ahead: {'; '.join(parts)}."


def where_the_elbo_differs(comparison: Comparison) -> Iterator[str]:
    """Sentences where the ELBO and log p(x) have different winners, or tell other pairs apart in opposite orders."""
    winners = {comparison.ranking[0], comparison.elbo_ranking[0]}

    def of_winner(pair: PairedDifference) -> bool:
        return pair.first in winners

    for by_elbo in comparison.elbo_pairs:
        by_evidence = comparison.pair(by_elbo.first, by_elbo.second)
        turned = by_elbo.first != by_evidence.first
        of_winners = winners == {by_elbo.first, by_elbo.second}
        both = by_elbo.told_apart and by_evidence.told_apart
        if (turned and (of_winners or both)) or (by_elbo.told_apart and not by_evidence.told_apart and of_winner(by_elbo)):
            side = "but by log p(x) behind" if turned else "by log p(x)"
            yield (
                f"By ELBO '{by_elbo.first}' is ahead of '{by_elbo.second}' by {in_short(by_elbo)}, {side} by "
                f"{in_short(by_evidence)}: the ELBO lies below log p(x) by {gaps(comparison, by_elbo)} (+-: sampling error)."
            )


def in_short(pair: PairedDifference) -> str:
    mean = pair.mean()
    if mean.doubt:
        return f"{float(mean.value):.3f} nats ({pair.claim})"
    return f"{mean.with_error(sampling=True, unit=' nats')} ({pair.claim})"


def gaps(comparison: Comparison, pair: PairedDifference) -> str:
    """The mean gap log p(x) - ELBO of the guides of a pair."""
    sizes = {}
    for name in (pair.first, pair.second):
        record = comparison.records[name]
        gap = (record.log_evidence - record.elbo)[torch.isfinite(record.log_evidence - record.elbo)]
        sizes[name] = f"{float(gap.mean()):.3f} nats for '{name}'"
    return " and ".join(sizes.values())


def these_data(comparison: Comparison) -> Iterator[str]:
    """Pairs of the best model whose order is certain for these data, but not for others."""
    for pair in comparison.pairs:
        if pair.first == comparison.ranking[0] and pair.claim == "cannot be told apart" and pair.certain_for_these_data:
            yield (
                f"On these {len(pair)} data '{pair.first}' is ahead of '{pair.second}' by more than Monte Carlo error; "
                "on other data the order may be reversed."
            )


def few_data(comparison: Comparison) -> Iterator[str]:
    for pair in comparison.pairs:
        if pair.first == comparison.ranking[0] and pair.few_decide and pair.claim != "not to be trusted":
            which = pair.deciding
            shown = f"{which[:SHOWN]}{f' and {len(which) - SHOWN} more' if len(which) > SHOWN else ''}"
            yield (
                f"{len(which)} of {len(pair)} data account for the lead of '{pair.first}' over '{pair.second}': "
                f"without data {shown} there is none."
            )
