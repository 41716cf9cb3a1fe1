"""Pairs with a fault that is known in closed form, and a diagnosis of few data and particles."""

from functools import partial
from importlib import import_module
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from pair_helpers import F64, diagonal_family, exact_family, guide_of, linear_gaussian, model_of

import pyro_vae as pv
from pyro_vae.exact import LinearGaussian

FEW = {"num_data": 60, "num_particles": 100, "progress": False}


def in_batches(x, size=20):
    return list(x.split(size))


def linear_pair(fault, num_data=120, data_dim=4):
    """Model, guide and data of a linear-Gaussian model: the guide is exact, shifted, or the best diagonal one.

    The two columns of the weight are nearly alike, so that the posterior is strongly correlated.
    """
    lm, x = linear_gaussian(latent_dim=2, data_dim=data_dim, num_data=num_data, variance=0.3)
    lm = LinearGaussian(lm.weight[:, :1] + torch.tensor([0.0, 0.4], dtype=F64), lm.bias, lm.variance)
    families = {"none": exact_family(lm), "family": diagonal_family(lm), "encoder": diagonal_family(lm, mean_shift=0.3)}
    return lm, model_of(lm), guide_of(families[fault]), x


def collapsed_pair():
    """A decoder that ignores z, and a guide that is the prior."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(4), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    return model, guide, torch.randn(120, 4, dtype=F64)


def diagnose(model, guide, num_steps=20, **options):
    """`pv.diagnose` with chains of a tenth of the steps in its self-check, for tests that hold nothing of their bounds."""
    short = partial(pv.SelfCheck, num_steps=num_steps)
    with patch.object(import_module("pyro_vae.report.diagnose"), "SelfCheck", short):
        return pv.diagnose(model, guide, **options)


def diagnosed(model, guide, x, **options):
    """Half of the data as training data, half as test data."""
    half = len(x) // 2
    options = {**FEW, **options}
    return diagnose(model, guide, train=in_batches(x[:half]), test=in_batches(x[half:]), **options)
