"""Guides of a linear-Gaussian model that are wrong by known amounts, and the symmetric gap of each."""

import pyro.distributions as dist
import torch
from pair_helpers import F64, guide_of, linear_gaussian, model_of, posterior_moments

import pyro_vae as pv


def spoiled_pair(latent_dim=2, factor=1.0, shift=0.0, seed=0):
    """The exact posterior, its spread times `factor`, its mean moved by `shift` of its own standard deviations."""
    lm, _ = linear_gaussian(latent_dim, latent_dim + 2, seed=seed)
    moments = posterior_moments(lm)

    def family(x):
        loc, root = moments(x)
        return dist.MultivariateNormal(loc + shift * root.square().sum(-1).sqrt(), scale_tril=factor * root)

    return model_of(lm), guide_of(family), lm


def symmetric_gap(lm, factor, shift):
    """KL(p to q) + KL(q to p) of N(m, S) and N(m + s, f^2 S): D ((f^2 + f^-2) / 2 - 1) + s' S^-1 s (1 + f^-2) / 2."""
    root = posterior_moments(lm)(lm.bias)[1]
    moved = shift * root.square().sum(-1).sqrt()
    distance = float(torch.linalg.solve_triangular(root, moved.unsqueeze(-1), upper=False).square().sum())
    squares = factor**2 + factor**-2
    return len(root) * (squares / 2 - 1) + distance * (1 + factor**-2) / 2


def calibrated(num_data, seed, latent_dim=2, factor=1.0, shift=0.0, num_calls=1, **options):
    """The record of `num_calls` calls of `num_data` each: the structure is looked at once, and arrays stay in the cache."""
    model, guide, lm = spoiled_pair(latent_dim, factor, shift)
    template = torch.zeros(num_data, latent_dim + 2, dtype=F64)
    estimator = pv.GuideCalibration(model, guide, seed=seed, **options)
    if num_calls == 1:
        return estimator(template), lm
    return pv.evaluate(estimator, [template] * num_calls, progress=False), lm
