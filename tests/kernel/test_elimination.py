"""Enumerated sites in plates inside the datum and along chains, against brute force, the forward algorithm, quadrature."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, quiet
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.einsum.torch_log import einsum

import pyro_vae as pv
from pyro_vae.errors import EnumerationError
from pyro_vae.kernel import Pair, elimination
from pyro_vae.kernel.elimination import Factor, summed_out

PARALLEL = {"enumerate": "parallel"}
INITIAL = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
MOVE = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], dtype=F64)
EMIT = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
TOPICS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=F64)


def no_guide(*args, **kwargs):
    pass


def bits(*shape, seed=0):
    return torch.bernoulli(torch.full(shape, 0.5, dtype=F64), generator=torch.Generator().manual_seed(seed))


def evidence(model, guide, *args, estimator=pv.ImportanceSampling, **options):
    with quiet():
        return estimator(model, guide, seed=0, **options)(*args)


def forward(emissions, initial=INITIAL, move=MOVE):
    """log p of chains from log-densities (..., T, S)."""
    alpha = initial.log() + emissions[..., 0, :]
    for t in range(1, emissions.shape[-2]):
        alpha = (alpha.unsqueeze(-1) + move.log()).logsumexp(-2) + emissions[..., t, :]
    return alpha.logsumexp(-1)


def hmm(y):
    with pyro.plate("sequences", len(y)):
        s = None
        for t in pyro.markov(range(y.shape[1])):
            s = pyro.sample(f"s{t}", dist.Categorical(INITIAL if s is None else MOVE[s]), infer=PARALLEL)
            pyro.sample(f"y{t}", dist.Bernoulli(EMIT[s]), obs=y[:, t])


# --- the sum itself


def random_factors(seed):
    """Factors over sites in nested and sibling plates, each reading sites of its own plates and of those around."""
    draw = torch.Generator().manual_seed(seed)
    dims, sizes = {"a": -2, "b": -3}, {"a": 2, "b": 3}  # the datum, of size 2, at -1; particles at -4
    contexts = [(), ("a",), ("a", "b")] if seed % 2 else [(), ("a",), ("b",)]
    plates_of = {f"s{i}": frozenset(contexts[i % 3]) for i in range(5)}
    values = {name: int(torch.randint(2, 4, (), generator=draw)) for name in plates_of}
    factors = []
    for context in contexts * 2:
        near = [name for name, plates in plates_of.items() if plates <= set(context)]
        picked = sorted(name for name in near if torch.rand((), generator=draw) < 0.7)
        shape = [values[name] for name in picked] + [2 if torch.rand((), generator=draw) < 0.5 else 1]
        shape += [sizes[p] if p in context else 1 for p in ("b", "a")] + [2]
        tensor = 3 * torch.randn(shape, generator=draw, dtype=F64)
        factors.append(Factor(tensor, tuple(picked), {p: dims[p] for p in context}))
    return factors, plates_of, values, sizes


def brute_force(factors, plates_of, values, sizes):
    """All joint values of all copies of the sites, side by side; (K, B)."""
    read = [name for name in plates_of if any(name in f.sites for f in factors)]
    copies = [
        (name, place)
        for name in read
        for place in itertools.product(*(range(sizes[p]) if p in plates_of[name] else [0] for p in ("b", "a")))
    ]
    choices = torch.tensor(list(itertools.product(*(range(values[name]) for name, _ in copies))), dtype=torch.long)
    at = dict(zip(copies, choices.unbind(1), strict=True))
    total = torch.zeros(len(choices), 2, 2, dtype=F64)
    for factor in factors:
        for place in itertools.product(*(range(sizes[p]) if p in factor.plates else [0] for p in ("b", "a"))):
            own = {n: tuple(i if p in plates_of[n] else 0 for p, i in zip("ba", place, strict=True)) for n in factor.sites}
            picked = factor.tensor[tuple(at[n, own[n]] for n in factor.sites)]
            total = total + picked[..., place[0], place[1], :]
    return total.logsumexp(0)


@pytest.mark.parametrize("seed", range(12))
def test_random_factors(seed):
    factors, plates_of, values, sizes = random_factors(seed)
    for name in plates_of:  # two copies of everything are enough for brute force
        values[name] = min(values[name], 2)
    factors = [Factor(f.tensor[tuple(slice(values[n]) for n in f.sites)], f.sites, f.plates) for f in factors]
    found = sum(factor.tensor for factor in summed_out(factors, plates_of))
    assert found.shape[-3:] == (1, 1, 2)
    assert torch.allclose(found[:, 0, 0].expand(2, 2), brute_force(factors, plates_of, values, sizes), atol=1e-10)


def test_factors_that_are_high_at_different_values():
    """Pyro's contraction, which multiplies exponentials, gives a probability of zero here."""
    a = torch.tensor([0.0, -2000.0], dtype=F64).reshape(2, 1, 1)
    b = torch.tensor([[-2000.0, -2100.0], [0.0, 0.0]], dtype=F64).reshape(2, 2, 1, 1)
    assert einsum("s,st->", a[:, 0, 0], b[..., 0, 0]).item() == -math.inf
    (found,) = summed_out([Factor(a, ("s",), {}), Factor(b, ("s", "t"), {})], {"s": frozenset(), "t": frozenset()})
    assert found.tensor.item() == pytest.approx(-2000.0 + math.log(3), abs=1e-9)


# --- chains


@pytest.mark.parametrize("length", [1, 2, 3, 13, 40])
def test_a_hidden_markov_model(length):
    y = bits(4, length)
    found = evidence(hmm, no_guide, y)
    truth = forward(dist.Bernoulli(EMIT).log_prob(y.unsqueeze(-1)))
    assert torch.allclose(found.log_evidence, truth, atol=1e-10) and not bool(found.std_error.any())
    assert torch.allclose(evidence(hmm, no_guide, y, estimator=pv.ExactEvidence).log_evidence, truth, atol=1e-10)


def test_the_largest_table_of_a_chain_does_not_grow_with_its_length(monkeypatch):
    y = bits(5, 200)
    monkeypatch.setattr(elimination, "MOST_BYTES", 3 * 3 * 5 * 8)  # two neighbours, 5 data, one particle
    found = evidence(hmm, no_guide, y, num_particles=1)
    assert torch.allclose(found.log_evidence, forward(dist.Bernoulli(EMIT).log_prob(y.unsqueeze(-1))), atol=1e-9)


def test_a_chain_of_which_data_are_shorter():
    y, lengths = bits(4, 5), torch.tensor([5, 3, 1, 4])

    def model(y):
        with pyro.plate("sequences", len(y)):
            s = None
            for t in pyro.markov(range(5)):
                with poutine.mask(mask=t < lengths):
                    s = pyro.sample(f"s{t}", dist.Categorical(INITIAL if s is None else MOVE[s]), infer=PARALLEL)
                    pyro.sample(f"y{t}", dist.Bernoulli(EMIT[s]), obs=y[:, t])

    log_prob = dist.Bernoulli(EMIT).log_prob(y.unsqueeze(-1))
    truth = torch.stack([forward(log_prob[i, :n]) for i, n in enumerate(lengths)])
    assert torch.allclose(evidence(model, no_guide, y).log_evidence, truth, atol=1e-10)


def test_a_chain_of_order_two_then_another_chain():
    second = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=F64)

    def model(y):
        with pyro.plate("sequences", len(y)):
            before = last = torch.tensor(0)
            for t in pyro.markov(range(5), history=2):
                s = pyro.sample(f"s{t}", dist.Categorical(second[before, last]), infer=PARALLEL)
                pyro.sample(f"y{t}", dist.Normal(s.to(y.dtype), 1.0), obs=y[:, t])
                before, last = last, s
            r = None
            for t in pyro.markov(range(4)):
                r = pyro.sample(f"r{t}", dist.Categorical(INITIAL if r is None else MOVE[r]), infer=PARALLEL)
                pyro.sample(f"v{t}", dist.Normal(EMIT[r], 0.3), obs=y[:, t])

    y = bits(3, 5)
    found = evidence(model, no_guide, y).log_evidence
    assert found.sum().item() == pytest.approx(-TraceEnum_ELBO(max_plate_nesting=1).loss(model, no_guide, y), abs=1e-8)


def test_a_continuous_latent_beside_a_chain():
    y = bits(4, 6)

    def model(y):
        with pyro.plate("sequences", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            s = None
            for t in pyro.markov(range(y.shape[1])):
                s = pyro.sample(f"s{t}", dist.Categorical(INITIAL if s is None else MOVE[s]), infer=PARALLEL)
                pyro.sample(f"y{t}", dist.Bernoulli(logits=2 * EMIT[s] - 1 + z), obs=y[:, t])

    def guide(y):
        with pyro.plate("sequences", len(y)):
            pyro.sample("z", dist.Normal(y.mean(1) - 0.5, 0.9))

    z = torch.linspace(-8, 8, 4001, dtype=F64)
    log_prob = dist.Bernoulli(logits=(2 * EMIT - 1) + z[:, None, None, None]).log_prob(y[:, :, None])
    joint = forward(log_prob) + dist.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(z)[:, None]
    truth = joint.logsumexp(0) + math.log(16 / 4000)
    for estimator, largest in ((pv.ImportanceSampling, 0.05), (pv.AdaptiveImportanceSampling, 0.01)):
        found = evidence(model, guide, y, estimator=estimator, num_particles=1000)
        assert found.std_error.max() < largest
        assert ((found.log_evidence - truth).abs() < 5 * found.std_error).all()
    exact = evidence(model, guide, y, estimator=pv.ExactEvidence)
    assert torch.allclose(exact.log_evidence, truth, atol=1e-5)


# --- plates inside the datum


def lda(words, kept=None):
    """Topics of single words, enumerated; shares of the topics by document."""
    with pyro.plate("documents", words.shape[1]):
        share = pyro.sample("share", dist.Dirichlet(TOPICS.new_ones(2)))
        with pyro.plate("words", len(words)), poutine.mask(mask=True if kept is None else kept):
            k = pyro.sample("k", dist.Categorical(share), infer=PARALLEL)
            pyro.sample("w", dist.Categorical(TOPICS[k]), obs=words)


def lda_guide(words, kept=None):
    with pyro.plate("documents", words.shape[1]):
        pyro.sample("share", dist.Dirichlet(TOPICS.new_full((2,), 1.5)))


def lda_truth(words, kept):
    share = (torch.arange(20000, dtype=F64) + 0.5) / 20000
    p = share[:, None] * TOPICS[0] + (1 - share[:, None]) * TOPICS[1]
    log_p = (p.log()[:, words] * kept).sum(1)
    return log_p.logsumexp(0) - math.log(20000)


@pytest.mark.parametrize("ragged", [False, True])
def test_topics_of_words(ragged):
    words = torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(3))
    kept = torch.ones(6, 4, dtype=torch.bool)
    if ragged:
        kept[4:, 1] = kept[1:, 2] = False
    truth = lda_truth(words, kept)
    for estimator, largest in ((pv.ImportanceSampling, 0.05), (pv.AdaptiveImportanceSampling, 0.02)):
        found = evidence(lda, lda_guide, words, kept, estimator=estimator, num_particles=1000)
        assert found.std_error.max() < largest
        assert ((found.log_evidence - truth).abs() < 5 * found.std_error).all()


def test_the_gradient_of_a_bound():
    words = torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(3))
    logits = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)

    def by_hand(words):
        with pyro.plate("documents", words.shape[1]):
            share = pyro.sample("share", dist.Dirichlet(logits.exp()))
            with pyro.plate("words", len(words)):
                pyro.sample("w", dist.Categorical(share @ TOPICS), obs=words)

    def summed(words):
        with pyro.plate("documents", words.shape[1]):
            share = pyro.sample("share", dist.Dirichlet(logits.exp()))
            with pyro.plate("words", len(words)):
                k = pyro.sample("k", dist.Categorical(share), infer=PARALLEL)
                pyro.sample("w", dist.Categorical(TOPICS[k]), obs=words)

    gradients = []
    for model in (by_hand, summed):
        pyro.set_rng_seed(0)
        loss = pv.ImportanceWeightedELBO(num_particles=20).differentiable_loss(model, lda_guide, words)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert torch.allclose(*gradients, atol=1e-10) and bool(gradients[0].abs().min() > 1e-3)


def test_a_mixture_of_all_rows_as_one_datum():
    """One mean for all rows, their components enumerated in the plate of the rows."""
    x = torch.tensor([-1.0, 0.4, 1.9, 2.2], dtype=F64)

    def model(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(INITIAL), infer=PARALLEL)
            pyro.sample("x", dist.Normal(m + x.new_tensor([-2.0, 0.0, 2.0])[k], 0.7), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(x.mean() + 0.3, 1.0))

    m = torch.linspace(-16, 16, 8001, dtype=F64)
    parts = dist.Normal(m[:, None] + x.new_tensor([-2.0, 0.0, 2.0]), 0.7).log_prob(x[:, None, None]) + INITIAL.log()
    joint = parts.logsumexp(-1).sum(0) + dist.Normal(torch.zeros((), dtype=F64), 2.0).log_prob(m)
    truth = joint.logsumexp(0) + math.log(32 / 8000)
    found = evidence(model, guide, x, num_particles=2000, datum_plate=None)
    assert found.std_error.max() < 0.03
    assert abs(found.log_evidence.item() - truth.item()) < 5 * found.std_error.item()


def nested(x):
    """A class of the datum, one of each group given it, items of groups given both: x is (3 items, 2 groups, B data)."""
    with pyro.plate("data", x.shape[2]):
        c = pyro.sample("c", dist.Categorical(INITIAL), infer=PARALLEL)
        with pyro.plate("groups", 2, dim=-2):
            g = pyro.sample("g", dist.Bernoulli(0.2 + 0.3 * c.to(x.dtype)), infer=PARALLEL)
            with pyro.plate("items", 3, dim=-3):
                pyro.sample("x", dist.Normal(g + 0.5 * c, 1.0), obs=x)


def nested_truth(x):
    total = []
    for c in range(3):
        groups = []
        for g in (0.0, 1.0):
            log_prior = dist.Bernoulli(torch.tensor(0.2 + 0.3 * c, dtype=F64)).log_prob(torch.tensor(g, dtype=F64))
            groups.append(log_prior + dist.Normal(torch.tensor(g + 0.5 * c, dtype=F64), 1.0).log_prob(x).sum(0))
        total.append(INITIAL[c].log() + torch.stack(groups).logsumexp(0).sum(0))
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("expand", [False, True])
def test_a_class_of_groups_given_a_class_of_the_datum(expand):
    x = torch.randn(3, 2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = evidence(config_enumerate(nested, "parallel", expand=expand), no_guide, x)
    assert torch.allclose(found.log_evidence, nested_truth(x), atol=1e-10)


# --- what has no such sum


def crossed(x, loop=False):
    """Rows and columns with a class each, read by every cell."""
    with pyro.plate("data", x.shape[2]):
        with pyro.plate("columns", 2, dim=-2):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)), infer=PARALLEL)
        if not loop:
            with pyro.plate("rows", 3, dim=-3):
                b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.6)), infer=PARALLEL)
                with pyro.plate("columns", 2, dim=-2):
                    pyro.sample("x", dist.Normal(a + 2 * b, 1.0), obs=x)
            return
        for i in pyro.plate("rows", 3):
            b = pyro.sample(f"b{i}", dist.Bernoulli(x.new_tensor(0.6)), infer=PARALLEL)
            with pyro.plate(f"columns of {i}", 2, dim=-2):
                pyro.sample(f"x{i}", dist.Normal(2 * b, 1.0), obs=x[i])


def test_crossed_plates_are_refused_with_a_remedy():
    x = torch.randn(3, 2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EnumerationError, match="'a', 'b' are enumerated in different plates.*a loop"):
        evidence(crossed, no_guide, x)

    def looped(x):
        with pyro.plate("data", x.shape[2]):
            b = [pyro.sample(f"b{i}", dist.Bernoulli(x.new_tensor(0.6)), infer=PARALLEL) for i in pyro.plate("rows", 3)]
            with pyro.plate("columns", 2, dim=-2):
                a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)), infer=PARALLEL)
                for i in range(3):
                    pyro.sample(f"x{i}", dist.Normal(a + 2 * b[i], 1.0), obs=x[i])

    truth = []
    for rows in itertools.product((0.0, 1.0), repeat=3):
        b = torch.tensor(rows, dtype=F64)
        log_a = [
            dist.Bernoulli(x.new_tensor(0.3)).log_prob(x.new_tensor(a))
            + dist.Normal(a + 2 * b[:, None, None], 1.0).log_prob(x).sum(0)
            for a in (0.0, 1.0)
        ]
        truth.append(dist.Bernoulli(x.new_tensor(0.6)).log_prob(b).sum() + torch.stack(log_a).logsumexp(0).sum(0))
    found = evidence(looped, no_guide, x)
    assert torch.allclose(found.log_evidence, torch.stack(truth).logsumexp(0), atol=1e-10)


def in_plate(read):
    def model(x):
        with pyro.plate("data", x.shape[1]):
            with pyro.plate("places", len(x), dim=-2):
                k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer=PARALLEL)
                if read != "outside":
                    shifted = k.roll(1, -2) if read == "neighbour" and k.ndim > 1 else k
                    pyro.sample("x", dist.Normal(shifted, 1.0), obs=x)
            if read == "outside":
                pyro.sample("x", dist.Normal(k.sum(-2) if k.shape[-2] > 1 else len(x) * k.squeeze(-2), 1.0), obs=x[0])

    return model


@pytest.mark.parametrize("places", [2, 5])
@pytest.mark.parametrize("read", ["neighbour", "outside"])
def test_reading_another_place_of_the_plate_is_refused(read, places):
    """The axis of an enumerated site means the same place everywhere: what reads another one has no axis for it."""
    x = torch.randn(places, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EnumerationError):
        evidence(in_plate(read), no_guide, x, datum_plate="data")


@pytest.mark.parametrize("length", [4, 30])
def test_reading_further_back_than_the_chain_says_is_refused(length):
    """s[t - 2] lies on the axis of s[t], so that the table is about s[t] twice."""

    def model(y):
        with pyro.plate("sequences", len(y)):
            s = []
            for t in pyro.markov(range(length)):
                s.append(pyro.sample(f"s{t}", dist.Bernoulli(y.new_tensor(0.4)), infer=PARALLEL))
                mean = s[t] + (2 * s[t - 2] if t == length - 1 else 0)
                pyro.sample(f"y{t}", dist.Normal(mean, 1.0), obs=y[:, t])

    with pytest.raises(EnumerationError):
        evidence(model, no_guide, bits(3, length))


GUESS = torch.tensor([0.2, 0.5, 0.3], dtype=F64)


def nested_terms(x):
    """log p(x, c), (3, B)."""
    total = []
    for c in range(3):
        log_prior = [dist.Bernoulli(torch.tensor(0.2 + 0.3 * c, dtype=F64)).log_prob(x.new_tensor(g)) for g in (0.0, 1.0)]
        groups = [p + dist.Normal(x.new_tensor(g + 0.5 * c), 1.0).log_prob(x).sum(0) for g, p in enumerate(log_prior)]
        total.append(INITIAL[c].log() + torch.stack(groups).logsumexp(0).sum(0))
    return torch.stack(total)


def test_a_guide_that_enumerates_beside_what_the_model_sums_out_in_plates():
    """c in guide and model, g in the groups of the model alone: log p(x), L[q] and the gaps are sums."""

    def guide(x):
        with pyro.plate("data", x.shape[2]):
            pyro.sample("c", dist.Categorical(GUESS), infer=PARALLEL)

    x = torch.randn(3, 2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    terms, log_q = nested_terms(x), GUESS.log()[:, None]
    found = evidence(nested, guide, x)
    assert torch.allclose(found.log_evidence, nested_truth(x), atol=1e-10)
    assert torch.allclose(found.elbo, (log_q.exp() * (terms - log_q)).sum(0), atol=1e-10)
    gaps = evidence(nested, guide, x, estimator=pv.InferenceGaps)
    assert torch.allclose(gaps.optimal_elbo, nested_truth(x), atol=1e-9)
    assert torch.allclose(gaps.elbo, found.elbo, atol=1e-9)

    def both(x):
        guide(x)
        with pyro.plate("data", x.shape[2]), pyro.plate("groups", 2, dim=-2):
            pyro.sample("g", dist.Bernoulli(x.new_tensor(0.5)), infer=PARALLEL)

    with pytest.raises(EnumerationError, match="'g' lies in a plate inside the datum.*leave it out of the guide"):
        evidence(nested, both, x)


def test_a_guide_that_enumerates_beside_a_chain_and_a_drawn_latent():
    """Class c in the guide, states of the model alone, and z given c: weights of the draws by hand, length 3 and 30."""
    shift = torch.tensor([-1.0, 1.5], dtype=F64)

    def model(y):
        with pyro.plate("sequences", len(y)):
            c = pyro.sample("c", dist.Bernoulli(y.new_tensor(0.4)), infer=PARALLEL).long()
            z = pyro.sample("z", dist.Normal(shift[c], 1.0))
            s = None
            for t in pyro.markov(range(y.shape[1])):
                s = pyro.sample(f"s{t}", dist.Categorical(INITIAL if s is None else MOVE[s]), infer=PARALLEL)
                pyro.sample(f"y{t}", dist.Bernoulli(torch.sigmoid(2 * s - 2 + 0.3 * z + c)), obs=y[:, t])

    def guide(y):
        with pyro.plate("sequences", len(y)):
            c = pyro.sample("c", dist.Bernoulli(y.new_tensor(0.3)), infer=PARALLEL).long()
            pyro.sample("z", dist.Normal(shift[c] / 2, 1.3))

    for length in (3, 30):
        y = bits(4, length)
        with Pair(model, guide).open((y,), {}, 0) as call, torch.no_grad():
            drawn = call.draw(5)
            weights = call.weigh(drawn, call.score(call.latent_values(drawn), 5), 5)
            z = drawn["z"].value.expand(2, 5, 4)
            log_weight, elbo = weights.log_weight, weights.elbo
        per_class, bound = [], []
        for c, (prior, guess) in enumerate(((0.6, 0.7), (0.4, 0.3))):
            states = torch.arange(3, dtype=F64)
            logits = 2 * states - 2 + 0.3 * z[c, ..., None] + c  # (K, B, 3)
            emissions = torch.stack([dist.Bernoulli(logits=logits).log_prob(y[:, t, None]) for t in range(length)], -2)
            chain = INITIAL.log() + emissions[..., 0, :]
            for t in range(1, length):
                chain = (chain.unsqueeze(-1) + MOVE.log()).logsumexp(-2) + emissions[..., t, :]
            log_p = chain.logsumexp(-1) + dist.Normal(shift[c], 1.0).log_prob(z[c]) + math.log(prior)
            log_q = dist.Normal(shift[c] / 2, 1.3).log_prob(z[c])
            per_class.append(log_p - log_q)
            bound.append(guess * (log_p - log_q - math.log(guess)))
        assert torch.allclose(log_weight, torch.stack(per_class).logsumexp(0), atol=1e-9)
        assert torch.allclose(elbo, torch.stack(bound).sum(0), atol=1e-9)


def test_a_table_too_large_is_refused_before_it_is_made(monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            total = sum(pyro.sample(f"k{i}", dist.Bernoulli(x.new_tensor(0.3)), infer=PARALLEL) for i in range(8))
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    monkeypatch.setattr(elimination, "MOST_BYTES", 2**8 * 3 * 8 - 1)
    with pytest.raises(EnumerationError, match="takes a table over 'k0', 'k1'"):
        evidence(model, no_guide, bits(3), num_particles=1)
    monkeypatch.setattr(elimination, "MOST_BYTES", 2**8 * 3 * 8)
    assert bool(evidence(model, no_guide, bits(3), num_particles=1).log_evidence.isfinite().all())


def test_chains_within_the_steps_of_a_chain():
    """An inner chain that has ended is out of scope, and its axes are free again: 40 sites at each of three steps."""

    def model(y):
        with pyro.plate("sequences", len(y)):
            s = None
            for t in pyro.markov(range(3)):
                s = pyro.sample(f"s{t}", dist.Categorical(INITIAL if s is None else MOVE[s]), infer=PARALLEL)
                r = s
                for i in pyro.markov(range(40)):
                    r = pyro.sample(f"r{t}_{i}", dist.Categorical(MOVE[r]), infer=PARALLEL)
                pyro.sample(f"y{t}", dist.Bernoulli(EMIT[s]), obs=y[:, t])

    y = bits(2, 3)  # the inner chains sum to one
    truth = forward(dist.Bernoulli(EMIT).log_prob(y.unsqueeze(-1)))
    assert torch.allclose(evidence(model, no_guide, y, num_particles=1).log_evidence, truth, atol=1e-9)


@pytest.mark.parametrize("places", [1, 3])
def test_one_place_may_be_read_from_outside_of_its_plate(places):
    """Of several places none is meant, even where what is read has no effect."""
    x = torch.randn(1, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    slope = 1.5 if places == 1 else 0.0

    def model(x):
        with pyro.plate("data", x.shape[1]):
            with pyro.plate("places", places, dim=-2):
                k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(slope * k.sum(-2, keepdim=True), 1.0), obs=x)

    if places > 1:
        with pytest.raises(EnumerationError, match="'x' reads 'k', enumerated in the plates 'places', from outside of them"):
            evidence(model, no_guide, x, datum_plate="data")
        return
    parts = [math.log(p) + dist.Normal(x.new_tensor(mean), 1.0).log_prob(x[0]) for p, mean in ((0.7, 0.0), (0.3, 1.5))]
    found = evidence(model, no_guide, x, datum_plate="data").log_evidence
    assert torch.allclose(found, torch.logaddexp(*parts), atol=1e-10)
