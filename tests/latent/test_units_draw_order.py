"""`ActiveUnits`, `CollapseMonitor` and `diagnose` of guides that draw in another order than the model, by closed forms."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from chain_helpers import Chain
from pair_helpers import F64, assert_near
from pyro import poutine
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.densities import known_kl

X = torch.linspace(-2.0, 2.0, 20, dtype=F64)


def measure(model, guide, x=X, **options):
    return pv.ActiveUnits(model, guide, **{"num_particles": 200, "seed": 0, **options})([x], progress=False)


def bottom_up(event_dim=0):
    """p: h2, then h1 given h2; q: h1, then h2 given h1. The data say nothing, and the guide is the exact posterior."""
    shape = (2,) * event_dim

    def normal(loc, scale):
        return dist.Normal(loc, scale).to_event(event_dim)

    def model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", normal(x.new_zeros(len(x), *shape), 1.0))
            h1 = pyro.sample("h1", normal(h2, 1.0))
            h1 = h1.sum(-1) if event_dim else h1
            pyro.sample("x", dist.Normal(0.0 * h1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", normal(x.new_zeros(len(x), *shape), math.sqrt(2.0)))
            pyro.sample("h2", normal(h1 / 2, math.sqrt(0.5)))

    return model, guide


@pytest.mark.parametrize("event_dim", (0, 1))
def test_the_exact_posterior_of_data_that_say_nothing(event_dim):
    """KL 0 in all: log(2) / 2 for h2, and minus that for h1. False alarm: 3 numbers at 4.5 errors."""
    units = measure(*bottom_up(event_dim))
    half = math.log(2.0) / 2
    truth = torch.tensor([half, half, -half, -half] if event_dim else [half, -half], dtype=F64)
    assert_near(units.kl, truth, units.std_errors["kl"], 0.03)
    for name, sign in (("h2", 1), ("h1", -1)):
        estimate = units.site_kl[name]
        expected = torch.tensor([sign * half * 2**event_dim], dtype=F64)
        assert_near(estimate.value[None], expected, estimate.std_error[None], 0.03)


def test_a_part_of_a_kl_is_not_held_against_the_prior():
    units = measure(*bottom_up())
    assert units.names == ("h2", "h1") and float(units.kl[1]) < -0.3
    assert not bool(units.fraction_at_prior[0].isnan()) and bool(units.fraction_at_prior[1].isnan())
    assert not bool(units.collapsed[1])
    assert "1 with only a part of the KL of all latents" in units.verdict()
    assert "part of the KL" not in measure(Chain().model, Chain().guide, num_particles=2).verdict()


@pytest.mark.parametrize("reads", (True, False))
@pytest.mark.parametrize("order", list(itertools.permutations(("z1", "z2", "z3"))))
def test_a_chain_in_every_order(order, reads):
    """By site and in all. False alarm: 3 numbers at 4.5 errors in each of 12 cases."""
    chain = Chain(order, reads)
    units = measure(chain.model, chain.guide)
    with torch.no_grad():
        truth = torch.stack([part.mean() for part in chain.kl(X)[0].values()])
    assert_near(units.kl, truth, units.std_errors["kl"], 0.05)
    assert torch.allclose(units.kl, torch.stack([estimate.value for estimate in units.site_kl.values()]))
    without = {name for name, share in zip(units.names, units.fraction_at_prior, strict=True) if bool(share.isnan())}
    assert without == chain.sampled()


def test_in_the_order_of_the_model_the_formulas_stay():
    chain = Chain()
    with torch.no_grad():
        truth = chain.kl(X)[0]["z1"].mean()
    units = measure(chain.model, chain.guide, num_particles=3)
    assert torch.allclose(units.kl[0], truth, atol=1e-12) and float(units.std_errors["kl"][0]) == 0
    assert units.cost == 3


def test_independent_latents_keep_their_formulas_in_any_order():
    def model(x):
        with pyro.plate("data", len(x)):
            a, b = (pyro.sample(name, dist.Normal(torch.zeros_like(x), 1.0)) for name in "ab")
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x, 0.5))
            pyro.sample("a", dist.Normal(x - b, 0.5))

    units = measure(model, guide, num_particles=5)
    kl = 0.125 + X**2 / 2 - 0.5 - math.log(0.5)
    assert torch.allclose(units.kl[1], kl.mean(), atol=1e-12) and float(units.std_errors["kl"][1]) == 0
    assert not bool(units.fraction_at_prior.isnan().any())


def test_discrete_latents_by_enumeration():
    """Bits, the other way round. False alarm: 2 numbers at 4.5 errors."""

    def model(x):
        with pyro.plate("data", len(x)):
            two = pyro.sample("two", dist.Bernoulli(torch.full_like(x, 0.3)))
            one = pyro.sample("one", dist.Bernoulli(0.1 + 0.7 * two))
            pyro.sample("x", dist.Normal(one, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            one = pyro.sample("one", dist.Bernoulli(torch.sigmoid(x)))
            pyro.sample("two", dist.Bernoulli(0.2 + 0.5 * one))

    truth = torch.zeros(2, dtype=F64)
    for one, two in itertools.product((0.0, 1.0), repeat=2):
        log_q = [
            dist.Bernoulli(torch.sigmoid(X)).log_prob(torch.tensor(one)),
            dist.Bernoulli(0.2 + 0.5 * one).log_prob(torch.tensor(two)),
        ]
        log_p = [
            dist.Bernoulli(0.1 + 0.7 * two).log_prob(torch.tensor(one)),
            dist.Bernoulli(0.3).log_prob(torch.tensor(two)),
        ]
        weight = (log_q[0] + log_q[1]).exp()
        truth += torch.stack([(weight * (log_q[k] - log_p[k])).mean() for k in (1, 0)])
    units = measure(model, guide)
    assert units.names == ("two", "one")
    assert_near(units.kl, truth, units.std_errors["kl"], 0.03)


def test_sides_of_different_shapes():
    """A prior that no plate has expanded yet, (B,) against (1, B): torch's formula for Bernoullis does not broadcast."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("bit", dist.Bernoulli(torch.full_like(x, 0.3)))
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("bits", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("bit", dist.Bernoulli(torch.sigmoid(x).unsqueeze(0)))
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("bits", dist.Bernoulli(torch.sigmoid(x)))

    q = torch.sigmoid(X)
    truth = (q * (q / 0.3).log() + (1 - q) * ((1 - q) / 0.7).log()).mean()
    units = measure(model, guide)
    torch.testing.assert_close(units.kl, truth.expand(3))


@pytest.mark.parametrize("family", ["Bernoulli", "Binomial", "Categorical", "Poisson", "Normal", "Gamma", "Uniform"])
def test_a_formula_has_the_shape_of_both_sides(family):
    """Every pair of shapes that broadcasts, against formulas of sides that were expanded before."""
    make = {
        "Bernoulli": lambda a: dist.Bernoulli(a),
        "Binomial": lambda a: dist.Binomial(torch.full_like(a, 4.0), a),
        "Categorical": lambda a: dist.Categorical(torch.stack([a, 1 - a], -1)),
        "Poisson": lambda a: dist.Poisson(a),
        "Normal": lambda a: dist.Normal(a, 1 + a),
        "Gamma": lambda a: dist.Gamma(1 + a, a),
        "Uniform": lambda a: dist.Uniform(-a, a),
    }[family]
    shapes = [(), (4,), (1, 4), (3, 1), (3, 4)]
    for left, right in itertools.product(shapes, shapes):
        a, b = (torch.linspace(0.2, 0.8, math.prod(shape), dtype=F64).reshape(shape) for shape in (left, right))
        together = torch.broadcast_shapes(left, right)
        expected = kl_divergence(make(a.expand(together)), make(b.expand(together)))
        found = known_kl(make(a), make(b))
        assert found.shape == together
        torch.testing.assert_close(found, expected)


def test_a_site_without_units_of_its_own():
    """A guide with full covariance on the first draw. False alarm: 2 numbers at 4.5 errors."""
    root = torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            h1 = pyro.sample("h1", dist.Normal(h2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h1.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.MultivariateNormal(x[:, None].expand(-1, 2), scale_tril=root))
            pyro.sample("h2", dist.Normal(h1 / 2, 0.7).to_event(1))

    units = measure(model, guide)
    square = 2 * X.square().mean() + root.square().sum()
    first = square / 4 / 2 + 2 * (0.49 / 2 - 0.5 - math.log(0.7))  # h2 given h1, against N(0, 1)
    second = -1 - root.logdet() + (square / 4 + 2 * 0.49) / 2  # h1 against N(h2, 1), h1 - h2 = h1 / 2 - 0.7 eps
    values = torch.stack([units.site_kl[name].value for name in ("h2", "h1")])
    errors = torch.stack([units.site_kl[name].std_error for name in ("h2", "h1")])
    assert_near(values, torch.stack([first, second]), errors, 0.05)
    assert units.kl[2:].isnan().all() and "part of the KL" not in units.verdict()


def test_a_monitor_goes_by_the_means_of_such_units():
    """A unit that says much about the data is not silent, whatever its part of the KL is; one that says nothing is."""
    gain = {"value": 0.0}

    def model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Normal(torch.zeros_like(x), 1.0))
            h1 = pyro.sample("h1", dist.Normal(h2, 1.0))
            pyro.sample("x", dist.Normal(h1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Normal(gain["value"] * x, math.sqrt(2.0)))
            pyro.sample("h2", dist.Normal(h1 / 2, math.sqrt(0.5)))

    monitor = pv.CollapseMonitor(model, guide, every=1, patience=1, share=0.5, threshold=0.05)
    with pytest.warns(pv.errors.CollapseWarning):
        monitor(X)
    assert monitor.history().num_collapsed.tolist() == [1] and bool(monitor.last.fraction_at_prior[1].isnan())
    gain["value"] = 0.5
    monitor(X)
    assert monitor.history().num_collapsed.tolist() == [1, 0] and not monitor.collapsed


def test_a_flow_is_taken_to_pieces_where_it_is_a_product():
    """An affine transform over events; guide masked by whole events, model inside. False alarm: 3 numbers at 4.5 errors."""
    mask = torch.arange(20) % 3 != 0

    def model(x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), 2), 1.0).mask(mask[:, None]).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.sum(1), 1.0).mask(mask), obs=x)

    def guide(x):
        base = dist.Normal(x[:, None] * torch.tensor([0.4, 0.2], dtype=F64), 0.7).to_event(1)
        transform = dist.transforms.AffineTransform(0.05, torch.tensor([1.1, 0.9], dtype=F64), event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [transform]).mask(mask))

    loc = 0.05 + X[:, None] * torch.tensor([0.44, 0.18], dtype=F64)
    scale = torch.tensor([0.77, 0.63], dtype=F64)
    kl = scale**2 / 2 + loc**2 / 2 - 0.5 - scale.log()
    units = measure(model, guide)
    assert_near(units.kl, kl[mask].mean(0), units.std_errors["kl"], 0.03)
    estimate = units.site_kl["z"]
    assert_near(estimate.value[None], (kl.sum(1) * mask).mean()[None], estimate.std_error[None], 0.04)
    assert units.counts.tolist() == [int(mask.sum())] * 2 and not bool(units.fraction_at_prior.isnan().any())
    objective = pv.BetaTraceMeanField_ELBO(free_bits=0.01, num_particles=2)
    objective.loss(model, guide, X)  # which asks for the KL of each dimension
    assert math.isfinite(float(objective.terms.kl_sum))


def test_the_rate_that_a_diagnosis_reads():
    """The sum over sites is the KL of all latents: here that of q(h1, h2) to the prior, zero."""
    units = measure(*bottom_up(), num_particles=2000)
    total = sum(estimate.value for estimate in units.site_kl.values())
    error = sum(estimate.std_error for estimate in units.site_kl.values())
    assert_near(total[None], torch.zeros(1, dtype=F64), error[None], 0.02)


@pytest.mark.parametrize("how", ("a site drawn from the prior", "a value that obs_mask leaves open", "masked latents"))
def test_what_stands_between_the_latents(how):
    """h2 reaches the prior of h1 through w, drawn by the model; or data are masked. False alarm: 2 numbers at 4.5 errors."""
    keep = torch.arange(20) % 2 == 0
    everywhere = torch.ones(20, dtype=torch.bool)
    given = {"a site drawn from the prior": {}, "a value that obs_mask leaves open": {"obs": 0 * X, "obs_mask": keep}}

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=keep if how == "masked latents" else everywhere):
            w = h2 = pyro.sample("h2", dist.Normal(torch.zeros_like(x), 1.0))
            if how in given:
                w = pyro.sample("w", dist.Normal(h2, 1.0), **given[how])
            h1 = pyro.sample("h1", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(h1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Normal(x, 0.9))
            pyro.sample("h2", dist.Normal(h1 / 2, 0.7))

    square = X**2 + 0.81  # of h1
    h2 = (square / 4 + 0.49) / 2 - 0.5 - math.log(0.7)
    spread = square / 4 + 0.49  # of h1 - h2
    if how in given:
        spread = spread + 1.0  # of h1 - w
    if "obs" in given.get(how, {}):
        spread = torch.where(keep, square, spread)
    h1 = spread / 2 - 0.5 - math.log(0.9)
    counted = keep if how == "masked latents" else everywhere
    units = measure(model, guide, prior_sites=["w"] if how == "a site drawn from the prior" else [])
    assert_near(units.kl, torch.stack([h2[counted].mean(), h1[counted].mean()]), units.std_errors["kl"], 0.05)
    assert bool(units.fraction_at_prior[1].isnan())
