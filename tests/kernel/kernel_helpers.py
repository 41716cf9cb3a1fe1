"""What the kernel tests share: one way to weigh a pair, and linear-Gaussian pairs whose guide is exact."""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.exact import LinearGaussian
from pyro_vae.kernel import LogDensities, Pair

F64 = torch.float64


def tensor(values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def randn(*shape):
    return torch.randn(*shape, dtype=F64)


@dataclass
class Weighed:
    """What one call of a pair gave; `values` are the drawn latents."""

    lw: LogDensities
    values: dict[str, torch.Tensor]
    guide: Any
    model: Any
    structure: Any
    index: torch.Tensor | None
    executions: tuple[str, str]

    @property
    def log_weight(self):
        return self.lw.log_weight

    @property
    def elbo(self):
        return self.lw.elbo


def weigh(model, guide, *args, K=4, seed=0, kwargs=None, pair=None, **options):
    """Draw K particles, score them, weigh them; everything lazy is computed inside the call."""
    pair = Pair(model, guide, **options) if pair is None else pair
    with torch.no_grad(), pair.open(args, kwargs or {}, seed) as call:
        call.set_noise(1, 0)
        drawn = call.draw(K)
        values = call.latent_values(drawn)
        scored = call.score(values, K)
        lw = call.weigh(drawn, scored, K)
        assert lw.log_weight.shape == lw.elbo.shape == (K, call.batch_size)
        _ = lw.log_likelihood, lw.log_prior, lw.log_guide
        executions = call.guide.execution, call.model.execution
        return Weighed(lw, values, drawn, scored, call.structure, call.index, executions)


def assert_weights(result, log_evidence, atol=1e-10):
    """Every particle gives the same weight: that is what an exact guide does."""
    expected = log_evidence.expand(result.log_weight.shape)
    assert torch.allclose(result.log_weight, expected, rtol=0, atol=atol), (result.log_weight - expected).abs().max()
    assert torch.allclose(result.elbo, expected, rtol=0, atol=atol)


def assert_close(a, b, atol=1e-10):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype
    assert torch.allclose(a, b, rtol=0, atol=atol), (a - b).abs().max()


def linear_gaussian(num_data=5, latent_dim=2, data_dim=3, dtype=F64):
    lm = LinearGaussian(
        torch.randn(data_dim, latent_dim, dtype=dtype),
        torch.randn(data_dim, dtype=dtype),
        torch.tensor(0.4, dtype=dtype),
    )
    x = 2 * torch.randn(num_data, data_dim, dtype=dtype)
    return lm, x


def likelihood(lm, z):
    return dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1)


def standard_normal(lm):
    zero = lm.bias.new_zeros(lm.weight.shape[1])
    return dist.Normal(zero, torch.ones_like(zero)).to_event(1)


def posterior(lm, x):
    p = lm.posterior(x)
    return dist.MultivariateNormal(p.loc, scale_tril=p.scale_tril)


def exact_pair(lm):
    """A model and its exact posterior as the guide, as plain functions of x (B, X)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(lm, x))

    return model, guide


def normal(value, loc, scale):
    """Elementwise log-density, by the formula."""
    loc, scale = torch.as_tensor(loc, dtype=value.dtype), torch.as_tensor(scale, dtype=value.dtype)
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=value.dtype))
