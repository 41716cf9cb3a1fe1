"""What the programs sample, where, and with which densities."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from torch import nn
from vae_helpers import small_data, small_vae, svi_of

import pyro_vae as pv
from pyro_vae.models import Concatenated, ConditionalVAE
from pyro_vae.nn import Normal, StandardNormal


def conditional_vae(prior=None):
    """y of 3 numbers."""
    encoder = Concatenated(nn.Sequential(nn.Linear(6 + 3, 4), Normal()))
    decoder = Concatenated(nn.Sequential(nn.Linear(2 + 3, 6), Normal(0.5)))
    return ConditionalVAE(encoder, decoder, prior or StandardNormal(2))


def traces(vae, *args):
    guide = poutine.trace(vae.guide).get_trace(*args)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(*args)
    model.compute_log_prob()
    guide.compute_log_prob()
    return model, guide


def test_sites_and_plate_are_those_of_pyros_tutorial():
    vae, x = small_vae(), small_data()
    model, guide = traces(vae, x)
    assert [n for n, s in model.nodes.items() if s["type"] == "sample"] == ["data", "latent", "obs"]
    assert [n for n, s in guide.nodes.items() if s["type"] == "sample"] == ["data", "latent"]
    for trace in (model, guide):
        site = trace.nodes["latent"]
        assert [(f.name, f.size) for f in site["cond_indep_stack"]] == [("data", 10)]
        assert site["scale"] == 1.0 and site["fn"].event_shape == (2,)
    z = guide.nodes["latent"]["value"]
    torch.testing.assert_close(guide.nodes["latent"]["log_prob"], vae.encode(x).log_prob(z))
    torch.testing.assert_close(model.nodes["latent"]["log_prob"], vae.prior().log_prob(z))
    torch.testing.assert_close(model.nodes["obs"]["log_prob"], vae.decode(z).log_prob(x))


def test_the_conditional_programs_pass_y_to_encoder_and_decoder():
    vae, x, y = conditional_vae(), small_data(), torch.randn(10, 3)
    model, guide = traces(vae, x, y)
    z = guide.nodes["latent"]["value"]
    torch.testing.assert_close(guide.nodes["latent"]["log_prob"], vae.encode(x, y).log_prob(z))
    torch.testing.assert_close(model.nodes["latent"]["log_prob"], vae.prior().log_prob(z))
    torch.testing.assert_close(model.nodes["obs"]["log_prob"], vae.decode(z, y).log_prob(x))
    assert not torch.equal(model.nodes["obs"]["log_prob"], vae.decode(z, -y).log_prob(x))


class Unconditional(StandardNormal):
    """The kind of prior that is called without an argument, by inheritance."""


def test_a_prior_that_takes_an_argument_is_given_y():
    x, y = small_data(), torch.randn(10, 3)
    vae = conditional_vae(prior=nn.Sequential(nn.Linear(3, 4), Normal()))
    model, guide = traces(vae, x, y)
    z = guide.nodes["latent"]["value"]
    torch.testing.assert_close(model.nodes["latent"]["log_prob"], vae.prior(y).log_prob(z))
    before = vae.prior[0].weight.clone()
    svi_of(vae).step(x, y)
    assert not torch.equal(vae.prior[0].weight, before)
    vae.prior = Unconditional(2)  # the rule holds for the prior of the moment
    model, guide = traces(vae, x, y)
    z = guide.nodes["latent"]["value"]
    torch.testing.assert_close(model.nodes["latent"]["log_prob"], StandardNormal(2)().log_prob(z))


@pytest.mark.parametrize("kind", ["VAE", "ConditionalVAE"])
def test_particles_stand_left_of_the_data(kind):
    args = (small_data(), torch.randn(10, 3))[: 1 if kind == "VAE" else 2]
    vae = small_vae() if kind == "VAE" else conditional_vae(nn.Sequential(nn.Linear(3, 4), Normal()))
    looped, vectorized = [], []
    with torch.no_grad():
        for losses, option in ((looped, False), (vectorized, True)):
            elbo = Trace_ELBO(num_particles=50, vectorize_particles=option, max_plate_nesting=1)
            losses += [elbo.loss(vae.model, vae.guide, *args) / 10 for _ in range(20)]
    looped, vectorized = torch.tensor(looped), torch.tensor(vectorized)
    error = ((looped.var() + vectorized.var()) / 20).sqrt()
    assert error < 0.2  # means of 1000 particles agree within 4.5 standard errors: false alarms 7e-6 of runs
    assert (looped.mean() - vectorized.mean()).abs() < 4.5 * error


def test_the_kernel_runs_the_conditional_pair_on_a_leading_axis():
    vae = conditional_vae(nn.Sequential(nn.Linear(3, 4), Normal()))
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=30, seed=0)
    estimator(small_data(), torch.randn(10, 3))
    assert [known[-2:] for known in estimator._pair._known.values()] == [("leading", "leading")]
    assert not pyro.get_param_store()


def test_pyros_predictive_and_simulate_take_them():
    vae, x = small_vae(), small_data()
    draws = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=4)(x)
    assert draws["latent"].shape == (4, 10, 2) and draws["obs"].shape == (4, 10, 6)
    assert pv.simulate(vae.model, x, seed=0).observed["obs"].shape == (10, 6)
    assert pv.reconstruct(vae.model, vae.guide, x, seed=0).means["obs"].shape == (10, 6)
