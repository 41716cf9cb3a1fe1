"""What the tests of the beta-ELBOs share: pairs with their terms by hand, scripted draws, all ways to ask for a loss.

Draws are not random here. Normal noise comes from the columns of a Hadamard matrix, +1 and -1: their mean over K particles
is 0 and their covariance the identity, so that the mean of anything quadratic in the noise is its expectation, exactly. A
linear-Gaussian pair then has its closed forms as values, also where an objective samples. Discrete draws come in the
proportions of their probabilities, so that the mean of a score-function gradient is its expectation, exactly.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pair_helpers import F64, linear_gaussian
from pyro import poutine
from pyro.infer import autoguide
from pyro.poutine.guide import GuideMessenger
from torch import nn

import pyro_vae as pv
from pyro_vae.exact import LinearGaussian

OBJECTIVES = {
    "trace": pv.BetaTrace_ELBO,
    "mean-field": pv.BetaTraceMeanField_ELBO,
    "graph": pv.BetaTraceGraph_ELBO,
}
FORMS = ("loss", "loss_and_grads", "differentiable_loss", "module")
SEED = 7
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def tensor(value):
    return torch.as_tensor(value, dtype=F64)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Programs


class Program(nn.Module):
    """A function of parameters and data, as a module that Pyro registers under a name of its own."""

    serial = count()

    def __init__(self, function, **params):
        super().__init__()
        self.name, self.function, self.calls = f"program{next(self.serial)}", function, 0
        for key, value in params.items():
            setattr(self, key, nn.Parameter(tensor(value).clone()))

    def forward(self, *args):
        self.calls += 1
        pyro.module(self.name, self)
        return self.function(self, *args)


@dataclass
class Hand:
    """Terms by hand, as functions of the parameters."""

    reconstruction: torch.Tensor
    kl: dict[str, torch.Tensor]
    others: Any = 0.0

    def loss(self, beta):
        return -self.reconstruction + sum(weight(beta, n) * kl for n, kl in self.kl.items()) + self.others


@dataclass
class Case:
    """A pair, what it draws, and what it amounts to: `hand(model, guide, *args)`.

    :ivar noise: by site in the order of the draws, (K, ...); `discrete` likewise.
    """

    model: Any
    guide: Any
    hand: Callable[..., Hand]
    args: tuple[Any, ...] = ()
    noise: Sequence[torch.Tensor] = ()
    discrete: Sequence[torch.Tensor] = ()
    options: dict[str, Any] = field(default_factory=lambda: {"max_plate_nesting": 1})

    @property
    def num_particles(self):
        return len([*self.noise, *self.discrete][0])

    @property
    def parameters(self):
        programs = {"model": self.model, "guide": self.guide}
        return {f"{p}.{n}": w for p, m in programs.items() if isinstance(m, nn.Module) for n, w in m.named_parameters()}

    def objective(self, cls, beta=1.0, vectorize=True, **options):
        return cls(beta, num_particles=self.num_particles, vectorize_particles=vectorize, **{**self.options, **options})

    def pyro_objective(self, cls, vectorize=True):
        return cls(num_particles=self.num_particles, vectorize_particles=vectorize, **self.options)

    @contextmanager
    def scripted(self, vectorize=True):
        with script(self.noise, vectorize, NORMAL), script(self.discrete, vectorize, DISCRETE):
            yield


# Draws

FAMILIES = ("normal", "multivariate_normal", "lowrank_multivariate_normal")
NORMAL = [f"torch.distributions.{family}._standard_normal" for family in FAMILIES]
DISCRETE = ["torch.distributions.Bernoulli.sample", "torch.distributions.Categorical.sample"]


def signs(n, plate=()):
    """Noise of n latents, each (K, *plate): uncorrelated over K = 2, 4 or 8."""
    hadamard = torch.ones(1, 1, dtype=F64)
    while len(hadamard) < n + 1:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return [hadamard[:, i + 1].reshape(-1, *(1 for _ in plate)).expand(-1, *plate) for i in range(n)]


@contextmanager
def script(draws, vectorize, functions):
    """Let the functions that draw return these, (K, ...) by site: all K at once, or one particle after the other."""
    queue = list(draws) if vectorize else [d[k] for k in range(len(draws[0]) if draws else 0) for d in draws]
    queue = iter(queue)

    def draw(shape, dtype):
        value = next(queue).to(dtype)
        return value.reshape(value.shape[max(value.ndim - len(shape), 0) :]).expand(shape)

    def normal(shape, dtype, device):
        return draw(shape, dtype)

    def discrete(fn, sample_shape=()):
        dtype = F64 if isinstance(fn, torch.distributions.Bernoulli) else torch.long
        return draw(fn._extended_shape(torch.Size(sample_shape)), dtype)

    with ExitStack() as stack:
        if draws:
            for name in functions:
                stack.enter_context(mock.patch(name, normal if functions is NORMAL else discrete))
        yield
    assert next(queue, None) is None, "the pair drew less than the script has"


# All ways to ask for a loss


def weight(beta, name, step=0):
    if isinstance(beta, Mapping):
        return weight(beta.get(name, 1.0), name, step)
    return beta if isinstance(beta, torch.Tensor) or not callable(beta) else beta(step)


def run(form, objective, case, vectorize=True, scripted=True):
    """The value and the gradient by parameter; None for the gradient of `loss`."""
    for parameter in case.parameters.values():
        parameter.grad = None
    pair = case.model, case.guide
    with case.scripted(vectorize) if scripted else nullcontext():
        if form == "loss":
            with torch.no_grad():
                return tensor(objective.loss(*pair, *case.args)), None
        if form == "loss_and_grads":
            value = tensor(objective.loss_and_grads(*pair, *case.args))
        else:
            loss = objective(*pair)(*case.args) if form == "module" else objective.differentiable_loss(*pair, *case.args)
            assert loss.shape == () and loss.dtype == F64
            if loss.requires_grad:  # not where everything is masked
                loss.backward()
            value = loss.detach()
    return value, gradients_of(case)


def gradients_of(case):
    return {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in case.parameters.items()}


def by_hand(case, beta):
    """Terms, loss and gradient by hand."""
    hand = case.hand(case.model, case.guide, *case.args)
    parameters = case.parameters
    loss = tensor(hand.loss(beta))
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if loss.requires_grad else ()
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(parameters.values(), grads, strict=True)]
    return hand, loss.detach(), dict(zip(parameters, grads, strict=True))


def assert_close(found, wanted, what=""):
    found, wanted = (tensor(v) if isinstance(v, (int, float)) else v.detach() for v in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def assert_terms(terms, hand, beta, loss):
    """All terms, detached and of the right dtype."""
    assert set(terms.kl) == set(hand.kl)
    kl_sum = sum(hand.kl.values())
    found = {"reconstruction": terms.reconstruction, "kl_sum": terms.kl_sum, "elbo": terms.elbo, "loss": terms.loss}
    wanted = {"reconstruction": hand.reconstruction, "kl_sum": kl_sum, "elbo": hand.reconstruction - kl_sum, "loss": loss}
    found |= {f"kl {n}": v for n, v in terms.kl.items()}
    wanted |= {f"kl {n}": v for n, v in hand.kl.items()}
    for name, value in found.items():
        assert type(value) is torch.Tensor and value.shape == () and value.dtype == F64 and not value.requires_grad, name
        assert_close(value, wanted[name], name)
    if isinstance(beta, Mapping):
        assert {n: float(b) for n, b in terms.beta.items()} == {n: float(weight(beta, n)) for n in beta}
    else:
        assert float(terms.beta) == float(weight(beta, ""))


def assert_exact(case, objective, beta, vectorize=True, forms=FORMS):
    """Value, gradient and terms of the objective are those by hand, whichever way the loss is asked for."""
    cls = OBJECTIVES[objective] if isinstance(objective, str) else objective
    for form in forms:
        elbo = case.objective(cls, beta, vectorize)
        value, grads = run(form, elbo, case, vectorize)
        hand, loss, wanted = by_hand(case, beta)
        assert_close(value, loss, form)
        for name, grad in (grads or {}).items():
            assert_close(grad, wanted[name], f"{form}, gradient of {name}")
        assert_terms(elbo.terms, hand, beta, loss)
        assert elbo.num_updates == (form == "loss_and_grads")


# Closed forms


def normal_kl(loc, scale, prior_loc=0.0, prior_scale=1.0):
    """KL(N(loc, scale^2) || N(prior_loc, prior_scale^2))."""
    prior_loc, prior_scale = tensor(prior_loc), tensor(prior_scale)
    squares = scale.square() + (loc - prior_loc).square()
    return (prior_scale / scale).log() + 0.5 * (squares / prior_scale.square() - 1)


def normal_fit(x, mean, variance, noise=1.0):
    """E log N(x; y, noise^2) for y of this mean and variance."""
    noise = tensor(noise)
    return -HALF_LOG_2PI - noise.log() - 0.5 * ((x - mean).square() + variance) / noise.square()


# Pairs


def vae(num_data=5, dim=2, full_size=None, plate=None, full_covariance=False):
    """The linear VAE: W, b and the noise in the model, an affine encoder as guide.

    :param plate: gives the plate; its indices choose the batch from x, and `full_size` is what they stand for.
    """
    start, x = linear_gaussian(dim, 3, num_data)
    plate = plate or (lambda: pyro.plate("data", num_data))
    batch: list[torch.Tensor] = []

    def prior(x):
        if full_covariance:
            return dist.MultivariateNormal(x.new_zeros(dim), torch.eye(dim, dtype=F64))
        return dist.Normal(x.new_zeros(dim), 1.0).to_event(1)

    def family(p, x, distributions=dist):
        loc = x @ p.gain.T + p.center
        if full_covariance:
            root = p.log_scale.exp().diag() + p.below.tril(-1)
            return distributions.MultivariateNormal(loc, scale_tril=root.expand(len(x), dim, dim))
        return distributions.Independent(distributions.Normal(loc, p.log_scale.exp().expand_as(loc)), 1)

    def model(p, x):
        with plate() as index:
            z = pyro.sample("z", prior(x))
            noise = (0.5 * p.log_variance).exp()
            pyro.sample("x", dist.Normal(z @ p.weight.T + p.bias, noise).to_event(1), obs=x[index])

    def guide(p, x):
        with plate() as index:
            batch[:] = [index]
            pyro.sample("z", family(p, x[index]))

    def hand(m, g, x):
        x = x[batch[0]]
        scale = 1.0 if full_size is None else full_size / len(x)
        lm = LinearGaussian(m.weight, m.bias, m.log_variance.exp())
        q = family(g, x, torch.distributions)
        return Hand(-scale * lm.distortion(x, q).sum(), {"z": scale * lm.rate(q).sum()})

    params = {"gain": numbers(dim, 3, seed=1), "center": numbers(dim, seed=2), "log_scale": numbers(dim, seed=3) - 1}
    if full_covariance:
        params["below"] = numbers(dim, dim, seed=4)
    return Case(
        Program(model, weight=start.weight, bias=start.bias, log_variance=start.variance.log()),
        Program(guide, **params),
        hand,
        (x,),
        [torch.stack(signs(dim, (1,)), -1)],
    )


@dataclass
class Masks:
    """Where the latent and the observation of `masked` are masked: None, True, False or a tensor (B,)."""

    model: Any = None  # poutine.mask over the latent
    guide: Any = None
    whole_model: Any = None  # poutine.mask over the latent and the observation
    fn_model: Any = None  # fn.mask of the latent
    fn_guide: Any = None
    x: Any = None  # poutine.mask over the observation
    fn_x: Any = None


def maybe(mask):
    return poutine.mask(mask=True if mask is None else mask)


def with_mask(fn, mask):
    return fn if mask is None else fn.mask(mask)


def joined(size, *masks):
    """All of them, as a tensor."""
    joint = torch.ones(size, dtype=torch.bool)
    for mask in masks:
        joint = joint if mask is None else joint & mask
    return joint


def masked(masks, num_data=4):
    """One Gaussian latent and one observation per datum."""
    x = numbers(num_data)

    def model(p, x):
        with pyro.plate("data", len(x)), maybe(masks.whole_model):
            with maybe(masks.model):
                z = pyro.sample("z", with_mask(dist.Normal(x.new_zeros(len(x)), 1.0), masks.fn_model))
            with maybe(masks.x):
                pyro.sample("x", with_mask(dist.Normal(p.weight * z + p.bias, 1.0), masks.fn_x), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)), maybe(masks.guide):
            pyro.sample("z", with_mask(dist.Normal(p.loc, p.log_scale.exp()), masks.fn_guide))

    def hand(m, g, x):
        scale = g.log_scale.exp()
        on_z = joined(num_data, masks.model, masks.guide, masks.whole_model, masks.fn_model, masks.fn_guide)
        on_x = joined(num_data, masks.whole_model, masks.x, masks.fn_x)
        fit = normal_fit(x, m.weight * g.loc + m.bias, (m.weight * scale).square())
        return Hand(fit[on_x].sum(), {"z": normal_kl(g.loc, scale)[on_z].sum()})

    return Case(
        Program(model, weight=0.8, bias=-0.3),
        Program(guide, loc=numbers(num_data, seed=1), log_scale=numbers(num_data, seed=2) / 2),
        hand,
        (x,),
        signs(1, (1,)),
    )


def masked_coin(masks, num_data=4, probs=0.25, infer=None):
    """One Bernoulli latent and one observation per datum; q = 1/4, so that one draw in four is a 1."""
    x = numbers(num_data)

    def model(p, x):
        with pyro.plate("data", len(x)), maybe(masks.whole_model):
            with maybe(masks.model):
                c = pyro.sample("c", with_mask(dist.Bernoulli(logits=p.prior.expand(len(x))), masks.fn_model))
            with maybe(masks.x):
                pyro.sample("x", with_mask(dist.Normal(p.weight * c + p.bias, 1.0), masks.fn_x), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)), maybe(masks.guide):
            pyro.sample("c", with_mask(dist.Bernoulli(logits=p.logits), masks.fn_guide), infer=infer)

    def hand(m, g, x):
        on_c = joined(num_data, masks.model, masks.guide, masks.whole_model, masks.fn_model, masks.fn_guide)
        on_x = joined(num_data, masks.whole_model, masks.x, masks.fn_x)
        q = g.logits.sigmoid()
        kl = q * (q.log() - m.prior.sigmoid().log()) + (1 - q) * ((1 - q).log() - (1 - m.prior.sigmoid()).log())
        fit = q * normal_fit(x, m.weight + m.bias, 0.0) + (1 - q) * normal_fit(x, m.bias, 0.0)
        return Hand(fit[on_x].sum(), {"c": kl[on_c].sum()})

    return Case(
        Program(model, weight=0.8, bias=-0.3, prior=0.4),
        Program(guide, logits=[math.log(probs / (1 - probs))] * num_data),
        hand,
        (x,),
        discrete=[torch.stack([torch.eye(4)[(i * 3) % 4] for i in range(num_data)], 1)],
    )


def hierarchical(scale_model=1.0, scale_guide=1.0, plate_scale=1):
    """z2 ~ N(0, 1), z1 ~ N(a z2, s1), x ~ N(w z1, 1); guide z2 ~ N(g x, .), z1 ~ N(h x + k z2, .); all per datum."""
    num_data = 4
    x = numbers(num_data)

    def plate():
        return pyro.plate("data", plate_scale * num_data, subsample=torch.arange(num_data))

    def model(p, x):
        with plate(), poutine.scale(scale=scale_model):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(p.a * z2, p.log_s.exp()))
            pyro.sample("x", dist.Normal(p.w * z1, 1.0), obs=x)

    def guide(p, x):
        with plate(), poutine.scale(scale=scale_guide):
            z2 = pyro.sample("z2", dist.Normal(p.g * x, p.log_t2.exp()))
            pyro.sample("z1", dist.Normal(p.h * x + p.k * z2, p.log_t1.exp()))

    def hand(m, g, x):
        t1, t2 = g.log_t1.exp(), g.log_t2.exp()
        mean, variance = (g.h + g.k * g.g) * x, t1.square() + (g.k * t2).square()
        # E over z2 of KL(q(z1|z2) || p(z1|z2)): the difference of the means is d + (k - a) (z2 - E z2)
        d = (g.h + (g.k - m.a) * g.g) * x
        between = (d.square() + ((g.k - m.a) * t2).square()) / m.log_s.exp().square()
        kl1 = m.log_s - g.log_t1 + 0.5 * (t1.square() / m.log_s.exp().square() + between - 1)
        factor = scale_guide * plate_scale
        fit = normal_fit(x, m.w * mean, m.w.square() * variance)
        return Hand(factor * fit.sum(), {"z2": factor * normal_kl(g.g * x, t2).sum(), "z1": factor * kl1.sum()})

    return Case(
        Program(model, a=0.7, log_s=-0.2, w=1.3),
        Program(guide, g=0.5, h=-0.4, k=0.3, log_t1=-0.5, log_t2=-0.1),
        hand,
        (x,),
        signs(2, (1,)),
    )


def global_and_local(scale=3):
    """theta ~ N(0, 1) for all data, z ~ N(theta, 1) and x ~ N(w z, 1) per datum in a subsampled plate."""
    num_data = 4

    def plate():
        return pyro.plate("data", scale * num_data, subsample=torch.arange(num_data))

    def model(p, x):
        theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
        with plate():
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(p.w * z, 1.0), obs=x)

    def guide(p, x):
        pyro.sample("theta", dist.Normal(p.loc, p.log_scale.exp()))
        with plate():
            pyro.sample("z", dist.Normal(p.g * x, p.log_t.exp()))

    def hand(m, g, x):
        t, s = g.log_t.exp(), g.log_scale.exp()
        kl_z = -g.log_t + 0.5 * (t.square() + (g.g * x - g.loc).square() + s.square() - 1)
        fit = normal_fit(x, m.w * g.g * x, (m.w * t).square())
        return Hand(scale * fit.sum(), {"theta": normal_kl(g.loc, s), "z": scale * kl_z.sum()})

    params = {"loc": 0.3, "log_scale": -0.4, "g": 0.5, "log_t": -0.2}
    return Case(Program(model, w=1.3), Program(guide, **params), hand, (numbers(num_data),), signs(2, (1,)))


def no_formula():
    """Normal against Student's t: no formula for the KL, so that all objectives sample it. By hand at the same noise."""
    noise = numbers(3, 1, seed=4)

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(tensor(5.0), p.loc, 1.0))
            pyro.sample("x", dist.Normal(p.w * z, 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(p.g * x, p.log_t.exp()))

    def hand(m, g, x):
        q = torch.distributions.Normal(g.g * x, g.log_t.exp())
        z = q.loc + q.scale * noise
        prior = torch.distributions.StudentT(tensor(5.0), m.loc, tensor(1.0))
        kl = q.log_prob(z) - prior.log_prob(z)
        return Hand(normal_fit(x, m.w * z, 0.0).sum(-1).mean(), {"z": kl.sum(-1).mean()})

    return Case(Program(model, w=1.3, loc=0.2), Program(guide, g=0.5, log_t=-0.2), hand, (numbers(4),), [noise])


def log_normal():
    """LogNormal against LogNormal: a formula for the KL of transformed distributions."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(p.loc, 0.8))
            pyro.sample("x", dist.Normal(p.w * z.log(), 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(p.g * x, p.log_t.exp()))

    def hand(m, g, x):
        loc, scale = g.g * x, g.log_t.exp()
        return Hand(normal_fit(x, m.w * loc, (m.w * scale).square()).sum(), {"z": normal_kl(loc, scale, m.loc, 0.8).sum()})

    return Case(Program(model, w=1.3, loc=0.2), Program(guide, g=0.5, log_t=-0.2), hand, (numbers(4),), signs(1, (1,)))


def switched(in_fn=False):
    """c says whether there is a z, as in Pyro's AIR: z is masked by the draw c, in model and guide."""

    def hidden(fn, c):
        return fn.mask(c.bool()) if in_fn else fn

    def under(c):
        return nullcontext() if in_fn else poutine.mask(mask=c.bool())

    def model(p, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=p.prior.expand(len(x))))
            with under(c):
                z = pyro.sample("z", hidden(dist.Normal(x.new_zeros(len(x)), 1.0), c))
            pyro.sample("x", dist.Normal(p.w * c * z + p.bias, 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=p.logits))
            with under(c):
                pyro.sample("z", hidden(dist.Normal(p.g * x, p.log_t.exp()), c))

    def hand(m, g, x):
        q, prior, loc, scale = g.logits.sigmoid(), m.prior.sigmoid(), g.g * x, g.log_t.exp()
        kl_c = q * (q / prior).log() + (1 - q) * ((1 - q) / (1 - prior)).log()
        fit = q * normal_fit(x, m.w * loc + m.bias, (m.w * scale).square()) + (1 - q) * normal_fit(x, m.bias, 0.0)
        return Hand(fit.sum(), {"c": kl_c.sum(), "z": (q * normal_kl(loc, scale)).sum()})

    return Case(
        Program(model, prior=0.4, w=1.3, bias=-0.3),
        Program(guide, logits=[math.log(1 / 3)] * 4, g=0.5, log_t=-0.2),
        hand,
        (numbers(4),),
        [torch.tensor([1.0, -1.0] * 4)[:, None]],
        [torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])[:, None]],
    )


def imputed_by_the_guide(kind):
    """`obs_mask` under an autoguide, which draws the missing x as one more latent."""
    there = torch.tensor([True, False, True])
    num_data = len(there)

    def model(p, x):
        with pyro.plate("data", num_data):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(p.w * z, 1.0), obs=x, obs_mask=there)

    program = Program(model, w=1.3)
    guide = AUTOGUIDES[kind](program)
    guide(numbers(num_data))
    for i, parameter in enumerate(guide.parameters()):
        parameter.data = 0.4 * numbers(*parameter.shape, seed=20 + i) - 0.3

    def hand(m, g, x):
        z, t = (g.locs.z, g.scales.z), (g.locs.x_unobserved, g.scales.x_unobserved)
        spread = (m.w * z[1]).square()
        kl_x = -t[1].log() + 0.5 * (t[1].square() + (t[0] - m.w * z[0]).square() + spread - 1)
        fit = normal_fit(x, m.w * z[0], spread)[there]
        return Hand(fit.sum(), {"z": normal_kl(*z).sum(), "x_unobserved": kl_x[~there].sum()})

    return Case(program, guide, hand, (numbers(num_data),), signs(2, (1,)))


def partly_observed(coin=False):
    """`obs_mask`: x where it is there, drawn by the model where it is not."""
    num_data, there = 4, torch.tensor([True, False, True, True])
    case = (masked_coin if coin else masked)(Masks(x=there))
    latent = case.model

    def model(p, x):
        with pyro.plate("data", num_data):
            prior = dist.Bernoulli(logits=p.prior) if coin else dist.Normal(x.new_zeros(()), 1.0)
            z = pyro.sample("c" if coin else "z", prior)
            pyro.sample("x", dist.Normal(p.weight * z + p.bias, 1.0), obs=x, obs_mask=there)

    params = {n: w.detach() for n, w in latent.named_parameters()}
    drawn = numbers(case.num_particles, num_data, seed=8)
    return Case(Program(model, **params), case.guide, case.hand, case.args, [*case.noise, drawn], case.discrete)


def with_jacobian():
    """z = exp(u): u an auxiliary draw of the guide, z a point mass, the log-Jacobian a factor."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(tensor(0.2), 0.8))
            pyro.sample("x", dist.Normal(p.w * z.log(), 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(p.g * x, p.log_t.exp()), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp()))
            pyro.factor("z_jacobian", -u, has_rsample=True)

    def hand(m, g, x):
        loc, scale = g.g * x, g.log_t.exp()
        kl = normal_kl(loc, scale, 0.2, 0.8)
        fit = normal_fit(x, m.w * loc, (m.w * scale).square())
        return Hand(fit.sum(), {"z": (kl + loc).sum(), "z_jacobian": -loc.sum()})

    return Case(Program(model, w=1.3), Program(guide, g=0.5, log_t=-0.2), hand, (numbers(4),), signs(1, (1,)))


def with_own_loss(coin=False):
    """A factor of the guide with has_rsample=False, as the classification loss of Pyro's scANVI: a loss of its own.

    With a coin it reads the draw, so that the score function has to carry it.
    """
    case = (masked_coin if coin else masked)(Masks())
    hand = case.hand

    def guide(p, x):
        with pyro.plate("data", len(x)):
            if coin:
                draw = pyro.sample("c", dist.Bernoulli(logits=p.logits))
            else:
                pyro.sample("z", dist.Normal(p.loc, p.log_scale.exp()))
                draw = 1.0
            pyro.factor("own", (p.extra * x).square() * draw, has_rsample=False)

    def with_own(m, g, x):
        terms = hand(m, g, x)
        share = g.logits.sigmoid() if coin else 1.0
        return Hand(terms.reconstruction, terms.kl, ((g.extra * x).square() * share).sum())

    params = {n: w.detach() for n, w in case.guide.named_parameters()}
    return Case(case.model, Program(guide, extra=0.7, **params), with_own, case.args, case.noise, case.discrete)


def categorical():
    """Three classes per datum, q = (1/4, 1/4, 1/2)."""
    x = numbers(4)

    def model(p, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=p.prior))
            pyro.sample("x", dist.Normal(p.means[c], 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=p.logits))

    def hand(m, g, x):
        log_q, log_p = g.logits.log_softmax(-1), m.prior.log_softmax(-1)
        fit = (log_q.exp() * normal_fit(x[:, None], m.means, 0.0)).sum()
        return Hand(fit, {"c": (log_q.exp() * (log_q - log_p)).sum()})

    draws = torch.tensor([0, 1, 2, 2])
    return Case(
        Program(model, prior=numbers(3, seed=1), means=numbers(3, seed=2)),
        Program(guide, logits=tensor([0.25, 0.25, 0.5]).log().expand(4, 3)),
        hand,
        (x,),
        discrete=[torch.stack([draws.roll(i) for i in range(4)], 1)],
    )


def chain_of_coins():
    """c1 for all data with q = 1/4, c2 given c1 per datum with q(c2=1|c1) = 1/2 or 1/4: sixteen draws in proportion."""
    x = numbers(3)

    def model(p, x):
        c1 = pyro.sample("c1", dist.Bernoulli(logits=p.prior))
        with pyro.plate("data", 2 * len(x), subsample=torch.arange(len(x))):
            c2 = pyro.sample("c2", dist.Bernoulli(logits=p.table[c1.long()]))
            pyro.sample("x", dist.Normal(p.means[c2.long()] + p.shift * c1, 1.0), obs=x)

    def guide(p, x):
        c1 = pyro.sample("c1", dist.Bernoulli(logits=p.logit))
        with pyro.plate("data", 2 * len(x), subsample=torch.arange(len(x))):
            pyro.sample("c2", dist.Bernoulli(logits=p.logits[c1.long()]))

    def hand(m, g, x):
        q1 = torch.stack([-g.logit, g.logit]).sigmoid()  # (c1)
        q2 = torch.stack([-g.logits, g.logits], -1).sigmoid()  # (c1, c2)
        p1 = torch.stack([-m.prior, m.prior]).sigmoid()
        p2 = torch.stack([-m.table, m.table], -1).sigmoid()
        q = q1[:, None] * q2
        means = m.means[None] + m.shift * torch.arange(2)[:, None]
        fit = (q * normal_fit(x[:, None, None], means, 0.0)).sum()
        kl2 = len(x) * (q * (q2 / p2).log()).sum()
        return Hand(2 * fit, {"c1": (q1 * (q1 / p1).log()).sum(), "c2": 2 * kl2})

    third = math.log(1 / 3)
    c1 = torch.tensor([1.0] * 4 + [0.0] * 12)
    c2 = torch.tensor([1.0, 0.0, 0.0, 0.0] + [1.0, 0.0] * 6)
    return Case(
        Program(model, prior=0.3, table=numbers(2, seed=1), means=numbers(2, seed=2), shift=0.6),
        Program(guide, logit=third, logits=[0.0, third]),
        hand,
        (x,),
        discrete=[c1[:, None], c2[:, None]],
    )


def mixture():
    """A guide that is a mixture: the component a is an auxiliary draw, q(a=1) = 1/4, z Gaussian given a."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(p.w * z, 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=p.logits), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(p.locs[a] * x, p.log_scales.exp()[a]))

    def hand(m, g, x):
        log_q = g.logits.log_softmax(-1)
        locs, scales = g.locs * x[:, None], g.log_scales.exp()
        fit = normal_fit(x[:, None], m.w * locs, (m.w * scales).square())
        kl = {"z": (log_q.exp() * normal_kl(locs, scales)).sum(), "a": (log_q.exp() * log_q).sum()}
        return Hand((log_q.exp() * fit).sum(), kl)

    a = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0])[:, None]
    return Case(
        Program(model, w=1.3),
        Program(guide, logits=tensor([0.75, 0.25]).log().expand(4, 2), locs=[0.5, -0.3], log_scales=[-0.3, 0.2]),
        hand,
        (numbers(4),),
        [torch.tensor([1.0, -1.0] * 4)[:, None]],
        [a],
    )


def coin_then_flow():
    """c, a coin for all data; given c, u per datum is an auxiliary draw, z = exp(u) a point, the log-Jacobian a factor."""

    def model(p, x):
        c = pyro.sample("c", dist.Bernoulli(logits=p.prior))
        with pyro.plate("data", 2 * len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.LogNormal(tensor(0.2), 0.8))
            pyro.sample("x", dist.Normal(p.w * z.log() + c, 1.0), obs=x)

    def guide(p, x):
        c = pyro.sample("c", dist.Bernoulli(logits=p.logit)).long()
        with pyro.plate("data", 2 * len(x), subsample=torch.arange(len(x))):
            u = pyro.sample("u", dist.Normal(p.gains[c] * x, p.log_scales.exp()[c]), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp()))
            pyro.factor("z_jacobian", -u, has_rsample=True)

    def hand(m, g, x):
        q, p = torch.stack([-g.logit, g.logit]).sigmoid(), torch.stack([-m.prior, m.prior]).sigmoid()
        locs, scales = g.gains * x[:, None], g.log_scales.exp()
        fit = normal_fit(x[:, None], m.w * locs + torch.arange(2), (m.w * scales).square())
        kl_u = normal_kl(locs, scales, 0.2, 0.8)
        kl = {"c": (q * (q / p).log()).sum(), "z": 2 * (q * (kl_u + locs)).sum(), "z_jacobian": -2 * (q * locs).sum()}
        return Hand(2 * (q * fit).sum(), kl)

    return Case(
        Program(model, prior=0.3, w=1.3),
        Program(guide, logit=math.log(1 / 3), gains=[0.5, -0.3], log_scales=[-0.3, 0.2]),
        hand,
        (numbers(4),),
        [torch.tensor([1.0, -1.0] * 4)[:, None]],
        [torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])[:, None]],
    )


class CoinMessenger(GuideMessenger, nn.Module):
    """A guide that runs the model, for the pair of `masked_coin`."""

    def __init__(self, model, logits):
        nn.Module.__init__(self)
        GuideMessenger.__init__(self, model)
        self.logits = nn.Parameter(logits.detach().clone())

    def get_posterior(self, name, prior):
        pyro.module("coin_messenger", self)
        return dist.Bernoulli(logits=self.logits)


def coin_by_messenger():
    case = masked_coin(Masks())
    case.guide = CoinMessenger(case.model, case.guide.logits)
    return case


AUTOGUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": partial(autoguide.AutoLowRankMultivariateNormal, rank=2),
    "AutoGuideList": None,
}
JOINT = [n for n in AUTOGUIDES if n not in ("AutoNormal", "AutoNormalMessenger")]


def autoguided(kind, mask=None):
    """a, two standard normals for all data, and b, log-normal per datum; x ~ N(w'a + log b, 1)."""
    num_data = 3

    def model(p, x):
        a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", num_data), nullcontext() if mask is None else poutine.mask(mask=mask):
            b = pyro.sample("b", dist.LogNormal(x.new_full((), 0.2), 0.8))
            pyro.sample("x", dist.Normal((a * p.w).sum(-1) + b.log(), 1.0), obs=x)

    x, model = numbers(num_data), Program(model, w=[0.7, -0.4])
    if kind == "AutoGuideList":
        guide = autoguide.AutoGuideList(model)
        guide.append(autoguide.AutoNormal(poutine.block(model, expose=["a"])))
        guide.append(autoguide.AutoDiagonalNormal(poutine.block(model, expose=["b"])))
    else:
        guide = AUTOGUIDES[kind](model)
    guide(x)
    for i, parameter in enumerate(guide.parameters()):
        parameter.data = 0.4 * numbers(*parameter.shape, seed=20 + i) - 0.3

    def moments(g):
        if kind == "AutoMultivariateNormal":
            root = g.scale[:, None] * g.scale_tril
            return g.loc, root @ root.T
        if kind == "AutoLowRankMultivariateNormal":
            factor = g.scale[:, None] * g.cov_factor
            return g.loc, factor @ factor.T + g.scale.square().diag()
        if kind == "AutoDiagonalNormal":
            return g.loc, g.scale.square().diag()
        first, second = (g[0], g[1]) if kind == "AutoGuideList" else (g, g)
        b = (second.loc, second.scale) if kind == "AutoGuideList" else (second.locs.b, second.scales.b)
        return torch.cat([first.locs.a, b[0]]), torch.cat([first.scales.a, b[1]]).square().diag()

    def hand(m, g, x):
        on = joined(num_data, mask)
        loc, covariance = moments(g)
        variance = covariance.diagonal()
        readers = torch.cat([m.w.expand(num_data, 2), torch.eye(num_data, dtype=F64)], 1)
        spread = torch.einsum("ij,jk,ik->i", readers, covariance, readers)
        fit = normal_fit(x, readers @ loc, spread)[on].sum()
        if kind in ("AutoNormal", "AutoNormalMessenger", "AutoGuideList"):
            kl = normal_kl(loc, variance.sqrt(), [0.0] * 2 + [0.2] * num_data, [1.0] * 2 + [0.8] * num_data)
            return Hand(fit, {"a": kl[:2].sum(), "b": kl[2:][on].sum()})
        crossed = normal_fit(loc, tensor([0.0] * 2 + [0.2] * num_data), variance, [1.0] * 2 + [0.8] * num_data)
        entropy = 0.5 * torch.logdet(covariance) + len(loc) * (HALF_LOG_2PI + 0.5)
        return Hand(fit, {"a+b": -entropy - crossed.sum()})

    columns = torch.stack(signs(7), -1)[:, None]  # (K, 1, 7)
    split = {"AutoLowRankMultivariateNormal": [2, 5], "AutoDiagonalNormal": [5], "AutoMultivariateNormal": [5]}
    noise = list(columns[..., : sum(split.get(kind, [2, 3]))].split(split.get(kind, [2, 3]), -1))
    if kind in ("AutoNormal", "AutoNormalMessenger"):
        noise[1] = noise[1].squeeze(1)  # one per datum
    return Case(model, guide, hand, (x,), noise)


# A pair that can be pickled


class LinearModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(1, 2, dtype=F64)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class LinearGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2, dtype=F64)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def halving(step):
    """A schedule that can be pickled: 1, 1/2, 1/4, ..."""
    return 0.5**step


def named(value):
    """The value as a name of a test: the same in every process, so without the addresses of functions."""
    return re.sub(r" at 0x\w+", "", str(value))
