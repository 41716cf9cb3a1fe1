"""The importance-weighted bound per datum, with three gradients for the guide."""

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
    r"""The importance-weighted bound of each datum, as an objective (Burda, Grosse and Salakhutdinov, 2016,
    https://arxiv.org/abs/1509.00519)::

        loss = -sum over data of E[ log 1/K sum_k w_k ],    w_k = p(x, z_k) / q(z_k|x),    z_k ~ q(z|x)       (nats)

    A lower bound on log p(x): the ELBO at K = 1, never looser with more particles, tight as K grows. One weight per datum
    and particle, (K, B), never one for the whole batch; the scale of a subsampled plate (N/B) or of `poutine.scale` stands
    outside of the logarithm.

    What the guide learns from depends on `gradient`. With v_k the normalised weights:

    - ``"standard"``: autograd of the bound, ``sum_k v_k d log w_k``. Its signal-to-noise ratio falls like 1/sqrt(K)
      (Rainforth et al., 2018, https://arxiv.org/abs/1802.04537). Draws that are not reparameterised get their
      score-function term, with the bound of the other particles as baseline (Mnih and Rezende, 2016,
      https://arxiv.org/abs/1602.06725).
    - ``"dreg"``: ``sum_k v_k^2 d log w_k`` along the draws, doubly reparameterised (Tucker et al., 2019,
      https://arxiv.org/abs/1810.04152). The same mean, less noise, and no loss of signal as K grows. With a beta, v_k^2 is
      ``v_k (1 - beta + beta v_k)``.
    - ``"stl"``: ``sum_k v_k d log w_k`` along the draws, "sticking the landing" (Roeder, Wu and Duvenaud, 2017,
      https://arxiv.org/abs/1703.09194). Zero for every draw where the guide is the posterior. At K = 1 it has the mean of
      the others; **at K > 1 it is not the gradient of this bound**: its mean is another one.

    The model learns from ``sum_k v_k d log p(x, z_k)`` in all three.

    :param beta: a weight on the KL in the exponent of the weights, ``w_k = p(x|z_k) (p(z_k) / q(z_k|x))^beta``: a number, a
        tensor without dimensions, a schedule, or a dict of these by latent site, as in `BetaTrace_ELBO`. The bound is one on
        log p(x) at beta >= 1 only.
    :param num_particles: K.
    :param gradient: "standard", "dreg" or "stl".
    :param datum_plate: the plate of the data; found by itself where only one is common to all sites; `None` makes the
        whole call one datum, and so allows latents that all data share.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param compile: as in `BetaTrace_ELBO`.

    :ivar terms: `Terms` of the last call; their `elbo` is the ELBO, not the bound, which is ``-loss``.
    :ivar num_updates: the number handed to a schedule, as in `BetaTrace_ELBO`.
    :raises OptionError: for another gradient, and for what `BetaTrace_ELBO` refuses; for a beta by site with "dreg".
    :raises GlobalLatentError: for a latent outside of the datum plate: there is then no weight per datum.
    :raises StructureError: (or a subclass) for "dreg" and "stl" with draws that are not reparameterised; for sites that are
        scaled differently; for whatever the kernel has not checked.

    Model and guide are rehearsed at the first call with arguments of new shapes: K particles at once where that gives the
    numbers of one at a time, else by `torch.vmap` or a loop. Networks need no particle axis.

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
        # What the model draws itself cancels in a weight, but how likely it was to be drawn has a gradient.
        by_the_model = score_surrogate(log_weight, weights.log_drawn(self.prior_sites)) if self.prior_sites else 0.0
        if cuts is None:
            bound = log_mean_exp(log_weight, 0)
            if scored:
                bound = bound + score_surrogate(log_weight, total(weights.log_guide_by_site[n] for n in scored))
            return loss, -((bound + by_the_model) * scale).sum()
        share = normalised(log_weight)
        # E[v d log q] = E[v (1 - v) d log w], the second d along the draw, and log q has the weight beta.
        along = share if self.gradient == "stl" or isinstance(betas, Mapping) else share * (1 - betas + betas * share)
        model_part = ((weighed(share, log_joint).sum(0) + by_the_model) * scale).sum()
        return loss, -model_part - path_surrogate((weighed(along, log_weight) * scale).sum(), cuts)
