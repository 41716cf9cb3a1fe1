"""TotalCorrelationELBO: its parts against enumeration, closed forms and quadrature, its gradient, refusals, forms."""

import copy
import io
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, SIGMAS
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import EnumerationError, MaskError, OptionError, ScheduleWarning, StructureError
from pyro_vae.objectives import TotalCorrelationELBO
from pyro_vae.objectives.total_correlation_elbo import split

PARTS = ("mutual_information", "total_correlation", "dimension_wise")


def pair_of(family, prior=None, observe=True, plate=None):
    """A guide that draws z from family(x) and a model with prior(x), standard normal by default, and x ~ N(sum z, 1)."""
    prior = prior or (lambda x: unit_normal(family(x)))
    plate = plate or (lambda x: pyro.plate("data", len(x)))

    def model(x):
        with plate(x):
            z = pyro.sample("z", prior(x))
            z = z.flatten(1).sum(-1) if z.dim() > 1 else z
            pyro.sample("x", dist.Normal(z if observe else torch.zeros_like(z), 1.0).mask(observe), obs=x.flatten(1).sum(-1))

    def guide(x):
        with plate(x):
            pyro.sample("z", family(x))

    return model, guide


def unit_normal(fn):
    base = dist.Normal(torch.zeros(fn.shape(), dtype=fn.mean.dtype), 1.0)
    return base.to_event(fn.event_dim) if fn.event_dim else base


def parts_of(pair, x, objective=None, **options):
    """The three parts of one call, which sum to the sampled KL."""
    objective = objective or TotalCorrelationELBO(**{"dataset_size": len(x), **options})
    objective.loss(*pair, x)
    found = objective.decomposition
    assert all(not getattr(found, name).requires_grad and not getattr(found, name).dim() for name in PARTS)
    parts = torch.stack([getattr(found, name) for name in PARTS])
    torch.testing.assert_close(parts.sum(), objective.terms.per_datum().kl_sum, rtol=1e-5, atol=1e-5)
    return parts


def repeated(pair, x, times, **options):
    """Mean and standard error of the parts over calls."""
    objective = TotalCorrelationELBO(**{"dataset_size": len(x), **options})
    found = torch.stack([parts_of(pair, x, objective) for _ in range(times)])
    return found.mean(0), found.std(0) / times**0.5


def assert_parts(mean, std_error, truth, largest_error):
    """Two-sided at 4.5 standard errors: a false alarm in 5e4 for three parts (7e-6 each)."""
    assert float(std_error.max()) <= largest_error, f"blunt: {std_error}"
    z = (mean - truth).abs() / (std_error + 1e-12)
    assert float(z.max()) <= SIGMAS, f"{mean} +- {std_error}, truth {truth}"


# Values: enumeration


def two_bits(num_each=100):
    """q(z_j = 1|x_n) in tenths for four data, each repeated so that the shares of the four states are whole numbers."""
    probs = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.8, 0.7], [0.5, 0.9]], dtype=F64)
    design = []
    for p in probs:
        for state in itertools.product((0.0, 1.0), repeat=2):
            share = torch.where(torch.tensor(state, dtype=F64) == 1, p, 1 - p).prod()
            design += [state] * round(float(share) * num_each)
    return probs, probs.repeat_interleave(num_each, 0), torch.tensor(design, dtype=F64)


def exact_bits(probs, prior):
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=F64)
    by_bit = torch.where(states[:, None] == 1, probs, 1 - probs)  # (4 states, N, 2)
    joint = by_bit.prod(-1)
    q, q_bits = joint.mean(1), by_bit.mean(1).prod(-1)
    p = torch.where(states == 1, prior, 1 - prior).prod(-1)
    return torch.stack(
        [
            (joint * (joint.log() - q.log()[:, None])).sum(0).mean(),
            (q * (q / q_bits).log()).sum(),
            (q * (q_bits / p).log()).sum(),
        ]
    )


def test_two_bits_by_enumeration(monkeypatch):
    """Every part and the loss, exactly: the data repeat, and their draws take every state as often as q says."""
    probs, x, design = two_bits()
    monkeypatch.setattr(
        dist.Bernoulli, "sample", lambda self, shape=(): design.expand(self.shape(torch.Size(shape))).clone()
    )
    prior = torch.tensor([0.3, 0.4], dtype=F64)
    pair = pair_of(
        lambda x: dist.Bernoulli(x).to_event(1), lambda x: dist.Bernoulli(prior.expand(len(x), 2)).to_event(1), False
    )
    truth = exact_bits(probs, prior)
    assert float(truth.min()) > 0.03
    torch.testing.assert_close(parts_of(pair, x), truth, rtol=1e-10, atol=1e-10)
    objective = TotalCorrelationELBO(dataset_size=len(x), beta=4.0, mutual_information=0.5, dimension_wise=2.0)
    expected = len(x) * float(torch.tensor([0.5, 4.0, 2.0], dtype=F64) @ truth)
    assert objective.loss(*pair, x) == pytest.approx(expected, rel=1e-10)


# Values: Gaussians


def normal_family(scale):
    return lambda x: dist.Normal(x, scale).to_event(1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("num_data", [2, 7, 64])
def test_separated_means_hold_log_n_nats(num_data, dtype):
    """Also by dimension where every dimension tells the data apart: TC = (D - 1) log N."""
    x = 100.0 * torch.arange(num_data, dtype=dtype).unsqueeze(-1).expand(-1, 3)
    mi, tc, _ = parts_of(pair_of(normal_family(0.5)), x)
    assert mi.dtype == dtype
    assert float(mi) == pytest.approx(math.log(num_data), abs=1e-6)
    assert float(tc) == pytest.approx(2 * math.log(num_data), abs=1e-5)
    # Of a larger data set, the batch then says that the draws are apart from all others.
    assert float(parts_of(pair_of(normal_family(0.5)), x, dataset_size=10**6)[0]) == pytest.approx(math.log(1e6), abs=1e-5)


@pytest.mark.parametrize("dataset_size", [9, 500])
def test_a_guide_equal_to_the_prior_holds_nothing(dataset_size):
    x = torch.randn(9, 2, dtype=F64)
    parts = parts_of(pair_of(lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1)), x, dataset_size=dataset_size)
    torch.testing.assert_close(parts, torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)


def lattice(num_points, cholesky):
    """Means that are spread like a Gaussian with this Cholesky factor (a rank-one lattice through the quantiles)."""
    k = torch.arange(num_points, dtype=F64) + 0.5
    u = torch.stack([k / num_points, (k * (5**0.5 - 1) / 2) % 1.0], -1)
    return torch.special.ndtri(u) @ cholesky.T


def test_a_correlated_gaussian_aggregated_posterior():
    """q(z) = N(0, S): TC = -1/2 log(1 - rho^2), MI = 1/2 log |S| / v^2, the rest is sum_j KL(N(0, S_jj) || N(0, 1))."""
    v = 0.6
    spread = torch.tensor([[1.6, 1.0], [1.0, 0.9]], dtype=F64)
    x = lattice(700, torch.linalg.cholesky(spread))
    s = spread + v * torch.eye(2, dtype=F64)
    rho2 = s[0, 1] ** 2 / (s[0, 0] * s[1, 1])
    variances = s.diagonal()
    truth = torch.stack(
        [
            0.5 * (torch.logdet(s) - 2 * math.log(v)),
            -0.5 * (1 - rho2).log(),
            0.5 * (variances - 1 - variances.log()).sum(),
        ]
    )
    mean, std_error = repeated(pair_of(normal_family(v**0.5)), x, 30)
    # By quadrature, the mixture at these 700 means is within 0.0006 nats of the Gaussian in each part.
    assert_parts(mean, std_error, truth, largest_error=0.006)


def test_two_overlapping_gaussians_against_quadrature():
    x, scale = torch.tensor([[-0.6], [0.8]], dtype=F64), 0.7
    z = torch.linspace(-9, 9, 20001, dtype=F64)
    q = dist.Normal(x, scale).log_prob(z).exp()  # (2, grid)
    aggregated = q.mean(0)

    def integral(f):
        return torch.trapezoid(f, z)

    mi = integral(q * (q / aggregated).log()).mean()
    dw = integral(aggregated * (aggregated.log() - dist.Normal(0.0, 1.0).log_prob(z)))
    truth = torch.stack([mi, torch.zeros((), dtype=F64), dw])
    pair, many = pair_of(normal_family(scale)), x.repeat(250, 1)  # the same aggregated posterior, more draws
    mean, std_error = repeated(pair, many, 40)
    assert_parts(mean, std_error, truth, largest_error=0.006)
    assert abs(float(mean[1])) < 1e-12  # one dimension has no total correlation


@pytest.mark.parametrize("seed", range(5))
def test_the_information_is_never_above_log_n(seed):
    pyro.set_rng_seed(seed)
    x = 3 * torch.randn(16, 8)
    for dataset_size in (16, 17, 1000):
        mi = parts_of(pair_of(normal_family(0.02)), x, dataset_size=dataset_size)[0]
        assert float(mi) <= math.log(dataset_size) * (1 + 1e-6)
    assert float(mi) > math.log(900)


# The loss by hand


def double_normal(loc, scale):
    return dist.Normal(torch.as_tensor(loc, dtype=F64), torch.tensor(scale, dtype=F64))


def by_hand(z, locs, scales, x, log_prior, num_data, weights):
    """Plain loops over the data: z and locs (B, D)."""
    size, total, parts = len(z), 0.0, torch.zeros(3, dtype=F64)
    for i in range(size):
        log_q = dist.Normal(locs, scales).log_prob(z[i])  # (B, D)
        share = torch.full((size,), (num_data - 1) / (num_data * (size - 1)), dtype=F64)
        share[i] = 1 / num_data
        q = (share * log_q.sum(-1).exp()).sum()
        q_dims = (share[:, None] * log_q.exp()).sum(0)
        split_kl = torch.stack([log_q[i].sum() - q.log(), q.log() - q_dims.log().sum(), q_dims.log().sum() - log_prior[i]])
        parts += split_kl
        total = total - double_normal(z[i].sum(), 1.0).log_prob(x[i]) + (torch.tensor(weights, dtype=F64) * split_kl).sum()
    return total, parts / size


@pytest.mark.parametrize("reads", [False, True], ids=["leading", "loop"])
@pytest.mark.parametrize("num_data", [4, 50])
def test_two_latent_sites_and_an_inner_plate_by_hand(num_data, reads):
    """(2 steps + 3 elements) = five dimensions of two sites, the draws taken from the guide."""
    x = torch.randn(4, dtype=F64)
    scale_b = torch.tensor([0.4, 0.9, 1.3], dtype=F64, requires_grad=True)
    slope = torch.tensor(0.7, dtype=F64, requires_grad=True)
    seen = {}

    def guide(x):
        with pyro.plate("data", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(slope * x.unsqueeze(-1).expand(4, 3), scale_b).to_event(1))
            with pyro.plate("steps", 2, dim=-2):
                a = pyro.sample("a", dist.Normal(x - slope, 0.6))
                if reads:
                    float(a.detach().sum())
        seen.update(a=a, b=b)

    def model(x):
        with pyro.plate("data", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(torch.zeros(3, dtype=F64), 2.0).to_event(1))
            with pyro.plate("steps", 2, dim=-2):
                a = pyro.sample("a", dist.Normal(torch.ones((), dtype=F64), 1.5))
            pyro.sample("x", dist.Normal(a.sum(-2) + b.sum(-1), 1.0), obs=x)

    weights = (0.5, 3.0, 1.7)
    objective = TotalCorrelationELBO(
        dataset_size=num_data, beta=3.0, mutual_information=0.5, dimension_wise=1.7, datum_plate="data"
    )
    objective.loss(model, guide, x)  # rehearses
    loss = objective.differentiable_loss(model, guide, x)
    a, b = seen["a"].reshape(2, 4).T, seen["b"].reshape(4, 3)
    z = torch.cat([b, a], -1)
    locs = torch.cat([slope * x[:, None].expand(4, 3), (x - slope)[:, None].expand(4, 2)], -1)
    scales = torch.cat([scale_b, torch.full((2,), 0.6, dtype=F64)])
    log_prior = double_normal(0.0, 2.0).log_prob(b).sum(-1) + double_normal(1.0, 1.5).log_prob(a).sum(-1)
    expected, parts = by_hand(z, locs, scales, x, log_prior, num_data, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-10)
    found = torch.stack([getattr(objective.decomposition, name) for name in PARTS])
    torch.testing.assert_close(found, parts, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad(f, (slope, scale_b), retain_graph=True) for f in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    terms = objective.terms
    assert terms.beta == 3.0 and terms.plates == {"data": 4} and set(terms.kl) == {"a", "b"}
    torch.testing.assert_close(terms.loss, loss.detach())
    torch.testing.assert_close(terms.kl_sum, 4 * parts.sum().detach())
    torch.testing.assert_close(terms.elbo, (double_normal(z.sum(-1), 1.0).log_prob(x).sum() - 4 * parts.sum()).detach())


# With all weights one


def vae_and_data(dtype=F64, num_data=12, seed=0):
    torch.manual_seed(seed)
    vae = pv.mlp_vae(5, latent_dim=3, likelihood=pv.nn.Normal(), hidden=(8,)).to(dtype)
    return vae, torch.randn(num_data, 5, dtype=dtype)


@pytest.mark.parametrize("dataset_size", [12, 1000])
def test_with_weights_of_one_it_is_the_elbo(dataset_size):
    """Value and gradient of BetaTrace_ELBO under the same seed."""
    vae, x = vae_and_data()
    found = []
    for objective in (TotalCorrelationELBO(dataset_size=dataset_size, beta=1.0), pv.BetaTrace_ELBO()):
        objective.loss(vae.model, vae.guide, x)
        vae.zero_grad()
        pyro.set_rng_seed(1)
        loss = objective.loss_and_grads(vae.model, vae.guide, x)
        found.append((loss, [p.grad.clone() for p in vae.parameters()], float(objective.terms.elbo)))
    (ours, our_grads, our_elbo), (theirs, their_grads, their_elbo) = found
    assert ours == pytest.approx(theirs, abs=1e-10) and our_elbo == pytest.approx(their_elbo, abs=1e-10)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# Gradients


def quadrature_loss(x, slope, log_scale, weights, width=7.0, points=241):
    """Loss per datum without the reconstruction, by a grid over z: D = 1 or 2 dimensions, x (N, D)."""
    grid = torch.linspace(-width, width, points, dtype=F64)
    axes = torch.meshgrid(*[grid] * x.shape[1], indexing="ij")
    z = torch.stack([a.flatten() for a in axes], -1)  # (G, D)
    cell = (grid[1] - grid[0]) ** x.shape[1]
    log_q = dist.Normal(x @ slope, log_scale.exp()).log_prob(z.unsqueeze(1))  # (G, N, D)
    joint = log_q.sum(-1)
    log_agg = joint.logsumexp(1) - math.log(len(x))
    log_dims = (log_q.logsumexp(1) - math.log(len(x))).sum(-1)
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    agg = log_agg.exp()
    parts = (
        (joint.exp() * (joint - log_agg.unsqueeze(1))).mean(1).sum() * cell,
        (agg * (log_agg - log_dims)).sum() * cell,
        (agg * (log_dims - log_prior)).sum() * cell,
    )
    return sum(w * part for w, part in zip(weights, parts, strict=True))


@pytest.mark.parametrize("dim", [1, 2])
def test_the_gradient_is_that_of_quadrature(dim):
    """B = N, mean over 60 calls of 300 draws; for 2 to 6 numbers a false alarm in 2e4 (7e-6 each)."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, dim, generator=generator, dtype=F64)
    slope = (torch.eye(dim, dtype=F64) + 0.4).requires_grad_()
    log_scale = torch.full((dim,), -0.5, dtype=F64, requires_grad=True)
    weights = (0.5, 5.0, 2.0)
    exact = quadrature_loss(x, slope, log_scale, weights)
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(exact, (slope, log_scale))])
    pair = pair_of(lambda x: dist.Normal(x @ slope, log_scale.exp()).to_event(1), observe=False)
    objective = TotalCorrelationELBO(dataset_size=300, beta=5.0, mutual_information=0.5, dimension_wise=2.0)
    many = x.repeat(100, 1)
    losses, gradients = [], []
    for _ in range(60):
        loss = objective.differentiable_loss(*pair, many) / 300
        losses.append(loss.detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (slope, log_scale))]))
    found = torch.stack([torch.cat([loss.reshape(1), g]) for loss, g in zip(losses, gradients, strict=True)])
    mean, std_error = found.mean(0), found.std(0) / 60**0.5
    assert float(truth.abs().min()) > 0.05  # no number that zero would pass for
    assert_parts(mean, std_error, torch.cat([exact.detach().reshape(1), truth]), largest_error=0.03)


def test_a_large_beta_makes_the_dimensions_independent():
    """A guide that may turn its two dimensions: with equal reconstruction, the total correlation goes."""
    x = lattice(200, torch.linalg.cholesky(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)))
    angle = torch.zeros((), dtype=F64, requires_grad=True)

    def family(x):
        turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        return dist.Normal(x @ turn, 0.3).to_event(1)

    pair = pair_of(family, observe=False)
    objective = TotalCorrelationELBO(dataset_size=200, beta=10.0)
    before = parts_of(pair, x)[1]
    optimizer = torch.optim.Adam([angle], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss_and_grads(*pair, x)
        optimizer.step()
    assert float(before) > 0.4 and abs(float(parts_of(pair, x)[1])) < 0.1
    assert abs(float(angle.detach())) == pytest.approx(math.pi / 4, abs=0.1)


# Plates and scales


def test_linear_in_the_scale_of_a_subsampled_plate():
    vae, x = vae_and_data(num_data=40)
    rows = torch.tensor([3, 1, 4, 15, 9, 2])

    def run(plate, data):
        pair = (
            lambda x: program(x, vae.decoder, plate),
            lambda x: encode(x, vae.encoder, plate),
        )
        objective = TotalCorrelationELBO(dataset_size=40, beta=4.0, mutual_information=0.3)
        objective.loss(*pair, data)
        pyro.set_rng_seed(3)
        return objective.loss(*pair, data), objective

    def encode(x, encoder, plate):
        with plate(x):
            pyro.sample("z", encoder(x))

    def program(x, decoder, plate):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", decoder(z), obs=x)

    def plain(x):
        return pyro.plate("data", len(x))

    def subsampled(x):
        return pyro.plate("data", 40, subsample=rows)

    (whole, a), (part, b) = run(plain, x[rows]), run(subsampled, x[rows])
    assert part == pytest.approx(40 / 6 * whole, rel=1e-12)
    assert (a.terms.plates, b.terms.plates) == ({"data": 6}, {"data": 40})
    torch.testing.assert_close(a.terms.per_datum().kl_sum, b.terms.per_datum().kl_sum)
    for name in PARTS:
        torch.testing.assert_close(getattr(a.decomposition, name), getattr(b.decomposition, name))


def test_a_plate_that_draws_its_own_subsample_and_one_without_a_size():
    x = torch.randn(30, dtype=F64)

    def subsampled(x, observe):
        with pyro.plate("data", 30, subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(x[rows] if not observe else torch.zeros(5, dtype=F64), 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    objective = TotalCorrelationELBO(dataset_size=30)
    assert math.isfinite(objective.loss(lambda x: subsampled(x, True), lambda x: subsampled(x, False), x))
    assert objective.terms.plates == {"data": 30}
    unsized = pair_of(normal_family(0.5), plate=lambda x: pyro.plate("data", dim=-1))
    parts_of(unsized, torch.randn(6, 2, dtype=F64), dataset_size=20)


def test_a_scale_of_the_whole_pair_scales_the_loss_and_not_the_parts():
    pair, x = pair_of(normal_family(0.5)), torch.randn(6, 2, dtype=F64)
    scaled = [poutine.scale(program, scale=3.0) for program in pair]
    found = []
    for programs in (pair, scaled):
        objective = TotalCorrelationELBO(dataset_size=9, beta=2.0)
        objective.loss(*programs, x)
        pyro.set_rng_seed(0)
        found.append((objective.loss(*programs, x), float(objective.decomposition.mutual_information)))
    assert found[1] == pytest.approx((3 * found[0][0], found[0][1]))
    weighted = [poutine.scale(program, scale=torch.arange(1.0, 7.0, dtype=F64)) for program in pair]
    with pytest.raises(StructureError, match="the data have different scales.*by one number"):
        TotalCorrelationELBO(dataset_size=9).loss(*weighted, x)


def test_a_mixture_prior_whose_component_the_model_sums_out():
    """The same numbers as with the prior written as a mixture: sites that the model enumerates are summed out."""
    x = torch.randn(6, dtype=F64)
    weights, locs = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([-1.0, 2.0], dtype=F64)

    def enumerated(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(locs[y], 0.8))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def mixture(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 0.8)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = pair_of(lambda x: dist.Normal(x, 0.4))[1]
    found = []
    for model in (enumerated, mixture):
        objective = TotalCorrelationELBO(dataset_size=20, beta=3.0, dimension_wise=2.0)
        objective.loss(model, guide, x)
        pyro.set_rng_seed(0)
        loss, parts = objective.loss(model, guide, x), objective.decomposition
        found.append([loss, *(float(getattr(parts, name)) for name in PARTS), float(objective.terms.elbo)])
    assert found[0] == pytest.approx(found[1], rel=1e-10)


# Refusals


def make(**options):
    return TotalCorrelationELBO(**{"dataset_size": 6, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_size": 0}, "dataset_size must be a whole number of at least 2"),
        ({"dataset_size": 1}, "dataset_size must be a whole number of at least 2"),
        ({"dataset_size": 60.0}, "dataset_size must be a whole number of at least 2.*60.0"),
        ({"dataset_size": True}, "dataset_size must be a whole number of at least 2"),
        ({"beta": -1.0}, "beta must be finite and >= 0"),
        ({"beta": {"z": 2.0}}, "beta must be one weight"),
        ({"mutual_information": math.nan}, "mutual_information must be finite and >= 0"),
        ({"dimension_wise": "1"}, "dimension_wise must be a number"),
        ({"dimension_wise": torch.ones(2)}, "dimension_wise must be a number or a tensor without dimensions"),
    ],
)
def test_options_are_checked_when_it_is_made(options, message):
    with pytest.raises(OptionError, match=message):
        make(**options)


def test_sizes_that_do_not_fit():
    pair, x = pair_of(normal_family(0.5)), torch.randn(6, 2)
    with pytest.raises(OptionError, match="dataset_size=5 is smaller than the batch of 6"):
        make(dataset_size=5).loss(*pair, x)
    subsampled = pair_of(normal_family(0.5), plate=lambda x: pyro.plate("data", 40, subsample=torch.arange(6)))
    with pytest.raises(OptionError, match="plate 'data' holds 40 data, but dataset_size=41"):
        make(dataset_size=41).loss(*subsampled, x)
    for other in ({"x": x[:1]}, {"x": x, "datum_plate": None}):
        data = other.pop("x")
        with pytest.raises(StructureError, match="the call has one datum.*at least 2"):
            make(**other).loss(*pair, data)
    objective = make()
    objective.loss(*pair, x)
    assert objective.decomposition is not None
    with pytest.raises(StructureError):
        objective.loss(*pair, x[:1])
    assert objective.decomposition is None and objective.terms is None
    with pytest.raises(OptionError, match="beta must be one weight"):
        objective.beta = {"z": 1.0}
        objective.loss(*pair, x)


def flow(x):
    turn = dist.transforms.LowerCholeskyAffine(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
    return dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), [turn])


def hierarchical(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))


def hierarchical_model(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def test_guides_whose_dimensions_have_no_density_of_their_own():
    x = torch.randn(6, 2)
    for family in (lambda x: dist.MultivariateNormal(x, torch.eye(2)), flow):
        with pytest.raises(StructureError, match=r"have no known densities.*Normal\(loc, scale\).to_event\(1\)"):
            make().loss(*pair_of(family, lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1)), x)
    with pytest.raises(StructureError, match=r"draws 'b' given 'a', so the density q\(b\|x\) is not known"):
        make().loss(hierarchical_model, hierarchical, x[:, 0])


def with_factor(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
        pyro.factor("jacobian", x[:, 0], has_rsample=True)


def test_draws_that_come_with_a_factor():
    model = pair_of(normal_family(1.0))[0]
    with pytest.raises(StructureError, match="'jacobian'.*is not a latent that is drawn from a density"):
        make().loss(model, with_factor, torch.randn(6, 2))


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta])
def test_autoguides(auto):
    model, _ = pair_of(normal_family(1.0))
    with pytest.raises(StructureError):
        make().loss(model, auto(model), torch.randn(6, 2))


def test_no_latents_at_all():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(StructureError, match="share no latent"):
        make().loss(model, lambda x: None, torch.randn(6))


def test_masks():
    """Of observations: what is missing has no reconstruction. Of latents: refused, on either side and inside an event."""
    x, present = torch.randn(6, 2, dtype=F64), torch.tensor([True, False, True, True, True, True])
    pair = pair_of(normal_family(0.5))
    for masked in ((0,), (0, 1)):
        programs = [poutine.mask(p, mask=present) if i in masked else p for i, p in enumerate(pair)]
        with pytest.raises(MaskError, match=r"latents 'z' are masked.*remove masked data"):
            make().loss(*programs, x)
    inside = torch.tensor([True, False]).expand(6, 2)
    family = lambda x: dist.Normal(x, 1.0).mask(inside).to_event(1)  # noqa: E731
    with pytest.raises(MaskError, match="the masked latents 'z' of data"):  # which the data read
        make().loss(*pair_of(family, lambda x: dist.Normal(torch.zeros_like(x), 1.0).mask(inside).to_event(1)), x)

    def partly(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0).mask(present), obs=x.sum(-1))

    objective = make(beta=1.0)
    objective.loss(partly, pair[1], x)
    pyro.set_rng_seed(0)
    ours = objective.loss(partly, pair[1], x)
    pyro.set_rng_seed(0)
    assert ours == pytest.approx(pv.BetaTrace_ELBO().loss(partly, pair[1], x), abs=1e-10)


def test_a_site_that_the_guide_enumerates():
    def program(x, observe):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), infer={} if observe else {"enumerate": "parallel"})
            if observe:
                pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    with pytest.raises(EnumerationError, match="the guide enumerates 'y'"):
        make().loss(lambda x: program(x, True), lambda x: program(x, False), torch.randn(6))


def test_draws_without_a_gradient_have_a_value_only():
    x = torch.rand(6, 2)
    pair = pair_of(lambda x: dist.Bernoulli(x).to_event(1), lambda x: dist.Bernoulli(torch.full_like(x, 0.5)).to_event(1))
    objective = make()
    assert math.isfinite(objective.loss(*pair, x))
    for method in (objective.loss_and_grads, objective.differentiable_loss):
        with pytest.raises(StructureError, match="'z' are not reparameterised"):
            method(*pair, x)


def test_a_support_that_moves_with_parameters():
    """Its edges would make the aggregated posterior jump, which no gradient along the draws sees."""
    width = torch.tensor(2.0, requires_grad=True)
    pair = pair_of(lambda x: dist.Uniform(x - width, x + width).to_event(1))
    x = torch.rand(6, 2)
    assert math.isfinite(make().loss(*pair, x))
    with pytest.raises(StructureError, match="support of the guide's site 'z' depends on parameters"):
        make().loss_and_grads(*pair, x)


# Forms


def test_svi_modules_and_weights_that_follow_schedules():
    vae, x = vae_and_data(torch.float32)
    ramp = pv.LinearAnnealing(num_steps=10)
    objective = TotalCorrelationELBO(
        dataset_size=12, beta=lambda step: 1.0 + step, mutual_information=ramp, dimension_wise=ramp
    )
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), objective)
    for step in range(4):
        svi.step(x)
        assert objective.terms.beta == 1.0 + step and objective.num_updates == step + 1
    for number in (0, 5):
        objective.num_updates = number
        pyro.set_rng_seed(0)
        loss = objective.loss(vae.model, vae.guide, x)
        parts, terms = objective.decomposition, objective.terms.per_datum()
        weights = (number / 10, 1.0 + number, number / 10)
        expected = -terms.reconstruction + sum(w * getattr(parts, n) for w, n in zip(weights, PARTS, strict=True))
        assert loss == pytest.approx(12 * float(expected), rel=1e-5)
    objective.mutual_information = lambda step: -1.0
    with pytest.raises(OptionError, match="mutual_information must be finite"):
        objective.loss(vae.model, vae.guide, x)


def test_a_schedule_that_stands_still_is_noticed():
    pair = pair_of(normal_family(torch.tensor(1.0, requires_grad=True)))
    objective = make(dimension_wise=pv.LinearAnnealing(num_steps=10))
    objective._calls_since_update = 499
    with pytest.warns(ScheduleWarning, match="num_updates has been 0"):
        objective.differentiable_loss(*pair, torch.randn(6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_as_a_module_under_an_optimiser_of_torch(dtype):
    vae, x = vae_and_data(dtype)
    beta = torch.tensor(2.0, dtype=F64)
    objective = TotalCorrelationELBO(dataset_size=100, beta=beta)
    module = objective(vae.model, vae.guide)
    module(x)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        objective.num_updates += 1
        losses.append(loss.detach())
    assert losses[0].dtype == dtype and losses[0].dim() == 0
    assert float(sum(losses[-5:])) < float(sum(losses[:5]))
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    assert module.state_dict()["_extra_state"] == {"num_updates": 30}
    beta.add_(1.0)
    assert float(objective.terms.beta) == 2.0  # that of the call


def test_a_convolutional_vae_in_training():
    vae = pv.conv_vae((1, 8, 8), 3, likelihood=pv.nn.Bernoulli(event_dim=3), channels=(4, 4))
    x = (torch.rand(7, 1, 8, 8) > 0.5).float()
    objective = TotalCorrelationELBO(dataset_size=1000)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), objective)
    losses = [svi.step(x) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_give_the_same_numbers(way):
    vae, x = vae_and_data()
    objective = TotalCorrelationELBO(dataset_size=50, beta=pv.LinearAnnealing(num_steps=10, end=4.0))
    objective.loss_and_grads(vae.model, vae.guide, x)
    if way == "deepcopy":
        other = copy.deepcopy(objective)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(objective))
    else:
        file = io.BytesIO()
        torch.save(objective, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.num_updates == 1 and other.decomposition is None and objective.decomposition is not None
    losses = []
    for one in (objective, other):
        pyro.set_rng_seed(0)
        losses.append(one.loss(vae.model, vae.guide, x))
    pyro.set_rng_seed(0)
    assert losses == [objective.loss(vae.model, vae.guide, x)] * 2


def test_the_value_leaves_no_gradient_and_the_parts_telescope_in_single_precision():
    vae, x = vae_and_data(torch.float32)
    objective = TotalCorrelationELBO(dataset_size=60_000, beta=1.0)
    objective.loss(vae.model, vae.guide, x)
    assert all(p.grad is None for p in vae.parameters())
    parts = parts_of((vae.model, vae.guide), x, dataset_size=60_000)
    assert parts.dtype == torch.float32


def test_split_gives_back_the_kl():
    log_q, kl = torch.randn(5, 5, 3, dtype=F64), torch.randn(5, dtype=F64)
    torch.testing.assert_close(sum(split(log_q, kl, 30)), kl)


class NormedGuide(nn.Module):
    """Two latents of one encoder that counts its runs, in a batch norm, and uses random numbers, in a dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)).double()

    def forward(self, x):
        loc = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(loc[:, :1], 0.5).to_event(1))
            pyro.sample("b", dist.Normal(loc[:, 1:], 0.7).to_event(1))


def two_latents(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(a + b, 1.0).to_event(1), obs=x)


def test_looking_at_the_guide_costs_no_random_number_and_no_update_of_a_buffer():
    """From the first call on, the encoder runs once a call, as under BetaTrace_ELBO."""
    x, guide = torch.randn(8, 2, dtype=F64), NormedGuide()
    found = []
    for objective in (TotalCorrelationELBO(dataset_size=50, beta=1.0), pv.BetaTrace_ELBO()):
        own = copy.deepcopy(guide)
        losses = []
        for seed in range(3):
            pyro.set_rng_seed(seed)
            losses.append(objective.loss_and_grads(two_latents, own, x))
        norm = own.net[1]
        assert int(norm.num_batches_tracked) == 3
        found.append((losses, norm.running_mean))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1])
