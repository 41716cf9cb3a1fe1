"""An estimator of one's own: draws of guide and prior, with the guide's density as a control variate."""

import math
from dataclasses import replace

import torch

from pyro_vae.errors import StructureError
from pyro_vae.evidence import summarise
from pyro_vae.kernel import GUIDE, PROPOSAL, Pair
from pyro_vae.records import warn_about


class MixtureSampling:
    """log p(x) ~ log 1/K sum_k [w_k - s c_k], w = p(x, z) / r(z), c = q(z|x) / r(z) - 1, r = (1 - a) q(z|x) + a p(z).

    The share a of the prior bounds the weights by max p(x|z) / a. The mean of c is 0, so that any s will do; the one of
    least squares leaves no noise where the guide is the posterior (Owen and Zhou, 2000,
    https://doi.org/10.1080/01621459.2000.10473909).
    """

    def __init__(self, model, guide, *, num_particles=1000, share=0.1, seed=None):
        self.num_particles, self.num_prior, self.seed = num_particles, math.ceil(share * num_particles), seed
        self._pair = Pair(model, guide)

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        num_guide, share = self.num_particles - self.num_prior, self.num_prior / self.num_particles
        with self._pair.open(args, kwargs, self.seed) as call:
            call.set_noise(GUIDE, 0)
            guide = call.draw(num_guide)
            weights = call.weigh(guide, call.score(call.latent_values(guide), num_guide), num_guide)
            latents = call.structure.latents
            if set(call.structure.guide_sites) != set(latents) or any(weights.joint_mask(n) is not None for n in latents):
                raise StructureError("log q is not known at draws of the prior: let the guide sample the latents, unmasked")
            call.set_noise(PROPOSAL, 0)
            values, model = call.draw_prior(self.num_prior)
            of_prior = call.weigh(call.first_particle(guide), model, self.num_prior)  # whose log q is not read
            log_joint = torch.cat([weights.log_joint, of_prior.log_joint])
            log_prior = torch.cat([weights.log_marginal_prior, of_prior.log_marginal_prior])
            log_guide = torch.cat([weights.log_joint - weights.log_weight, call.log_guide(values, self.num_prior, model)])
            log_mixture = torch.logaddexp(log_guide + math.log1p(-share), log_prior + math.log(share))
            log_weight, control = log_joint - log_mixture, (log_guide - log_mixture).expm1()
            call.check_finite(log_weight)
            evidence = summarise(call, log_weight, weights.elbo, call.cost, "draws of guide and prior")
        top = log_weight.amax(0)
        weight, centred = (log_weight - top).exp(), control - control.mean(0)
        slope = (centred * weight).sum(0) / centred.square().sum(0).clamp(min=torch.finfo(weight.dtype).tiny)
        corrected = weight - slope * control
        mean, std_error = corrected.mean(0), corrected.std(0) / self.num_particles**0.5
        evidence = replace(evidence, log_evidence=top + mean.log(), std_error=std_error / mean, bound="consistent")
        warn_about(evidence, stacklevel=3)
        return evidence
