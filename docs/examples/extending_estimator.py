"""Draws of guide and prior, with the guide's density as a control variate."""

import math
from dataclasses import dataclass, replace

import torch

from pyro_vae.errors import StructureError
from pyro_vae.evidence import Estimator, summarise
from pyro_vae.noise import Noise
from pyro_vae.options import real_number, whole_number


@dataclass(repr=False, eq=False, kw_only=True)
class MixtureSampling(Estimator):
    """log p(x) ~ log 1/K sum_k [w_k - s c_k] with weights w and a control variate c::

        w = p(x, z) / r(z)    c = q(z|x) / r(z) - 1    r = (1 - a) q(z|x) + a p(z)

    The share a of the prior bounds the weights by max p(x|z) / a. The mean of c is 0,
    so any s will do. Least squares leaves no noise where the guide is the posterior
    (Owen and Zhou, 2000, https://doi.org/10.1080/01621459.2000.10473909).
    """

    num_particles: int = 1000
    share: float = 0.1

    def check_options(self):
        self.num_particles = whole_number("num_particles", self.num_particles, lowest=2)
        self.share = real_number("share", self.share, highest=1.0, ends="()")

    def estimate(self, call):
        num = self.num_particles
        num_prior = min(math.ceil(self.share * num), num - 1)
        num_guide, share = num - num_prior, num_prior / num
        call.set_noise(Noise.GUIDE, 0)
        guide = call.draw(num_guide)
        scored = call.score(call.latent_values(guide), num_guide)
        weights = call.weigh(guide, scored, num_guide)
        latents = call.structure.latents
        masked = any(weights.joint_mask(name) is not None for name in latents)
        if masked or set(call.structure.guide_sites) != set(latents):
            what = "log q is not known at draws of the prior"
            raise StructureError(f"{what}: let the guide sample the latents, unmasked")
        call.set_noise(Noise.PROPOSAL, 0)
        values, model = call.draw_prior(num_prior)
        # (the log q of this one is not read)
        of_prior = call.weigh(call.first_particle(guide), model, num_prior)
        log_joint = torch.cat([weights.log_joint, of_prior.log_joint])
        log_prior = torch.cat([weights.log_marginal_prior, of_prior.log_marginal_prior])
        own = call.log_guide(call.latent_values(guide), num_guide, weights.model)
        log_guide = torch.cat([own, call.log_guide(values, num_prior, model)])
        log_mixture = torch.logaddexp(
            log_guide + math.log1p(-share),
            log_prior + math.log(share),
        )
        log_weight, control = log_joint - log_mixture, (log_guide - log_mixture).expm1()
        call.check_finite(log_weight)
        method = "draws of guide and prior"
        evidence = summarise(call, log_weight, weights.elbo, call.cost, method)
        top = log_weight.amax(0)
        weight, centred = (log_weight - top).exp(), control - control.mean(0)
        tiny = torch.finfo(weight.dtype).tiny
        slope = (centred * weight).sum(0) / centred.square().sum(0).clamp(min=tiny)
        corrected = weight - slope * control
        mean, std_error = corrected.mean(0), corrected.std(0) / num**0.5
        return replace(
            evidence,
            log_evidence=top + mean.log(),
            std_error=std_error / mean,
            bound="consistent",
        )
