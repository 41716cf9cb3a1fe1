"""`simulate`: joint draws from the user's own model, nothing else touched."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, linear_gaussian, model_of

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, DatumPlateError


def test_moments_of_the_data_are_those_of_the_model():
    """C = W W' + s^2 I; 40,000 draws, 5 standard errors (6e-7 each)."""
    lm, _ = linear_gaussian(2, 4)
    num_data = 40_000
    sim = pv.simulate(model_of(lm), torch.zeros(num_data, 4, dtype=F64), seed=0)
    x = sim.observed["x"]
    assert x.shape == (num_data, 4)
    assert x.dtype == F64
    covariance = lm.weight @ lm.weight.T + lm.variance * torch.eye(4, dtype=F64)
    variances = covariance.diagonal()
    error = (variances / num_data).sqrt()
    assert error.max() < 0.03
    assert bool(((x.mean(0) - lm.bias).abs() < 5 * error).all())
    centred = x - lm.bias
    error = ((covariance.square() + torch.outer(variances, variances)) / num_data).sqrt()
    assert bool(((centred.T @ centred / num_data - covariance).abs() < 5 * error).all())


def test_latents_are_exact_draws_from_the_posterior():
    """Whitened by the exact posterior of their own data they are standard normal; 5 standard errors."""
    lm, _ = linear_gaussian(2, 4)
    num_data = 20_000
    sim = pv.simulate(model_of(lm), torch.zeros(num_data, 4, dtype=F64), seed=0)
    posterior = lm.posterior(sim.observed["x"])
    z = sim.latents["z"]
    assert z.shape == (num_data, 2)
    residual = torch.linalg.solve_triangular(posterior.scale_tril, (z - posterior.mean).unsqueeze(-1), upper=False)
    residual = residual.squeeze(-1)
    assert residual.mean(0).abs().max() < 5 / math.sqrt(num_data)
    second = residual.T @ residual / num_data - torch.eye(2, dtype=F64)
    assert second.abs().max() < 5 * math.sqrt(2 / num_data)
    # and the data tell about the latents at all: the prior would not do
    assert (z - posterior.mean).var(0).max() < 0.9 * z.var(0).max()


def test_every_datum_is_a_draw_of_its_own():
    lm, _ = linear_gaussian(2, 4)
    sim = pv.simulate(model_of(lm), torch.zeros(50, 4, dtype=F64), seed=0)
    assert len(sim.observed["x"].unique(dim=0)) == len(sim.latents["z"].unique(dim=0)) == 50


def test_a_conditional_model_keeps_its_inputs():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + 100 * y, 0.1), obs=x)

    y = torch.arange(5, dtype=F64)
    for sim in (
        pv.simulate(model, torch.zeros(5, dtype=F64), y, seed=0),
        pv.simulate(model, torch.zeros(5, dtype=F64), y=y, seed=0),
    ):
        assert (sim.observed["x"] - 100 * y).abs().max() < 6
        assert (sim.observed["x"] - 100 * y - sim.latents["z"]).abs().max() < 0.6


def test_only_sample_sites_are_returned():
    """No deterministic, no factor, no plate; several observed sites by name."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("nothing", 0 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y)

    sim = pv.simulate(model, torch.zeros(20, dtype=F64), torch.zeros(20, dtype=F64), seed=0)
    assert set(sim.observed) == {"x", "y"}
    assert set(sim.latents) == {"z"}
    assert set(sim.observed["y"].tolist()) == {0.0, 1.0}


def test_seed_and_random_state():
    lm, _ = linear_gaussian()
    template = torch.zeros(6, 4, dtype=F64)
    state = torch.get_rng_state()
    first, again, other = (pv.simulate(model_of(lm), template, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.observed["x"], again.observed["x"])
    assert not torch.equal(first.observed["x"], other.observed["x"])
    pyro.set_rng_seed(0)
    free, next_one = (pv.simulate(model_of(lm), template).observed["x"] for _ in range(2))
    assert not torch.equal(free, next_one)
    pyro.set_rng_seed(0)
    assert torch.equal(pv.simulate(model_of(lm), template).observed["x"], free)


def test_nothing_is_left_behind():
    layer = torch.nn.Linear(2, 4)
    layer.train()

    def model(x):
        pyro.module("decoder", layer)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(layer(z), scale).to_event(1), obs=x)

    template = torch.full((6, 4), 7.0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    sim = pv.simulate(model, template, seed=0)
    assert len(pyro.get_param_store()) == 0
    assert bool((template == 7).all())
    assert layer.training
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert not sim.observed["x"].requires_grad


def test_values_of_the_store_are_used():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 0.1))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    pyro.param("loc", torch.tensor(50.0))
    sim = pv.simulate(model, torch.zeros(10), seed=0)
    assert (sim.observed["x"] - 50).abs().max() < 2
    assert float(pyro.param("loc").detach()) == 50


def test_discrete_latents_are_drawn_also_where_marked_for_enumeration():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(10.0 * c, 0.1), obs=x)

    sim = pv.simulate(model, torch.zeros(5000), seed=0)
    assert sim.latents["c"].shape == (5000,)
    assert abs(float(sim.latents["c"].double().mean()) - 0.8) < 5 * math.sqrt(0.16 / 5000)
    assert (sim.observed["x"] - 10 * sim.latents["c"]).abs().max() < 1


@pytest.mark.parametrize("event", [True, False])
def test_an_unsized_plate_draws_one_latent_per_datum(event):
    """Pyro itself would draw one for the whole batch."""

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(1 if event else ()), 1.0).to_event(int(event)))
            pyro.sample("x", dist.Normal(z, 0.01).to_event(int(event)), obs=x)

    sim = pv.simulate(model, torch.zeros((9, 1) if event else 9), seed=0)
    x, z = sim.observed["x"].flatten(), sim.latents["z"].flatten()
    assert len(x) == len(z) == len(z.unique()) == 9
    assert (x - z).abs().max() < 0.1


def test_nested_plates():
    def model(x):
        pixels = pyro.plate("pixels", 3, dim=-2)
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pixels:
                pyro.sample("x", dist.Normal(z, 0.01), obs=x)

    sim = pv.simulate(model, torch.zeros(3, 8), seed=0)
    assert sim.latents["z"].shape == (8,)
    assert sim.observed["x"].shape == (3, 8)
    assert (sim.observed["x"] - sim.latents["z"]).abs().max() < 0.1


def test_a_template_outside_the_support_does_no_harm():
    """Only its shape counts."""

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(torch.tensor(1.0), 1.0))
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    sim = pv.simulate(model, torch.full((50,), 0.3), seed=0)
    assert set(sim.observed["x"].tolist()) == {0.0, 1.0}


def test_errors_are_named():
    lm, _ = linear_gaussian()
    with pytest.raises(ArgumentError, match=r"the model takes \(x\) but was called with 2 positional"):
        pv.simulate(model_of(lm), torch.zeros(3, 4), 1)

    def two_plates(x):
        with pyro.plate("a", len(x), dim=-1), pyro.plate("b", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))

    with pytest.raises(DatumPlateError, match="say which one holds the data"):
        pv.simulate(two_plates, torch.zeros(3))
    assert pv.simulate(two_plates, torch.zeros(3), datum_plate="a").latents["z"].shape == (2, 3)


@pytest.mark.parametrize("likelihood", ["Cauchy", "Categorical"])
def test_a_likelihood_without_a_mean_has_none(likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            fn = dist.Cauchy(z, 1.0) if likelihood == "Cauchy" else dist.Categorical(logits=torch.stack([z, -z], -1))
            pyro.sample("x", fn, obs=x)

    sim = pv.simulate(model, torch.zeros(5), seed=0)
    assert sim.observed["x"].shape == (5,) and sim.means == {}


def test_reconstructions_draw_what_the_guide_enumerates():
    """Two components at -5 and 5: each mean is that of the one drawn, in the shape of the data."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(10 * c - 5, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=100 * x), infer={"enumerate": "parallel"})

    x = torch.tensor([-4.0, 6.0, 5.0])
    assert pv.reconstruct(model, guide, x, seed=0).means["x"].tolist() == [-5.0, 5.0, 5.0]
