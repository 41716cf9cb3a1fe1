"""Reweighted wake-sleep: KL(p to q) for the guide, the importance-weighted bound for the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..errors import AuxiliarySiteError, OptionError, StructureError, quoted
from ..kernel import INFER, Call, Cut, LogDensities, Record
from ..ops import log_mean_exp
from ..options import check_function, real_number
from .datum_elbo import DatumELBO
from .gradients import normalised, weighed

Arguments = Callable[[Mapping[str, Tensor]], tuple]


class InclusiveKL(DatumELBO):
    r"""Train the guide by KL(p to q), so that it covers the posterior, and the model by the importance-weighted bound::

        loss = sum over data of  -log p(x) + KL(p(z|x) || q(z|x))                                     (nats)
        gradient of the guide    -sum_k v_k d log q(z_k|x)
        gradient of the model    -sum_k v_k d log p(x, z_k)
        v_k = w_k / sum_l w_l,   w_k = p(x, z_k) / r(z_k|x),   z_k ~ r(z|x),   k = 1, ..., K

    log p(x) is estimated by ``log 1/K sum_k w_k``, and the KL by ``sum_k v_k log p(x, z_k) / q(z_k|x)`` minus that. This is
    reweighted wake-sleep (Bornschein and Bengio, 2015, https://arxiv.org/abs/1406.2751; Le et al., 2019,
    https://arxiv.org/abs/1805.10469). The guide learns from the KL only, the model from log p(x) only.

    With the ELBO's KL(q to p) a guide often fits one mode of a posterior; with KL(p to q) it covers all modes that r finds.
    The weights are normalised for each datum, (K, B), where Pyro's `ReweightedWakeSleep` has one weight for the whole batch.
    There is no derivative through a draw, so latents may be discrete. Normalised weights are biased by O(1/K). A mode that
    the proposal misses is missed here too.

    **Sleep.** For data simulated from the model, the simulated latents are exact draws of the posterior. With ``sleep=s``
    the guide learns from ``(1 - s) KL(p to q) + s E[-log q(z|x)]``. The second term uses as many simulated data as the call
    has. ``sleep=1`` is the wake-sleep algorithm (Hinton et al., 1995, https://doi.org/10.1126/science.7761831).

    :param num_particles: K, particles per datum.
    :param proposal: r, another guide, called with the same arguments; it is not trained here. By default the guide.
    :param sleep: s, between 0 and 1.
    :param sleep_args: function from simulated observations by site to the positional arguments of model and guide. Not
        needed where the model observes one site whose value is one of the arguments.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes the
        whole call one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param compile: as in `BetaTrace_ELBO`.

    :ivar terms: `Terms` of the last call, from draws of the guide.
    :raises OptionError: for `sleep` out of range, or if it is not known which argument holds the data.
    :raises AuxiliarySiteError: for an autoguide with `proposal` or `sleep`: it cannot give log q at latents that it did not
        draw.
    :raises StructureError: (or a subclass) for programs that define no importance weight per datum, as in
        `ImportanceWeightedELBO`.

    Example::

        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pv.InclusiveKL(num_particles=100))
        svi.step(x)
    """

    def __init__(
        self,
        *,
        num_particles: int = 100,
        proposal: Callable | None = None,
        sleep: float = 0.0,
        sleep_args: Arguments | None = None,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        sleep = real_number("sleep", sleep, highest=1.0)
        if proposal is not None:
            check_function("proposal", proposal, "a guide, or None")
        if sleep_args is not None:
            check_function("sleep_args", sleep_args, "a function that gives the model's arguments, or None")
        super().__init__(num_particles=num_particles, datum_plate=datum_plate, prior_sites=prior_sites, compile=compile)
        self.proposal, self.sleep, self.sleep_args = proposal, sleep, sleep_args

    def _loss_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        call = self._call(model, guide, args, kwargs)
        if self.proposal is None:
            weights, scale = self._weigh(call, fixed_draws(call, self.num_particles), scores_draws=True)
            log_guide = weights.log_guide
        else:
            weights, log_guide, scale = self._weigh_proposal(call, model, args, kwargs)
        log_weight = weights.log_joint.detach() - weights.log_guide.detach()
        share = normalised(log_weight)
        bound = log_mean_exp(log_weight, 0)
        wake = weighed(share, log_guide).sum(0)
        cross = weighed(share, weights.log_joint.detach()).sum(0) - bound
        # The log-density of a site drawn from the prior cancels in the weight, but not in the gradient.
        log_model = weights.log_joint + weights.log_drawn(self.prior_sites)
        loss, surrogate = -bound * scale, -weighed(share, log_model).sum(0) * scale
        if self.sleep < 1:
            loss = loss + (1 - self.sleep) * (cross - wake.detach()) * scale
            surrogate = surrogate - (1 - self.sleep) * wake * scale
        if self.sleep:
            asleep = self._sleep_loss(call, weights, model, guide, args, kwargs) * scale
            loss, surrogate = loss + self.sleep * asleep.detach(), surrogate + self.sleep * asleep
        return loss.sum(), surrogate.sum()

    def _weigh_proposal(
        self, call: Call, model: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[LogDensities, Tensor, float | Tensor]:
        """Weights of draws of the proposal, log q at them, and the scale; `terms` are from one draw of the guide."""
        assert self.proposal is not None
        check_has_density(call, "proposal")
        with torch.no_grad():
            self._weigh(call, call.draw(1), 1)
            own_draws = self._pass
        proposal = self._call(model, self.proposal, args, kwargs, role="proposal", indices=call.guide.indices)
        with torch.no_grad(), poutine.block(hide_types=["param"]):  # SVI would train every parameter that it sees
            drawn = proposal.draw(self.num_particles)
        weights, scale = self._weigh(proposal, drawn, scores_draws=True)
        self._pass, self._num_drawn = own_draws, 1
        return weights, call.log_guide(proposal.latent_values(drawn), self.num_particles, weights.model), scale

    def _sleep_loss(
        self, call: Call, awake: LogDensities, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """-log q(z|x) of data and latents drawn from the model, (B,)."""
        check_has_density(call, "sleep")
        factors = [n for n in awake.log_likelihood_by_site if n not in awake.observations]
        if factors:
            raise StructureError(
                f"sleep= simulates data from the model, but its factors {quoted(factors)} cannot be simulated: the latents "
                "would be no draws of their posterior. Use sleep=0, or write the factor as a sampled site"
            )
        with torch.no_grad():
            sites = call.simulate()
        observed = {name: site.value for name, site in sites.items() if site.is_observed and site.value.numel()}
        if self.sleep_args is not None:
            simulated = self.sleep_args(observed)
            if not isinstance(simulated, tuple):
                raise OptionError(
                    "sleep_args must return the positional arguments of model and guide as a tuple, got "
                    f"{type(simulated).__name__}: e.g. sleep_args=lambda observed: (observed['obs'],)"
                )
        else:
            simulated = replaced_data(awake.observations, observed, args)
        dreaming = self._call(model, guide, simulated, kwargs, indices=call.guide.indices)
        return -dreaming.log_guide({n: sites[n].value for n in call.structure.latents}, 1, sites)[0]


def fixed_draws(call: Call, num_particles: int) -> Record:
    """Draws of the guide without a gradient; log q at them keeps its gradient."""
    cuts: list[list[Cut]] = []
    drawn = call.draw(num_particles, cuts=cuts)
    for _, leaf in (cut for chain in cuts for cut in chain):
        leaf.requires_grad_(False)
    return drawn


def check_has_density(call: Call, option: str) -> None:
    """Raise for autoguides, which give log q at their own draws only."""
    hidden = [n for n in call.structure.guide_sites if n not in call.structure.latents]
    if hidden:
        raise AuxiliarySiteError(
            f"{option}= needs log q at latents that the guide did not draw, but the guide has the sites "
            f"{quoted(hidden)} besides the latents: use a guide that samples the latents directly"
        )


def replaced_data(data: Mapping[str, Tensor], simulated: Mapping[str, Tensor], args: tuple) -> tuple:
    """The arguments with the data replaced, where exactly one of them is the observed value."""
    places = [i for i, arg in enumerate(args) if len(data) == 1 and arg is next(iter(data.values()))]
    if len(places) != 1:
        raise OptionError(
            f"sleep= gives the guide simulated data, but what the model observes ({quoted(data)}) is not one of its "
            f"{len(args)} positional arguments unchanged: pass sleep_args=, a function from simulated observations by "
            "site to these arguments, e.g. sleep_args=lambda observed: (observed['obs'],)"
        )
    (value,) = simulated.values()
    return tuple(value if i == places[0] else arg for i, arg in enumerate(args))
