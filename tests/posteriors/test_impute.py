"""What is missing given what was seen: against Gaussian conditionals, brute-force sums and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pair_helpers import F64, SIGMAS, assert_near, linear_gaussian, one_line, quiet
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import EnumerationError, InvalidDataError, MaskError, OptionError, StructureError
from pyro_vae.nn import StandardNormal

NAN = math.nan


def holed(x, seed=0):
    """30% of the numbers missing; all of the first row, none of the second."""
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    holes[0], holes[1] = True, False
    return x.masked_fill(holes, NAN)


def conditionals(lm, x):
    """E[x given what was seen] and its standard deviation by row, from the joint covariance; zero where seen."""
    covariance = (lm.weight @ lm.weight.T + lm.variance * torch.eye(len(lm.bias))).to(F64)
    mean, stddev = x.double().clone(), torch.zeros_like(x, dtype=F64)
    for n, row in enumerate(x.double()):
        seen, hole = ~row.isnan(), row.isnan()
        gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, hole]).T
        mean[n, hole] = lm.bias[hole].double() + gain @ (row[seen] - lm.bias[seen].double())
        stddev[n, hole] = (covariance[hole][:, hole] - gain @ covariance[seen][:, hole]).diagonal().sqrt()
    return mean, stddev


def posterior_of(lm, x):
    """p(z given what was seen) of each row: means (B, D) and covariances (B, D, D)."""
    seen = (~x.isnan()).to(x)
    precision = torch.eye(lm.weight.shape[1], dtype=x.dtype) + torch.einsum("xd,bx,xe->bde", lm.weight, seen, lm.weight) / (
        lm.variance
    )
    covariance = torch.linalg.inv(precision)
    return (covariance @ (((x.nan_to_num() - lm.bias) * seen) @ lm.weight / lm.variance).unsqueeze(-1))[..., 0], covariance


WAYS = {
    "NaN": lambda fn, x: (fn.mask(~x.isnan()).to_event(1), x),
    "filled by a number": lambda fn, x: (fn.mask(~x.isnan()).to_event(1), x.nan_to_num(7.0)),
    "NanMaskedNormal": lambda fn, x: (dist.NanMaskedNormal(fn.loc, fn.scale).to_event(1), x),
}


def linear_pair(lm, way="NaN", wrong=0.0):
    """With a guide that is off by `wrong` standard deviations, and by that much too wide."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            fn, value = WAYS[way](dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()), x)
            pyro.sample("x", fn, obs=value)

    def guide(x):
        loc, covariance = posterior_of(lm, x)
        scale = covariance.diagonal(dim1=1, dim2=2).sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + wrong * scale, (1 + wrong) * scale).to_event(1))

    return model, guide


@pytest.mark.parametrize("way", WAYS)
def test_means_and_spreads_are_those_of_the_gaussian_conditionals(way):
    """About 20 numbers each, false alarms in 2e-4 of seeds."""
    lm, x = linear_gaussian(num_data=16)
    x = holed(x)
    mean, stddev = conditionals(lm, x)
    result = pv.impute(*linear_pair(lm, way, 0.5), x, num_particles=4000, seed=0)
    holes = x.isnan()
    assert torch.equal(result.missing["x"], holes) and torch.equal(result.num_missing, holes.sum(1))
    assert_near(result.mean["x"][holes], mean[holes], result.std_error["x"][holes], 0.05)
    torch.testing.assert_close(result.stddev["x"], stddev, rtol=0.06, atol=0)
    assert torch.equal(result.mean["x"][~holes], x[~holes])
    assert not result.std_error["x"][~holes].any() and not result.in_doubt["x"].any() and result.reliable.all()
    evidence = dist.MultivariateNormal(lm.bias, lm.weight @ lm.weight.T + lm.variance * torch.eye(4, dtype=F64))
    found = result.evidence.log_evidence
    assert abs(float(found[1] - evidence.log_prob(x[1]))) < 0.1 and abs(float(found[0])) < 0.1


def test_the_error_is_that_of_the_mean():
    """Over 100 copies the squares of 4 numbers, in two independent rows, have the mean 1, known to 10 %."""
    lm, x = linear_gaussian(num_data=3)
    x = torch.stack(
        [x[0].masked_fill(torch.tensor([True, False, True, False]), NAN), x[1].masked_fill(torch.arange(4) < 2, NAN)]
    )
    copies = x.repeat(100, 1)
    mean, holes = conditionals(lm, x)[0].repeat(100, 1), copies.isnan()
    result = pv.impute(*linear_pair(lm, wrong=0.3), copies, num_particles=200, seed=0)
    squares = ((result.mean["x"] - mean)[holes] / result.std_error["x"][holes]).square()
    assert len(squares) == 400 and 0.5 < float(squares.mean()) < 1.6


def test_single_precision_one_datum_and_one_particle():
    lm, x = linear_gaussian(num_data=8, dtype=torch.float32)
    x = holed(x)
    mean, _ = conditionals(lm, x)
    pair = linear_pair(lm)
    result = pv.impute(*pair, x, num_particles=2000, seed=0)
    assert result.mean["x"].dtype == result.stddev["x"].dtype == torch.float32
    holes = x.isnan()
    assert_near(result.mean["x"][holes].double(), mean[holes], result.std_error["x"][holes].double(), 0.05)
    alone = pv.impute(*pair, x[3:4], num_particles=2000, seed=0)
    assert alone.mean["x"].shape == (1, 4) and len(alone) == 1
    assert_near(alone.mean["x"][holes[3:4]].double(), mean[3:4][holes[3:4]], alone.std_error["x"][holes[3:4]].double(), 0.05)
    with quiet():
        one = pv.impute(*pair, x, num_particles=1, num_draws=2, seed=0)
    assert one.std_error["x"][holes].isnan().all() and one.doubts["few draws"].tolist() == holes.any(1).tolist()
    assert one.mean["x"].isfinite().all() and torch.equal(one.draws["x"][0][~holes], x[~holes])


def test_far_from_zero_the_spread_keeps_its_digits():
    """Means of 10^9 with a spread of about .1: the squares of the means have no digit of it."""
    lm, x = linear_gaussian(num_data=6)
    scaled = pv.exact.LinearGaussian(0.05 * lm.weight, lm.bias + 1e9, lm.variance / 400)
    x = holed(1e9 + 0.05 * x)
    result = pv.impute(*linear_pair(scaled), x, num_particles=2000, seed=0)
    torch.testing.assert_close(result.stddev["x"], conditionals(scaled, x)[1], rtol=0.1, atol=1e-6)


def test_draws_are_draws_of_what_is_missing():
    """Joint moments of 2,000 tables, for 8 means and their covariance: false alarms in 2e-4 of seeds."""
    lm, x = linear_gaussian(num_data=2)
    x = torch.stack([torch.full((4,), NAN, dtype=F64), torch.cat([x[1, :2], torch.full((2,), NAN, dtype=F64)])])
    mean, stddev = conditionals(lm, x)
    result = pv.impute(*linear_pair(lm, wrong=0.3), x, num_particles=4000, num_draws=2000, seed=0)
    draws, holes = result.draws["x"], x.isnan()
    assert draws.shape == (2000, 2, 4) and torch.equal(draws[:, ~holes], x[~holes].expand(2000, -1))
    error = (2 * stddev.square() / 2000).sqrt()[holes]  # resampled: half of them at least are distinct
    assert_near(draws.mean(0)[holes], mean[holes], error, 0.1)
    covariance = lm.weight @ lm.weight.T + lm.variance * torch.eye(4, dtype=F64)
    found = torch.cov(draws[:, 0].T)
    error = ((covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()) * 2 / 2000).sqrt()
    assert ((found - covariance).abs() < SIGMAS * error).all() and error.max() < 0.5


# ----------------------------------------------------------------------------- other likelihoods, one latent, by quadrature

LIKELIHOODS = {
    "Bernoulli": (pv.nn.Bernoulli(), 4),
    "Binomial": (pv.nn.Binomial(5), 4),
    "Poisson": (pv.nn.Poisson(), 4),
    "Gamma": (pv.nn.Gamma(2.0), 4),
    "Normal": (pv.nn.Normal(), 8),
    "StudentT": (pv.nn.StudentT(df=5.0, scale=0.5), 4),
    "Heterogeneous": (pv.nn.Heterogeneous([pv.nn.Normal(0.5), pv.nn.Bernoulli(), pv.nn.Gamma(3.0), pv.nn.Binomial(4)]), 4),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_means_and_spreads_agree_with_quadrature(kind):
    """Of a MissingDataVAE: 7 numbers, false alarms in 5e-5 of seeds."""
    head, width = LIKELIHOODS[kind]
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(8, 2), pv.nn.Normal())
    vae = pv.MissingDataVAE(encoder, nn.Sequential(nn.Linear(1, width), head), StandardNormal(1)).double()
    x = vae.generate(3)
    x[0, :3], x[1, 1], x[2, 1:] = NAN, NAN, NAN
    holes = x.isnan()
    z = torch.linspace(-8, 8, 2001, dtype=F64).unsqueeze(-1)
    with torch.no_grad():
        fn = vae.decode(z).base_dist
        filled = torch.where(holes, x[0, 3] if kind != "Heterogeneous" else x.new_ones(()), x)
        log_p = fn.expand((3, 2001, 4)).log_prob(filled.unsqueeze(1)).masked_fill(holes.unsqueeze(1), 0.0).sum(-1)
        weight = (log_p - z.squeeze(-1).square() / 2).softmax(1)
        mean = weight @ fn.mean
        stddev = (weight @ (fn.variance + fn.mean.square()) - mean.square()).sqrt()
    result = pv.impute(vae.model, vae.guide, x, num_particles=4000, seed=0)
    assert_near(result.mean["obs"][holes], mean[holes], result.std_error["obs"][holes], 0.05)
    torch.testing.assert_close(result.stddev["obs"][holes], stddev[holes], rtol=0.06, atol=0)


def test_classes_have_no_mean_and_are_drawn():
    torch.manual_seed(0)
    vae = pv.mlp_missing_vae(3, 1, likelihood=pv.nn.Categorical(3), hidden=())
    x = torch.tensor([[0.0, NAN, 2.0], [1.0, 1.0, NAN]])
    with pytest.raises(StructureError, match="'obs' has no mean to fill in, like that of classes: pass num_draws=1"):
        pv.impute(vae.model, vae.guide, x, num_particles=50, seed=0)
    result = pv.impute(vae.model, vae.guide, x, num_draws=400, num_particles=400, seed=0)
    assert result.mean["obs"].isnan().tolist() == x.isnan().tolist() == result.stddev["obs"].isnan().tolist()
    assert "2 of them have no mean: they are classes" in one_line(result)
    z = torch.linspace(-8, 8, 1001).unsqueeze(-1)
    with torch.no_grad():
        probs = vae.decode(z).base_dist.probs  # (1001, 3, 3)
    weight = (probs[:, 0, 0].log() + probs[:, 2, 2].log() - z[:, 0].square() / 2).softmax(0)
    share = (result.draws["obs"][:, 0, 1:2] == torch.arange(3)).float().mean(0)
    expected = weight @ probs[:, 1]
    assert ((share - expected).abs() < SIGMAS * (expected * (1 - expected) * 2 / 400).sqrt()).all()  # 3 numbers, 2e-5


# ----------------------------------------------------------------------------------------- discrete latents: sums by hand


def mixture_pair(enumerated, logits):
    """Three classes of five bits; the guide enumerates the class or draws it."""
    infer = {"enumerate": "parallel"} if enumerated else {}

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=F64)), infer=infer)
            pyro.sample("x", dist.Bernoulli(logits=logits[y]).mask(~x.isnan()).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(len(x), 3, dtype=F64)), infer=infer)

    return model, guide


@pytest.mark.parametrize("enumerated", [True, False])
def test_a_mixture_of_bits_is_the_sum_over_its_classes(enumerated):
    """Enumerated there is no error at all; drawn, 8 numbers have false alarms in 6e-5 of seeds."""
    logits = 2 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = holed((torch.rand(6, 5, generator=torch.Generator().manual_seed(2), dtype=F64) < 0.5).double())
    seen, holes = ~x.isnan(), x.isnan()
    log_p = dist.Bernoulli(logits=logits).log_prob(x.nan_to_num().unsqueeze(1)).masked_fill(holes.unsqueeze(1), 0.0).sum(-1)
    weight = (log_p + torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()).softmax(1)
    mean = weight @ logits.sigmoid()
    result = pv.impute(*mixture_pair(enumerated, logits), x, num_particles=2000, num_draws=200, seed=0)
    if enumerated:
        torch.testing.assert_close(result.mean["x"][holes], mean[holes], rtol=0, atol=1e-10)
        torch.testing.assert_close(result.stddev["x"][holes], (mean * (1 - mean)).sqrt()[holes], rtol=0, atol=1e-10)
        assert not result.std_error["x"].any()
    else:
        assert_near(result.mean["x"][holes], mean[holes], result.std_error["x"][holes], 0.05)
        torch.testing.assert_close(result.stddev["x"][holes], (mean * (1 - mean)).sqrt()[holes], rtol=0.1, atol=0)
    shares = result.draws["x"].mean(0)
    assert ((shares - mean)[holes].abs() < 6 * (mean * (1 - mean) * 2 / 200).sqrt()[holes]).all()
    assert torch.equal(shares[seen], x[seen])


def test_what_only_the_model_enumerates_is_refused():
    logits = torch.randn(3, 5, dtype=F64)
    model, _ = mixture_pair(True, logits)
    with pytest.raises(EnumerationError, match="depend on 'y', which only the model has: let the guide enumerate"):
        pv.impute(model, lambda x: None, holed(torch.ones(3, 5, dtype=F64)), num_particles=10, seed=0)


# ------------------------------------------------------------------------------------------------- masks over whole events


@pytest.mark.parametrize("way", ["poutine.mask", "fn.mask", "obs_mask"])
def test_masks_over_events_make_whole_rows_missing(way):
    """z ~ N(0, 1), x and y of two numbers each, y missing in some rows: 6 numbers, false alarms in 4e-5 of seeds."""
    seen = torch.tensor([True, False, True, False, False])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)

    def model(x, y):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)).unsqueeze(-1)
            pyro.sample("x", dist.Normal(z, x.new_ones(2)).to_event(1), obs=x)
            fn = dist.Normal(z * y.new_tensor([2.0, -1.0]), 0.5).to_event(1)
            if way == "obs_mask":
                pyro.sample("y", fn, obs=y, obs_mask=seen)
            elif way == "fn.mask":
                pyro.sample("y", fn.mask(seen), obs=y)
            else:
                with poutine.mask(mask=seen):
                    pyro.sample("y", fn, obs=y)

    def guide(x, y):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(x.mean(1), 0.6))

    with pyro.validation_enabled(way != "obs_mask"):
        result = pv.impute(model, guide, x, x + 1, num_particles=3000, seed=0)
    name = "y_observed" if way == "obs_mask" else "y"
    assert set(result.mean) == {"x", name} and not result.missing["x"].any()
    assert torch.equal(result.missing[name], ~seen.unsqueeze(-1).expand(5, 2))
    slope, loc = torch.tensor([2.0, -1.0], dtype=F64), x.sum(1, keepdim=True) / 3  # z given x ~ N(sum x / 3, 1/3)
    mean, stddev = loc * slope, (slope.square() / 3 + 0.25).sqrt().expand(5, 2)
    holes = result.missing[name]
    assert_near(result.mean[name][holes], mean[holes], result.std_error[name][holes], 0.05)
    torch.testing.assert_close(result.stddev[name][~seen], stddev[~seen], rtol=0.06, atol=0)
    assert torch.equal(result.num_missing, 2 * (~seen).long())


def test_plates_inside_the_datum_and_the_whole_call_as_one():
    """Three readings in a plate left of the data; the data come first in the result. 5 numbers, 4e-5."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    x[0, 0] = x[1, 0] = x[2, 2] = x[0, 3] = x[1, 1] = NAN

    def model(x):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("readings", 3, dim=-2), poutine.mask(mask=~x.isnan()):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0))

    seen = ~x.isnan()
    count = seen.sum(0).double()
    mean, stddev = x.nan_to_num().sum(0) / (1 + count), (1 + 1 / (1 + count)).sqrt()
    result = pv.impute(model, guide, x, num_particles=3000, seed=0)
    holes = ~seen.T
    assert result.mean["x"].shape == (4, 3) and torch.equal(result.missing["x"], holes)
    assert_near(result.mean["x"][holes], mean.unsqueeze(1).expand(4, 3)[holes], result.std_error["x"][holes], 0.06)
    torch.testing.assert_close(result.stddev["x"][holes], stddev.unsqueeze(1).expand(4, 3)[holes], rtol=0.06, atol=0)
    whole = pv.impute(model, guide, x, num_particles=3000, datum_plate=None, seed=0)
    assert whole.mean["x"].shape == (1, 3, 4) and len(whole) == 1
    assert_near(whole.mean["x"][0].T[holes], mean.unsqueeze(1).expand(4, 3)[holes], whole.std_error["x"][0].T[holes], 0.06)


def test_what_does_not_depend_on_latents_is_drawn_anew_in_every_table():
    """A number beside the latent model: its draws are independent, and its mean has no error."""

    def model(x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("readings", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan().T), obs=x.T)
            pyro.sample("y", dist.Normal(5.0, torch.ones(2)).mask(~y.isnan()).to_event(1), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.full((4, 2), NAN)
    result = pv.impute(model, guide, x, y, num_particles=100, num_draws=500, seed=0)
    assert torch.equal(result.mean["y"], torch.full((4, 2), 5.0)) and not result.std_error["y"].any()
    assert torch.equal(result.stddev["y"], torch.ones(4, 2)) and torch.equal(result.mean["x"], x)
    draws = result.draws["y"]
    assert draws.shape == (500, 4, 2) and len(draws.unique()) > 3950
    assert (draws.mean(0) - 5).abs().max() < 5 / 500**0.5 and (draws.std(0) - 1).abs().max() < 5 / 1000**0.5  # 1e-5


@pytest.mark.parametrize("ends", [True, False])
def test_sequences_have_holes_inside_and_nothing_after_their_end(ends):
    """A random walk seen with noise: two steps by a Gaussian conditional, 2 numbers; false alarms in 2e-5 of seeds."""
    x = torch.tensor([[0.7, NAN, 1.0], [NAN, -0.4, NAN]], dtype=F64)
    alive = torch.tensor([[True, True, True], [True, True, not ends]])

    def model(x):
        with pyro.plate("data", 2):
            z = x.new_zeros(2)
            for t in range(3):
                with poutine.mask(mask=alive[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 0.5).mask(~x[:, t].isnan()), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", 2):
            for t in range(3):
                with poutine.mask(mask=alive[:, t]):
                    pyro.sample(f"z_{t}", dist.Normal(x.new_zeros(2), 1.0))

    result = pv.impute(model, guide, x, num_particles=4000, num_draws=2, seed=0)
    walk = torch.minimum(torch.arange(1, 4)[:, None], torch.arange(1, 4)).double() + 0.25 * torch.eye(3, dtype=F64)
    first = walk[1, [0, 2]] @ torch.linalg.solve(walk[[0, 2]][:, [0, 2]], x[0, [0, 2]])
    second = walk[0, 1] / walk[1, 1] * x[1, 1]
    found = torch.stack([result.mean["x_1"][0], result.mean["x_0"][1]])
    error = torch.stack([result.std_error["x_1"][0], result.std_error["x_0"][1]])
    assert_near(found, torch.stack([first, second]), error, 0.05)
    after = [result.mean["x_2"][1], result.stddev["x_2"][1], *result.draws["x_2"][:, 1]]
    assert all(bool(number.isnan()) == ends for number in after)
    assert result.mean["x_2"][0] == 1.0 and result.draws["x_1"].isfinite().all()


def test_a_program_that_runs_one_particle_at_a_time_gives_the_same():
    lm, x = linear_gaussian(num_data=4)
    x = holed(x)
    model, guide = linear_pair(lm)

    def looped(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ lm.weight.T + (lm.bias if float(z.detach().sum()) < 1e9 else 0.0)  # reads draws
            pyro.sample("x", dist.Normal(loc, lm.variance.sqrt()).mask(~x.isnan()).to_event(1), obs=x)

    first, second = (pv.impute(m, guide, x, num_particles=50, seed=0) for m in (model, looped))
    torch.testing.assert_close(first.mean["x"], second.mean["x"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first.stddev["x"], second.stddev["x"], rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------- refusals


def test_numbers_that_depend_on_those_seen_given_the_latents_are_refused():
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.NanMaskedMultivariateNormal(z, covariance), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.raises(StructureError, match=r"single draws of 'x' are partly missing.*NanMaskedNormal"):
        pv.impute(model, guide, torch.tensor([[1.0, NAN], [0.0, 1.0]]), num_particles=10, seed=0)
    result = pv.impute(model, guide, torch.tensor([[NAN, NAN], [0.0, 1.0]]), num_particles=1000, seed=0)  # all of a draw
    assert_near(result.mean["x"][0], torch.zeros(2), result.std_error["x"][0], 0.1)


def test_a_mask_that_depends_on_draws_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(z > 0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.raises(MaskError, match=r"the mask of 'x' depends on draws of the latents.*fn.mask\(~x.isnan\(\)\)"):
        pv.impute(model, guide, torch.zeros(3, 2), num_particles=10, seed=0)


def test_holes_that_nothing_masks_and_wrong_numbers_are_refused():
    lm, x = linear_gaussian(dtype=torch.float32)

    def unmasked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ lm.weight.T, 1.0).to_event(1), obs=x)

    model, guide = linear_pair(lm)
    with pytest.raises(InvalidDataError, match="NaN or infinite values in data"):
        pv.impute(unmasked, guide, holed(x), num_particles=10, seed=0)
    with pytest.raises(OptionError, match="num_draws must be a whole number of at least 0"):
        pv.impute(model, guide, x, num_draws=-1)
    with pytest.raises(OptionError, match="num_particles must be a whole number of at least 1"):
        pv.impute(model, guide, x, num_particles=0)


# --------------------------------------------------------------------------------------------------------------- the record


def test_without_holes_it_is_the_data_and_nothing_is_in_doubt():
    lm, x = linear_gaussian()
    with quiet():
        result = pv.impute(*linear_pair(lm), x, num_particles=5, seed=0)
    assert torch.equal(result.mean["x"], x) and not result.stddev["x"].any() and result.reliable.all()
    assert not result.num_missing.any() and not result.warnings()


def test_seeds_and_nothing_left_behind():
    lm, x = linear_gaussian()
    x, pair = holed(x), linear_pair(lm)
    state = torch.get_rng_state()
    first, again = (pv.impute(*pair, x, num_particles=100, num_draws=2, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("mean", "stddev", "draws"):
        assert torch.equal(getattr(first, part)["x"], getattr(again, part)["x"])
    other = pv.impute(*pair, x, num_particles=100, seed=4)
    assert not torch.equal(first.mean["x"], other.mean["x"]) and other.draws == {}


def test_few_draws_of_a_guide_that_is_far_off_are_in_doubt_where_numbers_are_missing():
    logits = torch.tensor([[9.0] * 3, [-9.0] * 3, [0.0] * 3], dtype=F64)
    model, _ = mixture_pair(False, logits)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.tensor([1.0, 1.0, 1e5], dtype=F64).expand(len(x), 3)))

    x = torch.tensor([[1.0, 1.0, NAN], [1.0, 1.0, 1.0]], dtype=F64)
    with pytest.warns(pv.errors.UnreliableEvidenceWarning, match="the imputation uses the weights|fewer than five draws"):
        result = pv.impute(model, guide, x, num_particles=1000, seed=0)
    assert not result.reliable[0] and "Imputation of 2 data" in one_line(result)
