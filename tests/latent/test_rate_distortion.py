"""`RateDistortion` against the closed form of the linear-Gaussian model and against quadrature, and what it refuses."""

import gc
import json
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    SIGMAS,
    assert_near,
    diagonal_family,
    exact_pair,
    guide_of,
    linear_gaussian,
    model_of,
    one_line,
    quiet,
    scaled_family,
)
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    BatchCouplingError,
    ConvergenceWarning,
    EmptyBatchError,
    InvalidDataError,
    LocalFitError,
    NonFiniteError,
    OptionError,
    StructureError,
)
from pyro_vae.latent import RateDistortion
from pyro_vae.latent.rate_distortion import annealing_grid, reported_betas

BETAS = (30.0, 10.0, 3.0, 1.0, 0.3)
NAMES = ("rate", "distortion", "bound")


def measure(model, guide, x, batch_size=None, **options):
    batches = [x] if batch_size is None else DataLoader(TensorDataset(x), batch_size)
    options = {"betas": BETAS, "num_steps": 60, "num_chains": 4, "seed": 0, **options}
    return RateDistortion(model, guide, **options)(batches, progress=False)


@pytest.fixture(scope="module")
def linear():
    """A long run on the linear-Gaussian model with a stretched guide: (model, data, its exact curve, the run)."""
    pyro.set_rng_seed(0)
    lm, x = linear_gaussian()
    curve = measure(model_of(lm), guide_of(scaled_family(lm, 1.3)), x, num_steps=1200, num_chains=150)
    return lm, x, lm.rate_distortion(x, curve.beta), curve


# --- the closed form ---


def test_the_points_are_those_of_the_closed_form(linear):
    """12 comparisons at 4.5 standard errors: a false alarm in 10,000 seeds."""
    _, _, exact, curve = linear
    assert curve.beta.tolist() == [math.inf, *BETAS]
    assert_near(curve.rate[1:], exact.rate[1:], curve.std_errors["rate"][1:], 0.05)
    assert_near(curve.distortion[3:], exact.distortion[3:], curve.std_errors["distortion"][3:], 0.1)
    relative = curve.std_errors["distortion"][:3] / exact.distortion[:3]
    assert_near(curve.distortion[:3] / exact.distortion[:3], torch.ones(3, dtype=F64), relative, 0.05)


def test_the_points_lie_on_the_proven_side_and_within_a_twentieth_of_a_nat(linear):
    """R + D / beta is at least the least of all encoders, -log Z_beta; 6 comparisons at 4.5 standard errors."""
    _, _, exact, curve = linear
    excess = -curve.bound - (exact.rate + exact.distortion / curve.beta)
    assert torch.allclose(curve.bound, -(curve.rate + curve.distortion / curve.beta), atol=1e-9)
    assert float(curve.std_errors["bound"].max()) < 0.012
    assert bool((excess >= -SIGMAS * curve.std_errors["bound"] - 1e-12).all()), excess
    assert float(excess.max()) < 0.05, excess


def test_the_prior_has_no_rate_and_both_are_monotone(linear):
    _, _, _, curve = linear
    assert float(curve.rate[0]) == 0.0 and float(curve.bound[0]) == 0.0
    assert float(curve.std_errors["rate"][0]) == 0.0
    assert bool((curve.rate.diff() > 0).all()) and bool((curve.distortion.diff() < 0).all())


def test_the_slope_is_minus_beta(linear):
    """A chord's slope lies between those of its ends, within 4.5 of its errors, which are summed as if independent."""
    _, _, _, curve = linear
    errors = {name: error[1:].square() for name, error in curve.std_errors.items()}
    steps = {name: getattr(curve, name)[1:].diff() for name in ("rate", "distortion")}
    relative = sum((errors[n][1:] + errors[n][:-1]) / steps[n].square() for n in steps).sqrt()
    slope, beta = -curve.slope[1:], curve.beta[1:]
    assert float(relative[1:].max()) < 0.1
    assert bool((slope <= beta[:-1] * (1 + SIGMAS * relative)).all())
    assert bool((slope >= beta[1:] * (1 - SIGMAS * relative)).all())


def test_weak_data_bring_the_chains_down_in_one_step_where_nothing_changes():
    """A likelihood that does not depend on z: rate zero and the same distortion at every beta, exactly."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0 * z.sum(-1), 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    guide = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
    curve = measure(model, guide, x, num_steps=5)
    assert curve.rate.abs().max() < 1e-12
    assert torch.allclose(curve.distortion, -dist.Normal(0, 1).log_prob(x).mean().expand(6), atol=1e-12)
    assert torch.allclose(curve.log_evidence.value, dist.Normal(0, 1).log_prob(x).mean(), atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*points of the curve:pyro_vae.errors.ConvergenceWarning")  # the chains are short
def test_standard_errors_are_those_of_repetitions():
    """One datum 300 times over: the spread over the copies is the Monte Carlo error, known to 1 / sqrt(600) = 4 %."""
    lm, x = linear_gaussian(num_data=1)
    copies = x.expand(300, -1)
    curve = measure(model_of(lm), guide_of(scaled_family(lm, 1.0)), copies, num_chains=8, betas=(3.0, 1.0))
    for name in NAMES:
        ratio = curve.sampling_errors[name][1:] / curve.std_errors[name][1:]
        assert bool(((ratio - 1).abs() < 0.2).all()), (name, ratio)
    for own in (curve.guide_rate, curve.guide_distortion, curve.elbo, curve.log_evidence):
        assert abs(float(own.sampling_error / own.std_error) - 1) < 0.2


@pytest.mark.filterwarnings("ignore:.*points of the curve:pyro_vae.errors.ConvergenceWarning")  # the chains are short
def test_fewer_steps_are_higher_not_lower():
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(scaled_family(lm, 1.0))
    exact = float(lm.log_evidence(x).mean())
    bounds = [float(measure(*pair, x, num_steps=steps, num_chains=60, betas=(1.0,)).bound[-1]) for steps in (4, 20, 100)]
    assert bounds[0] < bounds[1] < bounds[2] < exact + 0.05
    assert bounds[0] < exact - 1  # which shows that there is something to see


# --- the guide's own point, and log p(x) ---


def test_the_guide_s_point_is_its_rate_and_distortion_above_the_curve(linear):
    lm, x, exact, curve = linear
    q = scaled_family(lm, 1.3)(x)
    for found, truth in (
        (curve.guide_rate, lm.rate(q)),
        (curve.guide_distortion, lm.distortion(x, q)),
        (curve.elbo, lm.elbo(x, q)),
    ):
        assert_near(found.value[None], truth.mean()[None], found.std_error[None], 0.1)
    assert torch.allclose(curve.elbo.value, -(curve.guide_rate.value + curve.guide_distortion.value))
    above = curve.guide_rate.value + curve.guide_distortion.value / curve.beta - (exact.rate + exact.distortion / curve.beta)
    assert bool((above > 0).all())


def test_an_exact_guide_stands_on_the_curve_at_beta_one():
    lm, x = linear_gaussian()
    curve = measure(*exact_pair(lm), x)
    assert torch.allclose(curve.elbo.value, lm.log_evidence(x).mean(), atol=1e-10)
    assert float(curve.elbo.std_error) < 1e-10
    assert float(curve.bound[curve.beta.tolist().index(1.0)]) <= float(curve.elbo.value) + 1e-9
    assert math.isclose(float(curve.elbo.sampling_error), float(lm.log_evidence(x).std() / 6**0.5), rel_tol=1e-9)


def test_chains_that_end_above_the_guide_s_point_are_not_called_a_curve_and_the_remedy_works():
    """The guide is the posterior, so its point is on the true curve: whatever the chains miss, they miss against it."""
    lm, x = linear_gaussian()
    pair = exact_pair(lm)
    with pytest.warns(ConvergenceWarning, match=r"points of the curve.*beta = 1:.*raise num_steps \(now 10\)") as raised:
        short = measure(*pair, x, num_steps=10)
    assert raised[0].filename == __file__
    place = short.beta.tolist().index(1.0)
    assert bool(short.above_guide[place]) and short.to_dict()["above_guide"] == short.above_guide.tolist()
    assert "WARNING" in one_line(short) and "The chains are too short" in one_line(short)
    own = short.guide_rate.value + short.guide_distortion.value / short.beta
    torch.testing.assert_close(short.excess, short.rate + short.distortion / short.beta - own, rtol=0, atol=1e-9)
    assert abs(float(short.excess[place] + short.bound[place] - lm.log_evidence(x).mean())) < 1e-9
    for num_steps in (500, 1500):
        long = measure(*pair, x, num_steps=num_steps, num_chains=60)  # without a warning
        assert not bool(long.above_guide.any()) and "WARNING" not in one_line(long)
        assert abs(float(long.excess[place])) < 0.05 + 4 * float(long.std_errors["excess"][place])


@pytest.mark.filterwarnings("ignore:.*points of the curve:pyro_vae.errors.ConvergenceWarning")  # the chains are short
def test_the_errors_of_the_excess_are_those_of_repetitions():
    """One datum 300 times over, as for the others above; the share of the guide's own point is seen here.

    Two runs of other seeds differ by their errors: by less than 4.5 of them.
    """
    lm, x = linear_gaussian(num_data=1)
    pair = model_of(lm), guide_of(scaled_family(lm, 1.5))
    options = {"num_steps": 30, "num_chains": 20, "betas": (1.0, 3.0)}
    curve, other = (measure(*pair, x.expand(300, -1), **options, seed=seed) for seed in (0, 1))
    stated = curve.std_errors["excess"]
    assert bool(((curve.sampling_errors["excess"] / stated - 1).abs() < 0.2).all())
    difference = (curve.excess - other.excess).abs()
    assert bool((difference > 0).all()) and bool((difference < SIGMAS * 2**0.5 * stated).all())


def test_log_evidence_is_the_log_mean_of_the_weights(linear):
    lm, x, _, curve = linear
    assert_near(curve.log_evidence.value[None], lm.log_evidence(x).mean()[None], curve.log_evidence.std_error[None], 0.02)
    assert float(curve.log_evidence.value) >= float(curve.bound[curve.beta.tolist().index(1.0)])


# --- quadrature: decoders that are not linear, supports that are not the line, sums over a discrete site ---

CURVED_X = torch.tensor([[0.9, 0.2], [0.1, 1.5]], dtype=F64)


def curved(z):
    """Mean of two observations for a z of any shape."""
    return torch.stack([torch.tanh(2 * z), z.square() / 2], -1)


def curved_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(curved(z), 0.5).to_event(1), obs=x)


def positive_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.0)))
        pyro.sample("x", dist.Normal(curved(z), 0.5).to_event(1), obs=x)


@config_enumerate
def enumerated_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
        pyro.sample("x", dist.Normal(curved(z) + c[..., None], 0.5).to_event(1), obs=x)


def quadrature(name, betas):
    """Rate, distortion and mean log Z_beta on a grid of z."""
    low, high, prior = (1e-6, 25.0, dist.Gamma(2.0, 1.0)) if name == "positive" else (-9.0, 9.0, dist.Normal(0.0, 1.0))
    z = torch.linspace(low, high, 40_001, dtype=F64)
    log_prior = prior.log_prob(z)[:, None] + math.log(float(z[1] - z[0]))
    log_likelihood = dist.Normal(curved(z)[:, None], 0.5).to_event(1).log_prob(CURVED_X)
    if name == "enumerated":
        one = dist.Normal(curved(z)[:, None] + 1, 0.5).to_event(1).log_prob(CURVED_X)
        log_likelihood = torch.logaddexp(log_likelihood + math.log(0.7), one + math.log(0.3))
    rows = []
    for beta in betas.tolist():
        log_f = log_prior + log_likelihood / beta
        log_z = log_f.logsumexp(0)
        q = (log_f - log_z).exp()
        rows.append([(q * (log_f - log_z - log_prior)).sum(0), -(q * log_likelihood).sum(0), log_z])
    return [torch.stack([row[i].mean() for row in rows]) for i in range(3)]


@pytest.mark.parametrize("name", ["curved", "positive", "enumerated"])
def test_quadrature(name):
    """Stiff in log z where positive: chains must not get stuck. 9 comparisons: a false alarm in 15,000 seeds."""
    model = {"curved": curved_model, "positive": positive_model, "enumerated": enumerated_model}[name]
    family = dist.LogNormal if name == "positive" else dist.Normal
    guide = guide_of(lambda x: family(0.5 * x[:, 1] - 0.2, 0.6))
    with quiet():
        curve = measure(model, guide, CURVED_X, num_steps=800, num_chains=200, betas=(10.0, 3.0, 1.0))
    rate, distortion, log_z = quadrature(name, curve.beta)
    assert_near(curve.rate[1:], rate[1:], curve.std_errors["rate"][1:], 0.06)
    assert_near(curve.distortion[1:], distortion[1:], curve.std_errors["distortion"][1:], 0.35)
    missing = log_z - curve.bound
    # 1e-6: the grid of z ends.
    assert bool((missing >= -SIGMAS * curve.std_errors["bound"] - 1e-6).all()) and float(missing.max()) < 0.1, missing


# --- data: batches, masks, one datum, dtypes ---


@pytest.mark.filterwarnings("ignore:.*points of the curve:pyro_vae.errors.ConvergenceWarning")  # the chains are short
def test_batches_are_joined_and_counted():
    lm, x = linear_gaussian(num_data=7)
    pair = model_of(lm), guide_of(diagonal_family(lm))
    parts = measure(*pair, x, batch_size=3, num_chains=100, num_steps=100)
    whole = measure(*pair, x, num_chains=100, num_steps=100)
    assert parts.num_data == whole.num_data == 7
    for name in NAMES:
        error = (parts.std_errors[name].square() + whole.std_errors[name].square()).sqrt()
        assert bool(((getattr(parts, name) - getattr(whole, name)).abs() <= SIGMAS * error + 1e-12).all())
    assert torch.allclose(parts.sampling_errors["bound"][-1], whole.sampling_errors["bound"][-1], rtol=0.05)
    assert parts.cost == pytest.approx(whole.cost)
    assert parts.cost >= 3 * 100 * 100


def test_a_masked_datum_has_neither_rate_nor_distortion():
    lm, x = linear_gaussian(num_data=3)
    kept = torch.tensor([True, False, True])
    base = model_of(lm), guide_of(diagonal_family(lm))
    pair = [poutine.mask(program, mask=kept) for program in base]
    masked = measure(*pair, x, num_chains=200, num_steps=100)
    plain = measure(*base, x[kept], num_chains=200, num_steps=100)
    for name in NAMES:
        error = (masked.std_errors[name].square() + (2 / 3 * plain.std_errors[name]).square()).sqrt()
        difference = getattr(masked, name) - 2 / 3 * getattr(plain, name)
        assert bool((difference.abs() <= SIGMAS * error + 1e-9).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_datum_and_the_dtype(dtype):
    lm, x = linear_gaussian(num_data=1, dtype=dtype)
    curve = measure(model_of(lm), guide_of(diagonal_family(lm)), x, num_chains=2)
    assert {getattr(curve, name).dtype for name in ("beta", *NAMES)} == {dtype}
    assert curve.elbo.value.dtype == dtype and bool(curve.sampling_errors["rate"].isnan().all())
    assert bool(curve.std_errors["rate"].isfinite().all())
    assert math.isfinite(float(curve.log_evidence.std_error))


def test_two_sites_in_a_subsampled_plate_and_an_autoguide():
    """z = (a, b) with x = a + b + noise is the linear model with weights (1, 1)."""
    x = torch.tensor([[1.0], [-0.5], [2.0], [0.3]], dtype=F64)
    lm = pv.exact.LinearGaussian(torch.ones(1, 2, dtype=F64), torch.zeros(1, dtype=F64), torch.tensor(0.25, dtype=F64))

    def model(x):
        with pyro.plate("data", 40, subsample_size=len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("a", dist.Normal(x / 3, 0.7).to_event(1))
            pyro.sample("b", dist.Normal(x / 3, 0.7).to_event(1))

    def full(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b, 0.5).to_event(1), obs=x)

    auto = AutoNormal(full)
    auto(x)
    for pair in ((model, guide), (full, auto)):
        curve = measure(*pair, x, num_chains=200, num_steps=800)
        exact = lm.rate_distortion(x, curve.beta)
        assert_near(curve.rate[2:], exact.rate[2:], curve.std_errors["rate"][2:], 0.1)
        excess = -curve.bound - (exact.rate + exact.distortion / curve.beta)
        assert bool((excess >= -SIGMAS * curve.std_errors["bound"] - 1e-9).all()) and float(excess.max()) < 0.06


def test_no_plate_at_all_and_a_joint_autoguide():
    """`datum_plate=None`: the whole batch is one datum, rates and distortions are sums."""
    lm, x = linear_gaussian(num_data=3)
    dim = lm.weight.shape[1]

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), dim), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(2), obs=x)

    guide = AutoMultivariateNormal(model)
    guide(x)
    curve = measure(model, guide, x, datum_plate=None, num_chains=100, num_steps=200)
    exact = lm.rate_distortion(x, curve.beta)
    assert curve.num_data == 1
    assert_near(curve.rate[2:], 3 * exact.rate[2:], curve.std_errors["rate"][2:], 0.5)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_networks(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "mlp":
        vae, x = (
            pv.mlp_vae(12, latent_dim=3, likelihood=pv.nn.Bernoulli(), hidden=(16,)),
            torch.rand(5, 12, generator=generator).round(),
        )
    else:
        vae = pv.conv_vae((1, 8, 8), latent_dim=3, likelihood=pv.nn.Bernoulli(event_dim=3), channels=(4, 8))
        x = torch.rand(3, 1, 8, 8, generator=generator).round()
    vae.eval()
    curve = measure(vae.model, vae.guide, x, num_steps=40)
    assert bool(torch.stack([getattr(curve, name).isfinite().all() for name in NAMES]).all())
    assert float(curve.log_evidence.value) > float(curve.elbo.value) - 1
    assert 0.3 < curve.acceptance <= 1


# --- what it leaves alone, and what it keeps ---


def test_seeds_and_no_side_effects():
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(diagonal_family(lm))
    pyro.param("mine", torch.ones(2))
    state = torch.random.get_rng_state()
    first, again, other = (measure(*pair, x, batch_size=4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(first.rate, again.rate) and not torch.equal(first.rate, other.rate)
    measure(*pair, x, seed=None)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_memory_does_not_grow_with_the_data_or_the_steps():
    lm, x = linear_gaussian(num_data=4)
    alive = []

    def batches():
        for _ in range(5):
            gc.collect()
            alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
            yield (x,)

    with quiet():  # of chains that are too short
        RateDistortion(model_of(lm), guide_of(diagonal_family(lm)), num_steps=20, num_chains=4, seed=0)(
            batches(), progress=False
        )
    assert len(set(alive[2:])) == 1, alive


def test_the_record_prints_and_goes_into_json(linear):
    curve = linear[-1]
    text = str(curve)
    assert "upper bounds" in text and "Monte Carlo error" in text and "sampling error" in text and "bound: lower" in text
    assert len(re.findall(r"^ *(?:inf|[0-9.]+) {2,}", text, re.MULTILINE)) == len(curve)
    plain = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert plain["beta"][0] is None and plain["rate"] == curve.rate.tolist() and len(plain["slope"]) == len(curve) - 1
    assert plain["guide_rate"]["value"] == float(curve.guide_rate.value)


# --- betas and the grid ---


def test_infinity_and_one_are_always_reported():
    assert reported_betas((0.5, 4)) == [math.inf, 4.0, 1.0, 0.5]
    assert reported_betas((math.inf, 1, 1.0)) == [math.inf, 1.0]
    default = reported_betas(None)
    assert len(default) == 21 and default[0] == math.inf and default[-1] == 1.0


@pytest.mark.parametrize(
    "powers", [[0.0, 1.0], [0.0, 0.9999, 1.0], [0.0, 1e-9, 2e-9, 1.0, 50.0], [(k / 20) ** 3 for k in range(21)]]
)
def test_the_grid_passes_by_every_reported_power(powers):
    for num_steps in (len(powers) - 1, len(powers), 100):
        grid, places = annealing_grid(powers, num_steps)
        assert len(grid) == num_steps + 1 and all(a < b for a, b in zip(grid, grid[1:], strict=False))
        assert [grid[place] for place in places] == powers and list(places.values()) == list(range(len(powers)))
    with pytest.raises(OptionError, match="num_steps"):
        annealing_grid(powers, len(powers) - 2)


# --- refusals ---


def test_bad_options():
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(diagonal_family(lm))
    for options in (
        {"betas": ()},
        {"betas": (0.0,)},
        {"betas": (-1.0, 1.0)},
        {"betas": (math.nan,)},
        {"betas": ("a",)},
        {"betas": 2.0},
        {"num_steps": 3},
        {"num_steps": 0},
        {"num_chains": 1},
        {"num_leapfrog": 0},
    ):
        with pytest.raises(OptionError):
            measure(*pair, x, **options)


def test_bad_data():
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(diagonal_family(lm))
    with pytest.raises(ArgumentError, match="iterable of batches"):
        RateDistortion(*pair)(x)
    with pytest.raises(EmptyBatchError):
        RateDistortion(*pair)([], progress=False)
    with pytest.raises(ArgumentError, match="tuple"):
        RateDistortion(*pair)([x], args=lambda batch: batch, progress=False)
    x[1, 0] = math.nan
    with pytest.raises(InvalidDataError):
        measure(*pair, x)


def test_bad_pairs():
    def discrete_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(3, dtype=F64)
    discrete_guide = guide_of(lambda x: dist.Bernoulli(torch.sigmoid(x)))
    with pytest.raises(LocalFitError, match="discrete"):
        measure(discrete_model, discrete_guide, x)
    with pytest.raises(LocalFitError, match="summed out"):
        measure(config_enumerate(discrete_model), guide_nothing, x)
    lm, data = linear_gaussian()
    with pytest.raises(StructureError):
        measure(model_of(lm), lambda x: None, data)
    norm = torch.nn.BatchNorm1d(2).double()
    with pytest.raises(BatchCouplingError):
        measure(model_of(lm), guide_of(lambda x: dist.Normal(norm(x[:, :2]), 1.0).to_event(1)), data)


def guide_nothing(x):
    pass


def test_a_guide_that_is_nan_and_a_likelihood_that_is_zero():
    lm, x = linear_gaussian()
    with pytest.raises(NonFiniteError):
        measure(model_of(lm), guide_of(scaled_family(lm, math.nan)), x)

    def bounded(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1), obs=x)

    with pytest.raises(NonFiniteError, match="likelihood of zero"):
        measure(bounded, guide_of(lambda x: dist.Normal(x, 0.01)), torch.zeros(3, dtype=F64), check_support=False)
