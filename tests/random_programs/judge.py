"""Run the library on a random program and compare with the right values.

A number is wrong if it is further from the right value than `SIGMAS` of its errors + the oracle's error + `SLACK`, and no
doubt is on record. A mean of draws (a loss, a KL) that is off is taken once more with ten times the draws and other noise:
one rare draw can move it by more than any error says, a fault stays. A number is "unknown" where the oracle does not know
it, and "unchecked" instead of wrong where the record says that the check from the posterior's side could not be made. A
named error is a refusal. Every other exception is a crash.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_vae as pv

from .case import F64, Case, make_case
from .description import DISCRETE, Latent, Node, Program
from .fit import with_guide
from .generator import WITHOUT_NUMBER, program_of_seed
from .oracle import Posterior, Truth, evidence
from .oracle_elbo import Terms, elbo_terms
from .pyro_pair import build

SIGMAS = 5.0
SLACK = 0.02  # nats, for the bias of a logarithm of a mean, rounding, and a fit that was stopped
MISSED_SLACK = 0.06  # of a mean between -1 and 1, by modes with 3% of p(x) that a search may miss: .03 nats of log p(x)
EXACT_SLACK = 2e-3  # nats, for what claims to have no error
ORACLE_ERROR = 5e-3  # nats; programs of whose log p(x) the oracle knows less are not judged
FARTHEST_LOGIT = 12.0  # of draws in single precision
FARTHEST_LOG = 28.0
LARGEST_ERROR = 0.05  # nats, of the oracle for sums over the data and the parts of the ELBO
OF_ONE_DATUM = (
    "ImportanceSampling",
    "AdaptiveImportanceSampling",
    "ExactEvidence",
    "InferenceGaps",
    "PosteriorExpectation",
)
MEANS = ("ActiveUnits", "BetaTrace_ELBO", "BetaTraceGraph_ELBO", "BetaTraceEnum_ELBO", "BetaTraceMeanField_ELBO")
NAMED = tuple(getattr(pv.errors, name) for name in pv.errors.__all__ if name.endswith("Error"))


class Finding(NamedTuple):
    """What became of one number of one estimator."""

    judge: str
    outcome: str  # "right", "doubted", "unchecked", "unknown", "refused", "wrong" or "crashed"
    detail: str = ""


class Budget(NamedTuple):
    """What the judges may spend."""

    weights: int = 1000
    adaptive_weights: int = 500
    draws: int = 60  # of a guide, one after the other
    particles: int = 300  # of an objective
    repeat: int = 0  # added to the seed


FULL = Budget()


@dataclass(frozen=True)
class Known:
    """A program, its pair and its right values."""

    case: Case
    log_evidence: Truth
    terms: Terms
    means: Mapping[Node, Tensor]  # (B,) by node, the posterior mean of `shrunk`

    @property
    def in_floats(self) -> bool:
        """Whether floats can hold the draws of the guide.

        Single precision knows of no logit above 16, next to one, and the oracle's guides of no logarithm beyond 30.
        """
        far = False
        for site in self.case.guide:
            if site.family in ("unit", "beta") and self.case.program.dtype != F64:
                far |= bool((site.centre + 2 * site.width > FARTHEST_LOGIT).any())
            elif site.family in ("positive", "gamma"):
                far |= bool((site.centre.abs() > FARTHEST_LOG).any())
        return not far

    @property
    def elbo(self) -> tuple[Truth, Tensor]:
        return self.terms.of([1.0] * len(self.terms.factors))


def know(program: Program) -> Known | None:
    """The right values of a program; None where the oracle's own error of log p(x) is not small."""
    case = make_case(program)
    log_evidence, posterior = evidence(case)
    if not bool((log_evidence.error < ORACLE_ERROR).all()):
        return None
    case = with_guide(case, posterior)
    return Known(case, log_evidence, elbo_terms(case), posterior_means(case, posterior))


def shrunk(value: Tensor) -> Tensor:
    """Between -1 and 1, so that its mean exists for every posterior."""
    return value / (1 + value.abs())


def posterior_means(case: Case, posterior: Posterior) -> dict[Node, Tensor]:
    belief = posterior.marginals(case)
    return {n: (belief[n].softmax(-1) * shrunk(posterior.grids[n].value.double())).sum(-1) for n in belief}


def findings_of(seed: int, in_turn: bool = False) -> tuple[int, list[Finding] | None]:
    """All findings on the program of this number; None where the oracle does not know it well enough.

    :param in_turn: by the judges whose turn it is, rather than by all.
    """
    torch.set_num_threads(1)
    program = program_of_seed(seed)
    known = know(program)
    return seed, None if known is None else list(judge(known, judges_of(seed, program) if in_turn else ()))


def judge(known: Known, names: Collection[str] = (), budget: Budget = FULL) -> Iterator[Finding]:
    """The findings of the judges of these names on one program, by default of all."""
    for name in names or JUDGES:
        yield from guarded(name, JUDGES[name], known, budget)


def guarded(name: str, run: Callable, known: Known, budget: Budget) -> Iterator[Finding]:
    """Refusals and crashes as findings. A program for which no number is right must be refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pyro.clear_param_store()
            pair = build(known.case)
            findings = list(run(name, known, budget, *pair))
            if name in MEANS and any(finding.outcome == "wrong" for finding in findings):
                more = budget._replace(draws=10 * budget.draws, particles=10 * budget.particles, repeat=1)
                findings = list(run(name, known, more, *pair))
    except NAMED as error:
        yield Finding(name, "refused", type(error).__name__)
        return
    except Exception as error:
        yield Finding(name, "crashed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return
    if name in OF_ONE_DATUM and known.case.program.quirk in WITHOUT_NUMBER and has_effect(known.case):
        findings = [Finding(f.judge, "wrong", "a number where none is right") for f in findings]
    yield from findings


def has_effect(case: Case) -> bool:
    """Whether a quirk for which no number is right changes anything: something is hidden, or there are other data."""
    if case.program.quirk == "masked read":
        first = case.program.observed[0]
        return not bool(case.masks[first.parent or ""].all())
    return case.num_data > 1 and any(bool(case.masks[site.name].any()) for site in case.program.observed)


def doubted(record: Any) -> Tensor:
    """(B,) where a record says itself that its number may be wrong."""
    return ~record.reliable


def compared(
    judge: str, what: str, value: Tensor, std_error: Tensor, truth: Truth, doubts: Tensor | None, slack: float = SLACK
) -> Finding:
    """One number per datum against its right value."""
    if not bool((truth.error < LARGEST_ERROR).all()):
        return Finding(judge, "unknown", what)
    distance = (value.double() - truth.value).abs()
    allowed = SIGMAS * std_error.double().nan_to_num(nan=0.0) + truth.error + slack
    off = ~(distance <= allowed)
    if not bool(off.any()):
        return Finding(judge, "right", what)
    silent = off if doubts is None or not bool((off & ~doubts).any()) else off & ~doubts
    worst = int(torch.where(silent, distance - allowed, -torch.inf).argmax())
    found, error, right = (float(t[worst]) for t in (value, std_error, truth.value))
    detail = f"{what} of datum {worst}: {found:.4f} +- {error:.4f}, right {right:.4f}"
    return Finding(judge, "wrong" if doubts is None or bool((off & ~doubts).any()) else "doubted", detail)


def compared_elbo(name: str, known: Known, value: Tensor, std_error: Tensor, num: int) -> Finding:
    """A mean of `num` draws; where a rare draw did not come its own error is too small, and the oracle's is taken."""
    truth, deviation = known.elbo
    if not known.in_floats:
        return Finding(name, "unknown", "ELBO")
    error = torch.maximum(std_error.double().nan_to_num(nan=0.0), deviation / num**0.5)
    return compared(name, "ELBO", value, error, truth, None)


def compared_evidence(name: str, record: Any, truth: Truth) -> Finding:
    """log p(x) is right too where the interval of as many errors holds it: heavy tails and the check widen that."""
    low, high = record.confidence_interval(math.erf(SIGMAS / math.sqrt(2)))
    found = torch.where((low <= truth.value) & (truth.value <= high), truth.value, record.log_evidence.double())
    return compared(name, "log p(x)", found, record.std_error, truth, doubted(record))


def importance(name: str, known: Known, budget: Budget, model: Any, guide: Any, args: Any) -> Iterator[Finding]:
    record = pv.ImportanceSampling(model, guide, num_particles=budget.weights, **options(known))(*args)
    found = compared_evidence(name, record, known.log_evidence)
    unchecked = found.outcome == "wrong" and "posterior side" in record.unchecked
    yield found._replace(outcome="unchecked") if unchecked else found
    yield compared_elbo(name, known, record.elbo, record.elbo_std_error, budget.weights)


def adaptive(name: str, known: Known, budget: Budget, model: Any, guide: Any, args: Any) -> Iterator[Finding]:
    record = pv.AdaptiveImportanceSampling(model, guide, num_particles=budget.adaptive_weights, **options(known))(*args)
    yield compared_evidence(name, record, known.log_evidence)
    yield compared_elbo(name, known, record.elbo, record.elbo_std_error, 20)


def exact(name: str, known: Known, budget: Budget, model: Any, guide: Any, args: Any) -> Iterator[Finding]:
    record = pv.ExactEvidence(model, guide, **options(known))(*args)
    slack = EXACT_SLACK
    yield compared(name, "log p(x)", record.log_evidence, record.std_error, known.log_evidence, doubted(record), slack)
    yield compared_elbo(name, known, record.elbo, record.elbo_std_error, 20)


def expectation(name: str, known: Known, budget: Budget, model: Any, guide: Any, args: Any) -> Iterator[Finding]:
    """The posterior mean of each latent; model-side enumeration leaves it no draws."""
    case = known.case
    latents = [latent for latent in case.program.latents if latent.enumerated != "model"]

    def by_datum(latent: Latent, value: Tensor) -> Tensor:
        """(K, B, width), whatever shape the program gives it."""
        if latent.place == "plate":
            return value if case.program.data_dim == -2 else value.mT
        return value.reshape(len(value), case.num_data, latent.width)

    def f(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([shrunk(by_datum(latent, values[latent.name])) for latent in latents], -1)

    if not latents:
        return
    made = pv.PosteriorExpectation(model, guide, f, num_particles=budget.adaptive_weights, **options(known))
    record = made(*args)
    nodes = [node for latent in latents for node in latent.nodes]
    for i, node in enumerate(nodes):
        seen = case.masks[node.site][:, node.index]
        if bool(record.value[~seen, i].isnan().logical_not().any()) and case.program.site(node.site).family not in DISCRETE:
            yield Finding(name, "wrong", f"{node} is hidden and has a number")
        truth = Truth(known.means[node][seen], known.log_evidence.error[seen])
        yield compared(
            name, f"{node}", record.value[seen, i], record.std_error[seen, i], truth, doubted(record)[seen], MISSED_SLACK
        )


def gaps(name: str, known: Known, budget: Budget, model: Any, guide: Any, args: Any) -> Iterator[Finding]:
    num = 500  # the default
    record = pv.InferenceGaps(model, guide, num_particles=num, **options(known))(*args)
    errors, doubts = record.std_errors, doubted(record)
    yield compared_evidence(name, record.evidence, known.log_evidence)
    yield compared_elbo(name, known, record.elbo, errors["elbo"], num)
    if record.unsplit:  # draws that are not reparameterised: L[q*] is NaN, as the record says
        return
    above = (record.optimal_elbo.double() - known.log_evidence.value).clamp(min=0.0)
    zero = Truth(torch.zeros_like(above), known.log_evidence.error)
    yield compared(name, "L[q*] - log p(x)", above, errors["optimal_elbo"], zero, doubts)


def units(name: str, known: Known, budget: Budget, model: Any, guide: Any, args: Any) -> Iterator[Finding]:
    """The KL of each site, a mean over the data."""
    units = pv.ActiveUnits(model, guide, num_particles=budget.draws, **options(known, budget))
    record = units([args], args=lambda batch: batch, progress=False)
    if not known.in_floats:
        yield Finding(name, "unknown", "KL")
        return
    summed = {latent.name for latent in known.case.program.latents if latent.enumerated != "no"}
    for site, estimate in record.site_kl.items():
        reads = {known.case.program.site(site).parent, *(g.read for g in known.case.guide if g.name == site)}
        if summed & reads:  # a KL of mixtures, which the oracle has no number for
            yield Finding(name, "unknown", f"KL of {site}")
            continue
        weights = [-1.0 * (f.node.site == site and f.kind in ("prior", "guide")) for f in known.terms.factors]
        truth, deviation = known.terms.of(weights)
        mean = Truth(truth.value.mean().reshape(1), truth.error.mean().reshape(1))
        own = deviation.square().sum().sqrt() / len(deviation) / budget.draws**0.5
        error = torch.maximum(estimate.std_error.double(), own).reshape(1)
        yield compared(name, f"KL of {site}", estimate.value.reshape(1), error, mean, None)


def objective(name: str, known: Known, budget: Budget, model: Any, guide: Any, args: Any) -> Iterator[Finding]:
    """The loss at beta = 1, with the scales of the sites, is minus the sum of the ELBOs in expectation."""
    program = known.case.program
    enumerated = [latent for latent in program.latents if latent.enumerated != "no"]
    summed = any(latent.enumerated == "model" for latent in program.latents)
    scaled = any(site.scale != 1 for site in (*program.latents, *program.observed))
    drawn_discrete = any(s.family in DISCRETE and s.enumerated != "model" for s in program.latents)
    if (name == "BetaTraceEnum_ELBO") != bool(enumerated) or (summed and scaled):
        return
    if name == "BetaTraceMeanField_ELBO" and drawn_discrete:
        return
    if program.quirk == "coupled" or (enumerated and program.quirk != "none"):
        return  # the loss of coupled data is defined, but not of these right values; an enumerated axis is Pyro's own
    pyro.clear_param_store()
    pyro.set_rng_seed(known.case.program.seed + budget.repeat)
    # Pyro believes whoever says that a program can be vectorised; the others run one particle after the other.
    vectorized = program.quirk in ("none", "masked read") and program.guide.element == "narrow"
    num = budget.particles if vectorized else budget.draws
    objective = getattr(pv, name)(num_particles=num, vectorize_particles=vectorized, max_plate_nesting=2)
    with torch.no_grad():
        loss = torch.as_tensor(objective.loss(model, guide, *args), dtype=torch.float64)
    if not known.in_floats:
        yield Finding(name, "unknown", "loss")
        return
    weights = [-program.site(f.node.site).scale for f in known.terms.factors]
    truth, _ = known.terms.of(weights)
    total = Truth(truth.value.sum().reshape(1), truth.error.sum().reshape(1))
    # Formulas for some parts can add noise, where these parts were correlated with others: bounded by the sum of the parts.
    spread = (torch.tensor(weights).abs().double() @ known.terms.draws.std(-1)).square().sum().sqrt()
    yield compared(name, "loss", loss.reshape(1), spread.reshape(1) / num**0.5, total, None)


def options(known: Known, budget: Budget = FULL) -> dict[str, Any]:
    """The seed, and the plate of the data where two plates are common to all sites."""
    program = known.case.program
    inner = all(site.place == "plate" for site in (*program.latents, *program.observed))
    return {"seed": program.seed + budget.repeat, **({"datum_plate": "data"} if inner else {})}


JUDGES: dict[str, Callable] = {
    "ImportanceSampling": importance,
    "AdaptiveImportanceSampling": adaptive,
    "ExactEvidence": exact,
    "PosteriorExpectation": expectation,
    "ActiveUnits": units,
    "BetaTrace_ELBO": objective,
    "BetaTraceGraph_ELBO": objective,
    "BetaTraceEnum_ELBO": objective,
    "BetaTraceMeanField_ELBO": objective,
    "InferenceGaps": gaps,
}
# Where judges take turns, those that take long see one program in so many.
ONE_IN = {
    "ActiveUnits": 2,
    "BetaTrace_ELBO": 3,
    "BetaTraceGraph_ELBO": 3,
    "PosteriorExpectation": 5,
    "ExactEvidence": 6,
    "InferenceGaps": 10,
}


def judges_of(number: int, program: Program) -> tuple[str, ...]:
    """The judges whose turn it is at the program of this number.

    Quadrature over two latents takes minutes where a program runs one particle at a time. It is left to runs by all judges.
    """
    looped = program.quirk != "none" or program.guide.element == "select"
    names = tuple(name for name in JUDGES if number % ONE_IN.get(name, 1) == 0)
    return tuple(name for name in names if not (looped and name == "ExactEvidence"))
