"""Importance sampling with the guide as it is: the IWAE-K estimate, per datum and with its error."""

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

FEWEST_PARTICLES = 1000  # below it the check would cost more than about 35% of the decoder evaluations


@dataclass(repr=False, eq=False, kw_only=True)
class ImportanceSampling(Estimator):
    r"""log p(x) by importance sampling from the guide as it is::

        log p(x) ~ log 1/K sum_k p(x, z_k) / q(z_k given x),   z_k ~ q(z given x)

    A lower bound in expectation, tight as K grows (Burda, Grosse and Salakhutdinov, 2016,
    https://arxiv.org/abs/1509.00519). With an amortized guide it is often more than a nat short at any K that people
    pay for, and its Monte Carlo error does not show it: `AdaptiveImportanceSampling` is the better default.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param num_particles: K, weights per datum.
    :param jackknife: order of the bias correction, 0, 1 or 2. The bias, chi-squared divergence / 2K to first order, falls to
        O(1/K^2) or O(1/K^3) at no cost (Nowozin, 2018, https://openreview.net/forum?id=HyZoi-WRb; see
        `pyro_vae.ops.jackknife_log_mean_exp`). The result is then `bound="consistent"`: of either sign, no longer a lower
        bound; its error comes from the pseudo-values; NaN where no more than `jackknife` weights are positive.
    :param check: make a second estimate from the posterior's side, for about 326 more decoder evaluations per datum: draw
        a few particles by weight, move them along the gradients of log p(x, z), and sample from a Gaussian fitted to these
        and from the prior. With discrete latents, or without gradients, sample around the particles instead, up to 15
        latents. Where that is higher, the guide has missed mass, which no weight can show. It raises the upper end of the
        intervals; `doubts["posterior side"]` is true where it is higher by 2.2 joint errors. `log_evidence` stays as it is.
        Made from 1,000 particles on; `unchecked` says why it was not. See :doc:`/evidence` for what it cannot see.

    Called with the model's own arguments; returns `Evidence` for the B data of the call. Memory does not grow with K, but
    for (K, B) numbers. The record's `curve` holds the estimate at K, K/2, K/4, ... from the same weights, never jackknifed:
    see `pyro_vae.plots.plot_k_curve`.

    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum.
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
        """The record, and the log-weights behind it, (K, B)."""
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
        raise OptionError(f"jackknife must be its order, 1 or 2, or 0 for none, got {jackknife!r}")
    return int(jackknife)
