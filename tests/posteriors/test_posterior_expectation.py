"""E[f(z) given x] against closed forms, exact sums and quadrature: value, error, coverage, the guide's bias, doubts."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    assert_near,
    exact_pair,
    guide_of,
    linear_gaussian,
    model_of,
    one_line,
    posterior_moments,
    quiet,
    scaled_family,
    shifted_family,
)
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

GUIDES = {
    "exact": lambda lm: shifted_family(lm, lambda x: 0.0),
    "shifted": lambda lm: scaled_family(lm, 1.0, 2.0),
    "narrow": lambda lm: scaled_family(lm, 0.3),
    "wide": lambda lm: scaled_family(lm, 3.0),
}
THRESHOLDS = torch.tensor([-0.5, 0.0, 0.5], dtype=F64)


def first_moments(latents):
    z = latents["z"][..., 0]
    return torch.stack([z, z**2, z.exp()], -1)


def above(latents):
    return latents["z"][..., :1] > THRESHOLDS


def truths(lm, x):
    """E[z], E[z^2], E[exp z] of the first latent, and the probabilities of `above`."""
    loc, root = posterior_moments(lm)(x)
    mean, std = loc[:, 0], root[0].square().sum().sqrt()
    moments = torch.stack([mean, mean**2 + std**2, (mean + std**2 / 2).exp()], -1)
    return moments, 1 - torch.distributions.Normal(mean.unsqueeze(-1), std).cdf(THRESHOLDS)


def assert_all_near(record, truth, largest_error):
    assert_near(record.value.flatten(), truth.flatten(), record.std_error.flatten(), largest_error)


@pytest.mark.parametrize("family", GUIDES)
def test_closed_forms_of_the_linear_gaussian_model(family):
    lm, x = linear_gaussian()
    moments, probabilities = truths(lm, x)
    model, guide = model_of(lm), guide_of(GUIDES[family](lm))
    record = pv.PosteriorExpectation(model, guide, first_moments, num_particles=4000, seed=0)(x)
    assert_all_near(record, moments, 0.02)
    assert bool(record.reliable.all()) and record.num_particles == 4000
    record = pv.PosteriorExpectation(model, guide, above, num_particles=4000, seed=1)(x)
    assert record.is_probability and record.value.dtype == F64
    assert_all_near(record, probabilities, 0.01)


def gamma_poisson(family):
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_full((len(x),), 2.0), 1.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", family(x))

    return model, guide


@pytest.mark.parametrize("family", ["exact", "poor"])
def test_closed_forms_of_the_gamma_poisson_model(family):
    """E[rate], E[log rate], E[1 / (1 + rate)] would need a series; E[rate^2] and tail probabilities do not."""
    x = torch.tensor([0.0, 1.0, 3.0, 8.0, 30.0], dtype=F64)
    a, b = x + 2, 2.5
    families = {
        "exact": lambda x: dist.Gamma(x + 2, b),
        "poor": lambda x: dist.LogNormal(((x + 2) / b).log() + 0.7, 0.2),
    }
    model, guide = gamma_poisson(families[family])
    with quiet():
        record = pv.PosteriorExpectation(
            model,
            guide,
            lambda z: torch.stack([z["rate"], z["rate"].log(), z["rate"] ** 2], -1),
            num_particles=5000,
            seed=0,
        )(x)
        tail = pv.PosteriorExpectation(model, guide, lambda z: z["rate"] > 1.5, num_particles=5000, seed=0)(x)
    truth = torch.stack([a / b, torch.digamma(a) - math.log(b), a * (a + 1) / b**2], -1)
    for i, largest in enumerate((0.05, 0.02, 1.0)):
        assert_near(record.value[:, i], truth[:, i], record.std_error[:, i], largest)
    probability = 1 - torch.distributions.Gamma(a, torch.full_like(a, b)).cdf(torch.tensor(1.5, dtype=F64))
    assert_near(tail.value, probability, tail.std_error, 0.02)


@pytest.mark.parametrize(("family", "num_particles"), [("exact", 1000), ("shifted", 500), ("narrow", 500)])
def test_intervals_cover_and_are_not_too_wide(family, num_particles):
    """At least 93% of nominal 95%: with 1,600 intervals of one number each a false alarm in 200 at a true 94.5%."""
    lm, some = linear_gaussian(num_data=8)
    repeats = 200
    x = some.repeat_interleave(repeats, 0)
    moments, probabilities = (truth.repeat_interleave(repeats, 0) for truth in truths(lm, some))
    model, guide = model_of(lm), guide_of(GUIDES[family](lm))
    for f, truth in ((first_moments, moments), (above, probabilities)):
        with quiet():
            record = pv.PosteriorExpectation(model, guide, f, num_particles=num_particles, seed=3)(x)
        low, high = record.confidence_interval()
        covered = ((low <= truth) & (truth <= high)).double()
        assert float(covered.mean()) > 0.935 and float(covered.mean(0).min()) > 0.93
        if f is first_moments:
            off = (record.value - truth).reshape(8, repeats, -1).square().mean(1).sqrt()
            ratio = record.std_error.reshape(8, repeats, -1).mean(1) / off
            assert float(ratio.min()) > 0.8 and float(ratio.max()) < 1.25  # +- 5% is the noise of 200 repeats


@pytest.mark.parametrize("family", ["shifted", "narrow"])
def test_the_bias_of_the_guide_equals_its_closed_form(family):
    lm, x = linear_gaussian()
    loc, root = posterior_moments(lm)(x)
    mean, std = loc[:, 0], root[0].square().sum().sqrt()
    moved, factor = (2.0, 1.0) if family == "shifted" else (0.0, 0.3)
    guide = guide_of(GUIDES[family](lm))
    record = pv.PosteriorExpectation(model_of(lm), guide, lambda z: z["z"][..., 0] ** 2, num_particles=4000, seed=0)(x)
    truth = (mean + moved * std) ** 2 + (factor * std) ** 2 - mean**2 - std**2
    assert_near(record.bias, truth, record.bias_std_error, 0.05)
    assert_near(record.guide_value, truth + mean**2 + std**2, record.guide_std_error, 0.05)
    assert float((record.bias / record.bias_std_error).abs().min()) > 3  # and it is seen
    estimate = record.mean_bias()
    assert abs(float(estimate.value) - float(truth.mean())) < 4.5 * float(estimate.std_error)


def test_an_exact_guide_has_no_bias():
    lm, x = linear_gaussian()
    record = pv.PosteriorExpectation(*exact_pair(lm), lambda z: z["z"], num_particles=4000, seed=0)(x)
    assert_all_near(record, posterior_moments(lm)(x)[0], 0.01)
    assert float((record.bias / record.bias_std_error).abs().max()) < 4.5


def squared_pair(x_scale=0.5):
    """x ~ N(z^2, .5) with a prior off the middle: two modes of unequal mass; the guide knows the one above zero."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_full((len(x),), 0.3), 1.0))
            pyro.sample("x", dist.Normal(z**2, x_scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.clamp(min=0.1).sqrt(), 0.2))

    return model, guide


def test_a_mode_that_the_guide_misses_is_found_and_its_share_is_known_well():
    """The components of the proposal get fixed shares of the draws, so the error is far below that of independent draws."""
    some, repeats = torch.tensor([4.0, 2.0, 1.0], dtype=F64), 100
    grid = torch.linspace(-6, 6, 20001, dtype=F64)
    log_joint = dist.Normal(0.3, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.5).log_prob(some.unsqueeze(-1))
    share = log_joint.softmax(-1)
    truth = torch.stack([(share * grid).sum(-1), (share * (grid > 0)).sum(-1)], -1).repeat_interleave(repeats, 0)
    x = some.repeat_interleave(repeats)
    with quiet():
        mean = pv.PosteriorExpectation(*squared_pair(), lambda z: z["z"], num_particles=1000, seed=0)(x)
        sign = pv.PosteriorExpectation(*squared_pair(), lambda z: z["z"] > 0, num_particles=1000, seed=0)(x)
    for i, record in enumerate((mean, sign)):
        low, high = record.confidence_interval()
        assert float(((low <= truth[:, i]) & (truth[:, i] <= high)).double().mean()) > 0.9  # of 300: a false alarm in 1,000
        off = (record.value - truth[:, i]).reshape(3, repeats).square().mean(1).sqrt()
        ratio = record.std_error.reshape(3, repeats).mean(1) / off
        assert float(ratio.min()) > 0.75 and float(ratio.max()) < 1.3
    assert float(mean.std_error.max()) < 0.6 * 1.9 / math.sqrt(1000)  # 1.9, the spread of z over both modes of x = 4
    assert float(mean.bias[0]) > 0.5  # the guide's own value misses the mode below zero


def test_a_constant_is_exact():
    lm, x = linear_gaussian()
    made = pv.PosteriorExpectation(
        model_of(lm), guide_of(scaled_family(lm, 0.5)), lambda z: 0 * z["z"][..., 0] + 0.1, seed=0
    )
    record = made(x)
    assert torch.equal(record.value, torch.full((6,), 0.1, dtype=F64)) and not bool(record.std_error.any())
    assert torch.equal(record.guide_value, record.value) and not bool(record.bias_std_error.any())
    assert bool(record.reliable.all()) and torch.equal(record.ess, record.ess.clamp(500, 1000))


def test_whole_numbers_and_truth_values_are_converted():
    lm, x = linear_gaussian(dtype=torch.float32)
    model, guide = model_of(lm), guide_of(scaled_family(lm, 0.8))
    with quiet():
        counts = pv.PosteriorExpectation(model, guide, lambda z: (z["z"] > 0).long().sum(-1), seed=0)(x.float())
        events = pv.PosteriorExpectation(model, guide, lambda z: z["z"] > 0, seed=0)(x.float())
    assert counts.value.dtype == events.value.dtype == torch.float32
    assert torch.allclose(counts.value, events.value.sum(-1), atol=1e-5)
    assert not counts.is_probability and events.is_probability


def test_a_rare_event_has_an_interval_and_as_a_number_a_doubt():
    """Three in ten million, with no draw there: nobody may read 0 +- 0."""
    lm, x = linear_gaussian()
    loc, root = posterior_moments(lm)(x)
    far = loc[:, 0] + 5 * root[0].square().sum().sqrt()
    far[0] = loc[0, 0]
    model, guide = exact_pair(lm)
    record = pv.PosteriorExpectation(model, guide, lambda z: z["z"][..., 0] > far, seed=0)(x)
    low, high = record.confidence_interval()
    assert bool((low[1:] == 0).all()) and 0.002 < float(high[1:].min()) < float(high[1:].max()) < 0.008
    assert float(record.std_error.min()) > 5e-4 and bool(record.reliable.all())
    with pytest.warns(
        pv.errors.UnreliableEvidenceWarning, match="few.*draws determine the expectation of f for 5 of 6 data"
    ):
        record = pv.PosteriorExpectation(model, guide, lambda z: (z["z"][..., 0] > far).double(), seed=0)(x)
    assert record.doubts["few draws"].tolist() == [False] + [True] * 5


def test_a_function_with_a_heavy_tail_is_doubted():
    lm, x = linear_gaussian()
    scale = 6 / posterior_moments(lm)(x)[1][0].square().sum().sqrt()
    with quiet():
        record = pv.PosteriorExpectation(*exact_pair(lm), lambda z: (scale * z["z"][..., 0]).exp(), seed=0)(x)
    assert int(record.doubts["function tails"].sum()) >= 5
    assert any("weight times f of" in str(warning) for warning in record.warnings())
    assert bool((record.pareto_k > record.evidence.pareto_k).any())
    assert "error not to be trusted" in one_line(record) and "function tails" in one_line(record)


def test_few_numbers_of_many_do_not_doubt_a_datum_and_are_named():
    lm, x = linear_gaussian()
    scale = 8 / posterior_moments(lm)(x)[1][0].square().sum().sqrt()

    def f(z):
        heavy = (scale * z["z"][..., :1]).exp()
        return torch.cat([heavy, z["z"][..., :1] * torch.linspace(1, 2, 40, dtype=F64)], -1)

    record = pv.PosteriorExpectation(*exact_pair(lm), f, seed=0)(x)
    assert bool(record.reliable.all()) and int(record.in_doubt[:, 0].sum()) >= 5 and not bool(record.in_doubt[:, 1:].any())


def test_few_draws_are_no_reason_to_trust():
    lm, x = linear_gaussian()
    for num_particles in (2, 5):
        with quiet():
            record = pv.PosteriorExpectation(
                model_of(lm), guide_of(scaled_family(lm, 0.8)), lambda z: z["z"], num_particles=num_particles, seed=0
            )(x)
        assert bool(record.doubts["few draws"].all()) and "function tails" in record.unchecked
    single = pv.PosteriorExpectation(*exact_pair(lm), lambda z: z["z"], num_particles=1, seed=0)
    with quiet():
        record = single(x)
    assert bool(record.std_error.isnan().all()) and bool(record.doubts["few draws"].all())


def test_memory_is_bounded_by_pieces_that_change_no_number(monkeypatch):
    lm, x = linear_gaussian()
    made = pv.PosteriorExpectation(model_of(lm), guide_of(scaled_family(lm, 0.8)), first_moments, num_particles=250, seed=0)
    whole, seen = made(x), []

    def f(z):
        seen.append(len(z["z"]))
        return first_moments(z)

    monkeypatch.setattr("pyro_vae.posteriors.function.CHUNK_NUMBERS", 7 * 6 * 3)
    parts = pv.PosteriorExpectation(made.model, made.guide, f, num_particles=250, seed=0)(x)
    assert max(seen) == 7
    for name in ("value", "std_error", "pareto_k", "guide_value", "ess"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-6), name


def test_nothing_is_left_behind():
    lm, x = linear_gaussian()
    decoder = torch.nn.Linear(2, 3).double()
    made = pv.PosteriorExpectation(
        model_of(lm), guide_of(scaled_family(lm, 0.8)), lambda z: decoder(z["z"].mul_(1.0)), num_particles=100, seed=0
    )
    state, store = torch.get_rng_state(), dict(pyro.get_param_store())
    first = made(x)
    assert torch.equal(torch.get_rng_state(), state) and dict(pyro.get_param_store()) == store
    assert decoder.training and decoder.weight.grad is None and not first.value.requires_grad
    assert torch.equal(made(x).value, first.value)


def test_the_record_joins_selects_and_prints():
    lm, x = linear_gaussian()
    made = pv.PosteriorExpectation(model_of(lm), guide_of(scaled_family(lm, 0.8)), lambda z: z["z"][..., 0], seed=0)
    record = pv.evaluate(made, DataLoader(TensorDataset(x), 4), progress=False)
    assert len(record) == 6 and torch.equal(record.value[:4], made(x[:4]).value)
    assert torch.equal(record.select(torch.tensor([5, 0])).value, record.value[[5, 0]])
    kept = record.select(record.value > 0)
    assert len(kept) == len(kept.evidence) == int((record.value > 0).sum())
    estimate = record.mean()
    assert abs(float(estimate.value) - float(posterior_moments(lm)(x)[0][:, 0].mean())) < 4.5 * float(estimate.std_error)
    assert "nats" not in one_line(estimate) and "E[f given x]" in one_line(record) and "guide's bias" in one_line(record)
    plain = record.to_dict()
    assert plain["bias"] == record.bias.tolist() and plain["evidence"]["log_evidence"] and plain["reliable"] == [True] * 6
    vector = pv.PosteriorExpectation(made.model, made.guide, lambda z: z["z"], seed=0)(x)
    assert "f of shape (2,)" in one_line(vector)
    with pytest.raises(pv.errors.OptionError, match=r"f has the shape \(2,\): use value.mean\(0\)"):
        vector.mean()


def test_rounding_of_single_precision_is_no_other_result():
    """f may return float64 from a network in float32, whose last digits change with the number of particles."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    rounded = pv.PosteriorExpectation(model, guide, lambda z: z["z"].double() * (1 + 1e-6 * len(z["z"]) / 3), seed=0)
    x = torch.tensor([0.5, -1.0])
    assert_near(rounded(x).value, x.double() / 2, rounded(x).std_error.double(), 0.05)
    with pytest.raises(pv.errors.OptionError, match="not reduce over the first axis"):
        rounded(x.double())


@pytest.mark.parametrize(
    "f, error, message",
    [
        (lambda z: z["z"].sum(), pv.errors.OptionError, r"return \(3, 6, ...\), got \(\) from 'z' \(3, 6, 2\): reduce over"),
        (lambda z: z["z"].mean(0), pv.errors.OptionError, r"return \(3, 6, ...\), got \(6, 2\)"),
        (lambda z: z["z"].transpose(0, 1), pv.errors.OptionError, r"got \(6, 3, 2\)"),
        (lambda z: z, pv.errors.OptionError, "must return a tensor of shape .*, got dict"),
        (lambda z: z["z"] * 1j, pv.errors.OptionError, "real numbers, got complex"),
        (lambda z: z["w"], pv.errors.OptionError, "f uses 'w', but the latents are 'z': use one of these names"),
        (lambda z: z["z"] - z["z"].mean(0), pv.errors.OptionError, "not reduce over the first axis"),
        (lambda z: z["z"] - z["z"].mean(1, keepdim=True), pv.errors.BatchCouplingError, "must treat data separately"),
        (lambda z: z["z"] > z["z"].mean(1, keepdim=True), pv.errors.BatchCouplingError, "must treat data separately"),
        (
            lambda z: torch.randn_like(z["z"]),
            pv.errors.HiddenRandomnessError,
            "f gives different results for the same latents",
        ),
        (lambda z: z["z"].log(), pv.errors.NonFiniteError, "f is NaN or infinite at draws from the posterior for the data"),
        (3, pv.errors.OptionError, "f must be a function of the latents"),
    ],
)
def test_what_f_must_be_is_said(f, error, message):
    lm, x = linear_gaussian()
    with pytest.raises(error, match=message):
        pv.PosteriorExpectation(model_of(lm), guide_of(scaled_family(lm, 0.8)), f, seed=0)(x)


@pytest.mark.parametrize("make", [pv.mlp_vae, pv.conv_vae])
def test_reconstructions_under_the_posterior(make):
    """The decoders of the library take particles left of the data."""
    torch.manual_seed(0)
    shape = (1, 16, 16) if make is pv.conv_vae else (20,)
    vae = make(shape if make is pv.conv_vae else 20, latent_dim=2, likelihood=pv.nn.Bernoulli(event_dim=len(shape)))
    x = torch.rand(4, *shape).round()
    made = pv.PosteriorExpectation(vae.model, vae.guide, lambda z: vae.decode(z["latent"]).mean, num_particles=100, seed=0)
    with quiet():
        record = made(x)
        draws = pv.posterior(vae.model, vae.guide, x, num_samples=100, num_particles=100, means=True, seed=0)
    assert record.value.shape == x.shape and draws.means["obs"].shape == (100, *x.shape)
    # Both go by the same weighted draws: what is left is resampling, of S draws from K
    assert torch.allclose(draws.means["obs"].mean(0), record.value, atol=0.05)
