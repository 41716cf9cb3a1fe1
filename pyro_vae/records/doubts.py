"""The table of doubts: why a number may be wrong, what that means, and the remedy for the estimator that ran."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, PrecisionWarning, UnreliableEvidenceWarning

ONE_IN_A_HUNDRED = 2.33  # standard deviations of a Poisson count
FEW = 0.05  # largest share of data in doubt for which the mean over them, and its error, count as reliable
# The methods that estimate log p(x), as in `Evidence.method`.
GUIDE_ITSELF = "importance sampling"
FITTED_PROPOSALS = "fitted proposals"
ANNEALED_CHAINS, REVERSE_CHAINS = "annealed chains", "reverse chains"
TO_TOLERANCE = "to a tolerance"
EXACT_VALUE = "exact"
ELSEWHERE = "(evidence= of InferenceGaps and diagnose)"
REMEDIES = {
    GUIDE_ITSELF: f"Raise num_particles, or use AdaptiveImportanceSampling {ELSEWHERE}, which fits a proposal to each datum",
    FITTED_PROPOSALS: f"Raise num_particles, or use AnnealedImportanceSampling {ELSEWHERE}",
    ANNEALED_CHAINS: "Raise num_steps{steps} and num_chains",
    REVERSE_CHAINS: "Raise num_steps{steps} and num_chains",
    TO_TOLERANCE: f"Use AnnealedImportanceSampling with more steps {ELSEWHERE}, or give a guide nearer to the posterior",
}
OTHERWISE = "Raise the particles or steps of the estimator"
SEVERAL_MODES = "or give a guide with several modes"
MORE_MODES = {
    GUIDE_ITSELF: f"Use AdaptiveImportanceSampling {ELSEWHERE}, which looks for modes, {SEVERAL_MODES}",
    FITTED_PROPOSALS: f"Raise num_particles, use AnnealedImportanceSampling {ELSEWHERE}, {SEVERAL_MODES}",
    ANNEALED_CHAINS: f"Raise num_steps{{steps}} and num_chains, {SEVERAL_MODES}",
    TO_TOLERANCE: f"Use AnnealedImportanceSampling with start='prior' and many steps, {SEVERAL_MODES}",
}


@dataclass(frozen=True)
class Doubt:
    """A reason to doubt the numbers of some data.

    :ivar meaning: a sentence with {data}, such as "12 of 60 data", {off}, "low" or "high", and {threshold} of Pareto k.
    :ivar remedies: remedies, by the method that ran.
    :ivar otherwise: the remedy for any other method.
    :ivar category: of the warning.
    :ivar chance: share of faultless data that have this doubt by chance.
    """

    meaning: str
    remedies: Mapping[str, str]
    otherwise: str = OTHERWISE
    category: type[UserWarning] = UnreliableEvidenceWarning
    chance: float = 0.0


TABLE = {
    "tails": Doubt(
        "the weights of {data} have a Pareto k above {threshold}: their log p(x) is likely too {off}, by more than the "
        "stated error",
        REMEDIES,
    ),
    "no weight": Doubt(
        "no draw of {data} has a weight above 0: their log p(x) is given as minus infinity, which is too {off} unless p(x) "
        "is 0",
        REMEDIES,
    ),
    "steps": Doubt(
        "the log-weights of {data} vary too much over the chains for so few steps: their log p(x) is likely too {off}, by "
        "more than the stated error",
        REMEDIES,
    ),
    "posterior side": Doubt(
        "a second proposal, fitted to the posterior, gives a different log p(x) for {data}: the first one is likely "
        "too {off}, by more than the stated error",
        REMEDIES,
        chance=0.03,
    ),
    "search": Doubt(
        "the posterior of {data} has more modes than were fitted: their log p(x) is likely too {off}, by more than the "
        "stated error",
        MORE_MODES,
    ),
    "function tails": Doubt(
        "weight times f of {data} has a Pareto k above {threshold}: their expectation is likely off by more than the stated "
        "error",
        {},
        "Raise num_particles, or take a function that grows more slowly: the error of a mean needs a finite variance",
    ),
    "few draws": Doubt(
        "fewer than five draws determine the expectation of f for {data}: it is likely off by more than the stated error",
        {},
        "Raise num_particles; a function that says whether something happens should return truth values",
    ),
    "precision": Doubt(
        "log p(x) of {data} changes by more than a tenth of its error when a few particles are scored in float64: the "
        "error does not include this rounding",
        {},
        "Use float64: model.double(), guide.double(), and the data in double",
        PrecisionWarning,
    ),
    "end of support": Doubt(
        "for {data}, floats are too coarse to distinguish latents from one another or from the end of their support, "
        "or the joint density still changes where floats end: their log p(x) may be off by more than the stated error",
        {GUIDE_ITSELF: "Use float64: model.double(), guide.double(), and the data in double"},
        "Use float64 (model.double(), guide.double(), data in double), or ImportanceSampling with a guide that draws there",
    ),
    "not converged": Doubt(
        "the fit of the optimum q* of {data} had not converged: their amortization gap is too small and their approximation "
        "gap too large",
        {},
        "Raise num_particles, which lets fits run longer",
        ConvergenceWarning,
    ),
    "below the ELBO": Doubt(
        "log p(x) of {data} is significantly below their ELBO, so it is too low: a mode of the posterior is missed",
        MORE_MODES,
    ),
}
CATEGORIES = tuple(dict.fromkeys(doubt.category for doubt in TABLE.values()))


def remedy_for(reason: str, method: str, steps: str = "") -> str:
    """The remedy of a doubt for the method that ran; `steps` is the end of a sentence about annealing steps, " to 400"."""
    doubt = TABLE[reason]
    return doubt.remedies.get(method, doubt.otherwise).replace("{steps}", steps)


def warnings_about(doubts: Mapping[str, Tensor], method: str, steps: str = "", **words: Any) -> list[Warning]:
    """One warning for each reason with more data in doubt than by chance."""
    return [
        TABLE[reason].category(
            f"{TABLE[reason].meaning.format(data=count(flags), **words)}. {remedy_for(reason, method, steps)}"
        )
        for reason, flags in doubts.items()
        if more_than_chance(flags, TABLE[reason].chance)
    ]


def more_than_chance(flags: Tensor, chance: float) -> bool:
    """Whether as many data in doubt, of (B,), occur by chance in less than one of a hundred calls."""
    expected = chance * len(flags)
    return int(flags.count_nonzero()) > expected + ONE_IN_A_HUNDRED * math.sqrt(expected)


def without_doubt(doubts: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """(B,) true where no reason has a doubt; `like` is any (B,)."""
    clear = torch.ones_like(like, dtype=torch.bool)
    for flags in doubts.values():
        clear = clear & ~flags
    return clear


def either(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The union of the doubts of two records about the same data."""
    return {**first, **{reason: flags | first[reason] if reason in first else flags for reason, flags in second.items()}}


def concatenated_flags(records: Sequence[Any]) -> dict[str, Tensor]:
    """The `checks` of several batches, joined. A batch without a check has no doubt by it, and a reason in `unchecked`."""
    reasons = dict.fromkeys(reason for record in records for reason in record.checks)

    def flags(reason: str) -> list[Tensor]:
        known = next(record.checks[reason] for record in records if reason in record.checks)
        return [r.checks[reason] if reason in r.checks else known.new_zeros(len(r)) for r in records]

    return {reason: torch.cat(flags(reason)) for reason in reasons}


def are_many(doubted: Tensor) -> bool:
    """Whether so many of the data are in doubt that their mean is not reliable."""
    return int(doubted.count_nonzero()) > FEW * len(doubted)


def said_of_mean(doubted: Tensor) -> str:
    """The text after the error of a mean over (B,) data, "12 of 60 data in doubt"; empty where few or none are."""
    return f"{count(doubted)} in doubt" if are_many(doubted) else ""


def count(flags: Tensor) -> str:
    return f"{int(flags.count_nonzero())} of {len(flags)} data"


def counted(doubts: Mapping[str, Tensor], unchecked: Mapping[str, str]) -> str:
    """All reasons, those with data in doubt first: "tails 3 of 60; none: search; precision not checked (why)"."""

    def named(reason: str) -> str:
        return f"{reason} (not all {verb(reason)}: {unchecked[reason]})" if reason in unchecked else reason

    known = [reason for reason in TABLE if reason in doubts]
    found = [reason for reason in known if bool(doubts[reason].any())]
    clear = ", ".join(named(reason) for reason in known if reason not in found)
    parts = [", ".join(f"{named(r)} {int(doubts[r].count_nonzero())} of {len(doubts[r])}" for r in found)] if found else []
    if clear:
        parts.append(f"none: {clear}" if found else f"none of {len(doubts[known[0]])} data ({clear})")
    missing = [reason for reason in dict.fromkeys([*TABLE, *unchecked]) if reason in unchecked and reason not in doubts]
    return "; ".join([*parts, *(f"{reason} not {verb(reason)} ({unchecked[reason]})" for reason in missing)])


def verb(reason: str) -> str:
    return "judged" if reason == "tails" else "checked"


def remedies_for(doubts: Mapping[str, Tensor], method: str, steps: str) -> list[str]:
    """The remedies of all doubts, each once with its reasons: "tails: raise num_particles"."""
    reasons: dict[str, list[str]] = {}
    for reason, flags in doubts.items():
        if bool(flags.any()):
            reasons.setdefault(remedy_for(reason, method, steps), []).append(reason)
    return [f"{', '.join(names)}: {remedy}" for remedy, names in reasons.items()]


def printed(doubts: Mapping[str, Tensor], unchecked: Mapping[str, str], method: str, steps: str = "") -> list[str]:
    """The lines of a printed record: all reasons counted, then what to do."""
    line = counted(doubts, unchecked)
    return [f"doubts: {line}", *(f"  {remedy}" for remedy in remedies_for(doubts, method, steps))] if line else []


def plain(doubts: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    """For JSON."""
    return {reason: flags.tolist() for reason, flags in doubts.items()}
