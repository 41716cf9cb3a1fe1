"""The posterior-side check of `ImportanceSampling`: it widens, then flags, and never touches the estimate."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    exact_family,
    exact_pair,
    guide_of,
    linear_gaussian,
    make_evidence,
    model_of,
    posterior_moments,
    quiet,
    scaled_family,
    shifted_family,
)
from pyro import poutine

import pyro_vae as pv
from pyro_vae.evidence import Evidence
from pyro_vae.evidence.second_look import first_clause
from pyro_vae.kernel import calls

SIDE = "posterior side"
K = 1000


def estimate(model, guide, *args, **options):
    options = {"num_particles": K, "seed": 0, **options}
    with quiet():
        return pv.ImportanceSampling(model, guide, **options)(*args)


def covered(evidence, truth):
    low, high = evidence.confidence_interval()
    return (low <= truth + 1e-9) & (truth <= high + 1e-9)


def conditional_family(lm, factor):
    """Independent normals with the conditional standard deviations of the posterior times `factor`."""
    moments = posterior_moments(lm)
    scale = lm.optimal_diagonal(lm.bias).base_dist.scale

    def family(x):
        return dist.Normal(moments(x)[0], factor * scale).to_event(1)

    return family


def test_a_narrow_guide_is_found_out():
    """Four correlated latents, 0.8 of the conditional sd: good tail indices, and intervals that miss.

    300 data, about 80 of them with good k. Measured: their plain intervals cover 59%, the widened ones 99%, and all of the
    plain ones that miss are flagged. Fewer than 90% of 80 covered is seen at 97% less than once in 300 runs.
    """
    lm, x = linear_gaussian(latent_dim=4, data_dim=6, num_data=300, variance=1.0)
    evidence = estimate(model_of(lm), guide_of(conditional_family(lm, 0.8)), x)
    truth, good = lm.log_evidence(x), ~evidence.doubts["tails"]
    plain = covered(make_plain(evidence), truth)
    flagged = evidence.checks[SIDE]
    assert int(good.sum()) > 60
    assert float(plain[good].double().mean()) < 0.75, "the case is too easy to show anything"
    assert float(flagged[good & ~plain].double().mean()) > 0.9
    assert float(covered(evidence, truth)[good].double().mean()) > 0.9
    assert float((evidence.second - truth).abs().median()) < 0.1


def make_plain(evidence):
    """The record as it would be without the check."""
    fields = {name: getattr(evidence, name) for name in ("std_error", "pareto_k", "smoothed", "num_particles", "bound")}
    return make_evidence(evidence.log_evidence, **fields)


@pytest.mark.parametrize(
    ("factor", "num_particles"), [(1.0, 1000), (1.1, 1000), (1.5, 1000), (2.0, 1000), (1.1, 3000), (2.0, 3000)]
)
def test_guides_that_are_only_wide_are_seldom_flagged(factor, num_particles):
    """At most 5% of 400 data; measured were 1% to 4%. More than 8% is seen at 5% less than once in 100 runs."""
    lm, x = linear_gaussian(latent_dim=3, data_dim=5, num_data=400)
    moments = posterior_moments(lm)

    def family(x):
        loc, root = moments(x)
        return dist.MultivariateNormal(loc, scale_tril=factor * root)

    evidence = estimate(model_of(lm), guide_of(family), x, num_particles=num_particles)
    assert float(evidence.checks[SIDE].double().mean()) <= 0.08
    error = (evidence.second - lm.log_evidence(x)) / evidence.second_std_error
    assert float(evidence.second_std_error.max()) < 0.15
    assert float((error.abs() < 4).double().mean()) > 0.98


def lognormal_scale(x):
    def model(x):
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.5))
            pyro.sample("x", dist.Normal(0.0, scale.unsqueeze(-1)).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("scale", dist.LogNormal(x.square().mean(-1).log() / 2 * 0.5, 0.3))

    return model, guide


def gamma_poisson(x):
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Poisson(rate.unsqueeze(-1)).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + 0.9 * x.sum(-1), x.new_tensor(3.6)))

    return model, guide


def beta_bernoulli(x):
    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), 2.0))
            pyro.sample("x", dist.Bernoulli(p.unsqueeze(-1)).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Beta(1.8 + 0.9 * x.sum(-1), 1.8 + 0.9 * (3 - x.sum(-1))))

    return model, guide


def hierarchical(x):
    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(top, 0.5))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.6 * x.mean(-1), 0.7))
            pyro.sample("z", dist.Normal(0.5 * (top + x.mean(-1)), 0.45))

    return model, guide


def masked(x):
    """The latent of every second datum is masked and unused."""

    def kept(x):
        return torch.arange(len(x)) % 2 == 0

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=kept(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = torch.where(kept(x), z, torch.zeros_like(z))
            pyro.sample("x", dist.Normal(loc.unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=kept(x)):
            pyro.sample("z", dist.Normal(0.7 * x.mean(-1), 0.6))

    return model, guide


def enumerated(x):
    """A sign that the guide sums out."""

    def model(x):
        with pyro.plate("data", len(x)):
            sign = pyro.sample("sign", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = z + sign - 0.5
            pyro.sample("x", dist.Normal(loc.unsqueeze(-1), 1.0).expand(loc.shape + (3,)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.7 * x.mean(-1), 0.6))

    return model, guide


def bernoulli(x):
    """Three discrete latents as one event."""
    weight = torch.tensor([[1.0, -0.5, 0.3], [0.2, 1.0, -0.8], [-0.6, 0.4, 1.2]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor([0.3, 0.5, 0.6])).to_event(1))
            pyro.sample("x", dist.Normal(z.to(x.dtype) @ weight.to(x.dtype), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=0.8 * x @ weight.to(x.dtype).T - 0.5).to_event(1))

    return model, guide


def mixture(x):
    """A class, one-hot in the plate, and a continuous latent that depends on it; the guide draws both."""
    centres = torch.tensor([-1.0, 0.5, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.OneHotCategorical(x.new_tensor([0.5, 0.3, 0.2])))
            z = pyro.sample("z", dist.Normal(kind.to(x.dtype) @ centres.to(x.dtype), 0.5))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = x.mean(-1, keepdim=True)
            kind = pyro.sample("kind", dist.OneHotCategorical(logits=-0.8 * (mean - centres.to(x.dtype)).square()))
            centre = kind.to(x.dtype) @ centres.to(x.dtype)
            pyro.sample("z", dist.Normal(0.6 * centre + 0.4 * mean.squeeze(-1), 0.4))

    return model, guide


def discrete_in_a_plate(x):
    """A class for each of the three numbers of a datum, in a plate of its own, under a class of the datum that is masked."""

    def kept(x):
        return torch.arange(len(x)) % 2 == 0

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with poutine.mask(mask=kept(x)):
                pyro.sample("unused", dist.Categorical(x.new_tensor([0.2, 0.3, 0.5])))
            with pyro.plate("numbers", 3, dim=-2):
                kind = pyro.sample("kind", dist.Categorical(x.new_tensor([0.2, 0.5, 0.3])))
                pyro.sample("x", dist.Normal(kind.to(x.dtype) - 1, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            with poutine.mask(mask=kept(x)):
                pyro.sample("unused", dist.Categorical(x.new_tensor([0.4, 0.3, 0.3])))
            with pyro.plate("numbers", 3, dim=-2):
                levels = torch.arange(3, dtype=x.dtype) - 1
                pyro.sample("kind", dist.Categorical(logits=0.8 * x.T.unsqueeze(-1) * levels))

    return model, guide


def reads_numpy(x):
    """A decoder without gradients."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = torch.from_numpy(z.numpy() * 2)
            pyro.sample("x", dist.Normal(loc.unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x.mean(-1), 0.4))

    return model, guide


CONTINUOUS = (lognormal_scale, gamma_poisson, beta_bernoulli, hierarchical, masked, enumerated)
WITHOUT_GRADIENTS = (bernoulli, mixture, discrete_in_a_plate, reads_numpy)
PAIRS = {f.__name__: f for f in CONTINUOUS + WITHOUT_GRADIENTS}


def data_for(name, num_data=6, dtype=torch.float32):
    x = torch.randn(num_data, 3, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return {"gamma_poisson": (2 * x).exp().round().clamp(max=6), "beta_bernoulli": (x > 0).to(dtype)}.get(name, x)


def common_loc(x, variance):
    """log p(x) of three numbers N(loc, 1) with a common loc ~ N(0, variance)."""
    covariance = torch.eye(3, dtype=x.dtype) + variance
    return dist.MultivariateNormal(x.new_zeros(3), covariance).log_prob(x)


def gamma_poisson_evidence(x):
    total = x.sum(-1)
    return (total + 2).lgamma() - (total + 2) * math.log(4.0) - (x + 1).lgamma().sum(-1)


def beta_bernoulli_evidence(x):
    """6 B(2 + successes, 2 + failures), for 1 / B(2, 2) is 6."""
    a, b = 2 + x.sum(-1), 5 - x.sum(-1)
    return math.log(6.0) + a.lgamma() + b.lgamma() - (a + b).lgamma()


def lognormal_scale_evidence(x):
    log_scale = torch.linspace(-4, 4, 2001, dtype=x.dtype).unsqueeze(-1)
    log_likelihood = dist.Normal(0.0, log_scale.exp().unsqueeze(-1)).log_prob(x).sum(-1)
    return (dist.Normal(0.0, 0.5).log_prob(log_scale) + log_likelihood).logsumexp(0) + math.log(8 / 2000)


def bernoulli_evidence(x):
    """By a sum over the eight latent values."""
    weight = x.new_tensor([[1.0, -0.5, 0.3], [0.2, 1.0, -0.8], [-0.6, 0.4, 1.2]])
    z = torch.cartesian_prod(*x.new_tensor([[0.0, 1.0]] * 3)).unsqueeze(1)
    log_prior = dist.Bernoulli(x.new_tensor([0.3, 0.5, 0.6])).log_prob(z).sum(-1)
    return (log_prior + dist.Normal(z @ weight, 1.0).log_prob(x).sum(-1)).logsumexp(0)


def discrete_in_a_plate_evidence(x):
    log_prior, levels = x.new_tensor([0.2, 0.5, 0.3]).log(), x.new_tensor([-1.0, 0.0, 1.0])
    return (log_prior + dist.Normal(levels, 1.0).log_prob(x.unsqueeze(-1))).logsumexp(-1).sum(-1)


def mixed(x, terms):
    """`terms` holds (share, loc, variance) for each value of a class."""
    return torch.stack([math.log(p) + common_loc(x - loc, variance) for p, loc, variance in terms]).logsumexp(0)


EVIDENCE = {
    "lognormal_scale": lognormal_scale_evidence,
    "gamma_poisson": gamma_poisson_evidence,
    "beta_bernoulli": beta_bernoulli_evidence,
    "hierarchical": lambda x: common_loc(x, 1.25),
    "masked": lambda x: torch.where(torch.arange(len(x)) % 2 == 0, common_loc(x, 1.0), common_loc(x, 0.0)),
    "enumerated": lambda x: mixed(x, [(0.6, -0.5, 1.0), (0.4, 0.5, 1.0)]),
    "bernoulli": bernoulli_evidence,
    "mixture": lambda x: mixed(x, [(0.5, -1.0, 0.25), (0.3, 0.5, 0.25), (0.2, 2.0, 0.25)]),
    "discrete_in_a_plate": discrete_in_a_plate_evidence,
    "reads_numpy": lambda x: common_loc(x, 4.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", PAIRS)
def test_the_second_estimate_is_log_evidence_too(name, dtype):
    """4.5 errors from the closed form, 6 data."""
    x = data_for(name, dtype=dtype)
    evidence = estimate(*PAIRS[name](x), x)
    truth = EVIDENCE[name](x.to(F64))
    assert set(evidence.unchecked) <= {"precision"} and evidence.second.dtype == evidence.log_evidence.dtype == dtype
    error = evidence.second_std_error
    assert float(error.max()) < (0.15 if PAIRS[name] in WITHOUT_GRADIENTS else 0.1)
    assert float(((evidence.second - truth).abs() / error).max()) < 4.5
    assert int(evidence.checks[SIDE].sum()) <= 1  # two of six at a rate of 3%: once in 80 seeds


FIELDS = ("log_evidence", "std_error", "elbo", "elbo_std_error", "ess", "pareto_k", "smoothed")


@pytest.mark.parametrize("jackknife", [0, 2])
@pytest.mark.parametrize("name", [*PAIRS, "linear"])
def test_numbers_are_those_without_the_check(name, jackknife):
    """Bit for bit."""
    if name == "linear":
        lm, x = linear_gaussian()
        pair = model_of(lm), guide_of(scaled_family(lm, 0.7))
    else:
        x = data_for(name)
        pair = PAIRS[name](x)
    with_it, without = (estimate(*pair, x, check=check, jackknife=jackknife) for check in (True, False))
    for field in FIELDS:
        assert torch.equal(getattr(with_it, field).nan_to_num(), getattr(without, field).nan_to_num()), field
    assert torch.equal(with_it.curve.log_evidence, without.curve.log_evidence)
    assert with_it.second is not None and without.second is None
    assert without.unchecked[SIDE] == "check=False" and SIDE not in without.checks


def test_missing_observations_are_imputed_as_without_the_check():
    """Draws made while scoring come from the same random state."""
    x = data_for("hierarchical")
    mask = torch.arange(len(x)) % 2 == 0

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[..., 0], obs_mask=mask)
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.7 * x.mean(-1), 0.5))

    with_it, without = (estimate(model, guide, x, check=check) for check in (True, False))
    assert torch.equal(with_it.log_evidence, without.log_evidence)


def test_the_random_state_of_the_caller_does_not_notice():
    lm, x = linear_gaussian()
    after = []
    for check in (True, False):
        torch.manual_seed(5)
        estimate(*exact_pair(lm), x, seed=None, check=check)
        after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize("size", [1, 1500])
def test_the_second_estimate_does_not_depend_on_chunks(size):
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(scaled_family(lm, 0.7))
    whole = estimate(*pair, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "CHUNK_BYTES", {"cpu": size, "cuda": size})
        pieces = estimate(*pair, x)
    torch.testing.assert_close(pieces.second, whole.second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_particles", [1000, 2999, 3000, 5000])
@pytest.mark.parametrize(
    ("name", "price", "dim"),
    [("hierarchical", 325, 2), ("gamma_poisson", 326, 1), ("enumerated", 349, 1), ("bernoulli", 326, None)],
)
def test_cost(name, price, dim, num_particles):
    """At most 35% at 1,000 particles; from 3,000 on with the search, up to ten latents (the last pair has more)."""
    x = data_for(name)
    if num_particles >= 3000 and dim is not None:
        enumerated = 120 if name == "enumerated" else 0  # draws of the prior are scored apart
        climbs, fits, exchanges, uphill = 4 * 11 * 3, 2 * 3 * (12 + 3 * dim), 3 * dim, 2 * (2 * 3 + 1)
        price += 40 + 12 + 120 + climbs + fits + exchanges + uphill + enumerated
    cost = [estimate(*PAIRS[name](x), x, num_particles=num_particles, check=check).cost for check in (True, False)]
    assert cost[1] == num_particles + 2  # and two particles in float64
    assert cost[0] - cost[1] == price
    assert cost[0] <= 1.35 * cost[1]


@pytest.mark.parametrize(("num_particles", "flagged", "held"), [(1000, 0.45, 0.5), (3000, 0.98, 0.0)])
def test_a_mode_that_draws_of_the_prior_reach_is_found(num_particles, flagged, held):
    """z and -z are alike, and the guide draws the positive ones: log 2 is missing.

    400 data. Measured: 59% are flagged, and 66% of the intervals of the others hold log p(x). Without draws of the prior it
    was 4% and 3%. With the search of 3,000 particles, 399 of 400 are flagged.
    """
    x = 1 + 2 * torch.rand(400, 1, generator=torch.Generator().manual_seed(0), dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.5).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.3).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.96 * x, 0.32).to_event(1))

    evidence = estimate(model, guide, x, num_particles=num_particles)
    doubted = ~evidence.reliable
    # Half of log p(x) is that of x ~ N(z, .3) and z > 0: a Gaussian density times the share of N(loc, scale) above zero.
    loc, scale = x * 2.25 / 2.34, 1.5 * 0.3 / math.sqrt(2.34)
    one_mode = dist.Normal(0.0, math.sqrt(2.34)).log_prob(x) + torch.special.log_ndtr(loc / scale)
    truth = one_mode.squeeze(-1) + math.log(2)
    assert float(doubted.double().mean()) > flagged
    assert float(covered(evidence, truth)[~doubted].double().mean()) >= held


@pytest.mark.parametrize("num_data", [1, 3])
def test_few_particles_are_not_judged(num_data):
    lm, x = linear_gaussian(num_data=num_data)
    for num_particles in (1, 5, 100, 999):
        evidence = estimate(*exact_pair(lm), x, num_particles=num_particles)
        assert evidence.unchecked[SIDE] == "not judged below 1,000 particles"
        assert evidence.second is None and SIDE not in evidence.checks and evidence.cost == num_particles
    evidence = estimate(*exact_pair(lm), x)
    assert SIDE not in evidence.unchecked and evidence.checks[SIDE].shape == evidence.second.shape == (num_data,)


def test_the_whole_call_as_one_datum():
    lm, x = linear_gaussian(num_data=3)
    evidence = estimate(*exact_pair(lm), x, datum_plate=None)
    assert evidence.second.shape == (1,) and not evidence.unchecked
    assert float((evidence.second - lm.log_evidence(x).sum()).abs()) < 4.5 * float(evidence.second_std_error)


def counts():
    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Poisson(x.new_tensor(2.0)))
            pyro.sample("x", dist.Normal(n.unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Poisson(x.new_tensor(2.0)))

    return model, guide


def not_differentiable():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.detach().unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)
            pyro.factor("f", -0.1 * z.detach().square())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.6))

    return model, guide


def many_without_gradients():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((16,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :3], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_full((16,), 0.5)).to_event(1))

    return model, guide


def summed_out():
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(s.unsqueeze(-1), 1.0).expand(s.shape + (3,)).to_event(1), obs=x)

    return model, lambda x: None


def many_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(101), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :3], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(101), 1.0).to_event(1))

    return model, guide


def breaks_off_the_draws():
    """A program that fails where gradients are recorded, in a way that nobody foresaw."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if torch.is_grad_enabled():
                raise KeyError("nobody foresaw this")
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((len(x), 3)).to_event(1), obs=x)

    return model, not_differentiable()[1]


WHY_NOT = {
    counts: "the latent site 'n' is discrete and its values cannot be listed",
    many_without_gradients: "more than 15 latents, some of them discrete or without gradients",
    summed_out: "all latents are summed out",
    many_latents: "more than 100 latents",
    breaks_off_the_draws: "'nobody foresaw this'",
}


@pytest.mark.parametrize("pair", WHY_NOT, ids=lambda pair: pair.__name__)
def test_where_it_is_not_made_it_says_why(pair):
    x = data_for("hierarchical")
    evidence, plain = (estimate(*pair(), x, check=check) for check in (True, False))
    assert evidence.unchecked[SIDE] == WHY_NOT[pair]
    assert evidence.second is None and evidence.second_std_error is None and SIDE not in evidence.checks
    assert torch.equal(evidence.log_evidence, plain.log_evidence)


def test_a_model_cut_off_from_its_latents_costs_no_estimate():
    """Only the prior has a gradient here. What is found may be of no use; the estimate is as without the check."""
    x = data_for("hierarchical")
    evidence, plain = (estimate(*not_differentiable(), x, check=check) for check in (True, False))
    assert torch.equal(evidence.log_evidence, plain.log_evidence)


def test_prior_sites():
    x = data_for("hierarchical")

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("top", dist.Normal(0.6 * x.mean(-1), 0.7))

    evidence = estimate(hierarchical(x)[0], guide, x, prior_sites=["z"])
    assert evidence.unchecked[SIDE] == "the prior draws some latents (prior_sites)"


def test_the_start_of_a_message():
    assert first_clause(ValueError("the site 'a.b' is wrong: do this. Or that")) == "the site 'a.b' is wrong"
    assert first_clause(RuntimeError("no (really)")) == "no"
    assert first_clause(KeyError()) == "KeyError"


def test_the_larger_upper_end_counts():
    plain = make_evidence([-1.0, -1.0, -1.0])
    second = torch.tensor([-2.0, -0.5, -math.inf], dtype=F64)
    record = make_evidence([-1.0, -1.0, -1.0], second=second, second_std_error=torch.tensor([0.1, 0.2, math.nan], dtype=F64))
    (low, high), (plain_low, plain_high) = record.confidence_interval(), plain.confidence_interval()
    assert torch.equal(low, plain_low)
    assert torch.equal(high[[0, 2]], plain_high[[0, 2]])
    assert float(high[1]) == pytest.approx(-0.5 + 1.959964 * 0.2)


def record_of(second, flags, num_data=100):
    full = torch.full((num_data,), 1.0, dtype=F64)
    checks = {SIDE: torch.as_tensor(flags).expand(num_data)}
    return make_evidence(-1 * full, second=second * full, second_std_error=0.2 * full, checks=checks)


def test_the_mean_sees_a_shortfall_that_all_data_share():
    """A tenth of a nat everywhere, half an error of each datum but five of the mean."""
    record = record_of(-0.9, False)
    low, high = record.mean_confidence_interval()
    assert low == pytest.approx(-1 - 1.959964 * 0.01)
    assert high == pytest.approx(-0.9 + 1.959964 * 0.02)


def test_the_mean_sees_a_few_flagged_data_although_the_other_second_estimates_are_poor():
    flags = torch.arange(100) < 10
    second = torch.where(flags, 1.0, -3.0).to(F64)
    _, high = record_of(second, flags).mean_confidence_interval()
    half = 1.959964 * math.sqrt(10 * 0.2**2 + 90 * 0.1**2) / 100
    assert high == pytest.approx(-1 + 10 * 2 / 100 + half)


def test_a_poor_second_estimate_leaves_the_mean_alone():
    plain = make_evidence([-1.0] * 100)
    assert record_of(-5.0, False).mean_confidence_interval() == plain.mean_confidence_interval()


def test_batches_join_also_where_one_was_not_checked():
    checked = record_of(-0.9, True, num_data=2)
    unchecked = make_evidence([-3.0], unchecked={SIDE: "because"})
    for records, rows in (([checked, unchecked], [True, True, False]), ([unchecked, checked], [False, True, True])):
        joined = Evidence.cat(records)
        assert joined.checks[SIDE].tolist() == rows
        assert joined.second.isnan().tolist() == [not row for row in rows]
        assert joined.unchecked == {SIDE: "because"}
        high = joined.confidence_interval()[1]
        assert bool(high.isfinite().all()) and all(map(math.isfinite, joined.mean_confidence_interval()))
    assert json.loads(json.dumps(checked.to_dict()))["second"] == [-0.9, -0.9]
    assert checked.select(torch.tensor([True, False])).second.shape == (1,)


@pytest.mark.parametrize("num_particles", [99, 500])
def test_adaptive_makes_it_on_request(num_particles):
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(shifted_family(lm, lambda x: 0.5))

    def run(**options):
        with quiet():
            return pv.AdaptiveImportanceSampling(*pair, num_particles=num_particles, seed=0, **options)(x)

    default, asked = run(), run(check=True)
    assert default.unchecked[SIDE] == "check=False" and default.second is None
    assert torch.equal(default.log_evidence, asked.log_evidence) and torch.equal(default.smoothed, asked.smoothed)
    if num_particles < 100:
        assert asked.unchecked[SIDE] == "not judged below 100 particles" and asked.cost == default.cost
    else:
        assert asked.cost == default.cost + 324 and SIDE not in asked.unchecked
        z = (asked.second - lm.log_evidence(x)) / asked.second_std_error
        assert float(z.abs().max()) < 4.5 and float(asked.second_std_error.max()) < 0.1


def test_over_a_loader():
    lm, x = linear_gaussian(num_data=5)
    estimator = pv.ImportanceSampling(model_of(lm), guide_of(exact_family(lm)), num_particles=K, seed=0)
    result = pv.evaluate(estimator, torch.utils.data.DataLoader(x, batch_size=2), seed=0)
    assert result.second.shape == result.checks[SIDE].shape == (5,)
