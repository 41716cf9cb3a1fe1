"""Split log p(x) - ELBO into the amortization gap of the encoder and the approximation gap of the family."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import SubsamplingError
from ..evidence import Estimator, Evidence, mean_std_error
from ..kernel import Call
from ..options import amount, check_function, real_number
from .default_evidence import default_evidence, proposals_of
from .enumerated import enumerated_gaps
from .gaps import Gaps
from .optimum import at_least, elbo_terms, find_optimum
from .unsplit import unsplit_gaps, why_not_split

USUAL = 500  # particles; beyond, fits may take as many times more rounds


@dataclass(repr=False, eq=False, kw_only=True)
class InferenceGaps(Estimator):
    r"""Amortization, approximation and inference gap per datum (Cremer, Li and Duvenaud, 2018)::

        inference gap      log p(x) - L[q]     = amortization gap + approximation gap
        amortization gap   L[q*] - L[q]        what the encoder leaves behind
        approximation gap  log p(x) - L[q*]    what the family cannot reach

    q* maximises the ELBO of each datum over offsets added to the guide's own parameters: its family contains the guide. It
    is looked for near the guide, and again at another mode where fitted proposals have found a better one. L[q] and L[q*]
    are measured on fresh draws that share their noise, so that their difference is paired. log p(x) is estimated from below:
    the approximation and inference gaps are therefore biased low, by as much as log p(x) is.

    For a guide whose latents are Gaussian once they are unconstrained, each site with a mean and a scale (or a full
    covariance) that other latents do not move, q* is found by natural gradients, and L[q] and L[q*] have smaller errors: the
    quadratic of the fitted proposals is a control variate for both. Other guides are fitted by Adam. Either fit
    ends a little below its optimum, which moves that much from the amortization to the approximation gap: `tolerance` says
    how much.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param num_particles: K, the budget: weights behind log p(x), draws behind L[q] and behind L[q*], and for K > 500 K / 500
        times as many rounds of the fits of q*.
    :param tolerance: nats that q* may be short of its optimum: nearly all data less, the others up to 2.5 times as much by
        the estimate of their fit, or they are in doubt as "not converged". Adam stops where a round gains under 0.05 nats.
    :param evidence: maps (model, guide) to an estimator of log p(x), e.g.
        `functools.partial(pv.ImportanceSampling, num_particles=5000)`; by default `AdaptiveImportanceSampling`, and
        `ImportanceSampling` where latents cannot be fitted (discrete ones, masks that depend on draws).

    A guide that enumerates all its latents has exact gaps. One that enumerates some beside latents that it draws has q*
    freed for these alone: what the enumerated ones lose counts as approximation, and `held` of the record names them.

    Where a draw of the guide is not reparameterised (a discrete latent that is not enumerated) q* cannot be fitted. The
    record then has log p(x), L[q] and the inference gap; `unsplit` says why the rest is NaN.

    Called with the model's own arguments; returns `Gaps` for the B data of the call, in nats.

    :raises LocalFitError: for latents that cannot be fitted per datum for another reason.
    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum.
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
            check_function("evidence", self.evidence, "an estimator to be built, such as pv.ImportanceSampling, or None")
        self._estimator = None if self.evidence is None else self.evidence(self.model, self.guide)

    def estimate(self, call: Call) -> Gaps:
        if not call.structure.latents:
            return enumerated_gaps(call, self.num_particles)
        if why_not := why_not_split(call):
            gaps = unsplit_gaps(call, self.num_particles, self._estimator, why_not)
            check_same_data(call, gaps.evidence)
            return gaps
        if self._estimator is None:
            evidence, fitted = default_evidence(call, self.num_particles)
        else:
            evidence = self._estimator(*call.model.args, **call.model.kwargs)
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
                # of amortization - approximation = 2 L[q*] - L[q] - log p(x), whose terms share their draws
                "contrast": (mean_std_error(2 * optimal - bound) ** 2 + evidence.std_error**2).sqrt(),
            },
            converged=converged,
            evidence=evidence,
            family=optimum.offsets.family,
            held=(*call.structure.guide_enumerated, *call.structure.indicators),
            num_particles=self.num_particles,
            cost=total,
        )


def check_same_data(call: Call, evidence: Evidence) -> None:
    same = evidence.index is call.index is None or (
        evidence.index is not None and call.index is not None and torch.equal(evidence.index, call.index)
    )
    if not same or len(evidence) != call.batch_size:
        raise SubsamplingError(
            "the evidence estimator looked at other data of the subsampled plate than the gaps: give both the same seed="
        )
