"""Split log p(x) - ELBO into the amortization gap of the encoder and the approximation gap of the family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SubsamplingError
from ..evidence import Estimator, Evidence, check_builder, mean_std_error
from ..kernel import Call
from ..options import amount, real_number
from ..records import without_warnings
from .default_evidence import default_evidence, proposals_of
from .enumerated import enumerated_gaps
from .gaps import Gaps
from .optimum import at_least, elbo_terms, find_optimum
from .unsplit import unsplit_gaps, why_not_split

USUAL = 500  # particles; with more, fits may take proportionally more rounds


@dataclass(repr=False, eq=False, kw_only=True)
class InferenceGaps(Estimator):
    r"""Amortization, approximation and inference gap per datum (Cremer, Li and Duvenaud, 2018).

    With the guide q and the best member q* of its family for each datum::

        inference gap      log p(x) - L[q]     = amortization gap + approximation gap
        amortization gap   L[q*] - L[q]        lost because q is not the best member of its family
        approximation gap  log p(x) - L[q*]    lost because the family does not contain the posterior

    q* maximises the ELBO of each datum over offsets added to the guide's parameters, so its family contains the guide. The
    search starts near the guide, and starts again at another mode where fitted proposals have found a better one. L[q] and
    L[q*] are measured on fresh draws with common noise, so their difference is paired. log p(x) is estimated from below. The
    approximation and inference gaps are therefore too low in expectation, by as much as log p(x) is.

    Where the guide is Gaussian in unconstrained space, q* is found by natural gradients. Each site must then have a mean and
    a scale (or a full covariance) that do not depend on other latents. The quadratic of the fitted proposals is a control
    variate for L[q] and L[q*], which makes their errors smaller. When half of the data have converged, the others go on
    without them, where the model's arguments can be cut as in `AutoEvidence`. Other guides are fitted by Adam. Either fit
    ends a little below its optimum, which moves as many nats from the amortization to the approximation gap: see
    `tolerance`.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param num_particles: K: the weights for log p(x), and the draws for each of L[q] and L[q*]. With K > 500, the fits of q*
        may take K / 500 times as many rounds.
    :param tolerance: nats by which L[q*] may be below its optimum, as estimated by the fit. Nearly all data must be within
        it, and the others within 2.5 times as much, or they are in doubt as "not converged". Adam stops where a round gains
        under 0.05 nats.
    :param evidence: function from (model, guide) to an estimator of log p(x), such as
        `functools.partial(pv.ImportanceSampling, num_particles=5000)`. The default is `AdaptiveImportanceSampling`, or
        `ImportanceSampling` where latents cannot be fitted (discrete latents, masks that depend on draws).

    If the guide enumerates all its latents, the gaps are exact. If it enumerates some latents and draws others, q* is
    optimised over the drawn ones only. What the enumerated ones lose is counted as approximation, and `held` of the record
    names them.

    If a draw of the guide is not reparameterised (a discrete latent that is not enumerated), q* cannot be fitted. The record
    then has log p(x), L[q] and the inference gap. Its `unsplit` says why the other numbers are NaN.

    Call it with the model's arguments. It returns `Gaps` for the B data of the call, in nats.

    :raises LocalFitError: for latents that cannot be fitted per datum for another reason.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.

    Reference: Cremer, Li and Duvenaud, 2018, https://arxiv.org/abs/1801.03558.

    Example::

        gaps = pv.InferenceGaps(model, guide)(x)
        print(gaps)
        gaps.amortization       # (B,)
    """

    num_particles: int = USUAL
    tolerance: float = 0.02
    evidence: Callable[[Callable, Callable], Callable[..., Evidence]] | None = None

    def check_options(self) -> None:
        self.num_particles = amount("num_particles", self.num_particles, lowest=2)
        self.tolerance = real_number("tolerance", self.tolerance, ends="(]")
        if self.evidence is not None:
            check_builder(self.evidence)
        self._estimator = None if self.evidence is None else self.evidence(self.model, self.guide)

    def estimate(self, call: Call) -> Gaps:
        if not call.structure.latents:
            return enumerated_gaps(call, self.num_particles)
        if why_not := why_not_split(call):
            gaps = unsplit_gaps(call, self.num_particles, None if self._estimator is None else self._evidence, why_not)
            check_same_data(call, gaps.evidence)
            return gaps
        if self._estimator is None:
            evidence, fitted = default_evidence(call, self.num_particles)
        else:
            evidence = self._evidence(*call.model.args, **call.model.kwargs)
            fitted = proposals_of(call, self.num_particles)
        optimum = find_optimum(call, fitted, self.tolerance, max(1.0, self.num_particles / USUAL))
        bound, optimal = elbo_terms(call, self.num_particles, optimum)
        optimal, converged = at_least(bound, optimal, optimum.offsets.converged)
        total = call.cost + (0 if self._estimator is None else evidence.cost)
        check_same_data(call, evidence)
        return Gaps(
            elbo=bound.mean(0),
            optimal_elbo=optimal.mean(0),
            log_evidence=evidence.log_evidence,
            std_errors={
                "elbo": mean_std_error(bound),
                "optimal_elbo": mean_std_error(optimal),
                "log_evidence": evidence.std_error,
                "amortization": mean_std_error(optimal - bound),
                "approximation": (mean_std_error(optimal) ** 2 + evidence.std_error**2).sqrt(),
                "inference": (mean_std_error(bound) ** 2 + evidence.std_error**2).sqrt(),
                # error of amortization - approximation = 2 L[q*] - L[q] - log p(x), whose terms share their draws
                "contrast": (mean_std_error(2 * optimal - bound) ** 2 + evidence.std_error**2).sqrt(),
            },
            converged=converged,
            evidence=evidence,
            family=optimum.offsets.family,
            held=(*call.structure.guide_enumerated, *call.structure.indicators),
            num_particles=self.num_particles,
            cost=total,
        )

    def _evidence(self, *args: Any, **kwargs: Any) -> Evidence:
        assert self._estimator is not None
        with without_warnings():  # the gaps warn about the same data
            return self._estimator(*args, **kwargs)


def check_same_data(call: Call, evidence: Evidence) -> None:
    same = evidence.index is call.index is None or (
        evidence.index is not None and call.index is not None and torch.equal(evidence.index, call.index)
    )
    if not same or len(evidence) != call.batch_size:
        raise SubsamplingError(
            "the evidence estimator used other data of the subsampled plate than the gaps: give both the same seed="
        )
