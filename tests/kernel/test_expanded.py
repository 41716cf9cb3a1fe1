"""``config_enumerate(expand=True)``: enumerated values lie over all plates, so that `torch.cat` takes them (scANVI)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, quiet
from pyro.infer import config_enumerate

import pyro_vae as pv
from pyro_vae.kernel import Pair
from pyro_vae.noise import Noise

X = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(1))


def cat(z, y):
    return torch.cat([z, y], -1)


def broadcast_cat(z, y):
    shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
    return cat(z.expand(*shape, -1), y.expand(*shape, -1))


def model_of(join):
    """z2 ~ N(W [z1, y], 1), x ~ N(z2, .5): given the class, x is Gaussian."""

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(3)))
            z2 = pyro.sample("z2", dist.Normal(join(z1, y) @ WEIGHT.T, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z2, 0.5).to_event(1), obs=x)

    return model


def guide_of(expand):
    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.8 * x, 0.5).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), 3)))
            pyro.sample("z1", dist.Normal(0.3 * broadcast_cat(z2, y)[..., :2] + 0.1 * y[..., :1], 0.9).to_event(1))

    return config_enumerate(guide, "parallel", expand=expand)


def truth():
    covariance = WEIGHT[:, :2] @ WEIGHT[:, :2].T + 1.25 * torch.eye(2, dtype=F64)
    by_class = [dist.MultivariateNormal(WEIGHT[:, 2 + k], covariance).log_prob(X) for k in range(3)]
    return torch.stack(by_class).logsumexp(0) - math.log(3)


@pytest.mark.parametrize("estimator", [pv.ImportanceSampling, pv.AdaptiveImportanceSampling, pv.InferenceGaps])
def test_a_program_that_concatenates_a_latent_and_a_class(estimator):
    with quiet():
        found = estimator(model_of(cat), guide_of(True), num_particles=2000, seed=0)(X)
        same = estimator(model_of(broadcast_cat), guide_of(False), num_particles=2000, seed=0)(X)
    error = found.std_error if isinstance(found, pv.Evidence) else found.std_errors["log_evidence"]
    assert error.max() < 0.06
    assert ((found.log_evidence - truth()).abs() < 5 * error).all()
    assert torch.allclose(found.log_evidence, same.log_evidence, atol=1e-9)  # the same draws
    assert torch.allclose(found.elbo, same.elbo, atol=1e-9)


def test_it_runs_with_a_particle_axis():
    with torch.no_grad(), Pair(model_of(cat), guide_of(True)).open((X,), {}, seed=0) as call:
        assert (call.guide.execution, call.model.execution) == ("leading", "leading")
        call.set_noise(Noise.GUIDE, 0)
        assert call.draw(7)["y"].value.shape == (3, 7, 4, 3)


@pytest.mark.parametrize("where", ["guide", "model"])
def test_two_classes_are_summed_as_without_expand(where):
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=F64)

    def classes(x):
        a = pyro.sample("a", dist.Categorical(probs))
        b = pyro.sample("b", dist.Bernoulli((0.2 + 0.2 * a.to(x.dtype)).expand(a.shape)))
        return a.to(x.dtype) + 2 * b

    def model(x):
        with pyro.plate("data", len(x)):
            mean = classes(x)
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            if where == "guide":
                classes(x)
            pyro.sample("z", dist.Normal(0.8 * x + 0.2, 0.6))

    def weights(expand):
        pair = [config_enumerate(p, "parallel", expand=expand) for p in (model, guide)]
        with quiet():
            return pv.ImportanceSampling(*pair, num_particles=500, check=False, seed=0)(X[:, 0])

    expanded, plain = weights(True), weights(False)
    assert torch.allclose(expanded.log_evidence, plain.log_evidence, atol=1e-10)
    assert torch.allclose(expanded.elbo, plain.elbo, atol=1e-10)
    exact = torch.stack([
        p.log() + dist.Bernoulli(0.2 + 0.2 * a).log_prob(b) + dist.Normal(a + 2 * b, 1.25**0.5).log_prob(X[:, 0])
        for a, p in zip(torch.arange(3, dtype=F64), probs, strict=True)
        for b in torch.arange(2, dtype=F64)
    ]).logsumexp(0)  # fmt: skip
    assert expanded.std_error.max() < 0.1
    assert ((expanded.log_evidence - exact).abs() < 5 * expanded.std_error).all()
