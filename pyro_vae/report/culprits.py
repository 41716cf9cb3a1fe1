"""What to change first: the culprit, its size in one sentence, and the advice."""

from __future__ import annotations

from collections.abc import Sequence

from ..gaps import OF_LOG_EVIDENCE
from ..records import Estimate, remedy_for
from .findings import Finding, collapsed, loss_of_the_model, overfitted
from .measured import Measured

HEADLINES = {
    "collapse": "The latents are not used: the posterior has collapsed onto the prior.",
    "blind encoder": "The guide gives all data the same latents: its encoder does not look at the data.",
    "estimate": "These estimates cannot be trusted yet.",
    "encoder": "The encoder is what keeps the ELBO from log p(x): {encoder}.",
    "overfitted encoder": (
        "The encoder is what keeps the ELBO from log p(x), because it does not carry over to new data: {encoder}."
    ),
    "family": "The variational family is what keeps the ELBO from log p(x): {family}.",
    "overfitted model": (
        "The model does not carry over to new data: log p(x) of test data is {loss} below that of training data "
        "(sampling error)."
    ),
    "undecided": "The ELBO is {inference} below log p(x); whether encoder or family does more is not decided.",
    "none": "The ELBO is next to log p(x): {inference}.",
}
ADVICE = {
    "collapse": (
        "Anneal the KL (beta=pv.LinearAnnealing(...)), give it free bits (free_bits=...), or keep the guide ahead of the "
        "model (pv.AggressiveTraining). If the latents stay unused then, the decoder can do without them."
    ),
    "blind encoder": (
        "Look whether the encoder was trained and gets x at all (its parameters in the optimiser, dead activations, scales "
        "of the data); pv.refit_guide(...).trained names what SVI trains of it. The nats of KL that it pays buy nothing."
    ),
    "estimate": "{remedy}, before anything is read from the gaps.",
    "encoder": (
        "pv.refit_guide(model, guide, train, optim, test=test, num_epochs=100): it trains the encoder further while the "
        "model stands still, and says how much that repairs. For the rest show the encoder all of the datum (masks and "
        "labels too), or make it bigger (other=larger_guide). The guide's own family, fitted to each datum, does better."
    ),
    "overfitted encoder": (
        "pv.refit_guide(model, guide, train, optim, test=test, num_epochs=100, simulated=1): it trains the encoder, while "
        "the model stands still, on data simulated from the model too, which cannot be learnt by heart. Else more data, or "
        "a smaller encoder (other=smaller_guide). For numbers to report, fit the guide per datum "
        "(pv.AdaptiveImportanceSampling)."
    ),
    "family": (
        "A richer family for the guide (pv.nn.MultivariateNormal, a flow, a mixture): no encoder can do better in this one. "
        "pv.refit_guide(model, guide, train, optim, test=test, num_epochs=100, other=richer_guide) says what it brings, the "
        "model being the same; then train both with it, or with pv.ImportanceWeightedELBO."
    ),
    "overfitted model": (
        "More or augmented training data, a smaller or regularised decoder, or training that stops in time "
        "(pv.EarlyStopping(model, guide, held_out)). This is more than all of the inference gap, so that a better guide "
        "comes second."
    ),
    "undecided": "More data or particles (num_data=, num_particles=) if it matters which part is larger.",
    "none": (
        "Nothing in the inference: the bound is tight for this model. Whether a simple family has bent the model to fit it "
        "shows when a richer one is trained and log p(x) compared; the rest is in decoder, prior, likelihood and training."
    ),
}

UNSPLIT = (
    "Nothing is known of the parts of the gap, because q* cannot be fitted. Where the discrete latents have few values, let "
    "the guide enumerate them (pyro.infer.config_enumerate), and the gap is split."
)


def culprit_of(measured: Measured, findings: Sequence[Finding]) -> str:
    """What to change first: a key of `ADVICE`.

    Latents that say nothing come first, because then there is nothing to infer; then an estimate that cannot be trusted,
    because then nothing is known about the gap; then the larger of what the model loses on new data and of the gap.
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
    digits = 2 if float(summary["inference"].value) >= 1 else 3
    loss = loss_of_the_model(measured)
    parts = {"encoder": "amortization", "family": "approximation"}
    return HEADLINES[culprit].format(
        inference=summary["inference"].with_error(digits, unit=" nats"),
        **{n: part_of(summary[gap], summary["inference"], digits) for n, gap in parts.items() if gap in summary},
        loss="" if loss is None else loss.with_error(2, sampling=True, unit=" nats"),
    )


def part_of(part: Estimate, whole: Estimate, digits: int) -> str:
    """ "0.31 +- 0.01 of 0.42 +- 0.01"; noise may make the other part negative, and no part is larger than the whole."""
    if float(part.value) >= float(whole.value):
        return f"all of {whole.with_error(digits, unit=' nats')}"
    return f"{part.with_error(digits)} of {whole.with_error(digits, unit=' nats')}"


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
