"""Importance sampling from proposals that are first fitted to each datum."""

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

    A full-covariance Gaussian over all latents of a datum, in unconstrained space, is fitted first. The fit starts at the
    guide. It regresses gradients of log p(x, z) on the points where they were taken, which is an averaged Newton step (see
    `pyro_vae.proposals`). Then::

        log p(x) ~ log 1/K sum_k p(x, z_k) / r(z_k),    z_k ~ r = 0.98 N(m, 1.05^2 S) + 0.02 p(z)

    Here 1.05 stands for the factor 1 + 0.35 / sqrt(D). The estimate of p(x) is unbiased, so that of log p(x) is a lower
    bound in expectation. The prior's share of r keeps the weights bounded. On amortized guides this is more than a nat
    nearer to log p(x) than `ImportanceSampling` at ten times the cost.

    One Gaussian can miss a second mode, and its weights do not show it. With at most ten latents the default therefore
    searches for more modes. The search moves four spread draws of the prior uphill and makes two further fits, from these or
    from other draws. One fit is where p(x, z) is highest outside the first fit, the other where it is highest above both.
    The fits share the draws by their estimated masses. For each datum, the proposal has one to three components with
    Gaussian or Student t tails. The one with the largest effective sample size is used, measured on the points of the search
    and of the fits. These points enter no weight, so the estimate stays unbiased. A mode can still be missed, less often the
    more latents there are, see :doc:`/evidence`. Where a posterior has more modes than three components can hold, the number
    is doubted: `doubts["search"]` is true where the search has seen a mode that holds 2% of p(x) or more and that the
    proposal lacks.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites. The fits start at it, and `elbo` is its ELBO.
    :param num_particles: K, weights per datum.
    :param num_gradients: gradients per datum for the fit, each counted as three decoder evaluations; by default
        `max(20 + 3 D, min(0.35 K, 40 + 5 D))` for D latents.
    :param proposal: "gaussian", "student", "mixture" or "auto". "student" is a multivariate t with 5 + D degrees of freedom
        and the factor 1 + 0.15 / sqrt(D). "mixture" is the search above; it costs another 22 + min(K / 10, 500) + 3 D
        decoder evaluations and 36 + 2 (12 + 3 D) gradients. "auto" is "mixture" up to ten latents and "gaussian" beyond.
    :param check: make a second estimate from a fit to the posterior, as `ImportanceSampling` does, for about 326 more
        decoder evaluations. It is made with 100 particles or more. The proposals come from such a fit already, so it seldom
        finds anything.

    Called with the model's own arguments; returns `Evidence` for the B data of the call.

    :raises LocalFitError: for latents that cannot be fitted. Use `ImportanceSampling`, which fits nothing.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
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
