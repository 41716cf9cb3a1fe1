"""What to change first: the culprit, its size in one sentence, and the advice."""

from __future__ import annotations

from collections.abc import Sequence

from ..gaps import OF_LOG_EVIDENCE
from ..records import Estimate, remedy_for
from .digits import with_error
from .findings import Finding, collapsed, loss_of_the_model, overfitted
from .measured import Measured

PER_DATUM = " nats per datum"
HEADLINES = {
    "collapse": "The latents are not used: the posterior has collapsed onto the prior.",
    "blind encoder": "The guide gives all data the same latents: its encoder does not look at the data.",
    "estimate": "The estimates of log p(x) cannot be trusted, so that the gaps say nothing yet.",
    "encoder": "The encoder causes {encoder}.",
    "overfitted encoder": "The encoder is overfitted to the training data. On test data it causes {encoder}.",
    "family": "The variational family of the guide causes {family}.",
    "overfitted model": (
        "The model is overfitted to the training data: mean log p(x) is {loss} lower on test data (sampling error)."
    ),
    "undecided": (
        "The ELBO is {inference} below log p(x). Whether the encoder or the variational family causes more of this gap is "
        "not decided."
    ),
    "none": "The ELBO is close to log p(x): the gap is {inference}.",
}
ADVICE = {
    "collapse": (
        "Anneal the KL (beta=pv.LinearAnnealing(...)), use free bits (free_bits=...), or train the encoder several steps "
        "per step of the decoder (pv.AggressiveTraining). If the latents stay unused, the decoder does not need them."
    ),
    "blind encoder": (
        "Check that the encoder is trained and that x reaches it: its parameters must be in the optimiser, its activations "
        "must vary, and its inputs must be scaled. pv.refit_guide(...).trained lists what SVI trains of the guide. The "
        "present KL to the prior carries no information about the data."
    ),
    "estimate": "{remedy}. Then diagnose again: gaps that rest on a wrong log p(x) are wrong.",
    "encoder": (
        "Train the encoder further while the model stays fixed: pv.refit_guide(model, guide, train, optim, test=test, "
        "num_epochs=100). It reports how much of the gap this closes. If much remains, check that the encoder gets all that "
        "the likelihood uses, such as masks and labels. A larger encoder (other=larger_guide) helps only if the report puts "
        "the rest under capacity."
    ),
    "overfitted encoder": (
        "Train the encoder, while the model stays fixed, also on data simulated from the model, which never repeat: "
        "pv.refit_guide(model, guide, train, optim, test=test, num_epochs=100, simulated=1). More training data or a "
        "smaller encoder (other=smaller_guide) can help too. For numbers to report, fit the guide to each datum "
        "(pv.AdaptiveImportanceSampling)."
    ),
    "family": (
        "Give the guide a richer family: pv.nn.MultivariateNormal, a flow or a mixture. No encoder can do better within the "
        "present family. pv.refit_guide(model, guide, train, optim, test=test, num_epochs=100, other=richer_guide) measures "
        "the gain while the model stays fixed. Then train model and guide together, with the richer family or with "
        "pv.ImportanceWeightedELBO."
    ),
    "overfitted model": (
        "Use more or augmented training data, a smaller or regularised decoder, or stop training earlier "
        "(pv.EarlyStopping(model, guide, held_out)). A better guide comes second: the whole inference gap is smaller than "
        "this loss."
    ),
    "undecided": "If it matters which part is larger, use more data or particles (num_data=, num_particles=).",
    "none": (
        "No change of the guide is needed for this model. To improve log p(x), change decoder, prior, likelihood or "
        "training. A model that was trained with a simple family may have adapted to it: to see that, train with a richer "
        "family and compare log p(x)."
    ),
}

UNSPLIT = (
    "The gap is not split into the parts of encoder and family, because q* (the best member of the guide's family for a "
    "datum) cannot be fitted. If the discrete latents have few values, let the guide enumerate them "
    "(pyro.infer.config_enumerate): then the gap is split."
)


def culprit_of(measured: Measured, findings: Sequence[Finding]) -> str:
    """What to change first: a key of `ADVICE`.

    Latents without information come first, because then there is nothing to infer. An estimate that cannot be trusted comes
    second, because then nothing is known about the gap. Third is the larger of the gap and of what the model loses on new
    data.
    """
    states = {finding.topic: finding.state for finding in findings}
    if states.get("latents") == "fault":
        return "collapse" if collapsed(measured) else "blind encoder"
    if states["estimate"] == "fault":
        return "estimate"
    loss = loss_of_the_model(measured)
    if loss is not None and float(loss.value) > float(measured.test.inference.mean()):
        return "overfitted model"
    if states["gap"] == "fine":
        return "none"
    part = measured.test.larger_part()
    if part == "encoder" and overfitted(measured):
        return "overfitted encoder"
    return part


def headline_of(measured: Measured, culprit: str) -> str:
    """The culprit in one sentence, with the sizes on test data and their Monte Carlo errors."""
    summary = measured.test.summary()
    most = 2 if float(summary["inference"].value) >= 1 else 3
    loss = loss_of_the_model(measured)
    parts = {"encoder": "amortization", "family": "approximation"}
    return HEADLINES[culprit].format(
        inference=with_error(summary["inference"], most=most, unit=PER_DATUM),
        **{n: part_of(summary[gap], summary["inference"], most) for n, gap in parts.items() if gap in summary},
        loss="" if loss is None else with_error(loss, sampling=True, unit=PER_DATUM),
    )


def part_of(part: Estimate, whole: Estimate, most: int) -> str:
    """ "most of the gap ...: 0.31 +- 0.01 of 0.42 +- 0.01"; by noise of the other part, a part may be all of the gap."""
    gap, size = "of the gap between the ELBO and log p(x)", with_error(whole, most=most, unit=PER_DATUM)
    if float(part.value) >= float(whole.value):
        return f"all {gap}: {size}"
    return f"most {gap}: {with_error(part, most=most, unit='')} of {size}"


def advice_of(measured: Measured, culprit: str) -> str:
    """What to do about the culprit; about an estimate in doubt, what fits the estimator that ran."""
    if culprit == "undecided" and measured.test.unsplit:
        return UNSPLIT
    return ADVICE[culprit].format(remedy=remedy_of(measured))


def remedy_of(measured: Measured) -> str:
    """For the reason that most of the test data are in doubt for; where the weights show none, for a mode that is missed."""
    gaps = measured.test
    if "tails" in gaps.unchecked:
        return "Take at least 100 weights per datum (num_particles, or num_chains of annealed chains)"
    counts = {reason: int(flags.sum()) for reason, flags in gaps.doubts.items() if reason in OF_LOG_EVIDENCE}
    reason = max(counts, key=counts.__getitem__, default="")
    return remedy_for(reason if counts.get(reason) else "below the ELBO", gaps.evidence.method)
