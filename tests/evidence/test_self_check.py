"""The trial on simulated data: passes what is right, names what is too low, sees a mode that no weight shows."""

import dataclasses
import functools
import json
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pair_helpers import make_evidence

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, OptionError, UnreliableEvidenceWarning
from pyro_vae.evidence import Sandwich, SelfCheckResult

W = torch.tensor([[1.0, 0.4], [0.2, -1.0], [0.5, 0.5]], dtype=torch.double)
ORACLE = pv.exact.LinearGaussian(W, torch.zeros(3, dtype=torch.double), 0.25)
TEMPLATE = torch.zeros(100, 3, dtype=torch.double)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, 0.5).to_event(1), obs=x)


def guide(x, shift=0.2):
    with pyro.plate("data", len(x)):
        posterior = ORACLE.posterior(x)
        scale = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        pyro.sample("z", dist.Normal(posterior.mean + shift, 1.2 * scale).to_event(1))


def two_modes(x):
    """x = 3 |z| + 0.3 z + noise: two values of z explain each x, one of them with about a fifth of the mass or more."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(3 * z.abs() + 0.3 * z, 0.1), obs=x)


def one_mode(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 3.3, 0.05))


def test_the_default_estimator_passes_where_the_truth_is_known():
    check = pv.SelfCheck(model, guide, num_steps=50, seed=0)(TEMPLATE)
    assert check.passed and "No bias seen on 100" in check.verdict()
    assert check.coverage() >= 0.9
    least, most = check.bias
    assert least - 5 * check.bias_std_errors[0] < 0 < most + 5 * check.bias_std_errors[1]
    assert max(check.bias_std_errors) < 0.01  # a blunt check could not fail
    assert float(check.sandwich.mean_width().value) < 0.01


def test_an_estimator_that_is_too_low_is_named():
    trial = functools.partial(pv.ImportanceSampling, num_particles=2)
    far = functools.partial(guide, shift=1.5)
    with pytest.warns(UnreliableEvidenceWarning):
        check = pv.SelfCheck(model, far, evidence=trial, num_steps=50, seed=0)(TEMPLATE)
    assert not check.passed and "too low" in check.verdict()
    assert check.bias[1] < -0.5


def test_a_mode_that_the_proposal_misses_is_seen():
    x = torch.zeros(200, dtype=torch.double)
    trial = functools.partial(pv.ImportanceSampling, num_particles=1000)
    for seed in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check = pv.SelfCheck(two_modes, one_mode, evidence=trial, num_steps=50, num_chains=4, seed=seed)(x)
        assert not check.passed and "too low" in check.verdict()  # the chains start in both modes, so the bounds are near
        assert any("too low for this model" in str(warning.message) for warning in caught)
        assert check.evidence.doubts["tails"].double().mean() < 0.1  # the weights of hardly any datum show it


def rescaled(x):
    return model(x / 2)


def labelled(x, y):
    return model(x + 0 * y)


@pytest.mark.parametrize(
    ("program", "args", "kwargs"),
    [
        (rescaled, (TEMPLATE + 1,), {}),
        (labelled, (TEMPLATE, TEMPLATE.clone()), {}),
    ],
    ids=["rescaled", "two alike"],
)
def test_arguments_that_cannot_be_guessed_are_asked_for(program, args, kwargs):
    with pytest.raises(ArgumentError, match="data=lambda observed"):
        pv.SelfCheck(program, prior_of(program), seed=0)(*args, **kwargs)


def prior_of(program):
    return poutine.block(program, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])


def test_simulated_values_go_into_keywords_too():
    trial = functools.partial(pv.ImportanceSampling, num_particles=200, seed=1)
    check = pv.SelfCheck(model, guide, evidence=trial, num_steps=10, num_chains=4, seed=0, progress=False)
    by_position, by_keyword = check(TEMPLATE), check(x=TEMPLATE)
    assert torch.equal(by_keyword.evidence.log_evidence, by_position.evidence.log_evidence)


def whole_numbers(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros((), dtype=torch.double), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(len(x), 3), 0.5).to_event(1), obs=x.double())


def twice(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, 0.5).to_event(1), obs=x)
        pyro.sample("again", dist.Normal(z @ W.T, 1.0).to_event(1), obs=x)


def turned(x):
    with pyro.plate("data", x.shape[1]):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, 0.5).to_event(1), obs=x.T)


@pytest.mark.parametrize(
    ("program", "args", "match"),
    [
        (whole_numbers, TEMPLATE.long(), "cannot hold them"),
        (twice, TEMPLATE, "observed by another site too"),
        (turned, TEMPLATE.T, "0 of the 1"),
    ],
    ids=["whole numbers", "twice", "turned"],
)
def test_places_that_cannot_hold_a_draw_are_refused(program, args, match):
    with pytest.raises(ArgumentError, match=match):
        pv.SelfCheck(program, prior_of(program), seed=0)(args)


def test_data_says_where_simulated_values_go():
    def of_half(x):
        return guide(x / 2)

    check = pv.SelfCheck(rescaled, of_half, data=lambda seen: (2 * seen["x"],), num_steps=20, seed=0)
    assert check(TEMPLATE + 1).passed


def test_batches_join():
    check = pv.SelfCheck(model, guide, num_steps=10, num_chains=4)
    joined = pv.evaluate(check, [TEMPLATE[:30], TEMPLATE[:20]], progress=False, seed=0)
    assert len(joined) == len(joined.evidence) == len(joined.sandwich) == 50


def test_simulated_data_take_the_place_of_what_was_observed_in_its_shape():
    """An image that the model flattens, a label before it and an option as a keyword."""
    seen = []

    def drawing(label, image, *, noise):
        with pyro.plate("data", len(image)):
            z = pyro.sample("z", dist.Normal(image.new_zeros(2), 1.0).to_event(1))
            loc = z @ W.T + label.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=image.flatten(1))

    def look(label, image, *, noise):
        seen.append((label, image, noise))
        posterior = ORACLE.posterior(image.flatten(1) - label.unsqueeze(-1))
        with pyro.plate("data", len(image)):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, posterior.covariance_matrix))

    label = torch.arange(100, dtype=torch.double) % 3
    check = pv.SelfCheck(drawing, look, num_steps=30, seed=0)(label, TEMPLATE.reshape(100, 1, 3), noise=0.5)
    assert check.passed and float(check.sandwich.mean_width().value) < 0.01
    last = seen[-1]  # a run on as many copies of the data as there are particles
    assert torch.equal(last[0].reshape(-1, 100)[-1], label) and last[1].shape[1:] == (1, 3) and last[2] == 0.5
    assert float(last[1].var()) > 0.1  # simulated, no longer the template


def made(bias, spread, width, num_data):
    """A record: an estimate off by `bias` on average, with this spread over the data, between bounds this far apart."""
    noise = torch.linspace(-1, 1, num_data, dtype=torch.double) * spread
    lower = make_evidence(torch.full((num_data,), -10.0))
    upper = dataclasses.replace(lower, log_evidence=lower.log_evidence + width, bound="upper")
    return SelfCheckResult(make_evidence(lower.log_evidence + width / 2 + bias + noise), Sandwich(lower, upper))


@pytest.mark.parametrize(
    ("bias", "spread", "width", "num_data", "outcome"),
    [
        (0.0, 0.1, 0.01, 50, "no bias seen"),
        (0.0, 3.0, 0.01, 50, "too few data"),
        (0.0, 0.1, 0.01, 1, "too few data"),
        (-0.5, 0.1, 0.01, 50, "too low"),
        (-0.5, 3.0, 0.01, 50, "too few data"),
        (0.5, 0.1, 0.01, 50, "too high"),
        (0.0, 0.1, 1.0, 50, "bounds apart"),
    ],
)
def test_a_blunt_trial_is_no_pass(bias, spread, width, num_data, outcome):
    check = made(bias, spread, width, num_data)
    assert check.outcome == outcome and check.passed == (outcome == "no bias seen")
    assert bool(check.warnings()) != check.passed
    assert check.verdict().startswith("Not decided") == (outcome in ("too few data", "bounds apart"))


def test_seed_record_and_options():
    check = pv.SelfCheck(model, guide, num_steps=10, num_chains=4, seed=3)
    first, again = check(TEMPLATE[:5]), check(TEMPLATE[:5])
    assert torch.equal(first.sandwich.width, again.sandwich.width)
    json.dumps(pickle.loads(pickle.dumps(first)).to_dict())
    assert " ".join(str(first).split()).endswith(first.verdict()) and len(first) == 5
    with pytest.raises(OptionError):
        pv.SelfCheck(model, guide, num_steps=0)
