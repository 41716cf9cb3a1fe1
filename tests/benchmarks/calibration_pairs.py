"""Pairs of model and guide whose log p(x) is known, for `evidence_calibration.py`.

Linear-Gaussian models have correlated posteriors and closed forms. Others observe what no latent touches: their posterior is
the prior, which can be any density, and log p(x) is known. Flows are trained by the ELBO.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.exact import LinearGaussian

NARROW, WIDE = "narrower than the posterior", "wider than the posterior"
BLIND = "one of two modes"  # which no check of this kind can see


@dataclass
class Case:
    family: str
    name: str
    model: Callable
    guide: Callable
    x: Tensor
    truth: Tensor


def linear_gaussian(dim: int, num_data: int) -> tuple[LinearGaussian, Callable, Tensor]:
    weight = torch.randn(2 * dim, dim) * (1.0 if dim <= 10 else 0.5)
    lm = LinearGaussian(weight, torch.randn(2 * dim), torch.tensor(0.5 * dim))
    noise = lm.variance.sqrt() * torch.randn(num_data, 2 * dim)
    x = torch.randn(num_data, dim) @ weight.T + lm.bias + noise

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x)

    return lm, model, x


def gaussian_guide(dim: int, factor: float, num_data: int, *, diagonal: bool) -> Case:
    """The posterior's mean, with the conditional standard deviations times a factor, or its covariance times its square."""
    lm, model, x = linear_gaussian(dim, num_data)
    precision = torch.eye(dim) + lm.weight.T @ lm.weight / lm.variance
    covariance = torch.linalg.inv(precision)
    gain, root = covariance @ lm.weight.T / lm.variance, torch.linalg.cholesky(covariance)
    conditional = precision.diagonal().rsqrt()

    def guide(x: Tensor) -> None:
        loc = (x - lm.bias) @ gain.T
        narrow = dist.Normal(loc, factor * conditional).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", narrow if diagonal else dist.MultivariateNormal(loc, scale_tril=factor * root))

    family = f"{NARROW}, D = {dim}" if diagonal or factor < 1 else f"{WIDE}, D = {dim}"
    unit = "conditional sd" if diagonal else "covariance root"
    return Case(family, f"linear-Gaussian, D = {dim}, {unit} x {factor}", model, guide, x, lm.log_evidence(x))


def posterior_is_prior(family: str, name: str, prior: Callable, draw: Callable, num_data: int) -> Case:
    x = torch.randn(num_data, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior()
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            draw()

    return Case(family, name, model, guide, x, dist.Normal(0.0, 1.0).log_prob(x).sum(-1))


def student(dim: int, df: float, factor: float, num_data: int) -> Case:
    def prior() -> None:
        pyro.sample("z", dist.StudentT(df, torch.zeros(dim), 1.0).to_event(1))

    def draw() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(dim), factor).to_event(1))

    return posterior_is_prior(f"t, {df:g} degrees", f"t{df:g}, D = {dim}, sd {factor}", prior, draw, num_data)


def funnel(dim: int, factor: float, num_data: int) -> Case:
    def prior() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(torch.zeros(dim - 1), (v / 2).exp().unsqueeze(-1)).to_event(1))

    def draw() -> None:
        pyro.sample("v", dist.Normal(0.0, factor))
        pyro.sample("z", dist.Normal(torch.zeros(dim - 1), factor).to_event(1))

    return posterior_is_prior("funnel", f"funnel, D = {dim}, sd {factor}", prior, draw, num_data)


class Banana(dist.TorchDistribution):
    """A standard normal in two dimensions, the second moved by b (z1^2 - 1)."""

    arg_constraints: dict = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, batch_shape: torch.Size, bend: float) -> None:
        self.bend = bend
        super().__init__(batch_shape, torch.Size((2,)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Banana":
        return Banana(torch.Size(batch_shape), self.bend)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        first, second = torch.randn(2, *sample_shape, *self.batch_shape)
        return torch.stack([first, second + self.bend * (first**2 - 1)], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        first, second = z[..., 0], z[..., 1] - self.bend * (z[..., 0] ** 2 - 1)
        return -0.5 * (first**2 + second**2) - math.log(2 * math.pi)


def banana(bend: float, factor: float, num_data: int) -> Case:
    scale = factor * torch.tensor([1.0, math.sqrt(1 + 2 * bend**2)])

    def draw() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))

    def prior() -> None:
        pyro.sample("z", Banana(torch.Size(), bend))

    return posterior_is_prior("banana", f"banana, bend {bend}, sd {factor}", prior, draw, num_data)


def skewed(dim: int, kind: str, factor: float, num_data: int) -> Case:
    """A Gamma posterior under a LogNormal guide, or the other way round: constrained latents."""
    gamma, log_normal = dist.Gamma(torch.full((dim,), 2.0), 1.0), dist.LogNormal(torch.zeros(dim), 0.5)
    pairs = {
        "Gamma": (gamma, dist.LogNormal(torch.full((dim,), 0.5), 0.6 * factor)),
        "LogNormal": (log_normal, dist.Gamma(torch.full((dim,), 3.5 / factor), 3.0 / factor)),
    }
    posterior, guide = pairs[kind]

    def prior() -> None:
        pyro.sample("z", posterior.to_event(1))

    def draw() -> None:
        pyro.sample("z", guide.to_event(1))

    return posterior_is_prior("skewed", f"{kind}, D = {dim}, factor {factor}", prior, draw, num_data)


def one_of_two_modes(num_data: int) -> Case:
    """x ~ N(|z|, 0.3), so that z and -z are alike; the guide draws the positive ones."""
    x = 1 + 2 * torch.rand(num_data, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.5).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.96 * x, 0.32).to_event(1))

    precision = 1 / 1.5**2 + 1 / 0.3**2
    positive = dist.Normal(0.0, 1.0).cdf(x / 0.3**2 / math.sqrt(precision))
    truth = dist.Normal(0.0, math.hypot(1.5, 0.3)).log_prob(x) + math.log(2) + positive.log()
    return Case(BLIND, BLIND, model, guide, x, truth.sum(-1))


class FlowGuide(torch.nn.Module):
    """A conditional spline flow over a Gaussian, both given by small networks of x."""

    def __init__(self, dim: int, data_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = torch.nn.Sequential(torch.nn.Linear(data_dim, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2 * dim))
        self.spline = T.conditional_spline_autoregressive(dim, data_dim, hidden_dims=[32])

    def forward(self, x: Tensor) -> None:
        pyro.module("flow", self)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        base = dist.Normal(loc, (log_scale - 1).exp())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [self.spline.condition(x)]))


def flows(
    model: Callable, simulate: Callable[[int], Tensor], dim: int, x: Tensor, truth: Tensor, name: str
) -> Iterator[Case]:
    """One flow, looked at after more and more steps of training."""
    pyro.clear_param_store()
    guide = FlowGuide(dim, x.shape[-1])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO())
    steps = 0
    for more in (200, 600, 1600):
        for _ in range(more):
            svi.step(simulate(128))
        steps += more
        yield Case("spline flows", f"spline flow, {name}, {steps} steps", model, guide, x, truth)


def flows_of_linear_gaussian(dim: int, num_data: int) -> Iterator[Case]:
    lm, model, x = linear_gaussian(dim, num_data)

    def simulate(size: int) -> Tensor:
        return torch.randn(size, dim) @ lm.weight.T + lm.bias + lm.variance.sqrt() * torch.randn(size, 2 * dim)

    return flows(model, simulate, dim, x, lm.log_evidence(x), f"linear-Gaussian, D = {dim}")


def flows_of_tanh_decoder(num_data: int) -> Iterator[Case]:
    """Two latents, so that log p(x) is a sum on a grid."""
    first, second, noise = 1.5 * torch.randn(2, 8), torch.randn(8, 4), torch.tensor(0.5)

    def decoder(z: Tensor) -> Tensor:
        return torch.tanh(z @ first) @ second

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    def simulate(size: int) -> Tensor:
        return decoder(torch.randn(size, 2)) + noise * torch.randn(size, 4)

    x = simulate(num_data)
    axis = torch.arange(-6, 6, 0.02, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1) + 2 * math.log(0.02)
    mean = decoder(grid.float()).double()
    truth = torch.stack([(log_prior + dist.Normal(mean, 0.5).log_prob(row).sum(-1)).logsumexp(0) for row in x.double()])
    return flows(model, simulate, 2, x, truth.float(), "tanh decoder, D = 2")


def discrete_guide(num_bits: int, num_real: int, chance: float, factor: float, num_data: int) -> Case:
    """Bits and Gaussian latents under a linear decoder; log p(x) is a sum over all bits.

    The guide draws independent bits from the posterior's marginals, their logits divided by a factor, and then the Gaussian
    latents from their posterior given the bits, its covariance root times the factor.
    """
    data_dim = 2 * num_bits + 2
    of_bits, of_real = 0.8 * torch.randn(num_bits, data_dim), torch.randn(num_real, data_dim)
    noise = torch.tensor(0.5 * num_bits + 1.0).sqrt()
    marginal = dist.MultivariateNormal(torch.zeros(data_dim), noise**2 * torch.eye(data_dim) + of_real.T @ of_real)
    x = torch.bernoulli(torch.full((num_data, num_bits), chance)) @ of_bits + marginal.sample((num_data,))
    every = torch.cartesian_prod(*[torch.arange(2.0)] * num_bits).reshape(-1, num_bits)
    log_prior = dist.Bernoulli(torch.tensor(chance)).log_prob(every).sum(-1, keepdim=True)
    log_joint = torch.stack([log_prior[:, 0] + marginal.log_prob(row - every @ of_bits) for row in x], -1)
    truth = log_joint.logsumexp(0)
    logits = torch.logit(((log_joint - truth).exp().T @ every).clamp(1e-6, 1 - 1e-6)) / factor
    covariance = torch.linalg.inv(torch.eye(num_real) + of_real @ of_real.T / noise**2)
    gain, root = of_real.T @ covariance / noise**2, factor * torch.linalg.cholesky(covariance)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(torch.full((num_bits,), chance)).to_event(1))
            mean = bits @ of_bits
            if num_real:
                mean = mean + pyro.sample("z", dist.Normal(torch.zeros(num_real), 1.0).to_event(1)) @ of_real
            pyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(logits=logits).to_event(1))
            if num_real:
                pyro.sample("z", dist.MultivariateNormal((x - bits @ of_bits) @ gain, scale_tril=root))

    kind = "bits and real latents" if num_real else "bits"
    family = f"{kind}, {'narrower' if factor < 1 else 'as wide or wider'}"
    return Case(family, f"{num_bits} bits of {chance}, {num_real} real, factor {factor}", model, guide, x, truth)


def all_cases(num_data: int) -> Iterator[Case]:
    half = max(num_data // 2, 1)
    for dim in (2, 4, 10):
        for factor in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
            yield gaussian_guide(dim, factor, num_data, diagonal=True)
    for factor in (0.9, 0.95):
        yield gaussian_guide(50, factor, half, diagonal=False)
    for df in (3.0, 5.0, 10.0):
        for dim in (1, 2, 5):
            for factor in (0.8, 1.0, 1.3):
                yield student(dim, df, factor, half)
    for dim in (2, 4):
        for factor in (0.8, 1.0, 1.2):
            yield funnel(dim, factor, num_data)
    for bend in (0.2, 0.4, 0.7):
        for factor in (0.8, 1.0, 1.2):
            yield banana(bend, factor, half)
    for dim in (1, 3):
        for kind in ("Gamma", "LogNormal"):
            for factor in (0.8, 1.0, 1.2):
                yield skewed(dim, kind, factor, half)
    yield from flows_of_linear_gaussian(4, num_data)
    yield from flows_of_tanh_decoder(num_data)
    for dim in (1, 2, 4, 10):
        for factor in (1.1, 1.25, 1.5, 2.0):
            # Of ten latents twice as wide few weights have a good tail index.
            more = 25 if (dim, factor) == (10, 2.0) else 1
            yield gaussian_guide(dim, factor, more * num_data, diagonal=False)
    yield one_of_two_modes(num_data)
    for num_bits, num_real in ((1, 0), (3, 0), (6, 0), (10, 0), (2, 2), (4, 3), (6, 6)):
        for chance in (0.1, 0.5):
            for factor in (0.4, 0.6, 0.8, 1.0, 1.5):
                yield discrete_guide(num_bits, num_real, chance, factor, half)
