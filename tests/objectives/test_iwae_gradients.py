"""Gradients of the importance-weighted bound, without noise.

Every datum is one node of a quadrature over the noise of K particles, or one K-tuple of classes, and `poutine.scale` gives
it its weight or its probability: the gradient of one call is then the mean of the gradient, and the truth is autograd of the
same sum by hand. One test draws for real, with stated false-alarm rates.
"""

import functools
import itertools
import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_helpers import DISCRETE, NORMAL, Program, assert_close, normal_fit, normal_kl, numbers, script, tensor, vae
from pair_helpers import F64, SIGMAS
from pyro import poutine

import pyro_vae as pv
from pyro_vae.errors import GlobalLatentError, StructureError

GRADIENTS = ("standard", "stl", "dreg")
X = 0.7


def log_normal(value, loc, log_scale):
    return -0.5 * ((value - loc) / log_scale.exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)


def log_mean_exp(log_weight):
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def gauss_hermite(num_nodes, num_dims):
    """Nodes (num_dims, M) and weights (M,) of E over standard normals."""
    nodes, weights = (tensor(part) for part in numpy.polynomial.hermite_e.hermegauss(num_nodes))
    weights = weights / weights.sum()
    grid = torch.meshgrid(*[nodes] * num_dims, indexing="ij")
    mass = functools.reduce(torch.mul, torch.meshgrid(*[weights] * num_dims, indexing="ij"))
    return torch.stack([g.flatten() for g in grid]), mass.flatten()


def gradients(loss, *programs):
    named = [(f"{i}.{n}", w) for i, program in enumerate(programs) for n, w in program.named_parameters()]
    found = torch.autograd.grad(loss, [w for _, w in named], allow_unused=True, materialize_grads=True)
    return {name: grad for (name, _), grad in zip(named, found, strict=True)}


def run(objective, model, guide, *args, normals=(), classes=()):
    """Loss and gradients of one call with these draws, (K, M) by site; the rehearsal draws for itself before."""
    objective.loss(model, guide, *args)
    with script(normals, True, NORMAL), script(classes, True, DISCRETE):
        loss = objective.differentiable_loss(model, guide, *args)
    return loss.detach(), gradients(loss, model, guide)


def assert_gradients(found, wanted, tolerance=1e-9):
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def largest_difference(found, wanted, names):
    return max(float((found[n] - wanted[n]).abs().max()) for n in names)


# Gaussian guides: one latent, and z2 with z1 given z2. `densities` follows the draws; log q has the parameters of `held`.


class OneLatent:
    num_sites = 1

    def __init__(self):
        self.model = Program(self._model, w=0.7, b=-0.2, log_s=0.2)
        self.guide = Program(self._guide, g=0.2, c=0.4, log_t=-0.2)
        self.held = Program(self._guide, g=0.2, c=0.4, log_t=-0.2)

    @staticmethod
    def _model(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(p.w * z + p.b, p.log_s.exp()), obs=x)

    @staticmethod
    def _guide(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(p.g * x + p.c, p.log_t.exp()))

    def densities(self, guide, x, noise):
        m, g, (eps,) = self.model, self.guide, noise
        z = g.g * x + g.c + g.log_t.exp() * eps
        prior = log_normal(z, 0.0, tensor(0.0))
        return log_normal(x, m.w * z + m.b, m.log_s), prior, log_normal(z, guide.g * x + guide.c, guide.log_t)

    def elbo(self, x):
        """By formula."""
        m, g = self.model, self.guide
        loc, t = g.g * x + g.c, g.log_t.exp()
        return normal_fit(x, m.w * loc + m.b, (m.w * t).square(), m.log_s.exp()) - normal_kl(loc, t)


class TwoLatents:
    num_sites = 2

    def __init__(self):
        params = {"g": 0.3, "h": 0.2, "k": 0.4, "log_t1": -0.3, "log_t2": -0.1}
        self.model = Program(self._model, a=0.6, log_s=-0.1, w=0.6)
        self.guide, self.held = Program(self._guide, **params), Program(self._guide, **params)

    @staticmethod
    def _model(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(p.a * z2, p.log_s.exp()))
            pyro.sample("x", dist.Normal(p.w * z1, 1.0), obs=x)

    @staticmethod
    def _guide(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            z2 = pyro.sample("z2", dist.Normal(p.g * x, p.log_t2.exp()))
            pyro.sample("z1", dist.Normal(p.h * x + p.k * z2, p.log_t1.exp()))

    def densities(self, guide, x, noise):
        m, g, (eps2, eps1) = self.model, self.guide, noise
        z2 = g.g * x + g.log_t2.exp() * eps2
        z1 = g.h * x + g.k * z2 + g.log_t1.exp() * eps1
        prior = log_normal(z2, 0.0, tensor(0.0)) + log_normal(z1, m.a * z2, m.log_s)
        log_q = log_normal(z2, guide.g * x, guide.log_t2) + log_normal(z1, guide.h * x + guide.k * z2, guide.log_t1)
        return log_normal(x, m.w * z1, tensor(0.0)), prior, log_q

    def elbo(self, x):
        m, g = self.model, self.guide
        t1, t2 = g.log_t1.exp(), g.log_t2.exp()
        difference = (g.h + (g.k - m.a) * g.g) * x
        between = (difference.square() + ((g.k - m.a) * t2).square()) / m.log_s.exp().square()
        kl1 = m.log_s - g.log_t1 + 0.5 * (t1.square() / m.log_s.exp().square() + between - 1)
        fit = normal_fit(x, m.w * (g.h + g.k * g.g) * x, m.w.square() * (t1.square() + (g.k * t2).square()))
        return fit - normal_kl(g.g * x, t2) - kl1


class Nodes:
    """A pair with the nodes of a quadrature as its data."""

    def __init__(self, pair, num_particles, num_nodes):
        self.pair = pair
        flat, self.weights = gauss_hermite(num_nodes, num_particles * pair.num_sites)
        self.noise = flat.reshape(pair.num_sites, num_particles, -1)
        self.x = torch.full((flat.shape[1],), X, dtype=F64)
        self.num_particles = num_particles

    def run(self, gradient, beta=1.0):
        objective = pv.ImportanceWeightedELBO(beta, num_particles=self.num_particles, gradient=gradient)
        return run(objective, self.pair.model, self.pair.guide, self.x, self.weights, normals=list(self.noise))

    def log_weights(self, beta, held=False):
        fit, prior, log_q = self.pair.densities(self.pair.held if held else self.pair.guide, self.x, self.noise)
        return fit + beta * prior, beta * log_q

    def truth(self, beta=1.0):
        """The bound by quadrature, and autograd of it."""
        log_joint, log_q = self.log_weights(beta)
        loss = -(self.weights * log_mean_exp(log_joint - log_q)).sum()
        return loss.detach(), gradients(loss, self.pair.model, self.pair.guide)

    def along_the_draws(self, power, beta=1.0):
        """sum_k c(v_k) d log w_k along the draws for the guide, sum_k v_k d log p for the model, by hand."""
        log_joint, log_q = self.log_weights(beta, held=True)
        v = (log_joint - log_q).detach().softmax(0)
        share = v if power == 1 else v * (1 - beta + beta * v)
        for_guide = gradients(-(self.weights * share * (log_joint - log_q)).sum(), self.pair.model, self.pair.guide)
        for_model = gradients(-(self.weights * v * self.log_weights(beta)[0]).sum(), self.pair.model, self.pair.guide)
        return {n: (for_guide if n.startswith("1.") else for_model)[n] for n in for_model}


PAIRS = {"one latent": OneLatent, "two latents": TwoLatents}
NUM_NODES = {("one latent", 1): 24, ("one latent", 2): 40, ("two latents", 1): 24, ("two latents", 2): 14}
SETTINGS = [(kind, K) for kind in PAIRS for K in (1, 2)]


@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("kind", "num_particles"), SETTINGS)
def test_the_mean_of_standard_is_autograd_of_the_bound(kind, num_particles, beta):
    nodes = Nodes(PAIRS[kind](), num_particles, NUM_NODES[kind, num_particles])
    loss, found = nodes.run("standard", beta)
    bound, wanted = nodes.truth(beta)
    assert_close(loss, bound)
    assert_gradients(found, wanted)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_quadrature_of_one_particle_is_the_closed_form_of_the_elbo(kind):
    nodes = Nodes(PAIRS[kind](), 1, NUM_NODES[kind, 1])
    elbo = nodes.pair.elbo(tensor(X))
    wanted = gradients(-elbo, nodes.pair.model, nodes.pair.guide)
    for gradient in GRADIENTS:
        loss, found = nodes.run(gradient)
        assert_close(loss, -elbo)
        assert_gradients(found, wanted)


@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("kind", "num_particles"), SETTINGS)
def test_dreg_has_the_mean_of_standard(kind, num_particles, beta):
    """The guide is far from the posterior. What is left is the error of the quadrature: STL is off by far more."""
    nodes = Nodes(PAIRS[kind](), num_particles, NUM_NODES[kind, num_particles])
    bound, wanted = nodes.truth(beta)
    loss, found = nodes.run("dreg", beta)
    assert_close(loss, bound)
    assert_gradients(found, wanted, 1e-9 if num_particles == 1 else 2e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_stl_has_another_mean_with_two_particles(kind):
    nodes = Nodes(PAIRS[kind](), 2, NUM_NODES[kind, 2])
    _, wanted = nodes.truth()
    _, found = nodes.run("stl")
    names = [n for n in wanted if n.startswith("1.")]
    size = max(float(wanted[n].abs().max()) for n in names)
    assert largest_difference(found, wanted, names) > 0.1 * size
    assert_gradients({n: g for n, g in found.items() if n not in names}, {n: g for n, g in wanted.items() if n not in names})


@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("gradient", "power"), [("stl", 1), ("dreg", 2)])
@pytest.mark.parametrize(("kind", "num_particles"), SETTINGS)
def test_gradients_along_the_draws_by_hand(kind, num_particles, gradient, power, beta):
    """Node by node the same sum, and so of every draw."""
    nodes = Nodes(PAIRS[kind](), num_particles, 3)
    _, found = nodes.run(gradient, beta)
    assert_gradients(found, nodes.along_the_draws(power, beta))


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("kind", PAIRS)
def test_with_one_particle_dreg_is_stl(kind, beta):
    pair = PAIRS[kind]()
    args = numbers(6), torch.ones(6, dtype=F64)
    results = []
    for gradient in ("stl", "dreg"):
        objective = pv.ImportanceWeightedELBO(beta, num_particles=1, gradient=gradient)
        torch.manual_seed(3)
        results.append(gradients(objective.differentiable_loss(pair.model, pair.guide, *args), pair.model, pair.guide))
    assert_gradients(*results, tolerance=1e-12)


class PosteriorPerDatum:
    """A guide with the parameters of the posterior of each datum for itself: the gradient of each is seen alone."""

    def __init__(self, num_data):
        w, b, s = 1.3, -0.2, 0.8
        self.x = numbers(num_data)
        variance = 1 / (1 + w**2 / s**2)

        def model(p, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(w * z + b, s), obs=x)

        def guide(p, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(p.loc, p.log_t.exp()))

        log_t = torch.full((num_data,), 0.5 * math.log(variance), dtype=F64)
        self.model, self.guide = Program(model), Program(guide, loc=variance * w / s**2 * (self.x - b), log_t=log_t)
        self.log_evidence = torch.distributions.Normal(tensor(b), math.sqrt(w**2 + s**2)).log_prob(self.x).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_along_the_draws_nothing_is_left_at_the_posterior(gradient, num_particles, seed):
    pair = PosteriorPerDatum(7)
    torch.manual_seed(seed)
    objective = pv.ImportanceWeightedELBO(num_particles=num_particles, gradient=gradient)
    loss = objective.differentiable_loss(pair.model, pair.guide, pair.x)
    assert abs(float(loss.detach() + pair.log_evidence)) < 1e-10
    for name, grad in gradients(loss, pair.guide).items():
        assert float(grad.abs().max()) < 1e-12, name


def test_standard_keeps_the_noise_of_the_score_at_the_posterior():
    """What "stl" and "dreg" take away: the same draws have a gradient under "standard"."""
    pair = PosteriorPerDatum(7)
    loss = pv.ImportanceWeightedELBO(num_particles=5).differentiable_loss(pair.model, pair.guide, pair.x)
    assert all(float(grad.abs().min()) > 1e-4 for grad in gradients(loss, pair.guide).values())


def test_the_means_of_real_draws():
    """D = 2, K = 5: "dreg" and "standard" agree, "stl" does not. 17 numbers beyond 4.5 s.e.: 1.2e-4 false alarms.

    One datum, repeated: 24 blocks of 1500 replicates each.
    """
    case = vae(num_data=1)
    x = case.args[0].expand(1500, 3)

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ p.weight.T + p.bias, (0.5 * p.log_variance).exp()).to_event(1), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ p.gain.T + p.center, p.log_scale.exp()).to_event(1))

    model, guide = (
        Program(f, **{n: w.detach() for n, w in source.named_parameters()})
        for f, source in ((model, case.model), (guide, case.guide))
    )

    def blocks(gradient):
        objective = pv.ImportanceWeightedELBO(num_particles=5, gradient=gradient)
        found = [gradients(objective.differentiable_loss(model, guide, x), model, guide) for _ in range(24)]
        return torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in found]) / len(x)

    means, variances = {}, {}
    for gradient in GRADIENTS:
        found = blocks(gradient)
        means[gradient], variances[gradient] = found.mean(0), found.var(0) / len(found)
    for gradient, same in (("dreg", True), ("stl", False)):
        std_error = (variances[gradient] + variances["standard"]).sqrt()
        off = (means[gradient] - means["standard"]).abs() / std_error
        assert float((std_error / means["standard"].abs().max()).max()) < 0.02
        assert (float(off.max()) < SIGMAS) == same, (gradient, off)


# Classes: all K-tuples as data


class Coins:
    """c ~ Bernoulli, x ~ N(means[c], 1)."""

    sizes = (2,)

    def __init__(self):
        self.model = Program(self._model, prior=0.4, means=[-0.3, 0.9])
        self.guide = Program(self._guide, logit=-0.6)

    @staticmethod
    def _model(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            c = pyro.sample("c", dist.Bernoulli(logits=p.prior))
            pyro.sample("x", dist.Normal(p.means[c.long()], 1.0), obs=x)

    @staticmethod
    def _guide(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("c", dist.Bernoulli(logits=p.logit))

    def densities(self, x, classes, noise):
        (c,) = classes
        q, p = (torch.stack([-w, w]).sigmoid().log() for w in (self.guide.logit, self.model.prior))
        return normal_fit(x, self.model.means[c], 0.0), p[c], q[c], q[c]


class ThreeClasses:
    """c ~ Categorical, x ~ N(means[c], 1)."""

    sizes = (3,)

    def __init__(self):
        self.model = Program(self._model, prior=numbers(3, seed=1), means=numbers(3, seed=2))
        self.guide = Program(self._guide, logits=numbers(3, seed=3))

    @staticmethod
    def _model(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            c = pyro.sample("c", dist.Categorical(logits=p.prior))
            pyro.sample("x", dist.Normal(p.means[c], 1.0), obs=x)

    @staticmethod
    def _guide(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("c", dist.Categorical(logits=p.logits))

    def densities(self, x, classes, noise):
        (c,) = classes
        q, p = self.guide.logits.log_softmax(-1), self.model.prior.log_softmax(-1)
        return normal_fit(x, self.model.means[c], 0.0), p[c], q[c], q[c]


class ChainOfClasses:
    """c1 and c2 given c1, both drawn by score."""

    sizes = (2, 2)

    def __init__(self):
        self.model = Program(self._model, prior=numbers(2, seed=1), table=numbers(2, 2, seed=2), means=numbers(2, 2, seed=3))
        self.guide = Program(self._guide, first=numbers(2, seed=4), second=numbers(2, 2, seed=5))

    @staticmethod
    def _model(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            c1 = pyro.sample("c1", dist.Categorical(logits=p.prior))
            c2 = pyro.sample("c2", dist.Categorical(logits=p.table[c1]))
            pyro.sample("x", dist.Normal(p.means[c1, c2], 1.0), obs=x)

    @staticmethod
    def _guide(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            c1 = pyro.sample("c1", dist.Categorical(logits=p.first))
            pyro.sample("c2", dist.Categorical(logits=p.second[c1]))

    def densities(self, x, classes, noise):
        m, g, (c1, c2) = self.model, self.guide, classes
        p = m.prior.log_softmax(-1)[c1] + m.table.log_softmax(-1)[c1, c2]
        q = g.first.log_softmax(-1)[c1] + g.second.log_softmax(-1)[c1, c2]
        return normal_fit(x, m.means[c1, c2], 0.0), p, q, q


class ClassThenGaussian:
    """c ~ Categorical, z given c Gaussian, with score and path in one gradient."""

    sizes, num_normals = (2,), 1

    def __init__(self):
        self.model = Program(self._model, prior=numbers(2, seed=1), locs=numbers(2, seed=2), w=1.3)
        self.guide = Program(self._guide, logits=numbers(2, seed=3), gains=numbers(2, seed=4), log_t=[-0.3, 0.1])

    @staticmethod
    def _model(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            c = pyro.sample("c", dist.Categorical(logits=p.prior))
            z = pyro.sample("z", dist.Normal(p.locs[c], 1.0))
            pyro.sample("x", dist.Normal(p.w * z, 1.0), obs=x)

    @staticmethod
    def _guide(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            c = pyro.sample("c", dist.Categorical(logits=p.logits))
            pyro.sample("z", dist.Normal(p.gains[c] * x, p.log_t.exp()[c]))

    def densities(self, x, classes, noise):
        m, g, (c,), (eps,) = self.model, self.guide, classes, noise
        z = g.gains[c] * x + g.log_t.exp()[c] * eps
        log_c = g.logits.log_softmax(-1)[c]
        prior = m.prior.log_softmax(-1)[c] + log_normal(z, m.locs[c], tensor(0.0))
        return normal_fit(x, m.w * z, 0.0), prior, log_c + log_normal(z, g.gains[c] * x, g.log_t[c]), log_c


class GaussianThenClass:
    """z Gaussian, c given z by score: log q(c|z) moves with the draw z as well."""

    sizes, num_normals = (2,), 1

    def __init__(self):
        self.model = Program(self._model, prior=0.3, shift=0.8, w=1.3)
        self.guide = Program(self._guide, gain=0.4, log_t=-0.3, slope=0.9, logit=-0.4)

    @staticmethod
    def _model(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            c = pyro.sample("c", dist.Bernoulli(logits=p.prior * z))
            pyro.sample("x", dist.Normal(p.w * z + p.shift * c, 1.0), obs=x)

    @staticmethod
    def _guide(p, x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(p.gain * x, p.log_t.exp()))
            pyro.sample("c", dist.Bernoulli(logits=p.slope * z + p.logit))

    def densities(self, x, classes, noise):
        m, g, (c,), (eps,) = self.model, self.guide, classes, noise
        z = g.gain * x + g.log_t.exp() * eps
        sign = 2 * c.to(F64) - 1
        log_c = (sign * (g.slope * z + g.logit)).sigmoid().log()
        prior = log_normal(z, 0.0, tensor(0.0)) + (sign * m.prior * z).sigmoid().log()
        return normal_fit(x, m.w * z + m.shift * c, 0.0), prior, log_c + log_normal(z, g.gain * x, g.log_t), log_c


CLASS_PAIRS = [Coins, ThreeClasses, ChainOfClasses, ClassThenGaussian, GaussianThenClass]


def enumerate_tuples(pair, num_particles, num_nodes=12):
    """Classes (S, K, M), noise (S', K, M) and quadrature weights (M,): all tuples times all nodes."""
    flat = [range(n) for n in pair.sizes for _ in range(num_particles)]
    tuples = torch.tensor(list(itertools.product(*flat))).T
    num_normals = getattr(pair, "num_normals", 0)
    nodes, weights = gauss_hermite(num_nodes, num_normals * num_particles) if num_normals else (None, tensor([1.0]))
    num_tuples, num_weights = tuples.shape[1], len(weights)
    classes = tuples.repeat_interleave(num_weights, 1).reshape(len(pair.sizes), num_particles, -1)
    noise = [] if nodes is None else nodes.repeat(1, num_tuples).reshape(num_normals, num_particles, -1)
    return classes, noise, weights.repeat(num_tuples)


def score_gradients(pair, num_particles, beta=1.0, **options):
    """Loss and gradients of the objective and by enumeration."""
    classes, noise, weights = enumerate_tuples(pair, num_particles)
    x = torch.full(weights.shape, X, dtype=F64)
    fit, prior, log_q, log_classes = pair.densities(x, classes, noise)
    probability = weights * log_classes.sum(0).exp()
    bound = log_mean_exp(fit + beta * (prior - log_q))
    loss = -(probability * bound).sum()
    objective = pv.ImportanceWeightedELBO(beta, num_particles=num_particles, **options)
    # The order in which the discrete sites are drawn is that of `classes`, likewise the normal ones.
    args = x, probability.detach()
    found = run(objective, pair.model, pair.guide, *args, normals=list(noise), classes=list(classes))
    return found, (loss.detach(), gradients(loss, pair.model, pair.guide))


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("num_particles", [1, 2, 3])
@pytest.mark.parametrize("pair", CLASS_PAIRS)
def test_the_score_function_is_enumeration_of_all_tuples(pair, num_particles, beta):
    if num_particles == 3 and hasattr(pair, "num_normals"):
        pytest.skip("six dimensions of nodes")
    (loss, found), (bound, wanted) = score_gradients(pair(), num_particles, beta)
    assert_close(loss, bound)
    assert_gradients(found, wanted)


def test_pyro_has_no_score_function_where_this_has_one():
    """The guide's gradient is far from zero there, and of the right sign for the posterior."""
    (_, found), _ = score_gradients(Coins(), 2)
    assert abs(float(found["1.logit"])) > 0.01


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_mask_takes_a_datum_out_of_the_score(num_particles):
    """Half of the data masked in model and guide: the gradient is that of the others."""
    pair = Coins()
    classes, noise, _ = enumerate_tuples(pair, num_particles)
    x = torch.full(classes.shape[-1:], X, dtype=F64)
    fit, prior, log_q, log_c = pair.densities(x, classes, noise)
    probability = log_c.sum(0).exp()
    kept = torch.arange(len(x)) % 2 == 0
    loss = -(probability * log_mean_exp(fit + prior - log_q))[kept].sum()
    # Half of the tuples has no closed form as a mean: the score of each tuple by hand.
    log_w = (fit + prior - log_q).detach()
    others = [
        log_mean_exp(torch.cat([log_w[:k], log_w[k + 1 :]])) if num_particles > 1 else torch.zeros_like(x)
        for k in range(num_particles)
    ]
    signal = log_mean_exp(log_w) - torch.stack(others)
    by_hand = probability.detach() * (log_mean_exp(fit + prior - log_q) + (signal * log_c).sum(0))

    def masked(function):
        def program(p, x, scale):
            with poutine.mask(mask=kept):
                function(p, x, scale)

        return program

    model = Program(masked(pair._model), **{n: w.detach() for n, w in pair.model.named_parameters()})
    guide = Program(masked(pair._guide), **{n: w.detach() for n, w in pair.guide.named_parameters()})
    objective = pv.ImportanceWeightedELBO(num_particles=num_particles)
    value, found = run(objective, model, guide, x, probability.detach(), classes=list(classes))
    assert_close(value, loss)
    assert_gradients(found, gradients(-by_hand[kept].sum(), pair.model, pair.guide))


def test_the_baseline_lowers_the_variance_of_the_score():
    """Per tuple, by the weights of the enumeration: with the others as baseline the second moment is below that without."""
    pair = ThreeClasses()
    classes, noise, _ = enumerate_tuples(pair, 3)
    x = torch.full(classes.shape[-1:], X, dtype=F64)
    fit, prior, log_q, log_c = pair.densities(x, classes, noise)
    log_w, probability = (fit + prior - log_q).detach(), log_c.sum(0).exp().detach()
    onehot = torch.nn.functional.one_hot(classes[0], 3).to(F64)
    score = onehot - pair.guide.logits.softmax(-1).detach()  # (K, M, 3)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=p.logits))

    def model(p, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=p.prior))
            pyro.sample("x", dist.Normal(p.means[c], 1.0), obs=x)

    model = Program(model, **{n: w.detach() for n, w in pair.model.named_parameters()})
    per_datum = Program(guide, logits=pair.guide.logits.detach().expand(len(x), 3))
    _, found = run(pv.ImportanceWeightedELBO(num_particles=3), model, per_datum, x, classes=list(classes))
    plain = (log_w.softmax(0)[..., None] * score).sum(0) - (log_mean_exp(log_w)[:, None, None] * score.transpose(0, 1)).sum(
        1
    )
    second = [(probability[:, None] * g.square()).sum() for g in (found["1.logits"], plain)]
    means = [(probability[:, None] * g).sum(0) for g in (found["1.logits"], plain)]
    assert_close(*means)
    assert float(second[0]) < 0.7 * float(second[1])


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("pair", [Coins, ClassThenGaussian])
def test_draws_without_a_path_are_refused_along_the_path(pair, gradient):
    pair = pair()
    args = numbers(3), torch.ones(3, dtype=F64)
    with pytest.raises(StructureError, match=r"'c'.*not reparameterised.*gradient='standard'"):
        pv.ImportanceWeightedELBO(gradient=gradient).loss_and_grads(pair.model, pair.guide, *args)
    assert all(w.grad is None for w in pair.model.parameters())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_discrete_draws_from_the_prior_have_a_score_of_the_model(gradient):
    """c is drawn by the model (prior_sites): its log p cancels in the weight, and without a score term in the gradient its
    parameter would never learn. K = 1, by hand; z ~ q, so the score is all there is. One false alarm in 15,000."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=p.prior.expand(len(x))))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(p.g * x, 1.0))

    num_data, datum, blocks = 20_000, 0.8, []
    pair = Program(model, prior=0.3), Program(guide, g=0.2)
    objective = pv.ImportanceWeightedELBO(num_particles=1, gradient=gradient, prior_sites=["c"])
    torch.manual_seed(2)
    for _ in range(20):
        pair[0].prior.grad = None
        objective.loss_and_grads(*pair, torch.full((num_data,), datum, dtype=F64))
        blocks.append(-pair[0].prior.grad / num_data)
    blocks = torch.stack(blocks)
    std_error = blocks.std() / len(blocks) ** 0.5
    # E_q[log p(z|c) + log p(x|z, c)] at c = 1 less that at c = 0, the terms in common left out.
    loc = 0.2 * datum
    gain = 0.5 * (loc**2 - (loc - 1) ** 2) + 0.5 * ((datum - loc) ** 2 - (datum - loc - 1) ** 2)
    share = torch.tensor(0.3, dtype=F64).sigmoid()
    assert std_error < 0.005
    assert abs(blocks.mean() - share * (1 - share) * gain) < 4 * std_error


def test_latents_of_all_data_are_refused_with_any_gradient():
    def model(p, x):
        t = pyro.sample("t", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(t, 1.0), obs=x)

    def guide(p, x):
        pyro.sample("t", dist.Normal(p.loc, p.log_t.exp()))

    pair = Program(model), Program(guide, loc=0.1, log_t=-0.7)
    for gradient in GRADIENTS:
        with pytest.raises(GlobalLatentError):
            pv.ImportanceWeightedELBO(gradient=gradient).loss_and_grads(*pair, numbers(3))
        objective = pv.ImportanceWeightedELBO(gradient=gradient, datum_plate=None)
        assert math.isfinite(objective.loss_and_grads(*pair, numbers(3)))
