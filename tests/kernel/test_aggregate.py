"""The aggregated posterior: its estimate from a batch, against enumeration, and log q of some data's draws under others."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64

from pyro_vae.aggregate import check_separate, log_q_by_dimension
from pyro_vae.errors import StructureError
from pyro_vae.kernel import LivePair
from pyro_vae.ops import index_code_information

INF = math.inf
N = 5


def bits(num_data=N):
    """q(z|x_n) for two bits: the probability of each bit of each datum, (N, 2), and the four states, (4, 2)."""
    generator = torch.Generator().manual_seed(3)
    probs = 0.02 + 0.96 * torch.rand(num_data, 2, generator=generator, dtype=F64)
    return probs, torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=F64)


def log_q_of(z, probs):
    """log q(z_j|x_n) of one z, (N, 2)."""
    return torch.where(z == 1, probs, 1 - probs).log()


def batches_with(i, size, num_data=N):
    """All batches that hold datum i, which comes first."""
    others = [n for n in range(num_data) if n != i]
    return [[i, *rest] for rest in itertools.combinations(others, size - 1)]


def estimates(z, i, size, probs, row=0):
    """log of the estimated q(z), (batches, 3): joint, first bit, second bit; z stands as the draw of datum i."""
    rows = []
    for batch in batches_with(i, size):
        log_q = log_q_of(z, probs)[batch]  # (B, 2)
        table = torch.cat([log_q.sum(-1, keepdim=True), log_q], -1).expand(size, size, 3).clone()
        information = index_code_information(table, N)[row]
        rows.append(table[row, row] - information)
    return torch.stack(rows)


def aggregated(z, probs):
    log_q = log_q_of(z, probs)
    return torch.cat([log_q.sum(-1, keepdim=True), log_q], -1).exp().mean(0)


@pytest.mark.parametrize("size", range(2, N + 1))
@pytest.mark.parametrize("i", range(N))
def test_the_mean_over_all_batches_is_the_aggregated_posterior(i, size):
    """Exactly, for each datum and each state, jointly and by dimension."""
    probs, states = bits()
    for z in states:
        torch.testing.assert_close(estimates(z, i, size, probs).exp().mean(0), aggregated(z, probs), rtol=1e-12, atol=0)


def usual_log_weights(size, num_data):
    """As in the code of the paper and its descendants: 1/N in column 0 and the rest's share in column 1."""
    stratum = (num_data - (size - 1)) / (num_data * (size - 1))
    weights = torch.full((size, size), 1 / (size - 1), dtype=F64)
    weights.view(-1)[::size] = 1 / num_data
    weights.view(-1)[1::size] = stratum
    weights[size - 2, 0] = stratum
    return weights.log()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_usual_weights_fail_the_same_identity(size):
    """By more than a tenth somewhere, over the places that datum i may have in its batch (ours has no places)."""
    probs, states = bits()
    worst = 0.0
    for i, z in itertools.product(range(N), states):
        found = []
        for batch in batches_with(i, size):
            for place in range(size):
                order = [*batch[1 : place + 1], i, *batch[place + 1 :]]
                log_q = log_q_of(z, probs)[order].sum(-1)
                found.append((log_q + usual_log_weights(size, N)[place]).logsumexp(0).exp())
        worst = max(worst, float((torch.stack(found).mean() / aggregated(z, probs)[0]).log().abs()))
    assert worst > 0.1, worst


def test_which_way_the_logarithm_errs():
    """E log of the estimate <= log q(z): information too large, dimension-wise KL too small; exact at B = N."""
    probs, states = bits()
    mi, tc, dw = [], [], []
    for size in range(2, N + 1):
        parts = torch.zeros(3, dtype=F64)
        for i, z in itertools.product(range(N), states):
            own = log_q_of(z, probs)[i]
            weight = own.sum().exp() / N
            log_q = estimates(z, i, size, probs).mean(0)
            assert bool((log_q <= aggregated(z, probs).log() + 1e-12).all())
            parts += weight * torch.stack(
                [own.sum() - log_q[0], log_q[0] - log_q[1:].sum(), log_q[1:].sum() - math.log(0.25)]
            )
        for found, part in zip((mi, tc, dw), parts, strict=True):
            found.append(float(part))
    weights = torch.stack([log_q_of(z, probs).sum(-1).exp() for z in states]) / N  # (4, N)
    q = torch.stack([aggregated(z, probs) for z in states])  # (4, 3)
    exact_mi = float((weights * (weights * N / q[:, :1]).log()).sum())
    exact_tc = float((q[:, 0] * (q[:, 0] / q[:, 1:].prod(-1)).log()).sum())
    exact_dw = float((q[:, 0] * (q[:, 1:].prod(-1) / 0.25).log()).sum())
    assert (mi[-1], tc[-1], dw[-1]) == pytest.approx((exact_mi, exact_tc, exact_dw), abs=1e-12)
    assert mi == sorted(mi, reverse=True) and mi[0] - exact_mi > 0.02
    assert dw == sorted(dw) and exact_dw - dw[0] > 0.02
    assert tc[0] != pytest.approx(exact_tc, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("num_data", [7, 1000, 60_000])
def test_at_most_log_n_for_each_datum_whatever_comes(dtype, num_data):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 100.0, 1e4, 1e30):
        log_q = (scale * torch.randn(7, 7, 3, generator=generator)).to(dtype)
        found = index_code_information(log_q, num_data)
        assert found.dtype == dtype and found.shape == (7, 3)
        assert bool((found <= torch.tensor(math.log(num_data), dtype=dtype)).all()), scale


@pytest.mark.parametrize("far", [-1e4, -INF])
def test_separate_and_equal_data(far):
    log_q = torch.full((4, 4), far).fill_diagonal_(3.0).requires_grad_()
    torch.testing.assert_close(index_code_information(log_q, 4), torch.full((4,), math.log(4.0)))
    torch.testing.assert_close(index_code_information(log_q, 90), torch.full((4,), math.log(90.0)))
    (gradient,) = torch.autograd.grad(index_code_information(log_q, 90).sum(), log_q)
    assert bool((gradient == 0).all())
    torch.testing.assert_close(index_code_information(torch.full((4, 4), -2.0), 90), torch.zeros(4), rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_the_formula():
    log_q = torch.randn(4, 4, 2, dtype=F64, requires_grad=True)
    share = torch.full((4, 4), 8 / (9 * 3), dtype=F64).fill_diagonal_(1 / 9)
    by_hand = log_q.diagonal().T - (share.unsqueeze(-1) * log_q.exp()).sum(1).log()
    found = index_code_information(log_q, 9)
    torch.testing.assert_close(found, by_hand)
    pull = torch.randn(4, 2, dtype=F64)
    torch.testing.assert_close(*(torch.autograd.grad((f * pull).sum(), log_q, retain_graph=True) for f in (found, by_hand)))


# log q of draws under other data


def pair_of(guide_sites, reads=False):
    """A guide of independent sites, {name: distribution of x}, and a model with standard normal latents."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            for name, make in guide_sites.items():
                pyro.sample(name, make(torch.zeros_like(x)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            for name, make in guide_sites.items():
                z = pyro.sample(name, make(x))
                if reads:  # which runs the program in a loop
                    float(z.sum())

    return LivePair(model, guide)


def drawn_by(pair, *args):
    call = pair.call(args, {})
    return call, call.draw(1)


def shifted_exponential(start):
    return dist.TransformedDistribution(
        dist.Exponential(torch.ones_like(start)), [dist.transforms.AffineTransform(start, 1.0)]
    )


@pytest.mark.parametrize("reads", [False, True])
def test_log_q_by_dimension_is_that_of_each_pair_of_data(reads):
    sites = {
        "a": lambda x: dist.Normal(x, 0.5),
        "b": lambda x: dist.Normal(x.unsqueeze(-1).expand(-1, 3), torch.tensor([0.3, 1.0, 2.0], dtype=F64)).to_event(1),
        "c": lambda x: dist.Laplace(x[:, None, None] + torch.arange(6, dtype=F64).reshape(2, 3), 1.0).to_event(2),
        "d": lambda x: dist.LogNormal(x, 1.5),
        "e": lambda x: dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1).expand([len(x)]),
        "f": lambda x: dist.Uniform(x.unsqueeze(-1) - 2, x.unsqueeze(-1) + 2).to_event(1),
        "g": lambda x: shifted_exponential(x.unsqueeze(-1)).to_event(1),
        "h": lambda x: dist.Binomial((10 * x).abs().ceil().unsqueeze(-1), torch.tensor(0.6, dtype=F64)).to_event(1),
    }
    x = torch.tensor([0.3, -1.0, 2.0, 4.0], dtype=F64)
    call, drawn = drawn_by(pair_of(sites, reads), x)
    assert call.guide.execution == ("loop" if reads else "leading")
    found = log_q_by_dimension(drawn, sites, call.layout)
    start = 0
    for name, make in sites.items():
        width = drawn[name].value[0, 0].numel()
        for i, j in itertools.product(range(4), repeat=2):
            fn, z = make(x), drawn[name].value[0, i].flatten()
            base = fn
            while hasattr(base, "base_dist") and not isinstance(base, torch.distributions.TransformedDistribution):
                base = base.base_dist
            if name == "f":
                expected = torch.where((z >= x[j] - 2) & (z <= x[j] + 2), -math.log(4.0), -INF)
            elif name == "g":
                expected = torch.where(z >= x[j], x[j] - z, -INF)
            elif name == "h":
                n, k = math.ceil(abs(10 * x[j])), int(z)
                expected = z.new_tensor([math.log(math.comb(n, k) * 0.6**k * 0.4 ** (n - k)) if k <= n else -INF])
            elif name == "e":
                expected = dist.Normal(0.0, 1.0).log_prob(z)
            else:
                expected = base.log_prob(z.reshape((1, *fn.event_shape)))[j].flatten()
            torch.testing.assert_close(found[i, j, start : start + width], expected.to(F64))
        start += width
    assert found.shape == (4, 4, start) == (4, 4, 1 + 3 + 6 + 1 + 2 + 1 + 1 + 1)
    own = torch.cat([drawn[n].log_prob.reshape(4, 1) for n in sites], 1).sum(1)
    torch.testing.assert_close(found.sum(-1).diagonal(), own)


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_plates_inside_the_datum_are_dimensions(data_dim):
    inner = -3 - data_dim  # -2 or -1
    loc = torch.randn(3, 2, dtype=F64) if data_dim == -2 else torch.randn(2, 3, dtype=F64)  # 3 data, 2 steps

    def program(x, at=0.0, observe=True):
        with pyro.plate("data", 3, dim=data_dim), pyro.plate("steps", 2, dim=inner):
            pyro.sample("z", dist.Normal((at + loc).unsqueeze(-1).expand(*loc.shape, 4), 0.7).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros_like(loc))

    call, drawn = drawn_by(LivePair(program, lambda x: program(x, 1.0, False), datum_plate="data"), torch.zeros(3))
    found = log_q_by_dimension(drawn, ["z"], call.layout)
    assert found.shape == (3, 3, 8)
    z = drawn["z"].value[0]
    locs = 1 + loc
    if data_dim == -1:
        z, locs = z.transpose(0, 1), locs.T
    for i, j in itertools.product(range(3), repeat=2):
        expected = dist.Normal(locs[j].unsqueeze(-1), 0.7).log_prob(z[i]).flatten()
        torch.testing.assert_close(found[i, j], expected)


WEIGHTS = {"read": 0.7, "read with a weight of zero": 0.0}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("reads", [False, True])
def test_a_latent_drawn_given_another_is_refused(weight, discrete, reads):
    first = dist.Bernoulli(torch.tensor(0.5)) if discrete else dist.Normal(torch.tensor(0.0), 1.0)

    def program(x, observe=False):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", first)
            if reads:
                float(a.sum())
            pyro.sample("b", dist.Normal(weight * a + x, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    call, drawn = drawn_by(LivePair(lambda x: program(x, True), program), torch.randn(6))
    state = torch.get_rng_state()
    with pytest.raises(StructureError, match=r"draws 'b' given 'a'.*the density q\(b\|x\) is not known"):
        check_separate(call, drawn, ["a", "b"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_latent_that_depends_on_another_through_python_is_refused():
    def program(x, observe=False):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("b", dist.Normal(float(a.sum()), 1.0))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    call, drawn = drawn_by(LivePair(model, program), torch.randn(6))
    with pytest.raises(StructureError, match="given its other latents|given 'a'"):
        check_separate(call, drawn, ["a", "b"])


def test_separate_latents_pass_and_leave_no_trace():
    sites = {
        "a": lambda x: dist.Normal(x, 0.5),
        "b": lambda x: dist.Bernoulli(logits=x),
        "c": lambda x: dist.Gamma(x.exp(), 1.0),
    }
    call, drawn = drawn_by(pair_of(sites), torch.randn(6))
    state = torch.get_rng_state()
    check_separate(call, drawn, sites)
    assert torch.equal(torch.get_rng_state(), state)
