"""The importance-weighted bound per datum, with a choice of three gradients for the guide."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from torch import Tensor

from ..errors import OptionError, StructureError, quoted
from ..kernel import INFER, Cut
from ..ops import log_mean_exp
from ..options import one_of
from .datum_elbo import DatumELBO
from .gradients import normalised, path_surrogate, score_surrogate, scored_sites, weighed
from .objective import BetaObjective
from .weighing import beta_densities, total
from .weights import Weight

Gradient = Literal["standard", "stl", "dreg"]


class ImportanceWeightedELBO(DatumELBO, BetaObjective):
    r"""The importance-weighted bound (IWAE) of each datum, as an objective.

    For K particles (Burda, Grosse and Salakhutdinov, 2016, https://arxiv.org/abs/1509.00519)::

        loss = -sum over data of E[ log 1/K sum_k w_k ],    w_k = p(x, z_k) / q(z_k|x),    z_k ~ q(z|x)       (nats)

    Minus the loss is a lower bound on log p(x): the ELBO at K = 1, never looser with more particles, and tight as K grows.
    There is one weight per datum and particle, (K, B), not one for the whole batch. The scale of a subsampled plate (N/B) or
    of `poutine.scale` is applied outside the logarithm.

    `gradient` chooses the gradient for the guide. With v_k the normalised weights:

    - ``"standard"``: autograd of the bound, ``sum_k v_k d log w_k``. Its signal-to-noise ratio falls like 1/sqrt(K)
      (Rainforth et al., 2018, https://arxiv.org/abs/1802.04537). Draws that are not reparameterised get a score-function
      term, with the bound of the other particles as baseline (Mnih and Rezende, 2016, https://arxiv.org/abs/1602.06725).
    - ``"dreg"``: ``sum_k v_k^2 d log w_k`` along the draws, doubly reparameterised (Tucker et al., 2019,
      https://arxiv.org/abs/1810.04152). It has the same mean as "standard" with less noise, and its signal-to-noise ratio
      does not fall with K. With a beta, v_k^2 is ``v_k (1 - beta + beta v_k)``.
    - ``"stl"``: ``sum_k v_k d log w_k`` along the draws, "sticking the landing" (Roeder, Wu and Duvenaud, 2017,
      https://arxiv.org/abs/1703.09194). It is zero for every draw where the guide equals the posterior. At K = 1 its mean is
      that of the others; **at K > 1 it is not the gradient of this bound**: its mean differs.

    The gradient for the model is ``sum_k v_k d log p(x, z_k)`` in all three.

    :param beta: a weight on the KL in the exponent of the weights, ``w_k = p(x|z_k) (p(z_k) / q(z_k|x))^beta``: a number, a
        tensor without dimensions, a schedule, or a dict of these by latent site, as in `BetaTrace_ELBO`. Minus the loss is a
        lower bound on log p(x) at beta >= 1 only.
    :param num_particles: K, particles per datum.
    :param gradient: "standard", "dreg" or "stl".
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites. `None` makes the
        whole call one datum, which allows latents that all data share.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param compile: as in `BetaTrace_ELBO`.

    :ivar terms: `Terms` of the last call; their `elbo` is the ELBO, not the bound, which is ``-loss``.
    :ivar num_updates: the number passed to a schedule, as in `BetaTrace_ELBO`.
    :raises OptionError: for another gradient; for the options for which `BetaTrace_ELBO` raises; for a beta by site with
        "dreg".
    :raises GlobalLatentError: for a latent outside the datum plate: there is then no weight per datum.
    :raises StructureError: (or a subclass) for "dreg" and "stl" with draws that are not reparameterised; for sites with
        different scales; for any program structure that the kernel cannot check.

    At the first call with arguments of new shapes, model and guide are run to find how to compute K particles. They run at
    once where this gives the same numbers as one at a time, otherwise by `torch.vmap` or in a loop. Networks need no
    particle axis.

    Example::

        objective = pv.ImportanceWeightedELBO(num_particles=50, gradient="dreg")
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective)
        svi.step(x)
    """

    def __init__(
        self,
        beta: Weight | Mapping[str, Weight] = 1.0,
        *,
        num_particles: int = 10,
        gradient: Gradient = "standard",
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        one_of("gradient", gradient, Gradient)
        super().__init__(
            beta=beta, num_particles=num_particles, datum_plate=datum_plate, prior_sites=prior_sites, compile=compile
        )
        self.gradient = gradient

    def _loss_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        betas = self._betas_now()
        if self.gradient == "dreg" and isinstance(betas, Mapping):
            raise OptionError("gradient='dreg' needs one beta for all sites: use gradient='standard' with a beta by site")
        call = self._call(model, guide, args, kwargs)
        cuts: list[list[Cut]] | None = None if self.gradient == "standard" else []
        drawn = call.draw(self.num_particles, cuts=cuts)
        scored = scored_sites(drawn, call.structure.layout.enumerated)
        if scored and cuts is not None:
            raise StructureError(
                f"gradient='{self.gradient}' follows the draws of the guide, but {quoted(scored)} are not reparameterised: "
                "use gradient='standard', which has a score-function term for them"
            )
        weights, scale = self._weigh(call, drawn, betas=betas, scores_draws=True)
        log_joint, log_guide = beta_densities(weights, betas)
        log_weight = log_joint - log_guide
        loss = -(log_mean_exp(log_weight.detach(), 0) * scale).sum()
        if not log_weight.requires_grad:
            return loss, loss
        # Sites drawn from the prior cancel in a weight, but their score function has a gradient.
        by_the_model = score_surrogate(log_weight, weights.log_drawn(self.prior_sites)) if self.prior_sites else 0.0
        if cuts is None:
            bound = log_mean_exp(log_weight, 0)
            if scored:
                bound = bound + score_surrogate(log_weight, total(weights.log_guide_by_site[n] for n in scored))
            return loss, -((bound + by_the_model) * scale).sum()
        share = normalised(log_weight)
        # E[v d log q] = E[v (1 - v) d log w], with the second d along the draw; log q has the weight beta.
        along = share if self.gradient == "stl" or isinstance(betas, Mapping) else share * (1 - betas + betas * share)
        model_part = ((weighed(share, log_joint).sum(0) + by_the_model) * scale).sum()
        return loss, -model_part - path_surrogate((weighed(along, log_weight) * scale).sum(), cuts)
