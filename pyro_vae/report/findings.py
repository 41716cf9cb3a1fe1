"""What the numbers of a diagnosis say: claims that their intervals allow, and what to change first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..estimates import Estimate
from ..estimates.doubts import are_many, counted
from ..estimates.evidence import well_known
from ..estimates.mean import LEVEL, normal_quantile
from .numbers import difference

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

SMALL = 0.1  # nats: an information or a gap below it is nothing to mend
LARGE = 0.5  # share of the gap on test data that must be there on training data too, to blame the encoder's size

HEADLINES = {
    "collapse": "The latents are not used: the posterior has collapsed onto the prior.",
    "blind encoder": "The guide gives all data the same latents: its encoder does not look at the data.",
    "estimate": "These estimates cannot be trusted yet.",
    "encoder": "The encoder is what keeps the ELBO from log p(x): {amortization} of {inference} nats.",
    "overfitted encoder": (
        "The encoder is what keeps the ELBO from log p(x), because it does not carry over to new data: {amortization} of "
        "{inference} nats."
    ),
    "family": "The variational family is what keeps the ELBO from log p(x): {approximation} of {inference} nats.",
    "undecided": "The ELBO is {inference} nats below log p(x); whether encoder or family does more is not decided.",
    "none": "The ELBO is next to log p(x): {inference} nats.",
}
ADVICE = {
    "collapse": (
        "Anneal the KL (beta=pv.LinearAnnealing(...)), give it free bits (free_bits=...), or keep the guide ahead of the "
        "model (pv.AggressiveTraining). If the latents stay unused then, the decoder can do without them."
    ),
    "blind encoder": (
        "Look whether the encoder was trained and gets x at all (its parameters in the optimiser, dead activations, scales "
        "of the data). The nats of KL that it pays buy nothing."
    ),
    "estimate": (
        "More particles (num_particles=), or another estimator (evidence=functools.partial(pv.AnnealedImportanceSampling, "
        "...)), before anything is read from the gaps."
    ),
    "encoder": (
        "A better encoder: show it all of the datum (masks and labels too), make it bigger, or give it more updates. The "
        "guide's own family, fitted to each datum, does better."
    ),
    "overfitted encoder": (
        "More or augmented data, or a smaller or regularised encoder: it does far better on its training data than on new "
        "ones. For numbers to report, fit the guide per datum (pv.AdaptiveImportanceSampling)."
    ),
    "family": (
        "A richer family for the guide (pv.nn.MultivariateNormal, a flow, a mixture), or train with "
        "pv.ImportanceWeightedELBO: no encoder can do better in this one."
    ),
    "undecided": "More data or particles (num_data=, num_particles=) if it matters which part is larger.",
    "none": (
        "Nothing in the inference: the bound is tight for this model. Whether a simple family has bent the model to fit it "
        "shows when a richer one is trained and log p(x) compared; the rest is in decoder, prior, likelihood and training."
    ),
}


@dataclass(frozen=True)
class Finding:
    """One claim of a `Diagnosis`.

    :ivar topic: "latents", "estimate", "gap", "held-out" or "samples".
    :ivar state: "fine", "fault" or "undecided".
    :ivar claim: a sentence with numbers that claims no more than their intervals allow.
    """

    topic: str
    state: str
    claim: str


def findings_of(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """One claim per topic that was looked at."""
    found = [latents(diagnosis), estimate(diagnosis), gap(diagnosis), held_out(diagnosis)]
    if diagnosis.samples is not None:
        # Nearer to the training data: copies, or the densest parts of the data alone.
        open_ = diagnosis.samples.suspicious or diagnosis.samples.verdict().startswith("No verdict")
        state = "undecided" if open_ else "fine"
        found.append(Finding("samples", state, diagnosis.samples.verdict()))
    return tuple(finding for finding in found if finding is not None)


def culprit_of(diagnosis: Diagnosis) -> str:
    """What to change first: a key of `ADVICE`.

    Latents that say nothing come first, because then there is nothing to infer; then an estimate that cannot be trusted,
    because then nothing is known about the gap.
    """
    states = {finding.topic: finding.state for finding in diagnosis.findings}
    if states.get("latents") == "fault":
        return "collapse" if collapsed(diagnosis) else "blind encoder"
    if states["estimate"] == "fault":
        return "estimate"
    if states["gap"] == "fine":
        return "none"
    part = diagnosis.test.larger_part()
    if part == "encoder" and overfitted(diagnosis):
        return "overfitted encoder"
    return part


def headline_of(diagnosis: Diagnosis) -> str:
    """The culprit in one sentence, with the sizes on test data and their Monte Carlo errors."""
    summary = diagnosis.test.summary()
    digits = 2 if float(summary["inference"].value) >= 1 else 3
    sizes = {
        name: f"{float(estimate.value):.{digits}f} +- {float(estimate.std_error):.{digits}f}"
        for name, estimate in summary.items()
    }
    return HEADLINES[diagnosis.culprit].format(**sizes)


def latents(diagnosis: Diagnosis) -> Finding | None:
    """Are they used? By the mutual information where it is known, else by the KL: either says nothing below `SMALL`."""
    surgery, units = diagnosis.surgery, diagnosis.units
    if surgery is None and units is None:
        return None
    active = f"{units.num_active} of {len(units)} units active" if units is not None else ""
    if surgery is not None:
        name, said = "mutual information", surgery.mutual_information
    else:
        assert units is not None
        name, said = "KL to the prior", rate(diagnosis)
    size = f"{name} {text(said)}"
    numbers = ", ".join(part for part in (active, size) if part)
    top = upper_end(said)
    if math.isnan(top):
        return Finding("latents", "undecided", f"Too few data to tell whether the latents are used: {numbers}.")
    if top < SMALL:
        paid = f"yet the KL to the prior is {text(rate(diagnosis))}"
        why = "the posterior has collapsed onto the prior" if collapsed(diagnosis) else paid
        return Finding("latents", "fault", f"The latents are not used: {numbers}; {why}.")
    return Finding("latents", "fine", f"The latents are used: {numbers}.")


def rate(diagnosis: Diagnosis) -> Estimate:
    """The KL to the prior, from whichever part there is."""
    if diagnosis.surgery is not None:
        return diagnosis.surgery.kl
    assert diagnosis.units is not None
    return total(list(diagnosis.units.site_kl.values()))


def collapsed(diagnosis: Diagnosis) -> bool:
    """Whether latents that say nothing also cost nothing."""
    return upper_end(rate(diagnosis)) < SMALL


def estimate(diagnosis: Diagnosis) -> Finding:
    """May log p(x) be believed? By the weights, the fits, and the trial on simulated data."""
    gaps, check = diagnosis.test, diagnosis.self_check
    doubted = int((~gaps.evidence.reliable).sum())
    numbers = f"data in doubt: {counted(gaps.doubts, gaps.unchecked)}"
    if check is None:
        trial, biased, passed = "no trial on simulated data.", False, False
    else:
        trial = f"on simulated data: {lower_first(check.verdict())}"
        biased, passed = not check.passed and check.outcome != "too few data", check.passed
    few = "tails" in gaps.unchecked
    biased = biased or are_many(gaps.doubts["below the ELBO"])
    if biased or few or doubted > len(gaps) / 2:
        return Finding("estimate", "fault", f"The estimates cannot be trusted: {numbers}; {trial}")
    if not gaps.evidence.support_checked:
        score = "Values outside the support were let through: what stands for log p(x) is a score"
        return Finding("estimate", "undecided", f"{score}. {numbers}; {trial}")
    if not well_known(gaps.evidence):
        return Finding("estimate", "undecided", f"The estimates can be trusted for most data: {numbers}; {trial}")
    if not passed:
        return Finding("estimate", "undecided", f"No fault seen in the weights: {numbers}; {trial}")
    return Finding("estimate", "fine", f"The estimates can be trusted: {numbers}; {trial}")


def gap(diagnosis: Diagnosis) -> Finding:
    """Which part of log p(x) - ELBO is larger on test data, if it is worth a word."""
    gaps = diagnosis.test
    inference = gaps.summary()["inference"]
    top = gaps.evidence.mean_confidence_interval()[1] - float(gaps.log_evidence.mean()) + float(inference.value)
    sure = well_known(gaps.evidence) and not bool(gaps.doubts["below the ELBO"].any())
    if max(top, inference.confidence_interval()[1]) < SMALL and sure:
        return Finding("gap", "fine", f"The ELBO is next to log p(x): the inference gap is {text(inference)}.")
    state = "undecided" if gaps.larger_part() == "undecided" else "fault"
    return Finding("gap", state, gaps.verdict())


def held_out(diagnosis: Diagnosis) -> Finding:
    """What model and encoder lose on data they were not trained on."""
    test, train = diagnosis.test.summary(), diagnosis.train.summary()
    model, encoder = (difference(test[name], train[name]) for name in ("log_evidence", "amortization"))
    state = "fault" if overfitted(diagnosis) else "fine"
    if bool(encoder.sampling_error.isnan()):
        state = "undecided"
    claim = (
        f"Test minus training data: log p(x) {signed(model)} nats (the model), amortization gap {signed(encoder)} nats (the "
        "encoder); sampling errors."
    )
    return Finding("held-out", state, claim)


def overfitted(diagnosis: Diagnosis) -> bool:
    """The amortization gap is larger on test data, by more than chance and by more than half of it."""
    test, train = diagnosis.test.summary()["amortization"], diagnosis.train.summary()["amortization"]
    rise = difference(test, train)
    certain = float(rise.value) > normal_quantile(LEVEL) * float(rise.sampling_error)
    return certain and float(train.value) < LARGE * float(test.value)


def total(parts: list[Estimate]) -> Estimate:
    """Of sites over the same data; their errors added up, which is an upper bound."""
    return Estimate(*(sum(getattr(part, name) for part in parts) for name in ("value", "std_error", "sampling_error")))


def upper_end(estimate: Estimate) -> float:
    """Of the interval for the population, or for these data where there is one datum."""
    error = estimate.std_error if bool(estimate.sampling_error.isnan()) else estimate.sampling_error
    return float(estimate.value) + normal_quantile(LEVEL) * float(error)


def text(estimate: Estimate) -> str:
    return f"{float(estimate.value):.3f} +- {float(estimate.std_error):.3f} nats (Monte Carlo error)"


def signed(estimate: Estimate) -> str:
    return f"{float(estimate.value):+.2f} +- {float(estimate.sampling_error):.2f}"


def lower_first(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
