"""DESIGN 5.5: enumerated sites are summed out. Evidence and ELBO against sums by hand, to the last digit."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from kernel_helpers import F64, assert_close, normal, randn, tensor, weigh
from pyro.infer import config_enumerate

import pyro_vae as pv
from pyro_vae.errors import BatchCouplingError, EnumerationError, SiteMismatchError

ZERO = tensor(0.0)
P = tensor([0.2, 0.5, 0.3])  # prior of the class
MEANS = tensor([-1.0, 0.5, 2.0])
SHIFT = tensor([0.0, 0.2, 0.4])
B = 4
PARALLEL = {"enumerate": "parallel"}


@pytest.fixture
def x():
    return randn(B)


def q_of(x):
    return torch.stack([0.3 * x, -x, ZERO.expand_as(x)], -1).softmax(-1)


@pytest.mark.parametrize("how", ["guide", "both", "config_guide", "config_both", "sequential"])
@pytest.mark.parametrize("num_particles", [1, 3, 4])
def test_a_class_enumerated_in_the_guide(x, how, num_particles):
    in_guide = {"enumerate": "sequential"} if how == "sequential" else PARALLEL if how in ("guide", "both") else {}
    in_model = PARALLEL if how == "both" else {}

    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P), infer=in_model)
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("k", dist.Categorical(q_of(x)), infer=in_guide)

    if how.startswith("config"):
        guide = config_enumerate(guide, "parallel")
        model = config_enumerate(model, "parallel") if how == "config_both" else model
    result = weigh(model, guide, x, K=num_particles)
    log_joint = torch.stack([P[k].log() + normal(x, MEANS[k], 1.0) for k in range(3)])
    q = q_of(x).T
    assert_close(result.log_weight, log_joint.logsumexp(0).expand(num_particles, B))
    assert_close(result.elbo, (q * (log_joint - q.log())).sum(0).expand(num_particles, B))


def test_the_exact_class_posterior_makes_the_bound_tight(x):
    log_joint = torch.stack([P[k].log() + normal(x, MEANS[k], 1.0) for k in range(3)], -1)

    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("k", dist.Categorical(logits=log_joint))

    result = weigh(model, guide, x)
    assert_close(result.elbo, log_joint.logsumexp(-1).expand(4, B))
    assert_close(result.elbo, result.log_weight)


def test_a_class_of_zero_probability_under_q_does_not_count_in_the_elbo_but_in_the_evidence(x):
    q = tensor([0.0, 0.4, 0.6])

    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("k", dist.Categorical(q), infer=PARALLEL)

    result = weigh(model, guide, x)
    log_joint = torch.stack([P[k].log() + normal(x, MEANS[k], 1.0) for k in range(3)])
    assert_close(result.log_weight, log_joint.logsumexp(0).expand(4, B))
    expected = (q[1:, None] * (log_joint[1:] - q[1:, None].log())).sum(0)
    assert_close(result.elbo, expected.expand(4, B), atol=1e-6)  # Categorical clamps its probabilities


@pytest.mark.parametrize("kind", ["bernoulli", "one_hot"])
def test_other_enumerable_distributions(x, kind):
    p = tensor(0.3)

    def model(x):
        with pyro.plate("data", B):
            if kind == "bernoulli":
                k = pyro.sample("k", dist.Bernoulli(p))
                mean = 2 * k
            else:
                k = pyro.sample("k", dist.OneHotCategorical(P))
                mean = k @ MEANS
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            fn = dist.Bernoulli(tensor(0.6)) if kind == "bernoulli" else dist.OneHotCategorical(q_of(x))
            pyro.sample("k", fn, infer=PARALLEL)

    if kind == "bernoulli":
        prior, means, q = tensor([0.7, 0.3]), tensor([0.0, 2.0]), tensor([0.4, 0.6])[:, None].expand(2, B)
    else:
        prior, means, q = P, MEANS, q_of(x).T
    log_joint = torch.stack([lp.log() + normal(x, m, 1.0) for lp, m in zip(prior, means, strict=True)])
    for num_particles in (1, 3, 4):
        result = weigh(model, guide, x, K=num_particles)
        assert_close(result.log_weight, log_joint.logsumexp(0).expand(num_particles, B))
        assert_close(result.elbo, (q * (log_joint - q.log())).sum(0).expand(num_particles, B))


@pytest.mark.parametrize("num_particles", [1, 3, 4])
@pytest.mark.parametrize("configured", [False, True])
def test_a_class_enumerated_in_the_model_alone(x, num_particles, configured):
    """Summed out inside the logarithm, for the evidence and the ELBO alike."""

    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            k = pyro.sample("k", dist.Categorical(P), infer={} if configured else PARALLEL)
            pyro.sample("x", dist.Normal(MEANS[k] + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(x, 0.8))

    result = weigh(config_enumerate(model, "parallel") if configured else model, guide, x, K=num_particles)
    z = result.values["z"]
    inner = torch.stack([P[k].log() + normal(x, MEANS[k] + z, 1.0) for k in range(3)]).logsumexp(0)
    expected = inner + normal(z, 0.0, 1.0) - normal(z, x, 0.8)
    assert z.shape == (num_particles, B)
    assert_close(result.log_weight, expected)
    assert_close(result.elbo, expected)


def test_a_discrete_latent_of_the_model_that_nobody_enumerates_is_refused(x):
    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    with pytest.raises(SiteMismatchError, match="'k'"):
        weigh(model, lambda x: None, x)


@pytest.mark.parametrize("num_particles", [1, 2, 3, 4, 5])
def test_a_sampled_class(x, num_particles):
    """Not enumerated: an ordinary discrete latent with a weight of its own."""

    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("k", dist.Categorical(q_of(x)))

    result = weigh(model, guide, x, K=num_particles)
    k = result.values["k"]
    log_q = q_of(x).log().expand(num_particles, B, 3).gather(-1, k[..., None])[..., 0]
    assert_close(result.log_weight, P[k].log() + normal(x, MEANS[k], 1.0) - log_q)


def downstream_model(x):
    with pyro.plate("data", B):
        k = pyro.sample("k", dist.Categorical(P))
        z = pyro.sample("z", dist.Normal(MEANS[k], 0.7))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@config_enumerate
def downstream_guide(x):
    with pyro.plate("data", B):
        k = pyro.sample("k", dist.Categorical(q_of(x)))
        pyro.sample("z", dist.Normal(x + SHIFT[k], 0.9))


@pytest.mark.parametrize("num_particles", [1, 2, 3, 4, 5])
def test_a_continuous_latent_downstream_of_an_enumerated_one(x, num_particles):
    """z is drawn afresh for each class and particle; E must not be read as K."""
    result = weigh(downstream_model, downstream_guide, x, K=num_particles)
    z = result.values["z"]
    assert z.shape == (3, num_particles, B)
    assert len(z.unique()) == z.numel()
    q = q_of(x).T
    terms = []
    for k in range(3):
        log_p = P[k].log() + normal(z[k], MEANS[k], 0.7) + normal(x, z[k], 1.0)
        terms.append(log_p - normal(z[k], x + SHIFT[k], 0.9))
    terms = torch.stack(terms)
    assert_close(result.log_weight, terms.logsumexp(0))
    assert_close(result.elbo, (q[:, None] * (terms - q.log()[:, None])).sum(0))


def test_an_exact_guide_downstream_of_an_enumerated_site(x):
    """q(z | k, x) exact: the weight is log p(x) for any draw, the ELBO as well with the exact q(k)."""
    precision = 1 / 0.7**2 + 1
    sd = (0.7**2 + 1) ** 0.5
    log_joint = torch.stack([P[k].log() + normal(x, MEANS[k], sd) for k in range(3)], -1)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(logits=log_joint))
            pyro.sample("z", dist.Normal((MEANS[k] / 0.7**2 + x) / precision, precision**-0.5))

    for num_particles in (1, 3, 4):
        result = weigh(downstream_model, guide, x, K=num_particles)
        assert_close(result.log_weight, log_joint.logsumexp(-1).expand(num_particles, B))
        assert_close(result.elbo, log_joint.logsumexp(-1).expand(num_particles, B))


@pytest.mark.parametrize("num_particles", [1, 3, 4])
def test_a_class_downstream_of_a_continuous_latent(x, num_particles):
    def logits(z):
        return torch.stack([z, -z, 0.5 * z], -1)

    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            k = pyro.sample("k", dist.Categorical(logits=logits(z)))
            pyro.sample("x", dist.Normal(MEANS[k] + z, 1.0), obs=x)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(x, 0.8))
            pyro.sample("k", dist.Categorical(logits=logits(2 * z + x)))

    result = weigh(model, guide, x, K=num_particles)
    z = result.values["z"]
    log_pk, log_qk = logits(z).log_softmax(-1), logits(2 * z + x).log_softmax(-1)
    base = normal(z, 0.0, 1.0) - normal(z, x, 0.8)
    terms = torch.stack([log_pk[..., k] + normal(x, MEANS[k] + z, 1.0) for k in range(3)])
    log_q = log_qk.movedim(-1, 0)
    assert_close(result.log_weight, base + terms.logsumexp(0))
    assert_close(result.elbo, base + (log_q.exp() * (terms - log_q)).sum(0))


P2 = tensor([[0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])  # p(j | k)
Q2 = tensor([[0.3, 0.7], [0.8, 0.2], [0.5, 0.5]])


@pytest.mark.parametrize("j_in", ["guide", "model"])
@pytest.mark.parametrize("num_particles", [1, 2, 3, 4])
def test_two_enumerated_sites(x, j_in, num_particles):
    """k enumerated in the guide, j given k in the guide or in the model alone."""

    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            j = pyro.sample("j", dist.Categorical(P2[k]), infer=PARALLEL)
            pyro.sample("x", dist.Normal(MEANS[k] + 1.5 * j, 1.0), obs=x)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(q_of(x)))
            if j_in == "guide":
                pyro.sample("j", dist.Categorical(Q2[k]))

    result = weigh(model, guide, x, K=num_particles)
    q = q_of(x).T
    evidence, elbo = [], torch.zeros(B, dtype=F64)
    for k in range(3):
        inner = torch.stack([(P[k] * P2[k, j]).log() + normal(x, MEANS[k] + 1.5 * j, 1.0) for j in range(2)])
        evidence.append(inner.logsumexp(0))
        if j_in == "guide":
            for j in range(2):
                weight = q[k] * Q2[k, j]
                elbo = elbo + weight * (inner[j] - weight.log())
        else:
            elbo = elbo + q[k] * (inner.logsumexp(0) - q[k].log())
    assert_close(result.log_weight, torch.stack(evidence).logsumexp(0).expand(num_particles, B))
    assert_close(result.elbo, elbo.expand(num_particles, B))


@pytest.mark.parametrize("num_particles", [1, 2, 3, 4])
def test_three_sites_two_in_the_guide_one_in_the_model_and_a_continuous_one(x, num_particles):
    """k in the guide, j in the model alone, z downstream of k, l downstream of z in the guide."""

    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            z = pyro.sample("z", dist.Normal(MEANS[k], 0.7))
            j = pyro.sample("j", dist.Categorical(P2[k]), infer=PARALLEL)
            l = pyro.sample("l", dist.Bernoulli(logits=z))  # noqa: E741
            pyro.sample("x", dist.Normal(z + 1.5 * j - l, 1.0), obs=x)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(q_of(x)))
            z = pyro.sample("z", dist.Normal(x + SHIFT[k], 0.9))
            pyro.sample("l", dist.Bernoulli(logits=-z))

    result = weigh(model, guide, x, K=num_particles)
    z, q = result.values["z"], q_of(x).T
    assert z.shape[-2:] == (num_particles, B)
    z = z.reshape(3, num_particles, B)
    evidence, elbo = [], torch.zeros(num_particles, B, dtype=F64)
    for k, b in itertools.product(range(3), range(2)):
        sign = 1 if b else -1
        log_pl = torch.nn.functional.logsigmoid(sign * z[k])
        log_ql = torch.nn.functional.logsigmoid(-sign * z[k])
        log_p = P[k].log() + normal(z[k], MEANS[k], 0.7) + log_pl
        log_p = log_p + torch.stack([P2[k, j].log() + normal(x, z[k] + 1.5 * j - b, 1.0) for j in range(2)]).logsumexp(0)
        log_qz = normal(z[k], x + SHIFT[k], 0.9)
        evidence.append(log_p - log_qz)
        elbo = elbo + q[k] * log_ql.exp() * (log_p - log_qz - q[k].log() - log_ql)
    assert_close(result.log_weight, torch.stack(evidence).logsumexp(0))
    assert_close(result.elbo, elbo)


def test_equal_sizes_of_classes_particles_and_data():
    """E = K = B = 3: nothing may depend on telling the axes apart by their size."""
    x = randn(3)

    def model(x):
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(P))
            z = pyro.sample("z", dist.Normal(MEANS[k], 0.7))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(q_of(x)))
            pyro.sample("z", dist.Normal(x + SHIFT[k], 0.9))

    result = weigh(model, guide, x, K=3)
    z = result.values["z"]
    terms = [
        P[k].log() + normal(z[k], MEANS[k], 0.7) + normal(x, z[k], 1.0) - normal(z[k], x + SHIFT[k], 0.9) for k in range(3)
    ]
    assert_close(result.log_weight, torch.stack(terms).logsumexp(0))


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_an_enumerated_site_beside_an_inner_plate(x, data_dim):
    """k per datum, pixels in a plate inside: their log-densities are summed before the sum over k."""
    pixels = randn(B, 3)

    def turned(v):
        return v if data_dim == -2 else v.T

    def model(pixels):
        with pyro.plate("data", B, dim=data_dim):
            k = pyro.sample("k", dist.Categorical(P))
            with pyro.plate("pixels", 3, dim=-3 - data_dim):
                pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=turned(pixels))

    @config_enumerate
    def guide(pixels):
        with pyro.plate("data", B, dim=data_dim):
            q = q_of(x)[:, None] if data_dim == -2 else q_of(x)
            pyro.sample("k", dist.Categorical(q))

    result = weigh(model, guide, pixels)
    log_joint = torch.stack([P[k].log() + normal(pixels, MEANS[k], 1.0).sum(-1) for k in range(3)])
    q = q_of(x).T
    assert_close(result.log_weight, log_joint.logsumexp(0).expand(4, B))
    assert_close(result.elbo, (q * (log_joint - q.log())).sum(0).expand(4, B))


def test_one_class_as_one_datum(x):
    def model(x):
        k = pyro.sample("k", dist.Categorical(P))
        with pyro.plate("data", B):
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    def guide(x):
        pyro.sample("k", dist.Categorical(P.flip(0)), infer=PARALLEL)

    result = weigh(model, guide, x, datum_plate=None)
    log_joint = torch.stack([P[k].log() + normal(x, MEANS[k], 1.0).sum() for k in range(3)])
    q = P.flip(0)
    assert_close(result.log_weight, log_joint.logsumexp(0).expand(4, 1))
    assert_close(result.elbo, (q * (log_joint - q.log())).sum().expand(4, 1))


def test_numbers_of_classes_that_differ_are_refused(x):
    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("k", dist.Categorical(torch.ones(2, dtype=F64) / 2), infer=PARALLEL)

    with pytest.raises(EnumerationError, match="2 values in the guide and 3 in the model"):
        weigh(model, guide, x)


def test_a_continuous_site_marked_for_enumeration_is_refused_or_sampled(x):
    """config_enumerate leaves continuous sites alone; marking one by hand is a mistake with a name."""

    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(x, 1.0), infer=PARALLEL)

    with pytest.raises(EnumerationError, match="'z'.*cannot be listed"):
        weigh(model, guide, x)


def test_poisson_cannot_be_listed(x):
    def model(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Poisson(tensor(1.0)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(EnumerationError, match="'k'"):
        weigh(model, lambda x: None, x)


def test_classes_of_the_guide_alone_are_summed_out_of_log_q(x):
    """q(z) = sum_k q(k) q(z | k), whether k is marked for enumeration or not."""

    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Categorical(P))
            pyro.sample("z", dist.Normal(MEANS[k], 1.0))

    for either in (guide, config_enumerate(guide)):
        result = weigh(model, either, x)
        z = result.values["z"]
        log_q = torch.stack([normal(z, MEANS[j], 1.0) + P[j].log() for j in range(3)]).logsumexp(0)
        assert_close(result.log_weight, normal(z, 0.0, 1.0) + normal(x, z, 1.0) - log_q)


def test_a_network_on_a_one_hot_class(x):
    """The decoder of a semi-supervised VAE: cat([z, y]) of unequal leading axes needs an expand by hand."""
    net = torch.nn.Linear(4, 1).double()

    def model(x):
        with pyro.plate("data", B):
            y = pyro.sample("y", dist.OneHotCategorical(P))
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            shape = torch.broadcast_shapes(y.shape[:-1], z.shape)
            h = torch.cat([y.expand(*shape, 3), z.expand(shape)[..., None]], -1)
            pyro.sample("x", dist.Normal(net(h)[..., 0], 1.0), obs=x)

    @config_enumerate
    def guide(x):
        with pyro.plate("data", B):
            y = pyro.sample("y", dist.OneHotCategorical(q_of(x)))
            pyro.sample("z", dist.Normal(y @ MEANS + x, 0.6))

    for num_particles in (1, 3, 4):
        result = weigh(model, guide, x, K=num_particles)
        z, q = result.values["z"], q_of(x).T
        terms = []
        for k in range(3):
            mean = z[k] * net.weight[0, 3] + net.weight[0, k] + net.bias
            log_p = P[k].log() + normal(z[k], 0.0, 1.0) + normal(x, mean, 1.0)
            terms.append((log_p - normal(z[k], MEANS[k] + x, 0.6)).detach())
        terms = torch.stack(terms)
        assert_close(result.log_weight, terms.logsumexp(0))
        assert_close(result.elbo, (q[:, None] * (terms - q.log()[:, None])).sum(0))


# ------------------------------------------------------------------------ the axis must stay where it was put

AXIS_X = torch.tensor([0.3, -0.5])
LOCS = torch.tensor([-1.0, 2.0])


def squeezed(s, x):
    s = s.squeeze(-2) if s.dim() > 2 else s
    m = LOCS[s]
    return dist.Normal(m.unsqueeze(-2) if m.dim() > 1 else m, 1.0), x


def taken_for_data(s, x):
    return dist.Normal(LOCS[s].reshape(-1, 1), 1.0).to_event(1), x[:, None]


def one_axis_too_many(s, x):
    return dist.Normal(LOCS[s].unsqueeze(-2), 1.0), x


def turned(s, x):
    m = LOCS[s]
    return dist.Normal(m.flip(0) if m.dim() > 1 else m, 1.0), x


def fixed_shape(s, x):
    return dist.Normal(LOCS[s].reshape(2), 1.0), x


@pytest.mark.parametrize("side", ["model", "guide"])
@pytest.mark.parametrize("move", [squeezed, taken_for_data, one_axis_too_many, turned, fixed_shape])
def test_a_program_that_moves_the_enumerated_axis_is_refused_and_the_remedy_works(move, side):
    def programs(infer):
        def model(x):
            with pyro.plate("data", 2, dim=-1):
                s = pyro.sample("s", dist.Categorical(torch.tensor([0.9, 0.1])), infer=infer if side == "model" else {})
                fn, value = move(s, x)
                pyro.sample("x", fn, obs=value)

        def guide(x):
            if side == "guide" or not infer:
                with pyro.plate("data", 2, dim=-1):
                    pyro.sample("s", dist.Categorical(torch.tensor([0.5, 0.5])), infer=infer if side == "guide" else {})

        return model, guide

    with pytest.raises(EnumerationError, match="remove infer="):
        pv.ImportanceSampling(*programs({"enumerate": "parallel"}), num_particles=10)(AXIS_X)
    if move is one_axis_too_many:  # wrong in a plain run too
        return
    truth = (dist.Normal(LOCS, 1.0).log_prob(AXIS_X[:, None]) + torch.tensor([0.9, 0.1]).log()).logsumexp(1)
    drawn = pv.ImportanceSampling(*programs({}), num_particles=2000, seed=0)(AXIS_X)
    assert ((drawn.log_evidence - truth).abs() < 5 * drawn.std_error).all()
    assert (drawn.std_error < 0.05).all()


def test_a_moved_axis_of_many_values_is_found():
    """More combinations than are all looked at."""
    locs = torch.linspace(-3, 3, 30)

    def model(x):
        with pyro.plate("data", 2):
            s = pyro.sample("s", dist.Categorical(torch.ones(30)), infer={"enumerate": "parallel"})
            t = pyro.sample("t", dist.Categorical(torch.ones(30)), infer={"enumerate": "parallel"})
            m = locs[s] + (locs[t].flip(0) if t.dim() > 1 else locs[t])
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with pytest.raises(EnumerationError, match="the log-density of site 'x' differs"):
        pv.ExactEvidence(model, lambda x: None)(AXIS_X)


def test_values_that_the_guide_never_takes_have_no_weight_and_cost_nothing():
    """q(s) = 0 where p(s) = 0, and log q of the second site is -inf there: right is the sum over values."""
    p, move = torch.tensor([0.6, 0.4, 0.0]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.3, 0.7], [1 / 3, 1 / 3, 1 / 3]])
    x = torch.tensor([0.3, 1.7])
    infer = {"enumerate": "parallel"}

    def draw(infer):
        s = pyro.sample("s", dist.Categorical(p), infer=infer)
        return pyro.sample("t", dist.Categorical(move[s]), infer=infer)

    def model(x):
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(draw({}).float(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            draw(infer)

    joint = (p.unsqueeze(-1) * move).sum(0).log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(x.unsqueeze(-1))
    evidence = pv.ImportanceSampling(model, guide, num_particles=3)(x)
    torch.testing.assert_close(evidence.log_evidence, joint.logsumexp(-1))
    assert evidence.elbo.isfinite().all() and (evidence.elbo <= evidence.log_evidence).all()


@pytest.mark.parametrize("dropped", [False, True])
def test_an_index_that_drops_the_dim_of_a_plate(dropped):
    """The axis of the values falls into the place of the plate. The remedy, against a sum by hand, four errors."""

    def model(x):
        with pyro.plate("data", 2, dim=-1):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4, dtype=F64)))
            with pyro.plate("inner", 3, dim=-2):
                pyro.sample("w", dist.Normal(c, 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2, dim=-1):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5, dtype=F64)), infer={"enumerate": "parallel"})
            with pyro.plate("inner", 3, dim=-2):
                w = pyro.sample("w", dist.Normal(c, 1.0))
            pyro.sample("z", dist.Normal(0.1 * (w[..., 0, :] if dropped else w[..., :1, :]), 1.0))

    x = torch.tensor([0.3, -0.5], dtype=F64)
    objective = pv.BetaTraceEnum_ELBO(max_plate_nesting=2, num_particles=4000, vectorize_particles=True)
    if dropped:
        with pytest.raises(EnumerationError, match="index that drops a dim"):
            pv.ImportanceSampling(model, guide, num_particles=10, datum_plate="data")(x)
        with pytest.raises(EnumerationError, match="Keep the positions of the plate dimensions"):
            objective.loss(model, guide, x)
        return
    evidence = pv.ImportanceSampling(model, guide, num_particles=4000, check=False, seed=0, datum_plate="data")(x)
    truth = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert float(evidence.std_error.max()) < 0.1
    assert bool(((evidence.log_evidence - truth).abs() < 4 * evidence.std_error).all())
    # z ~ N(w_0 / 10, 1) with w_0 ~ N(c, 1): the square of its mean is on average (1 + 1/2) / 100.
    kl = float(torch.distributions.kl_divergence(dist.Bernoulli(0.5), dist.Bernoulli(0.4)))
    square = 0.01 * 1.5
    log_p = -0.5 * ((x - 0.05) ** 2 + 0.01 * 1.25 + 1) - 0.5 * math.log(2 * math.pi)
    assert objective.loss(model, guide, x) == pytest.approx(2 * (kl + square / 2) - float(log_p.sum()), abs=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_data_coupled_by_a_function_that_saturates_at_draws_of_the_guide(seed):
    """The guide draws far from zero, where tanh does not move; draws of the prior tell."""

    def model(x):
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(torch.tanh(z.sum(-1, keepdim=True)).expand(z.shape), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.full((3,), -20.0), 1.0))

    with pytest.raises(BatchCouplingError):
        pv.ImportanceSampling(model, guide, num_particles=10, seed=seed)(torch.tensor([0.3, -0.5, 1.0]))
