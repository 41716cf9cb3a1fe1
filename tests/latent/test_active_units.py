"""`ActiveUnits` against closed forms: means, KL and the share at the prior, per unit and over a whole data set."""

import json
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, assert_near, exact_family, guide_of, linear_gaussian, model_of, one_line
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    EmptyBatchError,
    InvalidDataError,
    NonFiniteError,
    OptionError,
    PrecisionWarning,
    StructureError,
)
from pyro_vae.exact import LinearGaussian
from pyro_vae.latent import ActiveUnits

NUMBERS = ("variance_of_means", "kl", "fraction_at_prior")


def measure(model, guide, x, batch_size=None, **options):
    """Over a loader of batches; a number of particles that is no divisor of anything."""
    batches = [x] if batch_size is None else DataLoader(x, batch_size)
    return ActiveUnits(model, guide, **{"num_particles": 7, "seed": 0, **options})(batches, progress=False)


def normal_kl(loc, scale, prior_scale=1.0):
    return (
        (scale / prior_scale) ** 2 / 2 + (loc / prior_scale) ** 2 / 2 - 0.5 - torch.log(torch.as_tensor(scale / prior_scale))
    )


def single(prior, posterior, event_dim=1):
    """A pair with one latent 'z' per datum and a likelihood that no number here reads."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            z = z.flatten(1).sum(1) if event_dim else z
            pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)

    return model, guide_of(posterior)


def gaussian_pair(scale=0.5, dim=3):
    """q = N((x, 0.1 x, 0), (scale, 1, 1)), p = N(0, I): the last unit is at the prior."""
    weights = torch.tensor([1.0, 0.1, 0.0], dtype=F64)[:dim]
    scales = torch.tensor([scale, 1.0, 1.0], dtype=F64)[:dim]
    pair = single(
        lambda x: dist.Normal(x.new_zeros(dim), 1.0).to_event(1),
        lambda x: dist.Normal(x[:, None] * weights.to(x.dtype), scales.to(x.dtype)).to_event(1),
    )
    return (*pair, weights, scales)


def data(num_data=40, dtype=F64, seed=1):
    return torch.randn(num_data, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# --- closed forms ---


def test_ppca_at_its_optimum():
    """Var E[z_j given x] = 1 - s^2 / l_j and KL_j = log(l_j / s^2) / 2; where l_j <= s^2 the unit is the prior."""
    generator = torch.Generator().manual_seed(3)
    stddevs = torch.tensor([3.0, 2.0, 1.2, 0.5, 0.4, 0.3], dtype=F64)
    x = torch.randn(500, 6, generator=generator, dtype=F64) * stddevs
    lm = LinearGaussian.fit(x, 5, variance=torch.tensor(0.5, dtype=F64))
    lengths = lm.weight.square().sum(0)
    spectrum = lengths + lm.variance
    precision = 1 + lengths / lm.variance

    def family(x):
        return dist.Normal((x - lm.bias) @ lm.weight / lm.variance / precision, precision.rsqrt()).to_event(1)

    units = measure(model_of(lm), guide_of(family), x, batch_size=64)
    num_data = len(x)
    truth = (1 - lm.variance / spectrum) * num_data / (num_data - 1)
    assert torch.allclose(units.variance_of_means, truth, atol=1e-10)
    assert torch.allclose(units.kl, (spectrum / lm.variance).log() / 2, atol=1e-10)
    assert units.active.tolist() == units.collapsed.logical_not().tolist() == [True, True, True, False, False]
    assert units.fraction_at_prior[3:].tolist() == [1.0, 1.0] and units.kl[3:].abs().max() < 1e-14
    assert units.num_active == 3 and units.num_collapsed == 2 and units.order.tolist() == [0, 1, 2, 3, 4]
    assert units.names == tuple(f"z[{j}]" for j in range(5))
    assert all(float(units.std_errors[name].abs().max()) == 0 for name in NUMBERS)
    assert math.isclose(float(units.site_kl["z"].value), float(units.kl.sum()), rel_tol=1e-12)
    assert units.cost == 1  # everything has a formula: one draw is enough


def test_a_diagonal_pair_and_its_sampling_errors():
    model, guide, weights, scales = gaussian_pair()
    x = data()
    units = measure(model, guide, x)
    kl = normal_kl(x[:, None] * weights, scales)
    assert torch.allclose(units.kl, kl.mean(0), atol=1e-12)
    assert torch.allclose(units.variance_of_means, (x[:, None] * weights).var(0), atol=1e-12)
    below = (kl < 0.01).to(F64)
    assert 0 < float(below[:, 1].mean()) < 1  # not vacuous
    assert torch.equal(units.fraction_at_prior, below.mean(0))
    assert torch.allclose(units.sampling_errors["kl"], kl.std(0) / len(x) ** 0.5, atol=1e-12)
    assert torch.allclose(units.sampling_errors["fraction_at_prior"], below.std(0) / len(x) ** 0.5, atol=1e-12)
    assert torch.allclose(units.site_kl["z"].sampling_error, kl.sum(1).std() / len(x) ** 0.5, atol=1e-12)
    assert units.num_data == len(x) and units.counts.tolist() == [len(x)] * 3


def test_epsilon_and_delta():
    """x^2 / 2 < epsilon for a known share of the data; collapsed from exactly 1 - delta on."""
    model, guide = single(lambda x: dist.Normal(torch.zeros_like(x), 1.0), lambda x: dist.Normal(x, 1.0), event_dim=0)
    x = torch.arange(100, dtype=F64)  # KL x^2 / 2: 0, 0.5, 2, ...
    for epsilon, share in ((0.4, 0.01), (0.6, 0.02), (2.1, 0.03), (4706.0, 0.98), (4804.0, 0.99)):
        units = measure(model, guide, x, epsilon=epsilon)
        assert float(units.fraction_at_prior) == share
        assert units.collapsed.tolist() == [share >= 0.99]
        assert measure(model, guide, x, epsilon=epsilon, delta=1 - share + 1e-12).num_collapsed == 1
    assert measure(model, guide, x, threshold=float(x.var()) + 1e-6).num_active == 0
    assert measure(model, guide, x, threshold=float(x.var()) - 1e-6).num_active == 1


def two_sites(a=0.8, s=0.6, b=-0.7, c=0.5, t=0.9, w=0.4):
    """z1 ~ N(0, 1), z2 ~ N(w z1, 1); q: z1 ~ N(a x, s), z2 ~ N(b z1 + c x, t). Means, and KLs, per datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 1.0))
            z2 = pyro.sample("z2", dist.Normal(w * z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, s))
            pyro.sample("z2", dist.Normal(b * z1 + c * x, t))

    def truth(x):
        square = ((b - w) * a * x + c * x) ** 2 + ((b - w) * s) ** 2
        kl = torch.stack([normal_kl(a * x, s), (t**2 + square - 1) / 2 - math.log(t)], 1)
        return torch.stack([a * x, (a * b + c) * x], 1), kl

    return model, guide, truth


def test_two_sites_of_which_one_depends_on_the_other():
    """The first has formulas; the second is averaged over draws of the first. False alarm: 2 numbers at 4.5 errors."""
    model, guide, truth = two_sites(a=0.3)
    x = data(60)
    units = measure(model, guide, x, batch_size=25, num_particles=40)
    means, kl = truth(x)
    assert units.names == ("z1", "z2") and units.cost == 40
    assert torch.allclose(units.kl[0], kl.mean(0)[0], atol=1e-12)
    assert torch.allclose(units.variance_of_means[0], means.var(0)[0], atol=1e-12)
    assert units.std_errors["kl"][0] == units.std_errors["variance_of_means"][0] == 0
    assert_near(units.kl[1:], kl.mean(0)[1:], units.std_errors["kl"][1:], 0.03)
    assert_near(units.variance_of_means[1:], means.var(0)[1:], units.std_errors["variance_of_means"][1:], 0.01)
    estimate = units.site_kl["z2"]
    assert float(estimate.std_error) == pytest.approx(float(units.std_errors["kl"][1]), rel=1e-9)


def test_the_noise_of_means_is_taken_off_and_its_error_is_right():
    """100 seeds at K = 2: the mean is off by b^2 s^2 / 2 without the correction; the spread is the stated error."""
    model, guide, truth = two_sites(a=0.3, s=1.0, b=1.0)
    x = data(30)
    estimator, runs = ActiveUnits(model, guide, num_particles=2), []
    for estimator.seed in range(100):  # it examines the pair once
        runs.append(estimator([x], progress=False))
    values = torch.stack([run.variance_of_means[1] for run in runs])
    kls = torch.stack([run.kl[1] for run in runs])
    means, kl = truth(x)
    assert_near(values.mean()[None], means[:, 1].var()[None], values.std()[None] / 10, 0.04)
    assert_near(kls.mean()[None], kl[:, 1].mean()[None], kls.std()[None] / 10, 0.02)
    stated = torch.stack([run.std_errors["variance_of_means"][1] for run in runs]).square().mean().sqrt()
    # The spread of 100 normal values is known to 7 %; the stated error to about as much.
    assert 0.7 < float(stated / values.std()) < 1.4
    stated = torch.stack([run.std_errors["kl"][1] for run in runs]).square().mean().sqrt()
    assert 0.7 < float(stated / kls.std()) < 1.4


def test_the_sampling_error_of_the_variance_is_right():
    """200 data sets, uniform: the spread of the variance of means over them, known to 5 %, is what one states."""
    model, guide = single(lambda x: dist.Normal(torch.zeros_like(x), 1.0), lambda x: dist.Normal(x, 0.5), event_dim=0)
    estimator = ActiveUnits(model, guide, seed=0)
    draws = torch.rand(200, 100, generator=torch.Generator().manual_seed(0), dtype=F64)
    runs = [estimator([draw], progress=False) for draw in draws]
    values = torch.stack([run.variance_of_means[0] for run in runs])
    stated = torch.stack([run.sampling_errors["variance_of_means"][0] for run in runs])
    assert 0.8 < float(stated.square().mean().sqrt() / values.std()) < 1.25


# --- distributions ---


def affine_normal(loc, scale):
    """A normal that hides its formulas."""
    base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc))
    return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(loc, scale)])


def test_a_guide_without_formulas_is_sampled():
    """False alarm: 6 numbers at 4.5 errors."""
    weights = torch.tensor([1.0, 0.3, 0.0], dtype=F64)
    model, guide = single(
        lambda x: dist.Normal(x.new_zeros(3), 1.0).to_event(1),
        lambda x: affine_normal(x[:, None] * weights, 0.8).to_event(1),
    )
    x = data(50)
    units = measure(model, guide, x, num_particles=120)
    assert_near(units.kl, normal_kl(x[:, None] * weights, 0.8).mean(0), units.std_errors["kl"], 0.02)
    truth = (x[:, None] * weights).var(0)
    assert_near(units.variance_of_means, truth, units.std_errors["variance_of_means"], 0.04)
    assert units.active.tolist() == [True, True, False]
    assert 0 < float(units.std_errors["fraction_at_prior"].max()) < 0.1


def test_a_constrained_latent():
    model, guide = single(
        lambda x: dist.LogNormal(torch.zeros_like(x), 1.0), lambda x: dist.LogNormal(x / 2, 0.5), event_dim=0
    )
    x = data()
    units = measure(model, guide, x)
    assert torch.allclose(units.kl, normal_kl(x / 2, 0.5).mean(0, keepdim=True), atol=1e-12)
    assert torch.allclose(units.variance_of_means, (x / 2 + 0.125).exp().var(0, keepdim=True), atol=1e-12)


def bernoulli_kl(q, p):
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


def test_two_bits_by_enumeration():
    """The second bit depends on the first, on both sides."""

    def first(x):
        return torch.sigmoid(x)

    def second(x, bit):
        return torch.sigmoid(x - 2 * bit)

    def model(x):
        with pyro.plate("data", len(x)):
            one = pyro.sample("one", dist.Bernoulli(torch.full_like(x, 0.3)))
            two = pyro.sample("two", dist.Bernoulli(0.2 + 0.5 * one))
            pyro.sample("x", dist.Normal(one + two, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            one = pyro.sample("one", dist.Bernoulli(first(x)))
            pyro.sample("two", dist.Bernoulli(second(x, one)))

    x = data(50)
    units = measure(model, guide, x, num_particles=150)
    prior = torch.tensor(0.3, dtype=F64)
    assert torch.allclose(units.kl[0], bernoulli_kl(first(x), prior).mean(), atol=1e-12)
    assert torch.allclose(units.variance_of_means[0], first(x).var(), atol=1e-12)
    kl = sum(
        weight * bernoulli_kl(second(x, bit), torch.tensor(0.2 + 0.5 * bit, dtype=F64))
        for bit, weight in ((0, 1 - first(x)), (1, first(x)))
    )
    mean = (1 - first(x)) * second(x, 0) + first(x) * second(x, 1)
    assert_near(units.kl[1:], kl.mean(0, keepdim=True), units.std_errors["kl"][1:], 0.02)
    assert_near(units.variance_of_means[1:], mean.var(0, keepdim=True), units.std_errors["variance_of_means"][1:], 0.01)


def test_a_categorical_has_a_kl_and_no_mean():
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=F64)
    model, guide = single(
        lambda x: dist.Categorical(torch.full((3,), 1 / 3, dtype=F64)),
        lambda x: dist.Categorical(logits=x[:, None] * logits),
        event_dim=0,
    )
    x = data()
    units = measure(model, guide, x)
    log_q = torch.log_softmax(x[:, None] * logits, 1)
    assert torch.allclose(units.kl[0], (log_q.exp() * (log_q + math.log(3))).sum(1).mean(), atol=1e-12)
    assert bool(units.variance_of_means.isnan().all()) and not bool(units.active.any())
    assert 0 <= float(units.fraction_at_prior[0]) < 1
    assert "0 of 1 units active" in one_line(units)


def test_a_guide_that_enumerates_all_is_one_that_draws():
    model, guide = single(
        lambda x: dist.Bernoulli(torch.full_like(x, 0.5)), lambda x: dist.Bernoulli(torch.sigmoid(x)), event_dim=0
    )
    x = data()
    units = measure(model, config_enumerate(guide), x)
    kl = torch.distributions.kl_divergence(dist.Bernoulli(torch.sigmoid(x)), dist.Bernoulli(torch.full_like(x, 0.5)))
    torch.testing.assert_close(units.kl, kl.mean()[None])


def mixed_prior(x, **infer):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.3)), infer=infer)
        z = pyro.sample("z", dist.Normal(3 * c - 1, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def summed_prior(z):
    return torch.logaddexp(
        dist.Normal(-1.0, 1.0).log_prob(z) + math.log(0.7), dist.Normal(2.0, 1.0).log_prob(z) + math.log(0.3)
    )


def test_a_prior_that_reads_what_the_model_sums_out():
    """KL to the mixture p(z), against quadrature. False alarm: one number at 4.5 errors."""
    x = data(30)
    guide = guide_of(lambda x: dist.Normal(x / 2, 0.8))
    units = measure(lambda x: mixed_prior(x, enumerate="parallel"), guide, x, num_particles=200)
    z = torch.linspace(-12, 12, 4001, dtype=F64)[:, None]
    log_q = dist.Normal(x / 2, 0.8).log_prob(z)
    kl = torch.trapezoid(log_q.exp() * (log_q - summed_prior(z)), z, dim=0).mean()
    estimate = units.site_kl["z"]
    assert_near(estimate.value[None], kl[None], estimate.std_error[None], 0.03)


def summed_guide(x, **infer):
    """c given x and z given both."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(torch.sigmoid(x)), infer=infer)
        pyro.sample("z", dist.Normal(x / 2 + 1.5 * c - 0.5, 0.8))


@pytest.mark.parametrize("sides", [("model", "guide"), ("model",), ("guide",)])
def test_a_masked_plate_after_a_site_that_the_guide_enumerates(sides):
    """Two units per datum given c, which is summed out: the KL of the mixture over the units that are not masked.

    The density of the site is a sum over the units already, which the mask once repeated for each of them.
    """
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[0.5, -1.0, 0.3], [1.5, 0.2, 0.7]], dtype=F64)

    def within(side):
        return poutine.mask(mask=mask if side in sides else True)

    def model(x):
        with pyro.plate("data", 3, dim=-1):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})
            with pyro.plate("units", 2, dim=-2):
                with within("model"):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                with poutine.mask(mask=mask):
                    pyro.sample("x", dist.Normal(z + c, 0.8), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-1):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            with pyro.plate("units", 2, dim=-2), within("guide"):
                pyro.sample("z", dist.Normal(0.5 * x + 1.5 * c - 0.5, 0.6))

    grid = torch.linspace(-6, 6, 601, dtype=F64)
    z = torch.stack([grid.unsqueeze(-1).expand(601, 601), grid.expand(601, 601)]).reshape(2, -1, 1)
    log_p = dist.Normal(z.new_zeros(()), 1.0).log_prob(z)
    by_value = [dist.Normal((0.5 * x + 1.5 * c - 0.5).unsqueeze(1), 0.6).log_prob(z) for c in (0.0, 1.0)]
    weights = torch.tensor([0.7, 0.3], dtype=F64).log()
    seen = mask.unsqueeze(1)
    log_q = torch.stack([torch.where(seen, q, log_p).sum(0) + w for q, w in zip(by_value, weights, strict=True)]).logsumexp(
        0
    )
    truth = (log_q.exp() * (log_q - log_p.sum(0))).sum(0).mean() * (grid[1] - grid[0]) ** 2
    found = measure(model, guide, x, num_particles=500).site_kl["z"]
    assert abs(float(found.value - truth)) < 4.5 * float(found.std_error) < 0.3


def test_latents_after_a_site_that_the_guide_enumerates():
    """KL of q(z given x) = sum_c q(c) q(z given c), to the mixture p(z), and the variance of E[z given x]: by quadrature."""
    x = data(30)
    pair = (lambda x: mixed_prior(x)), (lambda x: summed_guide(x, enumerate="parallel"))
    units = measure(*pair, x, num_particles=400)
    z = torch.linspace(-12, 12, 4001, dtype=F64)[:, None]
    shares, ends = torch.sigmoid(x), (x / 2 - 0.5, x / 2 + 1.0)
    log_q = torch.logaddexp(
        dist.Normal(ends[0], 0.8).log_prob(z) + torch.log1p(-shares), dist.Normal(ends[1], 0.8).log_prob(z) + shares.log()
    )
    kl = torch.trapezoid(log_q.exp() * (log_q - summed_prior(z)), z, dim=0).mean()
    estimate = units.site_kl["z"]
    assert_near(estimate.value[None], kl[None], estimate.std_error[None], 0.03)
    means = x / 2 - 0.5 + 1.5 * shares
    assert_near(units.variance_of_means, means.var()[None], units.std_errors["variance_of_means"], 0.1)


def test_a_full_covariance_has_one_kl_per_site():
    """Means and their variance per unit all the same; the KL equals the closed form of the linear-Gaussian model."""
    lm, x = linear_gaussian(num_data=30)
    family = exact_family(lm)
    units = measure(model_of(lm), guide_of(family), x, batch_size=8)
    assert torch.allclose(units.site_kl["z"].value, lm.rate(lm.posterior(x)).mean(), atol=1e-10)
    assert torch.allclose(units.variance_of_means, family(x).mean.var(0), atol=1e-10)
    assert bool(units.kl.isnan().all()) and bool(units.fraction_at_prior.isnan().all())
    assert not bool(units.collapsed.any())
    assert "2 without a separate KL" in one_line(units)


def test_a_mixture_over_vectors_as_the_prior_is_sampled_per_site():
    """Against quadrature in one dimension, told as a vector. False alarm: one number at 4.5 errors."""

    def mixture(x):
        locs = torch.tensor([[-1.5], [1.5]], dtype=F64)
        component = dist.Normal(locs, 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2, dtype=F64)), component)

    model, guide = single(mixture, lambda x: dist.Normal(x[:, None], 0.5).to_event(1))
    x = data(30)
    units = measure(model, guide, x, num_particles=100)
    z = torch.linspace(-9, 9, 4001, dtype=F64)[:, None]
    log_q = dist.Normal(x, 0.5).log_prob(z)
    kl = torch.trapezoid(log_q.exp() * (log_q - mixture(x).log_prob(z)[:, None]), z, dim=0)
    estimate = units.site_kl["z"]
    assert_near(estimate.value[None], kl.mean()[None], estimate.std_error[None], 0.03)
    assert torch.equal(units.kl, estimate.value[None]) and torch.allclose(units.variance_of_means[0], x.var(), atol=1e-12)


# --- autoguides ---


def positive_and_real(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros_like(x), 1.0))
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + rate, 1.0), obs=x)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_an_autoguide_over_the_data(kind):
    """'z' is a plain normal; 'rate' is log-normal, drawn before it is transformed. False alarm: 2 numbers at 4.5."""
    x = data(20)
    guide = kind(positive_and_real, init_scale=0.5)
    guide(x)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            if "scale" not in [n for n, p in guide.named_parameters() if p is parameter][0]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) / 2)
    if kind is AutoNormal:
        locs = {"rate": guide.locs.rate.detach(), "z": guide.locs.z.detach()}
    else:
        locs = {"rate": guide.loc.detach()[:20], "z": guide.loc.detach()[20:].reshape(20, 2)}
    units = measure(positive_and_real, guide, x, num_particles=150)
    assert units.names == ("rate", "z[0]", "z[1]")
    assert torch.allclose(units.kl[1:], normal_kl(locs["z"], 0.5).mean(0), atol=1e-10)
    assert torch.allclose(units.variance_of_means[1:], locs["z"].var(0), atol=1e-10)
    assert_near(units.kl[:1], normal_kl(locs["rate"], 0.5).mean(0, keepdim=True), units.std_errors["kl"][:1], 0.02)
    truth = (locs["rate"] + 0.125).exp().var(0, keepdim=True)
    assert_near(units.variance_of_means[:1], truth, units.std_errors["variance_of_means"][:1], 0.2)


def test_a_messenger_autoguide():
    x = data(20)
    guide = AutoNormalMessenger(positive_and_real, init_scale=0.5)
    guide(x)
    with torch.no_grad():
        guide.locs.z.copy_(torch.stack([x, 0 * x], 1))
        guide.locs.rate.copy_(x / 2)
    units = measure(positive_and_real, guide, x, num_particles=150)
    assert units.names == ("rate", "z[0]", "z[1]")
    assert torch.allclose(units.kl[1:], normal_kl(torch.stack([x, 0 * x], 1), 0.5).mean(0), atol=1e-10)
    assert torch.allclose(units.variance_of_means[1:], torch.stack([x, 0 * x], 1).var(0), atol=1e-10)
    assert_near(units.kl[:1], normal_kl(x / 2, 0.5).mean(0, keepdim=True), units.std_errors["kl"][:1], 0.02)


def test_a_mask_of_the_model_holds_for_the_summed_guide_too():
    """z1 is missing in every third datum: in the guide as well, whether it masks it or not."""
    x = data(12)
    present = torch.arange(12) % 3 != 0

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.3)))
            with poutine.mask(mask=present):
                z1 = pyro.sample("z1", dist.Normal(c, 1.0))
                pyro.sample("x1", dist.Normal(z1, 1.0), obs=x)
            z2 = pyro.sample("z2", dist.Normal(2 * c, 1.0))
            pyro.sample("x2", dist.Normal(z2, 1.0), obs=x)

    def guide(x, masked):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.sigmoid(x)), infer={"enumerate": "parallel"})
            with poutine.mask(mask=present if masked else torch.tensor(True)):
                pyro.sample("z1", dist.Normal(3 * c, 0.7))
            pyro.sample("z2", dist.Normal(c + x, 0.8))

    ours, theirs = (measure(model, partial(guide, masked=masked), x) for masked in (False, True))
    for name in ("z1", "z2"):
        torch.testing.assert_close(ours.site_kl[name].value, theirs.site_kl[name].value)


def test_a_joint_draw_has_one_kl_for_all_its_latents():
    """Against a long mean of log q - log p under the guide by hand. False alarm: one number at 4.5 errors."""
    x = data(3)
    guide = AutoMultivariateNormal(positive_and_real, init_scale=0.4)
    guide(x)
    units = measure(positive_and_real, guide, x, datum_plate=None, num_particles=2000)
    (name,) = units.site_kl
    assert name == "rate+z"
    q = dist.MultivariateNormal(guide.loc.detach(), scale_tril=(guide.scale[:, None] * guide.scale_tril).detach())
    u = q.sample((200_000,))
    log_p = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)  # of the rates too: their logarithms are standard normal
    right = q.log_prob(u) - log_p
    estimate = units.site_kl[name]
    assert abs(float(estimate.value) - float(right.mean())) < 4.5 * float(estimate.std_error) + 0.02
    assert float(estimate.std_error) < 0.1 and bool(units.kl.isnan().all())


# --- plates, masks, shapes ---


def test_masked_latents_do_not_count():
    """The first site is missing in every third datum, the second never."""
    observed = torch.arange(30) % 3 != 0

    def program(x, mask, is_model):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1) if is_model else family(x))
                if is_model:
                    pyro.sample("xa", dist.Normal(a.sum(1), 1.0), obs=x)
            b = pyro.sample("b", dist.Normal(torch.zeros_like(x), 1.0) if is_model else dist.Normal(x, 0.7))
            if is_model:
                pyro.sample("xb", dist.Normal(b, 1.0), obs=x)

    def family(x):
        return dist.Normal(x[:, None].expand(-1, 2) * torch.tensor([1.0, 0.5], dtype=F64), 0.5).to_event(1)

    x = data(30)
    estimator = ActiveUnits(
        lambda x, mask: program(x, mask, True), lambda x, mask: program(x, mask, False), num_particles=5, seed=0
    )
    loader = DataLoader(TensorDataset(x, observed), 7)
    units = estimator(loader, args=lambda batch: (batch[0], batch[1]), progress=False)
    loc = (x[:, None] * torch.tensor([1.0, 0.5], dtype=F64))[observed]
    assert units.counts.tolist() == [20, 20, 30]
    assert torch.allclose(units.kl[:2], normal_kl(loc, 0.5).mean(0), atol=1e-12)
    assert torch.allclose(units.variance_of_means[:2], loc.var(0), atol=1e-12)
    assert torch.allclose(units.kl[2], normal_kl(x, 0.7).mean(), atol=1e-12)
    assert torch.allclose(units.site_kl["a"].value, normal_kl(loc, 0.5).sum() / 30, atol=1e-12)  # over all data


def test_masked_data_add_nothing_to_the_kl_of_a_site():
    """A guide with full covariance, half of the data masked."""
    lm, x = linear_gaussian(num_data=12)
    observed = torch.arange(12) % 2 == 0
    masked = [poutine.mask(program, mask=observed) for program in (model_of(lm), guide_of(exact_family(lm)))]
    units = measure(*masked, x)
    rate = lm.rate(lm.posterior(x))
    assert torch.allclose(units.site_kl["z"].value, (rate * observed).sum() / 12, atol=1e-10)
    assert units.counts.tolist() == [6, 6] and not bool(units.std_errors["variance_of_means"].any())


def test_a_mask_inside_an_event():
    mask = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)) < 0.6

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).mask(mask).to_event(1))
            pyro.sample("x", dist.Normal((z * mask).sum(1), 1.0), obs=x)

    guide = guide_of(lambda x: dist.Normal(x[:, None].expand(-1, 3), 0.5).mask(mask).to_event(1))
    x = data(20)
    units = measure(model, guide, x)
    kl = normal_kl(x, 0.5)
    assert units.counts.tolist() == mask.sum(0).tolist()
    for unit in range(3):
        assert torch.allclose(units.kl[unit], kl[mask[:, unit]].mean(), atol=1e-12)
        assert torch.allclose(units.variance_of_means[unit], x[mask[:, unit]].var(), atol=1e-12)


def test_masked_blocks_with_full_covariance():
    """Two blocks per datum, each of two numbers; the KL of a site is that of the blocks that are there."""
    x, mask = data(20), torch.rand(20, 2, generator=torch.Generator().manual_seed(2)) < 0.6

    def blocks(loc):
        return dist.MultivariateNormal(loc, torch.eye(2, dtype=F64)).mask(mask).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", blocks(x.new_zeros(len(x), 2, 2)))
            pyro.sample("x", dist.Normal((z * mask[..., None]).sum((1, 2)), 1.0), obs=x)

    units = measure(model, guide_of(lambda x: blocks(x[:, None, None].expand(-1, 2, 2))), x, num_particles=100)
    estimate = units.site_kl["z"]  # in full x^2 per block
    assert_near(estimate.value[None], (x[:, None] ** 2 * mask).sum(1).mean()[None], estimate.std_error[None], 0.1)
    assert units.counts.tolist() == mask.sum(0).repeat_interleave(2).tolist()


def test_a_subsampled_plate():
    """What a call looks at is what its plate draws; the scale N / B has no part in it."""
    x = data(50)

    def program(is_model):
        def run():
            with pyro.plate("data", 50, subsample_size=20) as index:
                z = pyro.sample("z", dist.Normal(0.0 * x[index], 1.0) if is_model else dist.Normal(x[index], 0.5))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        return run

    estimator = ActiveUnits(program(True), program(False), seed=0)
    units = estimator([None] * 3, args=lambda batch: (), progress=False)
    assert units.num_data == 60
    assert abs(float(units.kl[0] - normal_kl(x, 0.5).mean())) < 0.3 and float(units.kl[0]) > normal_kl(0.0, 0.5)


def test_a_plate_inside_a_datum_counts_as_units():
    weights = torch.tensor([1.0, 0.5, 0.0], dtype=F64)

    def program(is_model):
        def run(x):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1):
                loc = x[:, None] * weights
                q = dist.Normal(torch.stack([loc, 2 * loc], -1), 0.5).to_event(1)
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1) if is_model else q)
                if is_model:
                    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, None].expand(-1, 3))

        return run

    x = data(25)
    units = measure(program(True), program(False), x, batch_size=10, datum_plate="data")
    loc = (x[:, None] * weights)[..., None] * torch.tensor([1.0, 2.0], dtype=F64)
    assert units.names == tuple(f"z[{j}]" for j in range(6))
    assert torch.allclose(units.kl, normal_kl(loc, 0.5).mean(0).flatten(), atol=1e-12)
    assert torch.allclose(units.variance_of_means, loc.var(0).flatten(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_datum(dtype):
    model, guide, weights, scales = gaussian_pair()
    x = data(1, dtype)
    units = measure(model, guide, x)
    assert torch.allclose(units.kl, normal_kl(x * weights, scales).to(dtype), atol=1e-6)
    assert bool(units.variance_of_means.isnan().all()) and units.num_active == 0
    assert {getattr(units, name).dtype for name in NUMBERS} == {dtype}
    assert "nan" in one_line(units)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_convolutional_vae_of_this_package(dtype):
    vae = pv.conv_vae((1, 8, 8), latent_dim=3, likelihood=pv.nn.Bernoulli(event_dim=3), channels=(4, 8)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(20, 1, 8, 8, generator=generator) < 0.4).to(dtype)
    units = measure(vae.model, vae.guide, x, batch_size=6)
    with torch.no_grad():
        q = vae.encode(x)
    kl = torch.distributions.kl_divergence(q.base_dist, dist.Normal(torch.zeros(3, dtype=dtype), 1.0))
    assert torch.allclose(units.kl, kl.mean(0), atol=1e-5)
    assert torch.allclose(units.variance_of_means, q.mean.var(0), atol=1e-5)


# --- streams of batches ---


def test_batches_add_up_to_the_whole():
    model, guide, weights, scales = gaussian_pair()
    x = 5 + 3 * data(101).sort().values  # no batch looks like another
    whole = measure(model, guide, x)
    for batch_size in (1, 7, 100):
        parts = measure(model, guide, x, batch_size=batch_size)
        for name in NUMBERS:
            assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-10)
            assert torch.allclose(parts.sampling_errors[name], whole.sampling_errors[name], rtol=0, atol=1e-10)
        assert parts.num_data == whole.num_data


def test_seeds_and_noise():
    """The same seed, the same numbers, and the caller's random state left alone; every batch has noise of its own."""
    model, guide, _ = two_sites()
    x = data(20)
    before = torch.get_rng_state()
    first, again, other = (measure(model, guide, x, 10, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.kl, again.kl) and not torch.equal(first.kl, other.kl)
    twice = measure(model, guide, torch.cat([x, x]), 20, seed=3)
    once = measure(model, guide, x, 20, seed=3)
    assert not torch.equal(twice.kl, once.kl)
    pyro.set_rng_seed(5)
    drawn = measure(model, guide, x, seed=None)
    pyro.set_rng_seed(5)
    assert torch.equal(drawn.kl, measure(model, guide, x, seed=None).kl)
    assert not torch.equal(drawn.kl, measure(model, guide, x, seed=None).kl)


def test_nothing_is_left_behind():
    vae = pv.mlp_vae(6, latent_dim=2, likelihood=pv.nn.Normal())
    vae.model.train()
    x = torch.randn(10, 6)
    modes = [m.training for m in vae.model.modules()]
    states = {name: value.clone() for name, value in vae.model.state_dict().items()}
    units = measure(vae.model, vae.guide, x)
    assert [m.training for m in vae.model.modules()] == modes
    assert all(torch.equal(value, states[name]) for name, value in vae.model.state_dict().items())
    assert all(p.grad is None for p in [*vae.model.parameters(), *vae.guide.parameters()])
    assert not list(pyro.get_param_store().keys()) and torch.is_grad_enabled()
    assert not units.kl.requires_grad


# --- refusals ---


@pytest.mark.parametrize(
    "options",
    [
        {"num_particles": 1},
        {"num_particles": 2.0},
        {"threshold": -0.1},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 1.0},
        {"delta": -0.1},
        {"seed": -1},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    model, guide, *_ = gaussian_pair()
    with pytest.raises(OptionError, match=next(iter(options))):
        measure(model, guide, data(), **options)


def test_bad_loaders_and_data():
    model, guide, *_ = gaussian_pair()
    x = data()
    units = ActiveUnits(model, guide)
    with pytest.raises(ArgumentError, match="DataLoader"):
        units(x, progress=False)
    with pytest.raises(EmptyBatchError):
        units([], progress=False)
    with pytest.raises(ArgumentError, match="tuple"):
        units([x], args=lambda batch: batch, progress=False)
    with pytest.raises(InvalidDataError):
        units([torch.full((3,), math.nan, dtype=F64)], progress=False)
    with pytest.raises(ArgumentError, match="callable"):
        ActiveUnits(None, guide)


def test_a_kl_that_is_no_number_and_units_that_change():
    model, _, *_ = gaussian_pair()
    with pytest.warns(PrecisionWarning, match="distinguish draws"), pytest.raises(NonFiniteError, match="'z'"):
        measure(model, guide_of(lambda x: dist.Normal(x[:, None].expand(-1, 3), 0.0).to_event(1)), data())

    def wide(x):
        return dist.Normal(x.new_zeros(len(x), len(x)), 1.0).to_event(1)

    model, guide = single(wide, wide)
    with pytest.raises(StructureError, match="units"):
        measure(model, guide, data(10), batch_size=4)


# --- the record ---


def test_the_record_prints_itself_and_goes_to_json():
    model, guide, *_ = gaussian_pair()
    units = measure(model, guide, data())
    assert "1 of 3 units active; 1 at the prior." in one_line(units) or "2 of 3 units active; 1 at the prior." in one_line(
        units
    )
    text = str(units).splitlines()
    assert [line.split()[0] for line in text[2:5]] == [units.names[d] for d in units.order]
    assert f"{float(units.kl[0]):.4f}" in text[2].split() and f"{float(units.variance_of_means[0]):.4f}" in text[2].split()
    plain = json.loads(json.dumps(units.to_dict()))
    assert plain["kl"] == units.kl.tolist() and plain["active"] == units.active.tolist()
    assert plain["site_kl"]["z"]["value"] == float(units.site_kl["z"].value)


def test_many_units_are_cut_short():
    model, guide = single(
        lambda x: dist.Normal(x.new_zeros(30), 1.0).to_event(1),
        lambda x: dist.Normal(x[:, None] * torch.linspace(0, 1, 30, dtype=F64), 1.0).to_event(1),
    )
    text = str(measure(model, guide, data()))
    assert "... 10 more, KL " in text and len(text.splitlines()) < 30


# --- beyond one latent per datum ---


def test_a_batch_as_one_datum():
    """Without a plate the numbers of a batch are units of one datum; data are the batches then."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    x = data(40).reshape(10, 4)
    units = ActiveUnits(model, guide, datum_plate=None, seed=0)(list(x), progress=False)
    assert units.num_data == 10 and units.counts.tolist() == [10] * 4
    assert torch.allclose(units.kl, normal_kl(x, 0.5).mean(0), atol=1e-12)
    assert torch.allclose(units.variance_of_means, x.var(0), atol=1e-12)


def test_a_latent_drawn_from_the_prior_is_no_unit():
    """E over the prior of w of KL(N(x, 0.5) to N(w, 1)), with w ~ N(0, 1). False alarm: one number at 4.5 errors."""

    def model(x):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(torch.zeros_like(x), 1.0))
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = data(40)
    units = measure(model, guide_of(lambda x: dist.Normal(x, 0.5)), x, num_particles=100, prior_sites=["w"])
    assert units.names == ("z",)
    assert_near(units.kl, (normal_kl(x, 0.5) + 0.5).mean(0, keepdim=True), units.std_errors["kl"], 0.03)


def test_what_the_model_sums_out_leaves_units_whose_prior_does_not_read_it():
    """Topics of words given shares: the shares have their own prior. A latent drawn given a class has a mixture for one."""
    words = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(0))  # documents first
    topics = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=F64)

    def model(words):
        with pyro.plate("documents", len(words)):
            share = pyro.sample("share", dist.Dirichlet(topics.new_ones(2)))
            with pyro.plate("words", words.shape[1]):
                k = pyro.sample("k", dist.Categorical(share), infer={"enumerate": "parallel"})
                pyro.sample("w", dist.Categorical(topics[k]), obs=words.T)

    def guide(words):
        with pyro.plate("documents", len(words)):
            pyro.sample("share", dist.Dirichlet(topics.new_tensor([2.0, 3.0])))

    units = pv.ActiveUnits(model, guide, seed=0)([words], progress=False)
    kl = torch.distributions.kl_divergence(dist.Dirichlet(topics.new_tensor([2.0, 3.0])), dist.Dirichlet(topics.new_ones(2)))
    assert units.site_kl["share"].value.item() == pytest.approx(kl.item(), abs=1e-6)

    def mixed(words):
        with pyro.plate("documents", len(words)):
            c = pyro.sample("c", dist.Bernoulli(topics.new_tensor(0.3)), infer={"enumerate": "parallel"})
            share = pyro.sample("share", dist.Dirichlet(torch.stack([1 + c, 2 - c], -1)))
            pyro.sample("w", dist.Categorical(share @ topics), obs=words[:, 0])

    points = (torch.arange(20000, dtype=F64) + 0.5) / 20000
    share = torch.stack([points, 1 - points], -1)
    parts = [dist.Dirichlet(topics.new_tensor(c)).log_prob(share) for c in ([1.0, 2.0], [2.0, 1.0])]
    log_p = torch.logaddexp(parts[0] + math.log(0.7), parts[1] + math.log(0.3))
    log_q = dist.Dirichlet(topics.new_tensor([2.0, 3.0])).log_prob(share)
    found = pv.ActiveUnits(mixed, guide, seed=0, num_particles=2000)([words], progress=False).site_kl["share"]
    assert abs(float(found.value) - float((log_q.exp() * (log_q - log_p)).mean())) < 4.5 * float(found.std_error) < 0.03
