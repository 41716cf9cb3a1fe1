"""Importance sampling with the guide as the proposal: the IWAE estimate with K weights, per datum, with its error."""

from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import OptionError
from ..kernel import Call, Record
from ..noise import Noise
from ..ops import jackknife_log_mean_exp
from ..options import amount, flag, is_whole
from ..records import GUIDE_ITSELF
from .coarse_draws import CoarseDraws
from .estimator import Estimator
from .evidence import Evidence
from .k_curve import KCurve
from .second_look import SecondLook
from .summary import summarise

FEWEST_PARTICLES = 1000  # with fewer particles the check would cost more than about 35% of the decoder evaluations


@dataclass(repr=False, eq=False, kw_only=True)
class ImportanceSampling(Estimator):
    r"""log p(x) by importance sampling from the guide::

        log p(x) ~ log 1/K sum_k p(x, z_k) / q(z_k given x),   z_k ~ q(z given x)

    A lower bound in expectation, tight as K grows (Burda, Grosse and Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519).
    With an amortized guide it is often more than a nat too low at any affordable K, and its Monte Carlo error does not show
    this. `AdaptiveImportanceSampling` is the better default.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param num_particles: K, weights per datum.
    :param jackknife: order of the bias correction, 0, 1 or 2. The bias is the chi-squared divergence / 2K to first order. It
        falls to O(1/K^2) or O(1/K^3) at no cost (Nowozin, 2018, https://openreview.net/forum?id=HyZoi-WRb; see
        `pyro_vae.ops.jackknife_log_mean_exp`). The result then has `bound="consistent"`: its bias may have either sign, so
        it is no lower bound. Its error comes from the pseudo-values. It is NaN where no more than `jackknife` weights are
        positive.
    :param check: make a second estimate from a fit to the posterior, for about 326 more decoder evaluations per datum. A few
        particles are drawn by weight and moved along the gradients of log p(x, z). Samples then come from a Gaussian fitted
        to them and from the prior. With discrete latents, or without gradients, samples are drawn around the particles
        instead, with at most 15 latents. From 3,000 particles on and up to ten latents, a search for modes comes first, for
        some 400 to 600 evaluations more. Where the second estimate is higher, the guide has missed mass, which the weights
        cannot show. It raises the upper end of the intervals, and `doubts["posterior side"]` is true where it is higher by
        2.2 joint standard errors. `log_evidence` stays as it is. The second estimate is made with 1,000 particles or more;
        `unchecked` says why it was not made. See :doc:`/evidence` for what it cannot find.

    Call it with the model's arguments. It returns `Evidence` for the B data of the call. Memory does not grow with K, apart
    from the (K, B) log-weights. The record's `curve` holds the estimate at K, K/2, K/4 and so on, from the same weights and
    without the jackknife: see `pyro_vae.plots.plot_k_curve`.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.
    :raises OptionError: for `num_particles` below 1, another order of the jackknife, or too few particles for it.

    Example::

        evidence = pv.ImportanceSampling(model, guide, num_particles=5000)(x)
        print(evidence)
        evidence.log_evidence       # (B,)
    """

    num_particles: int = 5000
    jackknife: int = 0
    check: bool = True

    def check_options(self) -> None:
        self.check = flag("check", self.check)
        self.jackknife = checked_order(self.jackknife)
        self.num_particles = amount("num_particles", self.num_particles, lowest=self.jackknife + 1)

    def estimate(self, call: Call) -> Evidence:
        return self.weighed(call)[0]

    def weighed(self, call: Call) -> tuple[Evidence, Tensor]:
        """The record, and the log-weights from which it was made, (K, B)."""
        look = SecondLook(call, self.num_particles, self.check, fewest=FEWEST_PARTICLES)
        coarse = CoarseDraws(call)

        def watch(guide: Record, model: Record, log_weight: Tensor) -> None:
            coarse.watch(guide, model, log_weight)
            look.watch_guide(guide, model, log_weight)

        log_weight, elbo = call.log_weights(self.num_particles, Noise.GUIDE, watch=watch)
        evidence = look.add_to(summarise(call, log_weight, elbo, call.cost, GUIDE_ITSELF), log_weight)
        if bool((doubted := coarse.too_many()).any()):
            evidence = replace(evidence, checks={**evidence.checks, "end of support": doubted})
        evidence = replace(evidence, curve=KCurve.from_log_weights(log_weight))
        if self.jackknife:
            value, std_error = jackknife_log_mean_exp(log_weight, self.jackknife)
            evidence = replace(evidence, log_evidence=value, std_error=std_error, bound="consistent")
        return evidence, log_weight


def checked_order(jackknife: int) -> int:
    if not (is_whole(jackknife) and jackknife in (0, 1, 2)):
        raise OptionError(f"jackknife must be the order of the correction, 1 or 2, or 0 for none, got {jackknife!r}")
    return int(jackknife)
