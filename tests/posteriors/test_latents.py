"""Expectations and draws for latents of all kinds: discrete, enumerated, several, constrained, masked, in inner plates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, assert_near, guide_of, linear_gaussian, posterior_moments, quiet, scaled_family
from pyro import poutine

import pyro_vae as pv

LOCS = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
Y = torch.tensor([-1.2, 0.0, 0.9, 3.0], dtype=F64)
PARALLEL = {"enumerate": "parallel"}


def mixture(y, infer=None):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(PRIOR), infer=infer or {})
        z = pyro.sample("z", dist.Normal(LOCS[k], 0.5))
        pyro.sample("y", dist.Normal(z, 0.7), obs=y)


def summed_mixture(y):
    mixture(y, PARALLEL)


def labelled_guide(infer):
    def guide(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.full((3,), 1 / 3, dtype=F64)), infer=infer)
            pyro.sample("z", dist.Normal(0.5 * y + 0.3 * LOCS[k], 0.6))

    return guide


def guide_of_z(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.7 * y, 0.8))


def exact_mixture():
    """P(k given y), (B, 3), and E[z given y], (B,)."""
    log_joint = PRIOR.log() + dist.Normal(LOCS, math.sqrt(0.25 + 0.49)).log_prob(Y.unsqueeze(-1))
    shares, variance = log_joint.softmax(-1), 1 / (1 / 0.25 + 1 / 0.49)
    return shares, (shares * variance * (LOCS / 0.25 + Y.unsqueeze(-1) / 0.49)).sum(-1)


def labels(latents):
    return latents["k"].unsqueeze(-1) == torch.arange(3)


@pytest.mark.parametrize("infer", [{}, PARALLEL], ids=["drawn", "enumerated"])
def test_the_label_of_a_mixture(infer):
    shares, mean = exact_mixture()
    guide = labelled_guide(infer)
    with quiet():
        label = pv.PosteriorExpectation(mixture, guide, labels, num_particles=4000, seed=0)(Y)
        z = pv.PosteriorExpectation(mixture, guide, lambda v: v["z"], num_particles=4000, seed=1)(Y)
        both = pv.PosteriorExpectation(mixture, guide, lambda v: v["z"] * (v["k"] == 1), num_particles=4000, seed=2)(Y)
        draws = pv.posterior(mixture, guide, Y, num_samples=4000, num_particles=8000, means=True, seed=3)
    assert_near(label.value.flatten(), shares.flatten(), label.std_error.flatten(), 0.015)
    assert label.is_probability == (infer == {})  # a sum over the values is no count of draws
    assert_near(z.value, mean, z.std_error, 0.02)
    variance = 1 / (1 / 0.25 + 1 / 0.49)
    assert_near(both.value, shares[:, 1] * variance * (LOCS[1] / 0.25 + Y / 0.49), both.std_error, 0.02)
    error = torch.full((12,), 2 * 0.5 / math.sqrt(2000), dtype=F64)  # of 2,000 draws at least, twice that of a half
    assert_near(labels(draws.latents).double().mean(0).flatten(), shares.flatten(), error, 0.03)
    assert_near(draws.latents["z"].mean(0), mean, torch.full((4,), 1.0 / math.sqrt(2000), dtype=F64), 0.03)
    assert torch.allclose(draws.means["y"], draws.latents["z"])


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("execution", ["leading", "vmap", "loop"])
def test_labels_however_the_model_is_run(execution, expand):
    """Where the axis of the labels lies in what the model records depends on how it ran."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Categorical(PRIOR))
            first = z[:, 0] if execution == "vmap" else z[..., 0]  # the first axis must be that of the data
            if execution == "loop" and float(first.detach().sum()) > 1e9:
                first = 0 * first
            pyro.sample("y", dist.Normal(first + LOCS[k], 0.7), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            uniform = torch.full((3,), 1 / 3, dtype=F64)
            pyro.sample("k", dist.Categorical(uniform), infer={**PARALLEL, "expand": expand})
            pyro.sample("z", dist.Normal(torch.stack([0.5 * y, 0 * y], -1), 0.9).to_event(1))

    shares = (PRIOR.log() + dist.Normal(LOCS, math.sqrt(1.49)).log_prob(Y.unsqueeze(-1))).softmax(-1)
    made = pv.PosteriorExpectation(model, guide, labels, num_particles=400 if execution == "loop" else 4000, seed=0)
    with made._pair.open((Y,), {}, 0) as call:
        assert call.model.execution == execution
    with quiet():
        record = made(Y)
        draws = pv.posterior(model, guide, Y, num_samples=500, num_particles=made.num_particles, seed=0)
    assert_near(record.value.flatten(), shares.flatten(), record.std_error.flatten(), 0.05)
    assert torch.allclose(record.value.sum(-1), torch.ones(4, dtype=F64))
    assert torch.allclose(labels(draws.latents).double().mean(0), shares, atol=0.15)


def test_what_the_model_alone_enumerates_has_no_draws():
    _, mean = exact_mixture()
    with quiet():
        record = pv.PosteriorExpectation(summed_mixture, guide_of_z, lambda v: v["z"], num_particles=4000, seed=0)(Y)
    assert_near(record.value, mean, record.std_error, 0.02)
    with pytest.raises(pv.errors.OptionError, match="f uses 'k', .* must be enumerated in the guide too"):
        pv.PosteriorExpectation(summed_mixture, guide_of_z, labels, seed=0)(Y)
    with pytest.raises(pv.errors.EnumerationError, match="means=True needs draws of 'k', which only the model has"):
        pv.posterior(summed_mixture, guide_of_z, Y, means=True)


def test_all_latents_enumerated_is_exact():
    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(PRIOR))
            j = pyro.sample("j", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("y", dist.Normal(LOCS[k] + j, 0.7), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("j", dist.Bernoulli(torch.tensor(0.5, dtype=F64)), infer=PARALLEL)
            pyro.sample("k", dist.Categorical(torch.full((3,), 1 / 3, dtype=F64)), infer=PARALLEL)

    j = torch.tensor([0.0, 1.0], dtype=F64)
    log_joint = PRIOR.log().unsqueeze(-1) + torch.tensor([0.7, 0.3], dtype=F64).log()
    log_joint = log_joint + dist.Normal(LOCS.unsqueeze(-1) + j, 0.7).log_prob(Y.reshape(-1, 1, 1))
    shares = log_joint.flatten(1).softmax(-1).reshape(4, 3, 2)

    def f(v):
        return torch.stack([v["k"].double(), v["j"], v["k"] * v["j"]], -1)

    truth = torch.einsum("bkj,kjf->bf", shares, f({"k": torch.arange(3).reshape(3, 1).expand(3, 2), "j": j.expand(3, 2)}))
    record = pv.PosteriorExpectation(model, guide, f, seed=0)(Y)
    assert torch.allclose(record.value, truth, atol=1e-12) and not bool(record.std_error.any())
    assert_near(record.bias.flatten(), (record.guide_value - truth).flatten(), record.bias_std_error.flatten(), 0.05)
    draws = pv.posterior(model, guide, Y, num_samples=3000, seed=0)
    assert_near(draws.latents["j"].mean(0), truth[:, 1], torch.full((4,), 0.5 / math.sqrt(3000), dtype=F64), 0.02)
    assert draws.num_distinct.tolist() == [3000] * 4


def test_constrained_latents_in_another_order_with_keyword_arguments():
    """Dirichlet and multinomial, Gamma and Poisson, side by side: both posteriors are known."""

    def model(counts, number):
        with pyro.plate("data", len(counts)):
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=F64)))
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.5))
            pyro.sample("counts", dist.Multinomial(20, p), obs=counts)
            pyro.sample("number", dist.Poisson(rate), obs=number)

    def guide(counts, number):
        with pyro.plate("data", len(counts)):
            pyro.sample("rate", dist.LogNormal(torch.zeros(len(counts), dtype=F64), 0.7))
            pyro.sample("p", dist.Dirichlet(1 + counts / 2))

    counts = torch.tensor([[5.0, 5.0, 10.0], [0.0, 1.0, 19.0], [20.0, 0.0, 0.0]], dtype=F64)
    number = torch.tensor([0.0, 2.0, 7.0], dtype=F64)
    made = pv.PosteriorExpectation(
        model, guide, lambda z: torch.cat([z["p"], z["rate"].unsqueeze(-1)], -1), num_particles=4000, seed=0
    )
    with quiet():
        record = made(number=number, counts=counts)
        draws = pv.posterior(model, guide, counts, number=number, num_samples=2000, num_particles=4000, seed=0)
    concentration = counts + torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    truth = torch.cat([concentration / concentration.sum(-1, keepdim=True), ((number + 2) / 2.5).unsqueeze(-1)], -1)
    assert_near(record.value.flatten(), truth.flatten(), record.std_error.flatten(), 0.05)
    assert draws.latents["p"].shape == (2000, 3, 3) and draws.latents["rate"].shape == (2000, 3)
    assert torch.allclose(draws.latents["p"].sum(-1), torch.ones((), dtype=F64))
    assert torch.allclose(draws.latents["p"].mean(0), truth[:, :3], atol=0.02)


def test_latents_in_a_plate_inside_a_datum_have_the_shapes_of_the_program():
    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1]), 1.0))
            with pyro.plate("parts", x.shape[0], dim=-2):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0), 0.6))
            with pyro.plate("parts", x.shape[0], dim=-2):
                pyro.sample("w", dist.Normal(x, 0.5))

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    seen = {}

    def f(latents):
        seen.update({name: value.shape[1:] for name, value in latents.items()})
        return torch.cat([latents["z"].unsqueeze(-1), latents["w"].movedim(1, -1)], -1)

    record = pv.PosteriorExpectation(model, guide, f, num_particles=4000, seed=0)(x)
    mean = x.sum(0) / 1.25 / (1 + 3 / 1.25)
    truth = torch.cat([mean.unsqueeze(-1), ((x / 0.25 + mean) / 5).T], -1)
    assert seen == {"z": (5,), "w": (3, 5)}
    assert_near(record.value.flatten(), truth.flatten(), record.std_error.flatten(), 0.02)
    draws = pv.posterior(model, guide, x, num_samples=2000, num_particles=4000, means=True, seed=0)
    assert draws.latents["w"].shape == draws.means["x"].shape == (2000, 3, 5)
    assert torch.allclose(draws.latents["w"].mean(0), truth[:, 1:].T, atol=0.06)


def test_the_whole_call_as_one_datum():
    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 0.7).to_event(1))

    x = torch.tensor([1.0, 4.0, 7.0, -1.0], dtype=F64)
    truth = (x.sum() / 9).reshape(1)
    for f, shape in ((lambda z: z["z"][..., 0], (1,)), (lambda z: z["z"], (1, 2))):
        record = pv.PosteriorExpectation(model, guide, f, num_particles=4000, datum_plate=None, seed=0)(x)
        assert record.value.shape == shape
        assert_near(record.value.reshape(-1)[:1], truth, record.std_error.reshape(-1)[:1], 0.02)
    with pytest.raises(pv.errors.OptionError, match=r"return \(3, ...\), got \(\)"):
        pv.PosteriorExpectation(model, guide, lambda z: z["z"].sum(), datum_plate=None)(x)
    assert pv.posterior(model, guide, x, datum_plate=None, seed=0).latents["z"].shape == (100, 2)


def test_a_subsampled_plate():
    lm, x = linear_gaussian()

    def subsampled(program):
        def inner(x):
            with pyro.plate("data", len(x), subsample_size=3) as index:
                program(x[index])

        return inner

    model = subsampled(
        lambda x: pyro.sample(
            "x",
            dist.Normal(
                pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1)) @ lm.weight.T + lm.bias, lm.variance.sqrt()
            ).to_event(1),
            obs=x,
        )
    )
    guide = subsampled(lambda x: pyro.sample("z", scaled_family(lm, 0.8)(x)))
    record = pv.PosteriorExpectation(model, guide, lambda z: z["z"], num_particles=4000, seed=0)(x)
    truth = posterior_moments(lm)(x)[0][record.evidence.index]
    assert_near(record.value.flatten(), truth.flatten(), record.std_error.flatten(), 0.01)


@pytest.mark.parametrize("discrete", [False, True])
def test_what_a_mask_hides_is_nan_and_the_rest_is_right(discrete):
    """The guide draws NaN where the mask is. With a discrete latent the draws are the guide's own."""
    keep = torch.tensor([True, False, True, False])
    x = torch.tensor([1.0, 4.0, 3.0, -1.0], dtype=F64)

    def model(x, keep):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            with poutine.mask(mask=keep):
                w = pyro.sample("w", dist.Normal(x.new_zeros(len(x)), 1.0))
            if discrete:
                pyro.sample("k", dist.Bernoulli(x.new_full((len(x),), 0.3)))
            pyro.sample("x", dist.Normal(z + torch.where(keep, w, 0.0), 0.5), obs=x)

    def guide(x, keep):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(keep, 0.45, 0.8) * x, 0.75))
            with poutine.mask(mask=keep):
                pyro.sample("w", dist.Normal(torch.where(keep, 0.45 * x, math.nan), 0.75, validate_args=False))
            if discrete:
                pyro.sample("k", dist.Bernoulli(x.new_full((len(x),), 0.4)))

    def f(latents):
        return torch.stack([latents["z"], latents["w"]], -1)

    with quiet():
        record = pv.PosteriorExpectation(model, guide, f, num_particles=4000, seed=0)(x, keep)
        draws = pv.posterior(model, guide, x, keep, num_particles=4000, seed=0)
    truth = torch.where(keep, x / 2.25, x / 1.25)
    assert_near(record.value[:, 0], truth, record.std_error[:, 0], 0.05)
    assert_near(record.value[keep, 1], truth[keep], record.std_error[keep, 1], 0.05)
    for numbers in (record.value, record.std_error, record.guide_value, record.bias):
        assert numbers[:, 1].isnan().tolist() == (~keep).tolist() and bool(numbers[:, 0].isfinite().all())
    assert draws.latents["w"].isnan().all(0).tolist() == (~keep).tolist()


def test_a_guide_that_is_its_own_proposal_has_a_paired_bias():
    """Draws and weights are the same for both values, so the error of the difference is that of the weights alone."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(x.new_full((len(x),), 4.0)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    values = torch.arange(200, dtype=F64)

    def log_posterior(x):
        return dist.Poisson(4.0).log_prob(values) + dist.Normal(values, 1.0).log_prob(x.unsqueeze(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(0.5 * x + 2.2))

    some, repeats = torch.tensor([2.0, 5.0, 9.0], dtype=F64), 60
    truth = (log_posterior(some).softmax(-1) * values).sum(-1).repeat_interleave(repeats)
    x = some.repeat_interleave(repeats)
    with quiet():
        record = pv.PosteriorExpectation(model, guide, lambda z: z["k"], num_particles=2000, seed=0)(x)
    assert_near(record.value, truth, record.std_error, 0.2)
    bias = 0.5 * x + 2.2 - truth
    assert_near(record.bias, bias, record.bias_std_error, 0.2)
    off = (record.bias - bias).reshape(3, repeats).square().mean(1).sqrt()
    ratio = record.bias_std_error.reshape(3, repeats).mean(1) / off
    assert float(ratio.min()) > 0.7 and float(ratio.max()) < 1.35  # +- 9% is the noise of 60 repeats


def test_a_guide_with_particles_of_several_values_is_refused():
    """Latents drawn given an enumerated site, which cannot be fitted, have one value for each of its values."""

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(PRIOR))
            n = pyro.sample("n", dist.Poisson(LOCS[k].exp()))
            pyro.sample("y", dist.Normal(n, 0.7), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.full((3,), 1 / 3, dtype=F64)), infer=PARALLEL)
            pyro.sample("n", dist.Poisson(LOCS[k].exp() + 0.1))

    with quiet(), pytest.raises(pv.errors.LocalFitError, match="draws 'n' given 'k', which it enumerates"):
        pv.PosteriorExpectation(model, guide, lambda z: z["n"], seed=0)(Y)


def test_a_given_site_has_no_draws():
    """A latent outside the data with one value is given, and no argument of f."""

    def model(x):
        s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 1.0), obs=x.new_tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, s), obs=x)

    x = torch.tensor([1.0, 4.0], dtype=F64)
    guide = guide_of(lambda x: dist.Normal(0.7 * x, 0.5))
    record = pv.PosteriorExpectation(model, guide, lambda z: z["z"], num_particles=4000, seed=0)(x)
    assert_near(record.value, x / 1.25, record.std_error, 0.02)
    assert record.evidence.given == ("s",)
    with pytest.raises(pv.errors.OptionError, match="f uses 's', .* is not drawn by the guide"):
        pv.PosteriorExpectation(model, guide, lambda z: z["s"], seed=0)(x)
