"""DESIGN 5.3 for Pyro's autoguides: log q by hand, or a refusal by name."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from kernel_helpers import (
    F64,
    assert_close,
    assert_weights,
    exact_pair,
    linear_gaussian,
    normal,
    randn,
    tensor,
    weigh,
)
from pyro.infer import autoguide
from torch.distributions import biject_to

from pyro_vae.errors import AuxiliarySiteError, LazyGuideError, StructureError

ZERO, ONE = tensor(0.0), tensor(1.0)
X = 5


def model(x):
    """A real, a positive and a simplex latent per datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(ONE * 2, ONE))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=F64)))
        pyro.sample("x", dist.Normal(z.sum(-1) + p[..., 0], s), obs=x)


def log_joint(values, x):
    z, s, p = values["z"], values["s"], values["p"]
    log_prior = normal(z, 0.0, 1.0).sum(-1) + s.log() - s + torch.log(tensor(2.0))  # Gamma(2, 1), Dirichlet(1, 1, 1)
    mean = z.sum(-1) + p[..., 0]
    return log_prior + normal(x, mean, s)


def spread(auto):
    """Move the parameters away from where an autoguide starts."""
    with torch.no_grad():
        for parameter in auto.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def unconstrained(values):
    """Unconstrained values and log |du / d value| by site, from the biject_to registry."""
    out = {}
    for name, support in (
        ("z", dist.constraints.real_vector),
        ("s", dist.constraints.positive),
        ("p", dist.constraints.simplex),
    ):
        transform = biject_to(support)
        u = transform.inv(values[name])
        jacobian = transform.log_abs_det_jacobian(u, values[name])
        if name == "z":
            jacobian = torch.zeros(values[name].shape[:-1], dtype=F64)
        out[name] = u, -jacobian
    return out


def log_q_by_hand(values, locs, scales):
    total = 0
    for name, (u, jacobian) in unconstrained(values).items():
        log_q = normal(u, locs[name], scales[name])
        total = total + (log_q if name == "s" else log_q.sum(-1)) + jacobian
    return total


@pytest.fixture
def x():
    pyro.set_rng_seed(3)
    return randn(X)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_auto_normal_against_log_q_by_hand(x, num_particles):
    guide = autoguide.AutoNormal(model, init_scale=0.4)
    guide(x)
    spread(guide)
    result = weigh(model, guide, x, K=num_particles)
    locs = {n: getattr(guide.locs, n).detach() for n in "zsp"}
    scales = {n: getattr(guide.scales, n).detach() for n in "zsp"}
    log_q = log_q_by_hand(result.values, locs, scales)
    assert result.lw.log_guide.shape == (num_particles, X)
    assert_close(result.lw.log_guide, log_q, atol=1e-8)
    assert_close(result.log_weight, log_joint(result.values, x) - log_q, atol=1e-8)
    for name in "zsp":
        drawn = result.values[name]
        assert len(drawn.flatten().unique()) == drawn.numel()


@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_auto_diagonal_normal_is_split_per_datum(x, num_particles):
    guide = autoguide.AutoDiagonalNormal(model, init_scale=0.4)
    guide(x)
    spread(guide)
    result = weigh(model, guide, x, K=num_particles)
    locs, scales, start = {}, {}, 0
    for name, shape in (("z", (X, 2)), ("s", (X,)), ("p", (X, 2))):
        stop = start + torch.Size(shape).numel()
        locs[name] = guide.loc[start:stop].detach().reshape(shape)
        scales[name] = guide.scale[start:stop].detach().reshape(shape)
        start = stop
    log_q = log_q_by_hand(result.values, locs, scales)
    assert_close(result.lw.log_guide, log_q, atol=1e-8)
    assert_close(result.log_weight, log_joint(result.values, x) - log_q, atol=1e-8)


def test_auto_diagonal_normal_as_one_datum_is_the_sum_over_data(x):
    guide = autoguide.AutoDiagonalNormal(model, init_scale=0.4)
    guide(x)
    spread(guide)
    result = weigh(model, guide, x, datum_plate=None)
    assert result.log_weight.shape == (4, 1)
    trace = poutine.trace(guide).get_trace(x)  # the same log q, by Pyro, at its own draw
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x)
    assert trace.log_prob_sum().isfinite()
    assert replayed.log_prob_sum().isfinite()
    locs, scales, start = {}, {}, 0
    for name, shape in (("z", (X, 2)), ("s", (X,)), ("p", (X, 2))):
        stop = start + torch.Size(shape).numel()
        locs[name] = guide.loc[start:stop].detach().reshape(shape)
        scales[name] = guide.scale[start:stop].detach().reshape(shape)
        start = stop
    values = {n: v.reshape(4, *v.shape[-1 - (n != "s") :]) for n, v in result.values.items()}
    expected = (log_joint(values, x) - log_q_by_hand(values, locs, scales)).sum(-1, keepdim=True)
    assert_close(result.log_weight, expected, atol=1e-8)


def gaussian(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def set_exact(guide, x):
    """x ~ N(z, 1): the posterior is N(x / 2, 1 / 2)."""
    with torch.no_grad():
        if isinstance(guide, autoguide.AutoNormal):
            guide.locs.z.copy_(x / 2)
            guide.scales.z_unconstrained.fill_(torch.log(torch.expm1(tensor(0.5**0.5))))
        elif isinstance(guide, autoguide.AutoDiagonalNormal):
            guide.loc.copy_(x / 2)
            guide.scale_unconstrained.fill_(torch.log(torch.expm1(tensor(0.5**0.5))))


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoDiagonalNormal])
@pytest.mark.parametrize("num_particles", [1, 3, 5])
@pytest.mark.parametrize("datum_plate", ["infer", "data", None])
def test_an_exact_autoguide_gives_the_evidence(x, kind, num_particles, datum_plate):
    guide = kind(gaussian)
    guide(x)
    set_exact(guide, x)
    expected = normal(x, 0.0, 2**0.5)
    result = weigh(gaussian, guide, x, K=num_particles, datum_plate=datum_plate)
    assert_weights(result, expected if datum_plate else expected.sum().reshape(1), atol=1e-9)


def test_a_wrapped_autoguide_is_recognised(x):
    guide = autoguide.AutoNormal(gaussian)
    guide(x)
    set_exact(guide, x)
    result = weigh(gaussian, poutine.scale(guide, scale=0.5), x)
    assert_weights(result, normal(x, 0.0, 2**0.5), atol=1e-9)


@pytest.mark.parametrize(
    "kind",
    [autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal, autoguide.AutoIAFNormal],
)
def test_joint_autoguides_are_refused_per_datum(x, kind):
    guide = kind(gaussian)
    guide(x)
    with pytest.raises(StructureError, match=rf"{kind.__name__}.*AutoNormal.*datum_plate=None"):
        weigh(gaussian, guide, x)


@pytest.mark.parametrize("kind", [autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal])
@pytest.mark.parametrize("num_particles", [1, 3, 5])
def test_joint_autoguides_are_right_as_one_datum(x, kind, num_particles):
    guide = kind(model, init_scale=0.5)
    guide(x)
    spread(guide)
    result = weigh(model, guide, x, datum_plate=None, K=num_particles)
    values = {n: v.reshape(num_particles, *v.shape[-1 - (n != "s") :]) for n, v in result.values.items()}
    parts = unconstrained(values)
    u = torch.cat([parts[n][0].reshape(num_particles, -1) for n in "zsp"], -1)
    log_q = guide.get_posterior().log_prob(u).detach() + sum(parts[n][1].sum(-1) for n in "zsp")
    assert_close(result.log_weight, (log_joint(values, x).sum(-1) - log_q)[:, None], atol=1e-8)


def test_auto_normal_messenger_does_not_count_the_observations(x):
    guide = autoguide.AutoNormalMessenger(gaussian, init_scale=0.5)
    guide(x)
    spread(guide)
    loc, scale = (getattr(guide, kind).z.detach() for kind in ("locs", "scales"))
    for num_particles in (1, 4, 5):
        result = weigh(gaussian, guide, x, K=num_particles)
        z = result.values["z"]
        assert_close(result.lw.log_guide, normal(z, loc, scale), atol=1e-8)
        assert_close(result.log_weight, normal(x, z, 1.0) + normal(z, 0.0, 1.0) - normal(z, loc, scale), atol=1e-8)


def test_auto_normal_messenger_on_constrained_latents(x):
    guide = autoguide.AutoNormalMessenger(model, init_scale=0.4)
    guide(x)
    spread(guide)
    locs = {n: getattr(guide.locs, n).detach() for n in "zsp"}
    scales = {n: getattr(guide.scales, n).detach() for n in "zsp"}
    result = weigh(model, guide, x)
    log_q = log_q_by_hand(result.values, locs, scales)
    assert_close(result.log_weight, log_joint(result.values, x) - log_q, atol=1e-8)


def test_auto_normal_messenger_on_a_model_with_a_factor(x):
    """The factor belongs to the model that the messenger runs, not to log q."""

    def with_factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))

    guide = autoguide.AutoNormalMessenger(with_factor, init_scale=0.5)
    guide(x)
    loc, scale = guide.locs.z.detach(), guide.scales.z.detach()
    result = weigh(with_factor, guide, x)
    z = result.values["z"]
    assert_close(result.log_weight, normal(x, z, 1.0) + normal(z, 0.0, 1.0) - normal(z, loc, scale), atol=1e-8)


def test_auto_hierarchical_normal_messenger(x):
    def hierarchical(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(ZERO, 1.0))
            z = pyro.sample("z", dist.Normal(2 * u, 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoHierarchicalNormalMessenger(hierarchical, init_scale=0.5)
    guide(x)
    spread(guide)
    result = weigh(hierarchical, guide, x)
    u, z = result.values["u"], result.values["z"]
    log_joint = normal(x, z, 1.0) + normal(z, 2 * u, 0.5) + normal(u, 0.0, 1.0)
    with torch.no_grad():  # log q by the guide's own recipe, one particle at a time
        log_q = []
        for k in range(len(u)):
            trace = poutine.trace(poutine.condition(guide, data={"u": u[k], "z": z[k]})).get_trace(x)
            trace.compute_log_prob()
            log_q.append(sum(trace.nodes[n]["unscaled_log_prob"] for n in "uz"))
    assert_close(result.log_weight, log_joint - torch.stack(log_q), atol=1e-8)


@pytest.mark.parametrize("kind", [autoguide.AutoDelta, autoguide.AutoLaplaceApproximation])
@pytest.mark.parametrize("datum_plate", ["infer", None])
def test_point_masses_are_refused(x, kind, datum_plate):
    guide = kind(gaussian)
    guide(x)
    with pytest.raises(StructureError, match="a point mass.*AutoNormal"):
        weigh(gaussian, guide, x, datum_plate=datum_plate)


@pytest.mark.parametrize(
    "kind",
    [autoguide.AutoNormal, autoguide.AutoDiagonalNormal, autoguide.AutoNormalMessenger],
)
def test_an_autoguide_that_never_ran_is_refused(x, kind):
    guide = kind(gaussian)
    with pytest.raises(LazyGuideError, match=rf"{kind.__name__} was never run.*guide\(\*args\) once"):
        weigh(gaussian, guide, x)
    assert getattr(guide, "prototype_trace", None) is None
    assert not list(guide.parameters())


def test_a_joint_autoguide_that_never_ran_is_refused(x):
    with pytest.raises(LazyGuideError, match="AutoMultivariateNormal"):
        weigh(gaussian, autoguide.AutoMultivariateNormal(gaussian), x, datum_plate=None)


def pair_of_latents(x):
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(ZERO, 1.0))
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(u + z, 1.0), obs=x)


def log_joint_of_pair(values, x):
    u, z = values["u"], values["z"]
    return normal(x, u + z, 1.0) + normal(u, 0.0, 1.0) + normal(z, 0.0, 1.0)


def test_a_list_of_auto_normals(x):
    guide = autoguide.AutoGuideList(pair_of_latents)
    guide.append(autoguide.AutoNormal(poutine.block(pair_of_latents, expose=["u"]), init_scale=0.5))
    guide.append(autoguide.AutoNormal(poutine.block(pair_of_latents, expose=["z"]), init_scale=0.3))
    guide(x)
    spread(guide)
    result = weigh(pair_of_latents, guide, x)
    log_q = 0
    for part, name in zip(guide, "uz", strict=True):
        log_q = log_q + normal(result.values[name], getattr(part.locs, name).detach(), getattr(part.scales, name).detach())
    assert_close(result.log_weight, log_joint_of_pair(result.values, x) - log_q, atol=1e-8)


def test_a_list_with_an_auto_diagonal_normal_is_split_or_refused(x):
    """Never the joint log q of the whole batch in the weight of every datum."""
    guide = autoguide.AutoGuideList(pair_of_latents)
    guide.append(autoguide.AutoDiagonalNormal(poutine.block(pair_of_latents, expose=["u"]), init_scale=0.5))
    guide.append(autoguide.AutoNormal(poutine.block(pair_of_latents, expose=["z"]), init_scale=0.3))
    guide(x)
    spread(guide)
    try:
        result = weigh(pair_of_latents, guide, x)
    except StructureError as error:
        assert "AutoDiagonalNormal" in str(error)
        return
    first, second = guide
    log_q = normal(result.values["u"], first.loc.detach(), first.scale.detach())
    log_q = log_q + normal(result.values["z"], second.locs.z.detach(), second.scales.z.detach())
    assert_close(result.log_weight, log_joint_of_pair(result.values, x) - log_q, atol=1e-8)


def test_a_list_with_a_point_mass_is_refused(x):
    guide = autoguide.AutoGuideList(pair_of_latents)
    guide.append(autoguide.AutoNormal(poutine.block(pair_of_latents, expose=["u"])))
    guide.append(autoguide.AutoDelta(poutine.block(pair_of_latents, expose=["z"])))
    guide(x)
    with pytest.raises(StructureError, match="'z' is a Delta, a point mass.*AutoNormal in the place of AutoDelta"):
        weigh(pair_of_latents, guide, x)


def test_a_list_with_a_function(x):
    """Pyro wraps the function in an AutoCallable, which never has a prototype trace."""

    def by_hand(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.7))

    guide = autoguide.AutoGuideList(pair_of_latents)
    guide.append(autoguide.AutoNormal(poutine.block(pair_of_latents, expose=["u"]), init_scale=0.5))
    guide.append(by_hand)
    guide(x)
    try:
        result = weigh(pair_of_latents, guide, x)
    except StructureError as error:  # a refusal by name is as good: its sites cannot be told from an autoguide's
        assert "AutoCallable" in str(error)
        return
    log_q = normal(result.values["u"], guide[0].locs.u.detach(), guide[0].scales.u.detach())
    log_q = log_q + normal(result.values["z"], x, 0.7)
    assert_close(result.log_weight, log_joint_of_pair(result.values, x) - log_q, atol=1e-8)


def test_a_list_with_a_function_that_draws_a_point_mass_is_refused(x):
    def by_hand(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    guide = autoguide.AutoGuideList(pair_of_latents)
    guide.append(autoguide.AutoNormal(poutine.block(pair_of_latents, expose=["u"]), init_scale=0.5))
    guide.append(by_hand)
    guide(x)
    with pytest.raises(StructureError):
        weigh(pair_of_latents, guide, x)


def test_a_list_with_a_function_that_unpacks_an_auxiliary_site(x):
    """The weights of the same list with the latent drawn under its own name, on the same noise."""

    def unpacking(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 0.7), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(a))

    def drawing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.7))

    found = []
    for by_hand in (unpacking, drawing):
        guide = autoguide.AutoGuideList(pair_of_latents)
        guide.append(autoguide.AutoNormal(poutine.block(pair_of_latents, expose=["u"]), init_scale=0.5))
        guide.append(by_hand)
        guide(x)
        found.append(weigh(pair_of_latents, guide, x).log_weight)
    assert_close(*found)


def test_an_autoguide_called_inside_a_function_is_refused_or_right(x):
    auto = autoguide.AutoNormal(gaussian)
    auto(x)
    set_exact(auto, x)
    try:
        result = weigh(gaussian, lambda x: auto(x), x)
    except AuxiliarySiteError:
        return
    assert_weights(result, normal(x, 0.0, 2**0.5), atol=1e-9)


def test_auto_discrete_parallel():
    """An enumerated autoguide: the exact posterior is read off its parameters."""
    x = randn(4)

    def mixture(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)

    guide = autoguide.AutoDiscreteParallel(mixture)
    guide(x)
    result = weigh(mixture, guide, x)
    evidence = torch.stack([normal(x, 0.0, 1.0) + tensor(0.7).log(), normal(x, 2.0, 1.0) + tensor(0.3).log()])
    assert_close(result.log_weight, evidence.logsumexp(0).expand(4, 4).contiguous(), atol=1e-8)


def test_auto_normal_with_a_subsampled_plate():
    """Parameters of all data, read at the subsample."""
    xs = randn(20)

    def subsampled(xs):
        with pyro.plate("data", 20, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=xs[index])

    def create_plates(xs):
        return pyro.plate("data", 20, subsample_size=4)

    guide = autoguide.AutoNormal(subsampled, create_plates=create_plates)
    guide(xs)
    with torch.no_grad():
        assert guide.locs.z.shape == (20,)
        guide.locs.z.copy_(xs / 2)
        guide.scales.z_unconstrained.fill_(torch.log(torch.expm1(tensor(0.5**0.5))))
    result = weigh(subsampled, guide, xs)
    assert_weights(result, normal(xs, 0.0, 2**0.5)[result.index], atol=1e-9)


def test_helpers_agree_with_a_plain_pair():
    lm, x = linear_gaussian()
    assert_weights(weigh(*exact_pair(lm), x), lm.log_evidence(x))
