"""A masked place never reaches a density, whatever it holds: values, gradients, estimators, objectives."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import InvalidDataError

SEEN = torch.tensor([[True, True], [True, False], [False, False]])

# (likelihood of parameters (3, 2) on the real line, legal data, what stands in the holes)
FAMILIES = {
    "Normal": (lambda a: dist.Normal(a, 0.5), 0.3, (math.nan, math.inf, -math.inf)),
    "LogNormal": (lambda a: dist.LogNormal(a, 0.5), 0.7, (0.0, -1.0, math.nan)),
    "Gamma": (lambda a: dist.Gamma(a.exp(), 1.5), 0.7, (0.0, -1.0, math.nan)),
    "Beta": (lambda a: dist.Beta(a.exp(), 1.5), 0.3, (-1.0, 0.0, 2.0, math.nan)),
    "Exponential": (lambda a: dist.Exponential(a.exp()), 0.7, (-1.0, math.nan)),
    "HalfNormal": (lambda a: dist.HalfNormal(a.exp()), 0.7, (-1.0, math.nan)),
    "Weibull": (lambda a: dist.Weibull(a.exp(), 1.5), 0.7, (0.0, math.nan)),
    "Uniform": (lambda a: dist.Uniform(a - 3, a + 3), 0.3, (90.0, math.nan)),
    "StudentT": (lambda a: dist.StudentT(4.0, a, 0.5), 0.3, (math.nan,)),
    "VonMises": (lambda a: dist.VonMises(a, 2.0), 0.3, (math.nan,)),
    "Poisson": (lambda a: dist.Poisson(a.exp()), 2.0, (-1.0, 0.5, math.nan)),
    "NegativeBinomial": (lambda a: dist.NegativeBinomial(3.0, logits=a), 2.0, (-1.0, math.nan)),
    "Bernoulli": (lambda a: dist.Bernoulli(logits=a), 1.0, (-1.0, 0.5, math.nan)),
    "Binomial": (lambda a: dist.Binomial(4, logits=a), 2.0, (-1.0, 9.0, math.nan)),
    "flow": (
        lambda a: dist.TransformedDistribution(dist.Normal(a, 0.5), [dist.transforms.SigmoidTransform()]),
        0.4,
        (-1.0, 0.0, math.nan),
    ),
    "ZeroInflatedPoisson": (
        lambda a: dist.ZeroInflatedPoisson(a.exp(), gate=torch.full_like(a, 0.2)),
        2.0,
        (-1.0, math.nan),
    ),
    "mixture": (
        lambda a: dist.MixtureSameFamily(
            dist.Categorical(a.new_tensor([0.3, 0.7])), dist.Gamma(a.exp().unsqueeze(-1) + a.new_tensor([0.5, 1.0]), 1.0)
        ),
        0.7,
        (-1.0, math.nan),
    ),
}
PLACES = ("whole events", "poutine.mask", "obs_mask")
# Each family on its own inside events, all families side by side at the other places.
CASES = [pytest.param((family,), "inside the event", id=family) for family in FAMILIES]
CASES += [pytest.param(tuple(FAMILIES), place, id=f"all, {place}") for place in PLACES]
NUM_COPIES = max(len(holes) for _, _, holes in FAMILIES.values())  # of `SEEN`: one copy for each hole
ALL_SEEN = SEEN.repeat(NUM_COPIES, 1)
ROWS = ALL_SEEN[:, 1]
NUM_DATA = len(ALL_SEEN)


def pair_of(families, place):
    """One observed site for each family, and the data of each as an argument."""

    def model(*data):
        weight = pyro.param("weight", lambda: torch.tensor(0.8))
        with pyro.plate("data", NUM_DATA):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_DATA, 2), 1.0).to_event(1))
            for family, x in zip(families, data, strict=True):
                observe(f"x of {family}", FAMILIES[family][0](weight * z), x, place)

    def guide(*data):
        loc = pyro.param("loc", lambda: torch.tensor(0.2))
        with pyro.plate("data", NUM_DATA):
            pyro.sample("z", dist.Normal(loc.expand(NUM_DATA, 2), 0.6).to_event(1))

    return model, guide


def observe(name, fn, x, place):
    if place == "inside the event":
        pyro.sample(name, fn.mask(ALL_SEEN).to_event(1), obs=x)
    elif place == "whole events":
        pyro.sample(name, fn.to_event(1).mask(ROWS), obs=x)
    elif place == "obs_mask":
        pyro.sample(name, fn.to_event(1), obs=x, obs_mask=ROWS)
    else:
        with poutine.mask(mask=ROWS):
            pyro.sample(name, fn.to_event(1), obs=x)


def with_holes(family, place):
    """Data with legal numbers in the holes, and with each of the holes of the family in one copy or more."""
    _, legal, holes = FAMILIES[family]
    legal = torch.full((NUM_DATA, 2), legal)
    hidden = ~ALL_SEEN if place == "inside the event" else ~ROWS.unsqueeze(-1).expand(NUM_DATA, 2)
    numbers = torch.tensor([holes[i % len(holes)] for i in range(NUM_COPIES)]).repeat_interleave(len(SEEN))
    return legal, torch.where(hidden, numbers.unsqueeze(-1), legal)


def both(families, place):
    """The arguments of the pair, without and with holes."""
    return zip(*(with_holes(family, place) for family in families), strict=True)


@pytest.mark.parametrize(("families", "place"), CASES)
def test_what_a_hole_holds_changes_no_evidence(families, place):
    """Equal to the run with legal numbers in the holes, under the same seed."""
    model, guide = pair_of(families, place)
    legal, x = both(families, place)
    for estimator in (
        pv.ImportanceSampling(model, guide, num_particles=50, seed=0),
        pv.AdaptiveImportanceSampling(model, guide, num_particles=100, seed=0),
    ):
        expected, found = estimator(*legal), estimator(*x)
        torch.testing.assert_close(found.log_evidence, expected.log_evidence, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.elbo, expected.elbo, rtol=1e-5, atol=1e-5)


OBJECTIVES = {
    "trace": lambda: pv.BetaTrace_ELBO(num_particles=3),
    "mean field": lambda: pv.BetaTraceMeanField_ELBO(num_particles=3),
    "graph": lambda: pv.BetaTraceGraph_ELBO(num_particles=3),
    "enumerated": lambda: pv.BetaTraceEnum_ELBO(num_particles=3, strict_enumeration_warning=False),
    "weighted": lambda: pv.ImportanceWeightedELBO(num_particles=3),
    "dreg": lambda: pv.ImportanceWeightedELBO(num_particles=3, gradient="dreg"),
}


@pytest.mark.parametrize(("families", "place"), CASES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_a_hole_holds_changes_no_loss_and_no_gradient(objective, families, place):
    model, guide = pair_of(families, place)
    if place == "obs_mask" and objective not in ("trace", "mean field", "graph", "enumerated"):
        pytest.skip("draws the missing half anew")
    results = []
    for data in both(families, place):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with pyro.validation_enabled(place != "obs_mask"):
            loss = OBJECTIVES[objective]().loss_and_grads(model, guide, *data)
        grads = [p.grad for p in pyro.get_param_store()._params.values()]
        results.append(torch.stack([torch.tensor(loss), *grads]))
    assert results[1].isfinite().all()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_the_program_gets_back_what_it_observed():
    returned = []

    def model(x):
        with pyro.plate("data", NUM_DATA):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_DATA, 2), 1.0).to_event(1))
            returned.append(pyro.sample("x", dist.Normal(z, 1.0).mask(ALL_SEEN).to_event(1), obs=x))

    guide = pair_of(["Normal"], "whole events")[1]
    x = with_holes("Normal", "inside the event")[1]
    pv.BetaTrace_ELBO().loss_and_grads(model, guide, x)
    pv.ImportanceSampling(model, guide, num_particles=10)(x)
    for value in returned:
        torch.testing.assert_close(value, x, equal_nan=True)


# ---------------------------------------------------------------------------------------------- gradients and fits


def gaussian_pair(x, seen):
    """z ~ N(0, 1), x ~ N(3 z, .1) per element: log p(x) = sum over seen places of log N(x; 0, sqrt(9.01))."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(3 * z, 0.1).mask(seen).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.25 * torch.where(seen, x, 0.0) + 0.7, 0.3).to_event(1))

    truth = (dist.Normal(0.0, math.sqrt(9.01)).log_prob(torch.where(seen, x, 0.0)) * seen).sum(-1)
    return model, guide, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_estimator_reaches_the_closed_form_beside_holes(dtype):
    """Six errors per datum: a false alarm in 10^8. The errors are gated."""
    x = torch.tensor([[0.3, -0.2], *([0.9, hole] for hole in (math.nan, math.inf, -math.inf))], dtype=dtype)
    model, guide, truth = gaussian_pair(x, x.isfinite())
    fitted = pv.AdaptiveImportanceSampling(model, guide, seed=0)(x)
    chains = pv.AnnealedImportanceSampling(model, guide, seed=0, num_steps=50, progress=False)(x)
    for evidence in (fitted, chains):
        assert (evidence.std_error < 0.02).all()
        assert ((evidence.log_evidence - truth).abs() < 6 * evidence.std_error + 1e-3).all()
    torch.testing.assert_close(pv.ExactEvidence(model, guide)(x).log_evidence, truth.to(dtype), rtol=1e-3, atol=1e-3)
    gaps = pv.InferenceGaps(model, guide, seed=0, num_particles=200)(x)
    assert gaps.converged.all()
    assert (gaps.approximation.abs() < 6 * gaps.std_errors["approximation"] + 0.02).all()  # the family holds the posterior
    assert (gaps.std_errors["approximation"] < 0.05).all()


def test_nan_with_a_place_in_the_density():
    """`NanMaskedNormal` and `NanMaskedMultivariateNormal` count a NaN as missing."""
    x = torch.tensor([[0.3, -0.2], [0.9, math.nan]])
    truth = (dist.Normal(0.0, math.sqrt(1.25)).log_prob(x.nan_to_num()) * ~x.isnan()).sum(-1)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(0.8 * x.nan_to_num(), 0.5).to_event(1))

    def normal(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(1))
            pyro.sample("x", dist.NanMaskedNormal(z, 0.5).to_event(1), obs=x)

    def multivariate(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(1))
            pyro.sample("x", dist.NanMaskedMultivariateNormal(z, 0.25 * torch.eye(2)), obs=x)

    for model in (normal, multivariate):
        evidence = pv.AdaptiveImportanceSampling(model, guide, seed=0)(x)
        assert ((evidence.log_evidence - truth).abs() < 5 * evidence.std_error).all()
        assert (evidence.std_error < 0.02).all()


@pytest.mark.parametrize("family", ["Normal", "Categorical", "Bernoulli", "Gamma"])
def test_nan_without_a_mask_is_still_refused(family):
    fns = {
        "Normal": lambda z: dist.Normal(z, 1.0),
        "Categorical": lambda z: dist.Categorical(logits=torch.stack([z, -z], -1)),
        "Bernoulli": lambda z: dist.Bernoulli(logits=z),
        "Gamma": lambda z: dist.Gamma(z.exp(), 1.0),
    }

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", fns[family](z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(InvalidDataError, match=r"data \[1\]: remove those rows, or mask"):
        pv.ImportanceSampling(model, guide, num_particles=10)(torch.tensor([1.0, math.nan, 0.0]))


def test_a_mask_over_a_joint_event_inside_another_event():
    """A mask over the two multivariate normals of a datum: one value belongs to three numbers."""
    x = torch.zeros(4, 2, 3)
    x[1, 1, 2] = math.nan
    seen = torch.ones(4, 2, dtype=torch.bool)
    seen[1, 1] = False

    def model(x, seen):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, 1, 1), 1.0).to_event(2))
            fn = dist.MultivariateNormal(z.expand(z.shape[:-2] + (2, 3)), torch.eye(3))
            pyro.sample("x", fn.mask(seen).to_event(1), obs=x)

    def guide(x, seen):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.zeros(4, 1, 1), 0.5).to_event(2))

    truth = torch.stack([exact_sum(3 * int(n)) for n in seen.sum(1)])
    torch.testing.assert_close(pv.ExactEvidence(model, guide)(x, seen).log_evidence, truth, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidDataError, match=r"data \[1\]"):
        pv.ExactEvidence(model, guide)(x, torch.ones_like(seen))


def exact_sum(n):
    """log N(0; 0, I + 1 1') in n dimensions: n zeros around one standard normal mean."""
    return torch.tensor(-0.5 * n * math.log(2 * math.pi) - 0.5 * math.log(1 + n))


def test_a_simulated_datum_keeps_its_holes():
    x = torch.tensor([[0.3, -0.2], [0.9, math.nan]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).mask(~x.isnan()).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x.nan_to_num(), 0.5).to_event(1))

    check = pv.SelfCheck(model, guide, seed=0, num_steps=30, progress=False)(x.repeat(50, 1))
    assert check.passed
