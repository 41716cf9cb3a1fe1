"""The record of a comparison of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnreliableEvidenceWarning, quoted
from ..evidence import Evidence
from ..gaps import Gaps
from ..options import flag
from ..plots import plot_comparison
from ..records import Result, page, remedy_for
from .paired_difference import PairedDifference
from .sides import any_of, doubts_of, evidence_of
from .verdicts import verdict_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 12  # pairs printed; with more, only those of the best model
WIDTH = 24  # of a name


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """A comparison of M models by log p(x) on N data, as returned by `compare`. Nats.

    :ivar records: the `Evidence` or `Gaps` that were compared, by name.
    :ivar pairs: all M (M - 1) / 2 `PairedDifference` of log p(x), those of the best model first.
    :ivar elbo_pairs: the same of the ELBO.
    :ivar level: level of claims and intervals.
    :ivar remarks: what was not checked, and the values on which all numbers are conditional, in sentences.

    Example::

        records = {name: pv.AdaptiveImportanceSampling(vae.model, vae.guide)(x) for name, vae in models.items()}
        comparison = pv.compare(records)
        comparison.ranking, comparison.pair("small", "large").claim
    """

    records: Mapping[str, Evidence | Gaps]
    pairs: tuple[PairedDifference, ...]
    elbo_pairs: tuple[PairedDifference, ...]
    level: float
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        """N."""
        return len(self.pairs[0])

    @property
    def ranking(self) -> tuple[str, ...]:
        """The models in the order of falling mean log p(x); neighbours may not be told apart."""
        return ranking_of(self.pairs, self.records)

    @property
    def elbo_ranking(self) -> tuple[str, ...]:
        """The models in the order of falling mean ELBO."""
        return ranking_of(self.elbo_pairs, self.records)

    def pair(self, one: str, other: str, *, elbo: bool = False) -> PairedDifference:
        """The pair of these two models, in either order.

        :param elbo: the pair of the ELBO in place of log p(x).
        :raises KeyError: for a name that was not compared.
        """
        flag("elbo", elbo)
        for pair in self.elbo_pairs if elbo else self.pairs:
            if (
                isinstance(one, str)
                and isinstance(other, str)
                and (one, other) in ((pair.first, pair.second), (pair.second, pair.first))
            ):
                return pair
        raise KeyError(f"no pair of {one!r} and {other!r}: the models are {quoted(self.records)}")

    def difference(self, one: str, other: str) -> Tensor:
        """(N,) log p(x) of one model minus that of the other, in double precision on the CPU."""
        pair = self.pair(one, other)
        return pair.difference if pair.first == one else -pair.difference

    def verdict(self) -> str:
        """Sentences about the best model, a different order of the ELBO, and few data that decide."""
        return " ".join(verdict_of(self))

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(N,) bool by reason, true where log p(x) of one of the models is in doubt."""
        found: dict[str, Tensor] = {}
        for record in self.records.values():
            for reason, flags in doubts_of(record).items():
                found[reason] = found[reason] | flags if reason in found else flags
        return found

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not checked for one of the models, by reason; "same data" where that was not checked."""
        found = {reason: why for record in self.records.values() for reason, why in evidence_of(record).unchecked.items()}
        if any(evidence_of(record).fingerprint is None for record in self.records.values()):
            found["same data"] = "not all records have a fingerprint"
        return found

    @property
    def reliable(self) -> Tensor:
        """(N,) true where log p(x) of no model is in doubt."""
        return ~any_of(self.doubts, torch.zeros(len(self), dtype=torch.bool))

    def warnings(self) -> list[Warning]:
        """One warning about the pairs whose difference is not reliable; `compare` issues it."""
        open_pairs = [p for p in self.pairs if p.claim == "not to be trusted"]
        if not open_pairs:
            return []
        blamed = [n for n in self.records if any(n in (p.first, p.second) for p in open_pairs) and self._blame(n)]
        remedies = dict.fromkeys(remedy for name in blamed for remedy in self._blame(name))
        named = ", ".join(f"'{p.first}' - '{p.second}'" for p in open_pairs)
        return [
            UnreliableEvidenceWarning(
                f"log p(x) of more than 5% of the data is in doubt, so that the order of these models is not to be trusted: "
                f"{named}. {'; '.join(remedies) or 'Look at the data whose log p(x) is not finite'}"
            )
        ]

    def _blame(self, name: str) -> list[str]:
        """The remedies of the doubts about a model."""
        record = self.records[name]
        method = evidence_of(record).method
        few = ["Raise num_particles to 100 or more"] if "tails" in evidence_of(record).unchecked else []
        return few + [remedy_for(reason, method) for reason, flags in doubts_of(record).items() if bool(flags.any())]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The paired differences with their intervals; see `pyro_vae.plots.plot_comparison`."""
        return plot_comparison(self, ax)

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, for JSON."""
        return {
            "records": {name: record.to_dict() for name, record in self.records.items()},
            "pairs": [pair.to_dict() for pair in self.pairs],
            "elbo_pairs": [pair.to_dict() for pair in self.elbo_pairs],
            "level": self.level,
            "remarks": list(self.remarks),
            "ranking": list(self.ranking),
            "elbo_ranking": list(self.elbo_ranking),
            "verdict": self.verdict(),
            "doubts": {reason: flags.tolist() for reason, flags in self.doubts.items()},
            "unchecked": self.unchecked,
            "reliable": self.reliable.tolist(),
        }

    def _columns(self) -> dict[str, list[Any]]:
        """A row for each datum: the numbers of each model, and the differences of each pair."""
        columns = {}
        for name, record in self.records.items():
            evidence = evidence_of(record)
            columns[f"log_evidence[{name}]"] = evidence.log_evidence.tolist()
            columns[f"std_error[{name}]"] = evidence.std_error.tolist()
            columns[f"elbo[{name}]"] = record.elbo.tolist()
            columns[f"reliable[{name}]"] = evidence.reliable.tolist()
        for kind, pairs in (("log_evidence", self.pairs), ("elbo", self.elbo_pairs)):
            columns |= {f"{kind}[{pair.first} - {pair.second}]": pair.difference.tolist() for pair in pairs}
        return columns

    def _in_short(self) -> str:
        claims = [pair.claim for pair in self.pairs]
        return (
            f"{len(self.records)} models, {len(self)} data, {claims.count('told apart')} of {len(claims)} pairs told apart"
        )

    def __str__(self) -> str:
        top = "log p(x)" if evidence_of(next(iter(self.records.values()))).support_checked else "score"
        lines = [
            f"Comparison of {len(self.records)} models on {len(self)} data, nats per datum",
            f"{'':<{WIDTH + 2}}{top:>12}{'Monte Carlo':>13}{'sampling':>10}{'ELBO':>12}{'in doubt':>10}  bound",
            *(self._row(name) for name in self.ranking),
            "",
            *self._differences(f"{top}, paired", self.pairs),
            *self._differences("ELBO, paired", self.elbo_pairs),
            "",
            *verdict_of(self),
            *self.remarks,
        ]
        return page(lines)

    def _row(self, name: str) -> str:
        record = self.records[name]
        evidence = evidence_of(record)
        mean = evidence.mean()
        errors = f"{float(mean.std_error):>13.3f}{float(mean.sampling_error):>10.3f}"
        if mean.doubt:  # and so is not reliable
            errors = f"{'-':>13}{'-':>10}"
        doubted = any_of(doubts_of(record), torch.zeros(len(self), dtype=torch.bool))
        number = "not known" if "tails" in evidence.unchecked else str(int(doubted.sum()))
        return (
            f"  {shortened(name):<{WIDTH}}{float(mean.value):>12.3f}{errors}{float(record.elbo.mean()):>12.3f}{number:>10}  "
            f"{evidence.bound}"
        )

    def _differences(self, title: str, pairs: tuple[PairedDifference, ...]) -> Iterator[str]:
        shown = pairs if len(pairs) <= ROWS else pairs[: len(self.records) - 1]
        p_name = "p" if len(pairs) == 1 else "p (Holm)"
        yield f"{title:<{WIDTH + 2}}{'mean':>12}{'Monte Carlo':>13}{'sampling':>10}{p_name:>12}"
        for pair in shown:
            mean = pair.mean()
            numbers = f"{float(mean.std_error):>13.3f}{float(mean.sampling_error):>10.3f}{shown_p(pair):>12}  {pair.claim}"
            if mean.doubt:
                numbers = f"{'':>35}  {pair.claim}: {mean.doubt}"
            yield f"  {shortened(f'{pair.first} - {pair.second}'):<{WIDTH}}{float(mean.value):>12.3f}{numbers}"
        if len(shown) < len(pairs):
            yield f"  and {len(pairs) - len(shown)} more pairs of the other models"


def shown_p(pair: PairedDifference) -> str:
    return "< 0.001" if pair.corrected < 0.001 else f"{pair.corrected:.3f}"


def shortened(name: str) -> str:
    return name if len(name) <= WIDTH else f"{name[: WIDTH - 3]}..."


def ranking_of(pairs: tuple[PairedDifference, ...], names: Mapping[str, Any]) -> tuple[str, ...]:
    wins = {name: sum(pair.first == name for pair in pairs) for name in names}
    return tuple(sorted(names, key=lambda name: -wins[name]))
