"""Every number of a diagnosis as one row, for the terminal, the page, JSON and CSV alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..calibration import Calibration
from ..evidence import SelfCheckResult
from ..gaps import Gaps
from ..latent import Surgery, UnitActivity
from ..records import Estimate, difference
from ..samples import SampleCheckResult, Statistic
from .measured import Measured

NATS = "nats per datum"
SHARE = "share of the data"
IN_DOUBT = "in doubt: "  # in front of a reason
SHOWN = 10  # latents of the calibration, worst first
PARTS_OF_KL = ("kl", "mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl")


@dataclass(frozen=True)
class Number:
    """One number of a `Diagnosis`, with its errors.

    :ivar part: of the diagnosis: "gaps", "held-out", "surgery", "units", "self-check", "calibration", "samples",
        "cost".
    :ivar data: "train", "test", "simulated", or "test - train".
    :ivar name: what it is.
    :ivar value: the number.
    :ivar std_error: its Monte Carlo error, for these data; NaN where it has none.
    :ivar sampling_error: its error as a statement about the population of data; NaN where it has none.
    :ivar unit: of the three, such as "nats per datum".
    :ivar num_data: behind it.
    :ivar doubt: why its errors are not to be trusted, such as "12 of 60 data in doubt"; empty where they are.
    """

    part: str
    data: str
    name: str
    value: float
    std_error: float
    sampling_error: float
    unit: str
    num_data: int
    doubt: str = ""


def numbers_of(measured: Measured) -> list[Number]:
    """All numbers of a diagnosis, in the order of the page."""
    rows = [*of_gaps(measured.test, "test"), *of_gaps(measured.train, "train"), *held_out(measured)]
    if measured.surgery is not None:
        rows += of_surgery(measured.surgery)
    if measured.units is not None:
        rows += of_units(measured.units)
    if measured.self_check is not None:
        rows += of_self_check(measured.self_check)
    if measured.calibration is not None:
        rows += of_calibration(measured.calibration)
    if measured.samples is not None:
        rows += of_samples(measured.samples)
    return rows


def number(part: str, data: str, name: str, estimate: Estimate | float, num_data: int, unit: str = NATS) -> Number:
    if not isinstance(estimate, Estimate):
        return Number(part, data, name, float(estimate), math.nan, math.nan, unit, num_data)
    values = float(estimate.value), float(estimate.std_error), float(estimate.sampling_error)
    return Number(part, data, name, *values, unit, num_data, estimate.doubt)


def of_gaps(gaps: Gaps, data: str) -> Iterator[Number]:
    n = len(gaps)
    for name, estimate in gaps.summary().items():
        yield number("gaps", data, gaps.titles[name], estimate, n)
    for reason, flags in gaps.doubts.items():
        yield number("gaps", data, f"{IN_DOUBT}{reason}", int(flags.sum()), n, "data")
    ess = f"ESS of {gaps.evidence.num_particles} weights, median"
    yield number("gaps", data, ess, float(gaps.evidence.ess.median()), n, "weights")
    yield number("cost", data, "gaps", gaps.cost, n, "decoder evaluations per datum")


def held_out(measured: Measured) -> Iterator[Number]:
    """What the pair loses on data it was not trained on: the model in log p(x), the encoder in its own gap."""
    test, train = measured.test.summary(), measured.train.summary()
    n = len(measured.test) + len(measured.train)
    for name, title in (("log_evidence", "log p(x)"), ("elbo", "ELBO"), ("amortization", "amortization gap")):
        if name in test and name in train:
            yield number("held-out", "test - train", title, difference(test[name], train[name]), n)


def of_surgery(surgery: Surgery) -> Iterator[Number]:
    titles = {
        "kl": "KL to the prior (rate)",
        "marginal_kl": "KL of q(z) to the prior",
        "dimension_wise_kl": "dimension-wise KL",
    }
    for name in PARTS_OF_KL:
        title = titles.get(name, name.replace("_", " "))
        estimate = replace(getattr(surgery, name), doubt=surgery.doubts.get(name, ""))
        yield number("surgery", "train", title, estimate, surgery.num_data)
    ceiling = "log N, ceiling of the mutual information"
    yield number("surgery", "train", ceiling, surgery.log_num_data, surgery.num_data, "nats")
    yield number("cost", "train", "surgery", surgery.cost, surgery.num_data, "decoder evaluations per datum")


def of_units(units: UnitActivity) -> Iterator[Number]:
    n = units.num_data
    yield number("units", "train", f"active units, of {len(units)}", units.num_active, n, "units")
    yield number("units", "train", f"units at the prior, of {len(units)}", units.num_collapsed, n, "units")
    for d in units.order.tolist():
        for name, title, unit in (
            ("kl", "KL", NATS),
            ("variance_of_means", "variance of means", "squared units of the latent"),
        ):
            errors = float(units.std_errors[name][d]), float(units.sampling_errors[name][d])
            value = float(getattr(units, name)[d])
            yield Number("units", "train", f"{title} of {units.names[d]}", value, *errors, unit, n)


def of_self_check(check: SelfCheckResult) -> Iterator[Number]:
    n = len(check)
    for side, value, error in zip(("upper", "lower"), check.bias, check.bias_std_errors, strict=True):
        # the spread over data contains all Monte Carlo errors, and there is no other population than the model's
        yield Number("self-check", "simulated", f"estimate minus {side} bound", value, error, error, NATS, n)
    width, reach = "width of the sandwich, upper minus lower bound", "95% intervals that reach the bounds of log p(x)"
    yield number("self-check", "simulated", width, check.sandwich.mean_width(), n)
    yield number("self-check", "simulated", reach, check.coverage(), n, SHARE)
    cost = check.evidence.cost + check.sandwich.lower.cost + check.sandwich.upper.cost
    yield number("cost", "simulated", "self-check", cost, n, "decoder evaluations per datum")


def of_calibration(calibration: Calibration) -> Iterator[Number]:
    n = len(calibration)
    if (gap := calibration.symmetric_gap) is not None:
        yield number("calibration", "simulated", "symmetric gap, KL of posterior to guide and back", gap, n)
    rows = [row for row in calibration.rows if row.num_data]
    yield number(
        "calibration", "simulated", f"ranks that are not uniform, of {len(rows)}", len(calibration.faulty), n, "ranks"
    )
    for row in (calibration.faulty or rows)[:SHOWN]:
        name = f"90% intervals of {row.name} that contain the true one"
        yield number("calibration", "simulated", name, row.coverage(0.9), row.num_data, SHARE)
    yield number("cost", "simulated", "calibration", calibration.cost, n, "decoder evaluations per datum")


def of_samples(samples: SampleCheckResult) -> Iterator[Number]:
    n, squared, plain = len(samples), "squared units of the data", "units of the data"
    rows = [
        ("reconstruction error", Statistic.mean_of(samples.reconstruction_error), squared),
        ("rank correlation of log p(x) and minus the error", samples.rank_correlation(), ""),
        *((f"sharpness, {name.replace('_', ' ')}", mean, squared) for name, mean in samples.mean_sharpness().items()),
        ("distance to the nearest training datum, sample draws", Statistic.mean_of(samples.sample_distance), plain),
        ("distance to the nearest training datum, held-out data", Statistic.mean_of(samples.data_distance), plain),
        ("P(sample nearer to the training data than held-out data)", samples.probability_nearer(), ""),
    ]
    for name, statistic, unit in rows:
        errors = math.nan, float(statistic.sampling_error)
        yield Number("samples", "test", name, float(statistic.value), *errors, unit, n)
