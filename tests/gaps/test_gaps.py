"""`InferenceGaps` against the closed forms of linear-Gaussian models. 3 standard errors: 0.3%."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    diagonal_family,
    exact_family,
    exact_pair,
    guide_of,
    linear_gaussian,
    model_of,
    quiet,
    scaled_family,
    shifted_family,
)
from pyro.infer import config_enumerate

import pyro_vae as pv
from pyro_vae.errors import (
    ConvergenceWarning,
    LocalFitError,
    OptionError,
    SubsamplingError,
    UnreliableEvidenceWarning,
)
from pyro_vae.kernel import calls


def gaps_of(model, guide, *args, **options):
    return pv.InferenceGaps(model, guide, **{"seed": 0, **options})(*args)


def assert_gap(estimate, truth, largest_error, atol=0.01, sigmas=3):
    value, error = float(estimate.value), float(estimate.std_error)
    assert error <= largest_error, f"blunt: {error}"
    assert abs(value - truth) <= sigmas * error, f"{value:.5f} +- {error:.5f}, truth {truth:.5f}"
    assert abs(value - truth) <= atol


def assert_parts_add_up(gaps):
    assert torch.allclose(gaps.inference, gaps.amortization + gaps.approximation, rtol=0, atol=1e-11)
    assert torch.allclose(gaps.elbo + gaps.inference, gaps.log_evidence, rtol=0, atol=1e-11)
    assert torch.allclose(gaps.elbo + gaps.amortization, gaps.optimal_elbo, rtol=0, atol=1e-11)


def test_an_exact_guide_has_no_gaps():
    lm, x = linear_gaussian(num_data=50)
    gaps = gaps_of(*exact_pair(lm), x)
    assert (gaps.elbo - lm.log_evidence(x)).abs().max() < 1e-10
    assert bool(gaps.converged.all())
    for name in ("amortization", "approximation", "inference"):
        assert getattr(gaps, name).abs().mean() < 0.02, name
    assert_parts_add_up(gaps)


@pytest.mark.parametrize("num_particles", [500, 2000])
def test_a_perturbed_mean_costs_half_its_square_in_units_of_the_posterior(num_particles):
    """Amortization gap 1/2 E[e(x)' (M / s^2) e(x)], no approximation gap."""
    lm, x = linear_gaussian(3, 6, num_data=100)
    direction = 0.1 * torch.randn(6, 3, generator=torch.Generator().manual_seed(5), dtype=F64)

    def shift(x):
        return 0.1 + 0.1 * torch.sin(x @ direction)

    precision = torch.linalg.inv(lm.posterior(x).covariance_matrix)
    truth = 0.5 * torch.einsum("bi,bij,bj->b", shift(x), precision, shift(x))
    assert 0.05 < truth.mean() < 1
    gaps = gaps_of(model_of(lm), guide_of(shifted_family(lm, shift)), x, num_particles=num_particles)
    summary = gaps.summary()
    assert_gap(summary["amortization"], float(truth.mean()), 0.004)
    assert_gap(summary["inference"], float(truth.mean()), 0.006)
    assert_gap(summary["approximation"], 0.0, 0.004)
    assert "z" in gaps.family
    assert_parts_add_up(gaps)


def test_a_diagonal_family_cannot_reach_correlations():
    """Approximation gap 1/2 [sum ln M_jj - ln |M|]; the guide is the best of its family already."""
    lm, x = linear_gaussian(3, 6, num_data=200)
    summary = gaps_of(model_of(lm), guide_of(diagonal_family(lm)), x, num_particles=2000).summary()
    assert_gap(summary["approximation"], float(lm.approximation_gap()), 0.003)
    assert_gap(summary["inference"], float(lm.approximation_gap()), 0.003)
    assert abs(float(summary["amortization"].value)) < 0.01


def test_amortization_is_not_negative_beyond_its_error_where_the_guide_is_optimal():
    """A fit that starts at the optimum may only lose: the loss stays below the 0.001 nats of the docs."""
    lm, x = linear_gaussian(3, 6, num_data=200)
    summary = gaps_of(model_of(lm), guide_of(diagonal_family(lm)), x, num_particles=500).summary()
    amortization = summary["amortization"]
    assert float(amortization.std_error) < 2e-4
    assert float(amortization.value) >= -0.001 - 3 * float(amortization.std_error), amortization


def test_both_gaps_at_once_and_the_verdict():
    """Mean and scale of a diagonal guide are off: encoder and family, each against its closed form."""
    lm, x = linear_gaussian(3, 6, num_data=100)
    family = diagonal_family(lm, 0.1, 1.3)
    truth = lm.gaps(x, torch.distributions.Independent(family(x).base_dist, 1))
    gaps = gaps_of(model_of(lm), guide_of(family), x, num_particles=2000)
    summary = gaps.summary()
    assert_gap(summary["amortization"], float(truth.amortization.mean()), 0.004)
    assert_gap(summary["approximation"], float(truth.approximation.mean()), 0.002)
    assert_gap(summary["inference"], float(truth.inference.mean()), 0.004)
    assert "encoder's (amortization)" in gaps.verdict()
    other = gaps_of(model_of(lm), guide_of(diagonal_family(lm, 0.0, 1.02)), x)
    assert "family's (approximation)" in other.verdict()
    for part in ("amortization", "approximation", "inference"):
        assert float(summary[part].sampling_error) >= 0


def two_layers(shift_1=0.0, shift_2=0.0, variance=0.379, num_data=200):
    """z2 -> z1 -> x with var(z1 | x) = var(z2 | z1) = variance; q is exact but for the shifts.

    A shift d of either mean costs KL = d^2 / (2 variance).
    """
    t, a = math.sqrt(variance), math.sqrt(1 - variance)
    s = math.sqrt(1 / (1 / variance - 1))
    x = math.sqrt(1 + s * s) * torch.randn(num_data, 1, generator=torch.Generator().manual_seed(0), dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(a * z2, t).to_event(1))
            pyro.sample("x", dist.Normal(z1, s).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(variance * x / s**2 + shift_1, t).to_event(1))
            pyro.sample("z2", dist.Normal(a * z1 + shift_2, t).to_event(1))

    return model, guide, x, dist.Normal(x.new_zeros(()), math.sqrt(1 + s * s)).log_prob(x).sum(-1)


@pytest.mark.parametrize(("num_particles", "seed"), [(500, 0), (2000, 1)])
@pytest.mark.parametrize(("shift_1", "shift_2"), [(0.05, 0.0), (0.0, 0.05), (0.0, 0.0)])
def test_a_hierarchical_guide_with_one_layer_shifted(shift_1, shift_2, num_particles, seed):
    """Amortization gap 0.05^2 / (2 x 0.379) = 0.0033, or 0; parameters replaced outright give -0.7."""
    model, guide, x, truth = two_layers(shift_1, shift_2)
    gaps = gaps_of(model, guide, x, num_particles=num_particles, seed=seed)
    gap = (shift_1**2 + shift_2**2) / (2 * 0.379)
    amortization = gaps.summary()["amortization"]
    assert float(amortization.std_error) < 0.0004
    assert abs(float(amortization.value) - gap) < 0.0008
    if gap:
        assert_gap(amortization, gap, 0.0004)
    else:  # the weights of an exact guide have no noise, and the fit ends a little below its optimum
        assert -1e-4 < float(amortization.value) <= 3 * float(amortization.std_error)
    assert bool(gaps.converged.all())
    assert_parts_add_up(gaps)
    if gap == 0:
        assert (gaps.elbo - truth).abs().max() < 1e-10


def test_a_large_shift_in_a_hierarchical_guide():
    model, guide, x, _ = two_layers(0.6, -0.8)
    gaps = gaps_of(model, guide, x, num_particles=2000)
    assert_gap(gaps.summary()["amortization"], (0.36 + 0.64) / (2 * 0.379), 0.005)


def test_errors_are_paired():
    """Common draws: the error of a difference is below that of its terms, and honest (sd of z near 1)."""
    lm, x = linear_gaussian(3, 6, num_data=300)
    family = diagonal_family(lm, 0.05, 1.1)
    gaps = gaps_of(model_of(lm), guide_of(family), x, num_particles=500)
    truth = lm.gaps(x, torch.distributions.Independent(family(x).base_dist, 1))
    independent = (gaps.std_errors["elbo"].square() + gaps.std_errors["optimal_elbo"].square()).sqrt()
    assert float((gaps.std_errors["amortization"] / independent).median()) < 0.8
    z = (gaps.amortization - truth.amortization) / gaps.std_errors["amortization"]
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * len(x)) + 0.1
    z = (gaps.approximation - truth.approximation) / gaps.std_errors["approximation"]
    assert 0.7 < float(z.std()) < 1 + 4 / math.sqrt(2 * len(x))
    contrast = (gaps.amortization - gaps.approximation) - (truth.amortization - truth.approximation)
    assert abs(float((contrast / gaps.std_errors["contrast"]).std()) - 1) < 4 / math.sqrt(2 * len(x))


def test_the_elbo_is_that_of_the_users_guide():
    lm, x = linear_gaussian(2, 4, num_data=200)
    family = diagonal_family(lm, 0.3, 0.7)
    gaps = gaps_of(model_of(lm), guide_of(family), x)
    truth = lm.elbo(x, torch.distributions.Independent(family(x).base_dist, 1))
    estimate = gaps.summary()["elbo"]
    assert_gap(
        pv.Estimate(estimate.value, estimate.std_error, estimate.sampling_error),
        float(truth.mean()),
        0.01,
        0.05,
        4,
    )
    optimal = lm.elbo(x, lm.optimal_diagonal(x))
    z = (gaps.optimal_elbo - optimal) / gaps.std_errors["optimal_elbo"]
    assert abs(float(z.mean())) < 4 / math.sqrt(len(x)) + 0.3  # the fit may fall short by a fraction of an error


@pytest.mark.parametrize("kind", ["importance", "adaptive"])
def test_another_estimator_of_the_evidence(kind):
    lm, x = linear_gaussian(num_data=20)
    make = {
        "importance": functools.partial(pv.ImportanceSampling, num_particles=3000, seed=1),
        "adaptive": functools.partial(pv.AdaptiveImportanceSampling, num_particles=300, seed=1),
    }[kind]
    model, guide = model_of(lm), guide_of(diagonal_family(lm, 0.1, 1.2))
    gaps = gaps_of(model, guide, x, evidence=make)
    alone = make(model, guide)(x)
    assert torch.equal(gaps.log_evidence, alone.log_evidence)
    assert torch.equal(gaps.evidence.log_evidence, alone.log_evidence)
    assert gaps.evidence.cost == alone.cost
    own = gaps_of(model, guide, x)
    assert torch.equal(own.amortization, gaps.amortization)
    assert_parts_add_up(gaps)


def test_cost_is_the_number_of_decoder_evaluations():
    lm, x = linear_gaussian(num_data=6)
    rows = [0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            rows[0] += z.shape[:-1].numel() * (3 if z.requires_grad else 1)
            pyro.sample("x", dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x)

    estimator = pv.InferenceGaps(model, guide_of(diagonal_family(lm)), num_particles=150, seed=0)
    estimator(x)  # the first call also looks at the structure
    rows[0] = 0
    gaps = estimator(x)
    assert gaps.cost == rows[0] / len(x)
    alone = pv.AdaptiveImportanceSampling(model, guide_of(diagonal_family(lm)), num_particles=150, seed=0)(x)
    assert gaps.evidence.cost == alone.cost  # the cost of the evidence, not of the fits before it


def test_chunk_size_changes_no_draw(monkeypatch):
    lm, x = linear_gaussian(num_data=6)
    results = []
    for size in (1, 1500, 2**40):
        monkeypatch.setattr(calls, "CHUNK_BYTES", {"cpu": size, "cuda": size})
        results.append(gaps_of(model_of(lm), guide_of(diagonal_family(lm, 0.1)), x, num_particles=150))
    for result in results[:-1]:
        for name in ("elbo", "optimal_elbo", "log_evidence"):
            assert torch.allclose(getattr(result, name), getattr(results[-1], name), rtol=1e-9, atol=1e-9), name


def test_seeds_and_random_state():
    lm, x = linear_gaussian(num_data=6)
    pair = model_of(lm), guide_of(diagonal_family(lm, 0.1))
    state = torch.get_rng_state()
    first, again, other = (gaps_of(*pair, x, seed=seed, num_particles=50) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.optimal_elbo, again.optimal_elbo)
    assert not torch.equal(first.optimal_elbo, other.optimal_elbo)


def test_data_do_not_depend_on_their_batch():
    """The fit of a datum is its own: the same truth in any company (4 paired errors)."""
    lm, x = linear_gaussian(num_data=40)
    pair = model_of(lm), guide_of(diagonal_family(lm, 0.3, 1.5))
    whole, half = gaps_of(*pair, x), gaps_of(*pair, x[:20])
    difference = whole.amortization[:20] - half.amortization
    error = (whole.std_errors["amortization"][:20].square() + half.std_errors["amortization"].square()).sqrt()
    assert (difference / error).abs().max() < 4.5


def test_fits_that_have_not_converged_are_counted_and_warned_about():
    """A tolerance that eight rounds cannot reach."""

    def skewed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z.exp()).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.5).to_event(1))

    x = torch.arange(20.0).reshape(10, 2)
    with pytest.warns(ConvergenceWarning) as caught:
        gaps = gaps_of(skewed, guide, x, tolerance=1e-6)
    assert int((~gaps.converged).sum()) == int(gaps.doubts["not converged"].sum()) == 10
    messages = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    assert len(messages) == 1
    assert "10 of 10 data had not converged" in messages[0]
    assert "Raise num_particles, which lets fits run longer" in messages[0]
    assert [w.filename for w in caught if w.category is ConvergenceWarning] == [__file__]


def test_a_far_guide_converges_with_enough_steps():
    lm, x = linear_gaussian(num_data=20)
    family = diagonal_family(lm, 1.5, 2.0)
    truth = lm.gaps(x, torch.distributions.Independent(family(x).base_dist, 1))
    with quiet():
        gaps = gaps_of(model_of(lm), guide_of(family), x)
    assert float(gaps.converged.double().mean()) > 0.9
    ratio = float(gaps.amortization.mean() / truth.amortization.mean())
    assert 0.97 < ratio < 1.03


# Guides of other families


def fitted(guide, x, prior=None, likelihood=None):
    """Gaps of a scalar latent under a given guide, and log p(x) by brute force."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x)

    with quiet():
        return gaps_of(model, guide, x, num_particles=500)


def test_a_gamma_guide_reaches_a_gamma_posterior():
    """Gamma-Poisson: the family contains the posterior, so all of the gap is the encoder's."""
    x = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=F64).repeat(10)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2 * x.new_ones(len(x)), 1.0))

    gaps = fitted(guide, x, dist.Gamma(x.new_tensor(2.0), 1.5), lambda z: dist.Poisson(z))
    posterior, q = dist.Gamma(2 + x, x.new_tensor(2.5)), dist.Gamma(x.new_tensor(2.0), 1.0).expand(x.shape)
    truth = torch.distributions.kl_divergence(q, posterior)
    summary = gaps.summary()
    assert abs(float(summary["inference"].value - truth.mean())) < 0.05 + 4 * float(summary["inference"].std_error)
    assert abs(float(summary["approximation"].value)) < 0.03
    assert set(gaps.family.split("(")[1].rstrip(")").replace(",", "").split()) == {
        "z:",
        "concentration",
        "rate",
    }


@pytest.mark.parametrize("name", ["half normal", "log normal", "weibull"])
def test_transformed_guides_are_fitted_or_refused_by_name(name):
    """A guide on the half line; HalfNormal is a fold and has no inverse to shift through."""
    x = torch.tensor([0.5, 1.0, 3.0], dtype=F64)

    def guide(x):
        one = x.new_ones(len(x))
        fn = {
            "half normal": dist.HalfNormal(one),
            "log normal": dist.LogNormal(0 * one, one),
            "weibull": dist.Weibull(one, 1.5 * one),
        }[name]
        with pyro.plate("data", len(x)):
            pyro.sample("z", fn)

    try:
        gaps = fitted(guide, x, dist.HalfNormal(x.new_tensor(2.0)), lambda z: dist.Normal(z, 0.5))
    except LocalFitError as refusal:
        assert "'z'" in str(refusal) or "HalfNormal" in str(refusal)  # noqa: PT017
        return
    grid = torch.linspace(1e-4, 12, 100_001, dtype=F64).unsqueeze(-1)
    log_joint = dist.HalfNormal(2.0).log_prob(grid) + dist.Normal(grid, 0.5).log_prob(x)
    truth = log_joint.logsumexp(0) + math.log(12 / 100_000)
    low, high = gaps.evidence.confidence_interval(0.9999)
    assert bool(((low <= truth) & (truth <= high)).all()), (gaps.log_evidence, truth)
    fine = gaps.evidence.reliable
    assert bool((gaps.approximation[fine] > -0.05).all())
    assert float(gaps.amortization.min()) > -0.05


@pytest.mark.parametrize("df", [1.0, 2.0, 5.0])
def test_heavy_tailed_guides_are_fitted_or_refused_by_name(df):
    """Student's t with one or two degrees of freedom has no standard deviation to measure offsets in."""
    x = torch.tensor([0.5, 1.0, 3.0], dtype=F64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(x.new_full((len(x),), df), 0.3 * x, 0.5))

    try:
        gaps = fitted(guide, x, dist.Normal(x.new_zeros(()), 1.0), lambda z: dist.Normal(z, 0.7))
    except LocalFitError as refusal:
        assert "'z'" in str(refusal)  # noqa: PT017
        return
    truth = dist.Normal(0.0, math.sqrt(1.49)).log_prob(x)
    assert (gaps.log_evidence - truth).abs().max() < 0.05
    assert bool(gaps.amortization.isfinite().all())
    assert float(gaps.amortization.min()) > -3 * float(gaps.std_errors["amortization"].max())


def test_a_cauchy_guide_is_fitted_or_refused_by_name():
    x = torch.tensor([0.5, 1.0, 3.0], dtype=F64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Cauchy(0.3 * x, 0.5))

    try:
        gaps = fitted(guide, x, dist.Normal(x.new_zeros(()), 1.0), lambda z: dist.Normal(z, 0.7))
    except LocalFitError as refusal:
        assert "'z'" in str(refusal)  # noqa: PT017
        return
    assert bool(gaps.amortization.isfinite().all())


def test_a_relaxed_guide_is_fitted_or_refused_by_name():
    """The temperature of a Concrete distribution is no entry of `arg_constraints`."""
    x = torch.tensor([0.2, 0.8], dtype=F64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.RelaxedBernoulliStraightThrough(x.new_tensor(0.7), logits=x))

    def relaxed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.RelaxedBernoulli(x.new_tensor(0.7), logits=x))

    try:
        gaps = fitted(relaxed, x, dist.Uniform(x.new_zeros(()), 1.0), lambda z: dist.Normal(z, 0.7))
    except LocalFitError as refusal:
        assert "'z'" in str(refusal) or "Bernoulli" in str(refusal)  # noqa: PT017
        return
    assert bool(gaps.amortization.isfinite().all())


# Refusals


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_counts_must_be_whole_numbers(value):
    lm, _ = linear_gaussian()
    with pytest.raises(OptionError, match="num_particles must be a whole number of at least"):
        pv.InferenceGaps(*exact_pair(lm), num_particles=value)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True, "0.1"])
def test_the_tolerance_must_be_positive(value):
    lm, _ = linear_gaussian()
    with pytest.raises(OptionError, match="tolerance must be a finite number above 0"):
        pv.InferenceGaps(*exact_pair(lm), tolerance=value)


def test_one_particle_is_refused_here():
    lm, _ = linear_gaussian()
    with pytest.raises(OptionError, match="at least 2, got 1"):
        pv.InferenceGaps(*exact_pair(lm), num_particles=1)


def test_two_particles_do():
    lm, x = linear_gaussian()
    gaps = gaps_of(*exact_pair(lm), x, num_particles=2)
    assert bool(gaps.inference.isfinite().all())
    str(gaps)


def test_the_gap_of_a_discrete_guide_is_not_split_until_it_enumerates():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(x.sigmoid()))

    x = torch.randn(4, dtype=F64)
    with quiet():
        gaps = gaps_of(model, guide, x)
    assert "'c'" in gaps.unsplit and bool(gaps.inference.isfinite().all())
    split = gaps_of(model, config_enumerate(guide), x)
    assert split.unsplit == "" and bool((split.approximation.abs() < 1e-12).all())
    assert ((gaps.inference - split.inference).abs() < 5 * gaps.std_errors["inference"]).all()


def test_float32_stays_float32():
    lm, x = linear_gaussian(dtype=torch.float32)
    gaps = gaps_of(model_of(lm), guide_of(diagonal_family(lm)), x, num_particles=100)
    for tensor in (gaps.elbo, gaps.optimal_elbo, gaps.log_evidence, *gaps.std_errors.values()):
        assert tensor.dtype == torch.float32


def subsampled(lm):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            likelihood = dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt())
            pyro.sample("x", likelihood.to_event(1), obs=x[rows])

    family = exact_family(lm)

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("z", family(x[rows]))

    return model, guide


def test_a_subsampled_plate_keeps_its_rows():
    lm, x = linear_gaussian(num_data=20)
    gaps = gaps_of(*subsampled(lm), x)
    assert len(gaps) == 5
    assert torch.allclose(gaps.elbo, lm.log_evidence(x)[gaps.evidence.index], atol=1e-10)
    same = functools.partial(pv.ImportanceSampling, num_particles=10, seed=0)
    assert torch.equal(gaps_of(*subsampled(lm), x, evidence=same).evidence.index, gaps.evidence.index)
    other = functools.partial(pv.ImportanceSampling, num_particles=10, seed=1)
    with pytest.raises(SubsamplingError, match="give both the same seed="):
        gaps_of(*subsampled(lm), x, evidence=other)


def test_doubts_of_another_estimator_are_warned_about_once_and_at_the_call():
    lm, x = linear_gaussian()
    narrow = guide_of(scaled_family(lm, 0.3))
    evidence = functools.partial(pv.ImportanceSampling, num_particles=200, check=False)
    with pytest.warns(UnreliableEvidenceWarning) as caught:
        pv.InferenceGaps(model_of(lm), narrow, evidence=evidence, seed=0)(x)
    found = [warning for warning in caught if "Pareto k" in str(warning.message)]
    assert len(found) == 1 and found[0].filename == __file__
