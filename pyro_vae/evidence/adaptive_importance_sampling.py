"""Importance sampling from proposals fitted to each datum first."""

from dataclasses import dataclass

from ..kernel import Call
from ..ops import MIN_PARTICLES_FOR_K
from ..options import amount, flag, one_of
from ..records import FITTED_PROPOSALS
from .estimator import Estimator
from .evidence import Evidence
from .fitted import Proposal, fitted_log_weights, with_search
from .second_look import SecondLook
from .summary import summarise


@dataclass(repr=False, eq=False, kw_only=True)
class AdaptiveImportanceSampling(Estimator):
    r"""log p(x) by importance sampling from proposals fitted to the posterior of each datum.

    Starting at the guide, a full-covariance Gaussian over all latents of a datum, in unconstrained space, is fitted by
    regressing gradients of log p(x, z) on the points where they were taken (an averaged Newton step, see
    `pyro_vae.proposals`). Then::

        log p(x) ~ log 1/K sum_k p(x, z_k) / r(z_k),    z_k ~ r = 0.98 N(m, 1.05^2 S) + 0.02 p(z)

    (the factor is 1 + 0.35 / sqrt(D)). Unbiased for p(x), so a lower bound on log p(x) in expectation; the share of the
    prior keeps the weights bounded. On amortized guides this is more than a nat nearer to log p(x) than
    `ImportanceSampling` at ten times the cost.

    One Gaussian misses what is not near it, with good diagnostics. Up to ten latents the default therefore looks for more.
    Four spread draws of the prior are moved uphill, and two further fits start from them or from other draws: one where
    p(x, z) is highest outside the first fit, one where it is highest above both. The fits share the draws by their estimated
    masses. Per datum, one to three components and Gaussian or Student t tails, whichever measures the largest effective
    sample size on the points of search and fits. These points only choose: no weight is made of them, so the estimate stays
    unbiased. A mode can still be missed, less and less often the more latents there are, see :doc:`/evidence`. A posterior
    with more modes than three components can hold is doubted: `doubts["search"]` is true where the search has seen a mode
    that holds 2% of p(x) or more and that the proposal lacks.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites; the start of the fits, and what `elbo` is about.
    :param num_particles: K, weights per datum.
    :param num_gradients: gradients per datum for the fit, each counted as three decoder evaluations; by default
        `max(20 + 3 D, min(0.35 K, 40 + 5 D))` for D latents.
    :param proposal: "gaussian", "student" (a multivariate t of 5 + D degrees, the factor 1 + 0.15 / sqrt(D)), "mixture" (the
        search, which costs another 22 + min(K / 10, 500) + 3 D decoder evaluations and 36 + 2 (12 + 3 D) gradients), or
        "auto": "mixture" up to ten latents, "gaussian" beyond.
    :param check: look from the posterior's side too, as `ImportanceSampling` does, for about 326 more decoder
        evaluations; from 100 particles on. The proposals come from such a fit already, so it seldom finds anything.

    Called with the model's own arguments; returns `Evidence` for the B data of the call.

    :raises LocalFitError: for latents that cannot be fitted; `ImportanceSampling` needs no fit.
    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.
    :raises OptionError: for counts that are too small and for another `proposal`.

    References: fitting local proposals, Cremer, Li and Duvenaud, 2018, https://arxiv.org/abs/1801.03558; defensive mixtures,
    Hesterberg, 1995, https://doi.org/10.1080/00401706.1995.10484303; components added where weights are high, Raftery and
    Bao, 2010, https://doi.org/10.1111/j.1541-0420.2010.01399.x.

    Example::

        evidence = pv.AdaptiveImportanceSampling(model, guide, num_particles=500)(x)
        print(evidence)
        evidence.log_evidence       # (B,)
    """

    num_particles: int = 500
    num_gradients: int | None = None
    proposal: Proposal = "auto"
    check: bool = False

    def check_options(self) -> None:
        self.check = flag("check", self.check)
        self.num_particles = amount("num_particles", self.num_particles)
        if self.num_gradients is not None:
            self.num_gradients = amount("num_gradients", self.num_gradients, lowest=2)
        one_of("proposal", self.proposal, Proposal)

    def estimate(self, call: Call) -> Evidence:
        look = SecondLook(call, self.num_particles, self.check, fewest=MIN_PARTICLES_FOR_K)
        log_weight, elbo, fitted = fitted_log_weights(call, self.num_particles, self.num_gradients, self.proposal, look)
        evidence = look.add_to(summarise(call, log_weight, elbo, call.cost, FITTED_PROPOSALS), log_weight)
        return with_search(evidence, fitted)
