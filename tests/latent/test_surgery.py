"""`ELBOSurgery` against closed forms, quadrature, enumeration and brute force over all pairs of data."""

import json
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, assert_near, guide_of, one_line
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    EmptyBatchError,
    InvalidDataError,
    MaskError,
    NonFiniteError,
    OptionError,
    StructureError,
    SurgeryWarning,
)
from pyro_vae.latent import ELBOSurgery
from pyro_vae.ops import index_code_information

# Draws that are a function of the parameters are equal to one another, as are draws that floats cannot tell apart.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.errors.PrecisionWarning")

PARTS = ("kl", "mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl")


def operate(model, guide, x, batch_size=None, doubted=False, **options):
    """The record of one data set; a warning is an error unless `doubted`."""
    return of_data(ELBOSurgery(model, guide, **{"seed": 0, **options}), x, batch_size, doubted)


def of_data(estimator, x, batch_size=None, doubted=False):
    batches = [x] if batch_size is None else list(x.split(batch_size))
    with warnings.catch_warnings():
        if doubted:
            warnings.simplefilter("ignore", SurgeryWarning)
        return estimator(batches, progress=False)


def values_of(surgery):
    return torch.stack([getattr(surgery, name).value for name in PARTS])


def errors_of(surgery):
    return torch.stack([getattr(surgery, name).std_error for name in PARTS])


class Fixed(dist.Normal):
    """A normal whose draw is a function of its parameters, so that any batches share their draws."""

    def rsample(self, sample_shape=()):
        loc = self.loc.expand(tuple(sample_shape) + self.loc.shape)
        return loc + self.scale * torch.sin(37.0 * loc + 1.0)


def standard(dim):
    """A model with a standard normal latent 'z', read by a likelihood that no number here reads."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, :1])

    return model


def diagonal(dim, scale=0.5, family=dist.Normal):
    """q(z|x) = N(x, scale^2), x has as many columns as z."""
    return guide_of(lambda x: family(x[:, :dim], torch.as_tensor(scale, dtype=x.dtype)).to_event(1))


def data(num_data=23, dim=3, seed=1, dtype=F64):
    return torch.randn(num_data, dim, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def brute_force(log_q, log_prior):
    """The five parts from log q(z_i|x_j) by dimension, (N, N, D), and log p(z_i), (N,), the whole table at once."""
    num_data = len(log_q)
    joint = log_q.sum(-1)
    mixture = joint.logsumexp(1) - math.log(num_data)
    product = (log_q.logsumexp(1) - math.log(num_data)).sum(-1)
    own = joint.diagonal()
    return torch.stack(
        [
            (own - log_prior).mean(),
            (own - mixture).mean(),
            (mixture - log_prior).mean(),
            (mixture - product).mean(),
            (product - log_prior).mean(),
        ]
    )


def fixed_table(x, scale=0.5):
    """Draws of `Fixed` and log q(z_i|x_j) by dimension."""
    z = Fixed(x, torch.tensor(scale, dtype=x.dtype)).rsample()
    return z, dist.Normal(x, scale).log_prob(z.unsqueeze(1))


# --- closed forms ---


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_separate_data_have_log_n(dtype):
    """And say so: there may be more than log N. The total correlation of 16 points in a square is 0: log 16 = 2 log 4."""
    grid = torch.cartesian_prod(*[50.0 * torch.arange(4)] * 2).to(dtype)
    with pytest.warns(SurgeryWarning, match="too small to tell"):
        found = ELBOSurgery(standard(2), diagonal(2), seed=0)(list(grid.split(5)), progress=False)
    assert abs(float(found.mutual_information.value) - math.log(16)) < 1e-6
    assert abs(float(found.total_correlation.value)) < (1e-6 if dtype == F64 else 1e-3)
    assert found.ceiling and found.log_num_data == math.log(16) and "as far as these can show" in one_line(found)
    assert found.mutual_information.value.dtype == dtype


def test_two_overlapping_gaussians_equal_quadrature():
    """False alarm: two numbers at 4.5 errors."""
    loc, scale = 0.7, 0.9
    grid = torch.linspace(-12, 12, 20001, dtype=F64)
    sides = [dist.Normal(side * loc, scale) for side in (1.0, -1.0)]
    q = sum(side.log_prob(grid).exp() for side in sides) / 2
    entropy = -torch.trapezoid(q * q.log(), grid)
    information = entropy - sides[0].entropy()
    marginal = -entropy - torch.trapezoid(q * dist.Normal(0.0, 1.0).log_prob(grid), grid)
    x = torch.tensor([[loc], [-loc]], dtype=F64).repeat(400, 1)  # the same mixture as once
    found = operate(standard(1), diagonal(1, scale), x, batch_size=300, num_particles=10)
    estimates = torch.stack([found.mutual_information.value, found.marginal_kl.value])
    errors = torch.stack([found.mutual_information.std_error, found.marginal_kl.std_error])
    assert_near(estimates, torch.stack([information, marginal]), errors, 0.01)
    assert float(found.total_correlation.value) == pytest.approx(0, abs=1e-12)  # of one dimension
    assert found.dimension_wise[0] == found.dimension_wise_kl.value


def test_a_posterior_that_is_the_prior_has_nothing():
    guide = guide_of(lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 1e-5)):
        found = operate(standard(3), guide, data(dtype=dtype), batch_size=5, num_particles=2)
        assert float(values_of(found).abs().max()) < tolerance and float(found.dimension_wise.abs().max()) < tolerance
        assert not found.ceiling


def test_a_correlated_gaussian_has_its_closed_form():
    """Means on a grid of normal quantiles, so that q(z) is a correlated normal. False alarm: four numbers at 4.5 errors."""
    u = torch.special.ndtri((torch.arange(50, dtype=F64) + 0.5) / 50)
    root = torch.tensor([[1.2, 0.0], [0.9, 0.6]], dtype=F64)
    means = torch.cartesian_prod(u, u) @ root.T
    covariance = means.T @ means / len(means) + 0.8**2 * torch.eye(2, dtype=F64)
    variances = covariance.diagonal()
    correlation = -(covariance.det() / variances.prod()).log() / 2
    single = (variances - 1 - variances.log()) / 2
    information = (covariance.det() / 0.8**4).log() / 2
    found = operate(standard(2), diagonal(2, 0.8), means, batch_size=333, num_particles=2)
    kl = (means.square().sum(1) / 2 + 0.8**2 - 1 - 2 * math.log(0.8)).mean()
    truth = torch.stack([kl, information, correlation + single.sum(), correlation, single.sum()])
    assert float(correlation) > 0.15
    assert_near(values_of(found), truth, errors_of(found), 0.03)
    assert_near(found.dimension_wise, single, found.dimension_wise_std_error, 0.01)


def test_two_bits_by_enumeration():
    """Every part over four states, under a prior that is not uniform. False alarm: seven numbers at 4.5 errors."""
    x = data(12, 2)
    priors = torch.tensor([0.3, 0.6], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(priors).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = guide_of(lambda x: dist.Bernoulli(torch.sigmoid(2 * x.cumsum(1))).to_event(1))
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 2)
    log_q = dist.Bernoulli(torch.sigmoid(2 * x.cumsum(1))).log_prob(states.unsqueeze(1))  # (4, N, 2)
    joint, p = log_q.sum(-1), dist.Bernoulli(priors).log_prob(states)
    q, singles = joint.exp().mean(1), log_q.exp().mean(1)
    correlation = (q * (q.log() - singles.log().sum(1))).sum()
    wise = (q.unsqueeze(1) * (singles.log() - p)).sum(0)
    information = (joint.exp() * (joint - q.log().unsqueeze(1))).sum(0).mean()
    marginal = correlation + wise.sum()
    found = operate(model, guide, x.repeat(40, 1), batch_size=50, num_particles=10)
    truth = torch.stack([information + marginal, information, marginal, correlation, wise.sum()])
    assert_near(values_of(found), truth, errors_of(found), 0.03)
    assert_near(found.dimension_wise, wise, found.dimension_wise_std_error, 0.02)


# --- the same numbers whatever the batches, as by brute force ---


@pytest.mark.parametrize("batch_size", [None, 1, 4, 11])
def test_batches_of_any_size_give_the_same_numbers(batch_size):
    x = data()
    z, log_q = fixed_table(x)
    found = operate(standard(3), diagonal(3, family=Fixed), x, batch_size)
    truth = brute_force(log_q, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    torch.testing.assert_close(values_of(found), truth, rtol=0, atol=1e-10)
    single = log_q.logsumexp(1) - math.log(len(x)) - dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(found.dimension_wise, single.mean(0), rtol=0, atol=1e-10)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x = data()
    whole = values_of(operate(standard(3), diagonal(3), x, 7, num_particles=3))
    monkeypatch.setattr("pyro_vae.latent.aggregated_density.BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    torch.testing.assert_close(
        values_of(operate(standard(3), diagonal(3), x, 7, num_particles=3)), whole, rtol=0, atol=1e-10
    )


def test_the_parts_add_up():
    found = values_of(operate(standard(3), diagonal(3), data(), 7, num_particles=2))
    torch.testing.assert_close(found[0], found[1] + found[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[2], found[3] + found[4], rtol=0, atol=1e-12)


def test_leave_one_out_leaves_one_out():
    x = data(dim=1)
    z, log_q = fixed_table(x)
    others = log_q.sum(-1).clone().fill_diagonal_(-math.inf).logsumexp(1) - math.log(len(x) - 1)
    found = operate(standard(1), diagonal(1, family=Fixed), x, 5, aggregate="leave-one-out", doubted=True)
    truth = (log_q.sum(-1).diagonal() - others).mean()
    assert float(found.mutual_information.value) == pytest.approx(float(truth), abs=1e-10)
    full = operate(standard(1), diagonal(1, family=Fixed), x, 5)
    assert found.mutual_information.value > full.mutual_information.value


def test_leave_one_out_has_no_ceiling_and_says_so():
    x = 40.0 * torch.arange(6, dtype=F64).unsqueeze(1)
    surgery = ELBOSurgery(standard(1), diagonal(1), aggregate="leave-one-out", seed=0)
    with pytest.warns(SurgeryWarning) as caught:
        found = surgery([x], progress=False)
    said = [str(warning.message) for warning in caught]
    assert said[0].startswith("mutual_information") and not any("too small" in text for text in said)
    assert "outside of [0, 1.792]" in said[0] and "use aggregate='full'" in said[0]
    assert float(found.mutual_information.value) > math.log(6)
    apart = 200.0 * torch.arange(6, dtype=F64).unsqueeze(1)
    found = operate(
        standard(1),
        guide_of(lambda x: dist.Uniform(x - 1, x + 1).to_event(1)),
        apart,
        aggregate="leave-one-out",
        doubted=True,
    )
    assert float(found.mutual_information.value) == math.inf and "No verdict" in one_line(found)


def test_minibatches_are_stratified():
    """As `index_code_information` with N, batch by batch; exact at B = N; too much information otherwise."""
    x = data(20, 2)
    _, log_q = fixed_table(x)
    table = torch.cat([log_q.sum(-1, keepdim=True), log_q], -1)
    parts = [index_code_information(table[i : i + 5, i : i + 5], 20)[:, 0] for i in range(0, 20, 5)]
    found = operate(standard(2), diagonal(2, family=Fixed), x, 5, aggregate="minibatch")
    truth = float(torch.cat(parts).mean())
    assert float(found.mutual_information.value) == pytest.approx(truth, abs=1e-10)
    whole = operate(standard(2), diagonal(2, family=Fixed), x, aggregate="minibatch")
    full = operate(standard(2), diagonal(2, family=Fixed), x)
    torch.testing.assert_close(values_of(whole), values_of(full), rtol=0, atol=1e-12)
    assert truth > float(full.mutual_information.value)


def test_no_ceiling_of_the_batch():
    """2,000 separate data in batches of 64: log 2000 = 7.6 nats, where an estimate from batches alone says log 64 = 4.16."""
    x = 30.0 * torch.arange(2000, dtype=F64).unsqueeze(1)
    found = operate(standard(1), diagonal(1), x, 64, doubted=True)
    assert float(found.mutual_information.value) == pytest.approx(math.log(2000), abs=1e-6)


# --- guides of other shapes ---


def chain(family=dist.Normal, a=0.8, s=0.6, b=-0.7, c=0.5, t=0.9):
    """q: z1 ~ N(a x, s), z2 ~ N(b z1 + c x, t); p: z1 ~ N(0, 1), z2 ~ N(0.4 z1, 1)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 1.0))
            z2 = pyro.sample("z2", dist.Normal(0.4 * z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", family(a * x, torch.full_like(x, s)))
            pyro.sample("z2", family(b * z1 + c * x, torch.full_like(x, t)))

    def table(x):
        """log q(z_i|x_j), (N, N), and log p(z_i), at the draws of `Fixed`."""
        z1 = Fixed(a * x, torch.full_like(x, s)).rsample()
        z2 = Fixed(b * z1 + c * x, torch.full_like(x, t)).rsample()
        first = dist.Normal(a * x, s).log_prob(z1[:, None])
        log_q = first + dist.Normal(b * z1[:, None] + c * x, t).log_prob(z2[:, None])
        return log_q, dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(0.4 * z1, 1.0).log_prob(z2)

    return model, guide, table


@pytest.mark.parametrize("batch_size", [None, 6, 1])
def test_a_guide_that_draws_one_latent_given_another(batch_size):
    model, guide, table = chain(Fixed)
    x = data(19, 1).squeeze(1)
    log_q, log_prior = table(x)
    truth = brute_force(log_q.unsqueeze(-1), log_prior)
    found = operate(model, guide, x, batch_size)
    torch.testing.assert_close(values_of(found)[:3], truth[:3], rtol=0, atol=1e-10)
    assert bool(values_of(found)[3:].isnan().all()) and bool(found.dimension_wise.isnan().all())
    assert found.names == ("z1", "z2") and "not independent" in one_line(found)


def test_a_joint_distribution_equals_its_chain():
    """The same guide told as a MultivariateNormal. False alarm: three numbers at 4.5 errors of their difference."""
    model, guide, _ = chain()
    x = data(30, 1).squeeze(1)
    a, s, b, c, t = 0.8, 0.6, -0.7, 0.5, 0.9
    root = torch.tensor([[s, 0.0], [b * s, t]], dtype=F64)

    def joint_model(x):
        cov = torch.tensor([[1.0, 0.4], [0.4, 1.16]], dtype=F64)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(2), cov))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    joint_guide = guide_of(lambda x: dist.MultivariateNormal(torch.stack([a * x, (a * b + c) * x], -1), scale_tril=root))
    one = operate(model, guide, x, 7, num_particles=200)
    other = operate(joint_model, joint_guide, x, 7, num_particles=200)
    errors = (errors_of(one)[:3].square() + errors_of(other)[:3].square()).sqrt()
    assert_near(values_of(one)[:3], values_of(other)[:3], errors, 0.03)
    assert bool(values_of(other)[3:].isnan().all())


def test_a_guide_that_runs_in_a_loop():
    """It reads a value of its draw, so that the kernel runs it once per particle."""
    model, _, table = chain(Fixed)
    x = data(9, 1).squeeze(1)

    def reading(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Fixed(0.8 * x, torch.full_like(x, 0.6)))
            float(z1.sum())
            pyro.sample("z2", Fixed(-0.7 * z1 + 0.5 * x, torch.full_like(x, 0.9)))

    log_q, log_prior = table(x)
    truth = brute_force(log_q.unsqueeze(-1), log_prior)
    torch.testing.assert_close(values_of(operate(model, reading, x, 4))[:3], truth[:3], rtol=0, atol=1e-10)


def test_separate_sites_are_dimensions_and_a_prior_chain_is_not():
    """Two independent sites of the guide: total correlation known; p couples them, so no KL per dimension."""
    model, _, _ = chain()
    x = data(19, 1).squeeze(1)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", Fixed(x, torch.full_like(x, 0.5)))
            pyro.sample("z2", Fixed(-x, torch.full_like(x, 0.7)))

    z1, z2 = Fixed(x, torch.full_like(x, 0.5)).rsample(), Fixed(-x, torch.full_like(x, 0.7)).rsample()
    log_q = torch.stack([dist.Normal(x, 0.5).log_prob(z1[:, None]), dist.Normal(-x, 0.7).log_prob(z2[:, None])], -1)
    truth = brute_force(log_q, dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(0.4 * z1, 1.0).log_prob(z2))
    found = operate(model, guide, x, 6)
    torch.testing.assert_close(values_of(found), truth, rtol=0, atol=1e-10)
    assert bool(found.dimension_wise.isnan().all()) and "their dependence under the prior" in one_line(found)


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_plates_inside_the_datum(data_dim):
    """Two steps of three numbers are six dimensions, on whichever side the data lie."""
    x = data(7, 6).reshape(7, 2, 3)
    inner = -3 - data_dim

    def program(x, family, scale, observe):
        loc = x if data_dim == -2 else x.transpose(0, 1)
        with pyro.plate("data", len(x), dim=data_dim), pyro.plate("steps", 2, dim=inner):
            pyro.sample("z", family(loc if not observe else torch.zeros_like(loc), scale).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1), obs=loc)

    one = torch.ones(3, dtype=F64)
    found = operate(
        lambda x: program(x, dist.Normal, one, True),
        lambda x: program(x, Fixed, 0.5 * one, False),
        x,
        3,
        datum_plate="data",
        doubted=True,
    )
    z, log_q = fixed_table(x.flatten(1))
    truth = brute_force(log_q, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    torch.testing.assert_close(values_of(found), truth, rtol=0, atol=1e-10)
    assert found.names == tuple(f"z[{d}]" for d in range(6))


@pytest.mark.parametrize("enumerated", [True, False])
def test_latents_after_a_class_that_is_summed_out_of_the_guide(enumerated):
    """q(z|x) = sum_c q(c|x) q(z|x, c), c enumerated on both sides or a draw of the guide alone: by sums over a grid of z."""
    x = data(6, 1)[:, 0]

    def model(x):
        with pyro.plate("data", len(x)):
            c = 0.3
            if enumerated:
                c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.3)))
            z = pyro.sample("z", dist.Normal(c - 0.5, 1.5 + 0 * x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        infer = {"enumerate": "parallel"} if enumerated else {}
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.sigmoid(x)), infer=infer)
            pyro.sample("z", dist.Normal(x / 2 + 2 * c - 1, 0.6))

    z = torch.linspace(-12, 12, 6001, dtype=F64)[:, None]
    sides = [dist.Normal(x / 2 + side, 0.6).log_prob(z) for side in (-1.0, 1.0)]
    log_q = torch.logaddexp(sides[0] + torch.sigmoid(-x).log(), sides[1] + torch.sigmoid(x).log())
    log_p = dist.Normal(-0.2, 1.5).log_prob(z)
    if enumerated:
        low, high = (dist.Normal(side, 1.5).log_prob(z) for side in (-0.5, 0.5))
        log_p = torch.logaddexp(low + math.log(0.7), high + math.log(0.3))
    log_mixture = log_q.logsumexp(-1, keepdim=True) - math.log(len(x))
    right = [
        torch.trapezoid(log_q.exp() * term, z, dim=0).mean()
        for term in (log_q - log_p, log_q - log_mixture, log_mixture - log_p)
    ]
    # Copies of the data have the same mixture, and more of them in a call take less time than more particles.
    found = operate(model, guide, x.repeat(40), 160, num_particles=25)
    for part, value in zip(PARTS, right, strict=False):
        estimate = getattr(found, part)
        assert abs(float(estimate.value - value)) < 4.5 * float(estimate.std_error) < 0.1, part
    assert bool(found.total_correlation.value.isnan())


def test_a_mixture_that_the_model_sums_out_is_a_prior():
    """As MixtureSameFamily; its dimensions are no product."""

    def enumerated(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full_like(x[:, 0], 0.3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal((2 * c - 1).unsqueeze(-1), x.new_ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = data(12, 2)
    found = operate(enumerated, diagonal(2, family=Fixed), x, 5)
    z, log_q = fixed_table(x)
    sides = torch.stack([dist.Normal(side, 1.0).log_prob(z).sum(-1) for side in (-1.0, 1.0)])
    log_prior = (sides + torch.tensor([0.7, 0.3], dtype=F64).log()[:, None]).logsumexp(0)
    torch.testing.assert_close(values_of(found), brute_force(log_q, log_prior), rtol=0, atol=1e-10)
    assert bool(found.dimension_wise.isnan().all())


def test_supports_that_depend_on_the_data():
    """Uniforms of width 2 at distances of 1: q(z) is flat but for its ends. Draws are outside the supports of others."""
    x = torch.arange(50, dtype=F64).unsqueeze(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_full((1,), -2.0), 60.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    found = operate(model, guide_of(lambda x: dist.Uniform(x - 1, x + 1).to_event(1)), x, 8, num_particles=20, doubted=True)
    exact = (48 * math.log(25) + 2 * (math.log(25) + math.log(50)) / 2) / 50  # half of each end has one cover, not two
    information = found.mutual_information
    assert_near(information.value[None], torch.tensor([exact], dtype=F64), information.std_error[None], 0.01)


class ConvGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))

    def forward(self, x):
        loc, scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class ConvModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(-1, (2, 1, 1)), nn.ConvTranspose2d(2, 1, 8))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)


def test_a_conv_vae_and_nothing_of_the_users_changes():
    torch.manual_seed(0)
    model, guide = ConvModel().eval(), ConvGuide().eval()
    x = (torch.rand(11, 1, 8, 8) > 0.5).float()
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in guide.state_dict().items()}
    found = operate(model, guide, x, 4)
    again = operate(model, guide, x, 4)
    assert torch.equal(torch.get_rng_state(), state) and not list(pyro.get_param_store().keys())
    assert torch.equal(values_of(found), values_of(again))
    assert not torch.equal(values_of(found), values_of(operate(model, guide, x, 4, seed=1)))
    assert all(torch.equal(value, weights[name]) for name, value in guide.state_dict().items())
    assert not guide.training and all(p.grad is None for p in guide.parameters())
    assert torch.distributions.Distribution._validate_args
    loc, scale = guide.net(x).chunk(2, -1)
    with torch.no_grad():
        truth = torch.distributions.kl_divergence(dist.Normal(loc, scale.exp()), dist.Normal(0.0, 1.0)).sum(-1).mean()
    many = operate(model, guide, x.repeat(10, 1, 1, 1), 40, num_particles=30)
    assert_near(many.kl.value[None], truth[None], many.kl.std_error[None], 0.05)
    torch.manual_seed(3)
    first = values_of(ELBOSurgery(model, guide)([x], progress=False))
    torch.manual_seed(3)
    assert torch.equal(first, values_of(ELBOSurgery(model, guide)([x], progress=False)))


def test_a_vae_of_this_package_and_a_shuffled_loader():
    """The loader is gone through once: rows and columns are of the same pass."""
    vae = pv.mlp_vae(6, 2, likelihood=pv.nn.Bernoulli(), hidden=(8,)).double()
    x = (data(30, 6) > 0).to(F64)
    loader = DataLoader(TensorDataset(x), 7, shuffle=True)
    found = ELBOSurgery(vae.model, vae.guide, seed=0, num_particles=300)(loader, progress=False)
    plain = operate(vae.model, vae.guide, x, num_particles=300)
    errors = (errors_of(found).square() + errors_of(plain).square()).sqrt()
    assert_near(values_of(found), values_of(plain), errors, 0.1)


def test_a_subsampled_plate_scores_the_data_it_drew_for():
    """Columns of a chain are opened again: the same subsample as in the first pass."""
    _, _, table = chain(Fixed)
    x = data(20, 1).squeeze(1)
    seen = {}  # by the batch, told by its first number: what the last run looked at

    def sub_model(x):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            part = x[index]
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(part), 1.0))
            z2 = pyro.sample("z2", dist.Normal(0.4 * z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=part)

    def sub_guide(x):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            part = seen[float(x[0])] = x[index]
            z1 = pyro.sample("z1", Fixed(0.8 * part, torch.full_like(part, 0.6)))
            pyro.sample("z2", Fixed(-0.7 * z1 + 0.5 * part, torch.full_like(part, 0.9)))

    for seed in (0, None):
        found = operate(sub_model, sub_guide, x, 10, seed=seed, doubted=True)
        log_q, log_prior = table(torch.cat([seen[float(x[0])], seen[float(x[10])]]))
        truth = brute_force(log_q.unsqueeze(-1), log_prior)
        torch.testing.assert_close(values_of(found)[:3], truth[:3], rtol=0, atol=1e-10)
        assert found.num_data == 8


def test_masked_observations_are_nothing_to_it():
    x = data()
    mask = torch.arange(len(x)) % 2 == 0

    def masked(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = diagonal(3, family=Fixed)
    surgery = ELBOSurgery(masked, lambda x, mask: guide(x), seed=0)
    found = surgery([(x[:9], mask[:9]), (x[9:], mask[9:])], args=lambda batch: batch, progress=False)
    torch.testing.assert_close(values_of(found), values_of(operate(standard(3), guide, x)), rtol=0, atol=1e-12)


def test_a_batch_as_one_datum():
    """Without a plate the joint density of a batch is one, and its dimensions are not looked at."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = data()
    z, log_q = fixed_table(x)
    truth = brute_force(log_q, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))

    def guide(x):
        pyro.sample("z", Fixed(x, torch.full_like(x, 0.5)).to_event(1))

    found = ELBOSurgery(model, guide, datum_plate=None, seed=0)(list(x), progress=False)
    torch.testing.assert_close(values_of(found)[:3], truth[:3], rtol=0, atol=1e-10)
    assert found.num_data == len(x)


# --- errors ---


def replicates(count, x, batch_size=None, doubted=False, **options):
    """Runs of one estimator, which examines the pair once, with one seed after the other."""
    estimator, runs = ELBOSurgery(standard(2), diagonal(2), **options), []
    for estimator.seed in range(count):
        runs.append(of_data(estimator, x, batch_size, doubted))
    return torch.stack([values_of(run) for run in runs]), torch.stack([errors_of(run) for run in runs]), runs


def test_the_monte_carlo_error_is_right():
    """100 seeds: spread, known to 7 %, against stated. With one particle an upper bound: never too small, here 1.2 to 4."""
    x = data(20, 2)
    values, errors, runs = replicates(100, x, num_particles=3, batch_size=12)
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert bool(((ratio > 0.7) & (ratio < 1.4)).all()), ratio
    values, errors, _ = replicates(100, x)
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert bool(((ratio > 0.85) & (ratio < 4)).all()), ratio
    sampling = torch.stack([runs[0].kl.sampling_error, runs[0].mutual_information.sampling_error])
    assert bool((sampling > 0).all())


def test_some_draws_under_all_data():
    """The means over a part of the data agree with those over all, by their own error, which is right (100 seeds, 7 %)."""
    x = data(60, 2)
    values, errors, runs = replicates(100, x, num_draws=15, batch_size=35, doubted=True)
    full = operate(standard(2), diagonal(2), x.repeat(10, 1), num_particles=40)
    assert runs[0].num_draws == 15 and runs[0].num_data == 60
    assert_near(values.mean(0), values_of(full), values.std(0) / 10 + errors_of(full), 0.1)
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert bool(((ratio > 0.8) & (ratio < 1.6)).all()), ratio  # 15 of 60 without replacement: up to 1 / sqrt(3/4) too large
    with torch.no_grad():
        exact = operate(standard(2), diagonal(2, family=Fixed), x, 25, num_draws=60)
    torch.testing.assert_close(values_of(exact), values_of(operate(standard(2), diagonal(2, family=Fixed), x)))


def test_values_beyond_their_range_are_said():
    x = data(dim=1)
    found = operate(standard(1), diagonal(1), x)
    assert found.warnings() == []
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    low = type(found.kl)(torch.tensor(-0.5), torch.tensor(0.1), torch.tensor(0.1))
    for name in ("mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl", "kl"):
        doubts = type(found)(**{**fields, name: low}).warnings()
        assert [str(d).split()[0] for d in doubts] == [name] and isinstance(doubts[0], SurgeryWarning)
    noise = type(found.kl)(torch.tensor(-0.5), torch.tensor(0.2), torch.tensor(0.1))
    assert type(found)(**{**fields, "total_correlation": noise}).warnings() == []


# --- what is refused, and what is printed ---


def test_what_has_no_known_density_is_refused_by_name():
    x = data(dim=2)
    model = standard(2)
    auto = AutoNormal(model)
    auto(x)
    with pytest.raises(StructureError, match="an autoguide"):
        operate(model, auto, x)

    def conditional(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    for batch_size in (None, 1):
        with pytest.raises(StructureError, match="differs from datum to datum"):
            operate(conditional, diagonal(2), x, batch_size)

    def hyper(x):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(w, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(StructureError, match="'w', drawn from the prior"):
        operate(hyper, diagonal(2), x, prior_sites=["w"])

    def masked(program):
        return poutine.mask(program, mask=torch.arange(len(x)) > 3)

    with pytest.raises(MaskError, match="remove masked data"):
        operate(masked(model), masked(diagonal(2)), x)


def test_a_guide_that_enumerates_all_is_one_that_draws():
    x, bits = data(dim=1)[:, 0], standard_bits()
    found, drawn = (operate(bits[0], guide, x) for guide in (config_enumerate(bits[1]), bits[1]))
    torch.testing.assert_close(values_of(found), values_of(drawn), rtol=0, atol=0, equal_nan=True)


def standard_bits():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, guide_of(lambda x: dist.Bernoulli(torch.sigmoid(x)))


def test_an_autoguide_that_draws_the_latents_themselves():
    """AutoNormalMessenger has parameters per datum: all alike the index is lost, far apart it is log N."""
    x, model = data(12, 2), standard(2)
    guide = AutoNormalMessenger(model)
    guide(x)
    alike = operate(model, guide, x)
    assert abs(float(alike.mutual_information.value)) < 1e-6 < float(alike.marginal_kl.value)
    with torch.no_grad():
        locs = [param for name, param in guide.named_parameters() if "loc" in name]
        for param in locs:
            param += 50.0 * torch.arange(12).unsqueeze(1)
    assert len(locs) == 1
    apart = operate(model, guide, x, doubted=True)
    assert abs(float(apart.mutual_information.value) - math.log(12)) < 1e-6


def test_a_latent_from_the_prior_that_p_of_z_does_not_need():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(z, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    x, guide = data(), diagonal(3, family=Fixed)
    found = operate(model, guide, x, 8, prior_sites=["w"])
    torch.testing.assert_close(values_of(found), values_of(operate(standard(3), guide, x)), rtol=0, atol=1e-12)


def test_bad_input():
    x = data(dim=2)
    pair = standard(2), diagonal(2)
    for options in ({"num_particles": 0}, {"num_particles": True}, {"num_draws": 0}, {"aggregate": "all"}, {"seed": -1}):
        with pytest.raises(OptionError, match=next(iter(options))):
            operate(*pair, x, **options)
    with pytest.raises(ArgumentError, match="pass a DataLoader"):
        ELBOSurgery(*pair)(x)
    with pytest.raises(EmptyBatchError):
        ELBOSurgery(*pair)([], progress=False)
    with pytest.raises(InvalidDataError):
        operate(*pair, torch.full_like(x, math.nan))
    with pytest.raises(StructureError, match="drop_last"):
        operate(*pair, x, 22, aggregate="minibatch")
    with pytest.raises(StructureError, match="needs at least two data"):
        operate(*pair, x[:1], aggregate="leave-one-out")
    with pytest.raises(NonFiniteError, match="log q"):
        operate(standard(2), guide_of(lambda x: dist.Normal(x, x * 0).to_event(1)), x)


def test_one_datum_says_nothing():
    with pytest.warns(SurgeryWarning, match="too small"):
        found = operate(standard(1), diagonal(1), data(1, 1), num_particles=5)
    assert float(found.mutual_information.value) == 0 and float(found.marginal_kl.value) == float(found.kl.value)


def test_the_record_prints_and_turns_plain():
    found = operate(standard(3), diagonal(3), data(), num_particles=2)
    text = str(found)
    assert f"at most {math.log(23):.3f}" in text and "z[2]" in text and "all data, exact" in text
    assert f"{float(found.total_correlation.value):.3f}" in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["mutual_information"]["value"] == float(found.mutual_information.value)
    assert plain["dimension_wise"] == found.dimension_wise.tolist() and plain["num_data"] == 23
    assert plain["ceiling"] is False and plain["log_num_data"] == math.log(23)


def test_progress_is_shown(capsys):
    ELBOSurgery(standard(1), diagonal(1), seed=0)([data(dim=1)])
    shown = capsys.readouterr().err
    assert "ELBOSurgery" in shown and "aggregated posterior" in shown


@pytest.mark.parametrize("make", ["conv_vae", "sizes"])
def test_networks_that_look_at_shapes(make):
    """A decoder may ask the shape of its latents for numel(): q = p gives zeros all the same."""
    if make == "conv_vae":
        vae = pv.conv_vae((1, 8, 8), latent_dim=2, likelihood=pv.nn.Bernoulli(event_dim=3)).eval()
        with torch.no_grad():
            for parameter in vae.encoder.parameters():
                parameter.zero_()
        model, guide, x = vae.model, vae.guide, torch.zeros(6, 1, 8, 8)
    else:

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                rows = z.reshape(z.shape[:-1].numel(), z.size()[-1:].numel()).reshape(z.size())
                pyro.sample("x", dist.Normal(rows, 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

        x = torch.zeros(6, 2)
    surgery = pv.ELBOSurgery(model, guide, seed=0)([x], progress=False)
    assert abs(float(surgery.mutual_information.value)) < 1e-6


def test_masks_that_mask_nothing_change_nothing():
    """Sequences of equal length come with masks all the same: of whole events, and below `to_event`."""
    x, nothing = data(12, 3), torch.ones(12, dtype=torch.bool)
    bare = operate(standard(3), diagonal(3), x)
    whole = operate(*(poutine.mask(program, mask=nothing) for program in (standard(3), diagonal(3))), x)
    places = nothing[:, None].expand(12, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).mask(places).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, :1])

    inside = operate(model, guide_of(lambda x: dist.Normal(x, 0.5).mask(places).to_event(1)), x)
    for masked in (whole, inside):
        assert torch.allclose(values_of(masked), values_of(bare), atol=1e-12)
    hidden = nothing.index_fill(0, torch.tensor([3]), False)
    with pytest.raises(MaskError, match="remove masked data"):
        operate(*(poutine.mask(program, mask=hidden) for program in (standard(3), diagonal(3))), x)
