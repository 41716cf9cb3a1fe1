"""Claims about the numbers of a diagnosis that their intervals allow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ..evidence import well_known
from ..gaps import Gaps
from ..ops import MIN_PARTICLES_FOR_K
from ..records import LEVEL, Estimate, are_many, counted, difference, normal_quantile
from .digits import with_error
from .measured import Measured

SMALL = 0.1  # nats: an information or a gap below it is nothing to mend
LARGE = 0.5  # share of the gap on test data that must be there on training data too, to blame the encoder's size
ALARM = 3.0  # sampling errors of a loss on new data: one false alarm in 700


State = Literal["fine", "fault", "undecided"]


@dataclass(frozen=True)
class Finding:
    """One claim of a `Diagnosis`.

    :ivar topic: "latents", "estimate", "gap", "calibration", "held-out" or "samples".
    :ivar state: "fine", "fault" or "undecided".
    :ivar claim: a sentence with numbers that claims no more than their intervals allow.
    """

    topic: str
    state: State
    claim: str


def findings_of(measured: Measured) -> tuple[Finding, ...]:
    """One claim per topic that was looked at."""
    found = [latents(measured), estimate(measured), gap(measured), calibration(measured), held_out(measured)]
    if measured.samples is not None:
        # Nearer to the training data: copies, or the densest parts of the data alone.
        state: State = "undecided" if measured.samples.doubts or measured.samples.unchecked else "fine"
        found.append(Finding("samples", state, measured.samples.verdict()))
    return tuple(finding for finding in found if finding is not None)


def latents(measured: Measured) -> Finding | None:
    """Whether the latents are used: by their mutual information with the data, or by the KL where that is not known."""
    surgery, units = measured.surgery, measured.units
    if surgery is None and units is None:
        return None
    if surgery is not None:
        name, said = "mutual information between latents and data", surgery.mutual_information
    else:
        name, said = "KL to the prior", rate(measured)
    size = f"the {name} is {text(said)}"
    if surgery is not None and surgery.ceiling:
        limit = f"log {surgery.num_data} = {surgery.log_num_data:.3f} nats"
        size = f"the {name} is as large as {surgery.num_data} data can show, {limit}; it may be larger"
    active = f"{units.num_active} of {len(units)} units are active, and " if units is not None else ""
    numbers = active + size
    top = upper_end(said)
    if math.isnan(top):
        return Finding("latents", "undecided", f"Too few data to tell whether the latents are used: {numbers}.")
    if top < SMALL:
        paid = f"The KL to the prior is {text(rate(measured))} all the same, without any use"
        why = "The posterior has collapsed onto the prior" if collapsed(measured) else paid
        return Finding("latents", "fault", f"The latents are not used: {numbers}. {why}.")
    return Finding("latents", "fine", f"The latents are used: {numbers}.")


def rate(measured: Measured) -> Estimate:
    """The KL to the prior, from whichever part there is."""
    if measured.surgery is not None:
        return measured.surgery.kl
    assert measured.units is not None
    return total(list(measured.units.site_kl.values()))


def collapsed(measured: Measured) -> bool:
    """Whether latents that say nothing also cost nothing."""
    return upper_end(rate(measured)) < SMALL


def estimate(measured: Measured) -> Finding:
    """Whether log p(x) can be believed: by the weights, the fits, and the self-check on simulated data."""
    gaps, check = measured.test, measured.self_check
    doubted = int((~gaps.evidence.reliable).sum())
    numbers = f"Data in doubt: {counted(gaps.doubts, gaps.unchecked)}."
    if check is None:
        trial, biased, passed = "There is no trial on simulated data.", False, False
    else:
        trial, biased, passed = check.verdict(), not check.passed and check.outcome != "too few data", check.passed
    evidence = f"{numbers} {trial}"
    few = "tails" in gaps.unchecked
    biased = biased or are_many(gaps.doubts["below the ELBO"])
    if biased or few or doubted > len(gaps) / 2:
        why = (
            "cannot be judged: their tails need 100 or more weights per datum" if few and not biased else "cannot be trusted"
        )
        return Finding("estimate", "fault", f"The estimates of log p(x) {why}. {evidence}")
    if not gaps.evidence.support_checked:
        score = "Data outside the support of the likelihood were let through, so what stands for log p(x) is a score"
        return Finding("estimate", "undecided", f"{score}. {evidence}")
    if not well_known(gaps.evidence):
        return Finding("estimate", "undecided", f"The estimates of log p(x) can be trusted for most data. {evidence}")
    if not passed:
        return Finding("estimate", "undecided", f"The importance weights show no fault. {evidence}")
    return Finding("estimate", "fine", f"The estimates of log p(x) can be trusted. {evidence}")


def gap(measured: Measured) -> Finding:
    """Which part of log p(x) - ELBO is larger on test data, where the gap is large enough to matter."""
    gaps = measured.test
    inference = gaps.summary()["inference"]
    top = gaps.evidence.mean_confidence_interval()[1] - float(gaps.log_evidence.mean()) + float(inference.value)
    sure = well_known(gaps.evidence) and not bool(gaps.doubts["below the ELBO"].any())
    if max(top, inference.confidence_interval()[1]) < SMALL and sure:
        return Finding("gap", "fine", f"The ELBO is close to log p(x): the inference gap is {text(inference)}.")
    state: State = "undecided" if gaps.larger_part() == "undecided" else "fault"
    return Finding("gap", state, gaps.verdict())


def calibration(measured: Measured) -> Finding | None:
    """Whether the guide is the posterior on data of the model, whose latents are known."""
    record = measured.calibration
    if record is None:
        return None
    few = len(record) < MIN_PARTICLES_FOR_K
    state: State = "fault" if not record.passed else "undecided" if few else "fine"
    return Finding("calibration", state, f"{record.verdict()}. This was measured on data of the model, not on your data.")


def held_out(measured: Measured) -> Finding:
    """What model and encoder lose on data they were not trained on."""
    test, train = known(measured.test), known(measured.train)
    of_test, of_train = test.summary(), train.summary()
    lost = {n: difference(of_test[n], of_train[n]) for n in ("log_evidence", "amortization") if n in of_test}
    model, encoder = lost["log_evidence"], lost.get("amortization", lost["log_evidence"])
    of_model = loss_of_the_model(measured) is not None
    state: State = "fault" if of_model or overfitted(measured) else "fine"
    if state == "fine" and (bool(encoder.sampling_error.isnan()) or model.doubt or encoder.doubt):
        state = "undecided"
    claim = f"On test data log p(x) is {compared(model)} than on training data"
    if "amortization" in lost:
        claim += f", and the amortization gap (the encoder's part) is {compared(encoder)}"
    if len(test) < len(measured.test) or len(train) < len(measured.train):
        claim += f", by the {len(test)} and {len(train)} data whose log p(x) is not in doubt"
    faults = [name for name, bad in (("model", of_model), ("encoder", overfitted(measured))) if bad]
    verdict = f"The {' and the '.join(faults)} {'are' if len(faults) > 1 else 'is'} overfitted. " if faults else ""
    if state == "fine":
        verdict = "Neither the model nor the encoder is clearly overfitted. "
    return Finding("held-out", state, f"{verdict}{claim} (sampling errors).")


def known(gaps: Gaps) -> Gaps:
    """The data whose log p(x) is not in doubt, where others are many; all of them where that leaves less than half."""
    kept = gaps.evidence.reliable
    return gaps.select(kept) if are_many(~kept) and int(kept.sum()) >= len(gaps) / 2 else gaps


def loss_of_the_model(measured: Measured) -> Estimate | None:
    """By how much log p(x) is lower on test data, if that is more than chance and worth a word."""
    train, test = (known(gaps).summary()["log_evidence"] for gaps in (measured.train, measured.test))
    loss = difference(train, test)
    if loss.doubt or not float(loss.value) > max(SMALL, ALARM * float(loss.sampling_error)):
        return None
    return loss


def overfitted(measured: Measured) -> bool:
    """The amortization gap is larger on test data, by more than chance and by more than half of it."""
    if measured.test.unsplit or measured.train.unsplit:
        return False
    test, train = measured.test.summary()["amortization"], measured.train.summary()["amortization"]
    rise = difference(test, train)
    certain = float(rise.value) > normal_quantile(LEVEL) * float(rise.sampling_error)
    return certain and float(train.value) < LARGE * float(test.value)


def total(parts: list[Estimate]) -> Estimate:
    """The sum over sites of the same data; the sum of their errors is an upper bound."""
    return Estimate(*(sum(getattr(part, name) for part in parts) for name in ("value", "std_error", "sampling_error")))


def upper_end(estimate: Estimate) -> float:
    """Upper end of the 95% interval for the population, or for these data where there is only one datum.

    Of a quantity that is not negative. An estimate below zero is noise and counts as zero, or the end would be too low.
    """
    error = estimate.std_error if bool(estimate.sampling_error.isnan()) else estimate.sampling_error
    return max(float(estimate.value), 0.0) + normal_quantile(LEVEL) * float(error)


def text(estimate: Estimate) -> str:
    said = with_error(estimate)
    return f"{said} (Monte Carlo error)" if "+-" in said else said


def compared(change: Estimate) -> str:
    """ "6.3 +- 1.8 nats lower"."""
    size = replace(change, value=change.value.abs())
    return f"{with_error(size, sampling=True)} {'lower' if float(change.value) < 0 else 'higher'}"
