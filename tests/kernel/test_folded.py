"""Particles folded into the batch: recurrent networks and programs that read lengths, without a loop over particles."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from kernel_helpers import F64, assert_close, normal, randn, weigh
from torch import nn

import pyro_vae as pv
from pyro_vae.kernel import Pair

B, D, T, X = 5, 2, 4, 3
PARTICLES = [1, 2, B, 7]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Recurrent(nn.Module):
    """z ~ N(0, I), and x_t ~ N(GRU(z)_t, 0.5), which `nn.GRU` decodes from a batch of exactly three axes."""

    def __init__(self, cell=nn.GRU):
        super().__init__()
        self.encoder, self.decoder = cell(X, 6, batch_first=True), cell(D, X, batch_first=True)
        self.loc = nn.Linear(6, D)

    def decode(self, z):
        return self.decoder(z.unsqueeze(1).expand(-1, T, -1).contiguous())[0]

    def encode(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)
        return self.loc(h.mean(1))

    def model(self, x, lengths):
        kept = torch.arange(T) < torch.as_tensor(lengths).unsqueeze(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            x_dist = dist.Normal(self.decode(z), 0.5).to_event(1)
            with pyro.plate("time", T, dim=-2), poutine.mask(mask=kept.T):
                pyro.sample("x", dist.Normal(x_dist.base_dist.loc.transpose(0, 1), 0.5).to_event(1), obs=x.transpose(0, 1))

    def guide(self, x, lengths):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x, lengths), 0.8).to_event(1))

    def by_hand(self, x, lengths, z):
        kept = torch.arange(T) < torch.as_tensor(lengths).unsqueeze(-1)
        weights = []
        with torch.no_grad():
            loc = self.encode(x, lengths)
            for particle in z:
                log_p = (normal(x, self.decode(particle), 0.5).sum(-1) * kept).sum(-1)
                weights.append(log_p + (normal(particle, 0.0, 1.0) - normal(particle, loc, 0.8)).sum(-1))
        return torch.stack(weights)


LENGTHS = [4, 2, 3, 4, 2]


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("kind", ["list", "tensor", "numpy"])
def test_recurrent_networks_over_ragged_sequences(cell, kind):
    lengths = {"list": LENGTHS, "tensor": torch.tensor(LENGTHS), "numpy": torch.tensor(LENGTHS).numpy()}[kind]
    vae, x = Recurrent(cell), randn(B, T, X)
    pair = Pair(vae.model, vae.guide)
    for K in PARTICLES:
        result = weigh(None, None, x, lengths, pair=pair, K=K)
        assert_close(result.log_weight, vae.by_hand(x, lengths, result.values["z"][:, 0]), atol=1e-9)
        assert result.executions[1] == "folded"


def test_gradients_run_through_the_copies():
    vae, x = Recurrent(), randn(B, T, X)
    with Pair(vae.model, vae.guide).open((x, LENGTHS), {}, 0) as call, torch.enable_grad():
        z = randn(3, 1, B, D).requires_grad_()
        folded = call.score({"z": z}, 3)["x"].log_prob.sum()
        call.one_by_one()
        looped = call.score({"z": z}, 3)["x"].log_prob.sum()
        for ours, theirs in zip(*(torch.autograd.grad(f, z) for f in (folded, looped)), strict=True):
            assert_close(ours, theirs, atol=1e-10)


def branch(z):
    """Another network for positive sums: a batch of copies would have one sum for all of them."""
    return z if float(z.sum()) > 0 else -z


def branch_behind_a_buffer(z):
    buffer = torch.zeros_like(z)
    buffer[:] = z.detach()
    return z if bool(buffer.sum() > 0) else -z


@pytest.mark.parametrize("read", [branch, branch_behind_a_buffer])
@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_program_that_reads_its_draws_is_not_folded(read, side):
    """With one datum: with more, the data would be coupled."""
    net = nn.GRU(D, X, batch_first=True)

    def decode(z):
        return net(z.unsqueeze(1))[0][:, 0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            z = read(z) if side == "model" else z
            pyro.sample("x", dist.Normal(decode(z), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("z", dist.Normal(torch.zeros(len(x), D) + float(x.sum() > 100), 0.9).to_event(1))
            if side == "guide":
                read(first)

    x = randn(1, X)
    result = weigh(model, guide, x, K=6)
    assert result.executions[0 if side == "guide" else 1] == "loop"
    printed = str(pv.ImportanceSampling(model, guide, num_particles=10, seed=0)(x))
    assert f"the {side} ran one particle at a time: " in printed


def sizes(kind):
    """The same pair with other plates: of the batch's size, of a fixed size, subsampled, without a size."""
    net = nn.GRU(D, X, batch_first=True)
    options = {
        "size of the batch": lambda x: {"size": len(x)},
        "fixed": lambda x: {"size": B},
        "subsampled": lambda x: {"size": 9, "subsample_size": len(x)},
        "indices": lambda x: {"size": 9, "subsample": torch.arange(len(x)) + 2},
        "no size": lambda x: {},
    }[kind]

    def model(x):
        with pyro.plate("data", **options(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            h = net(z.reshape(-1, 1, D))[0][:, 0]
            pyro.sample("x", dist.Normal(h, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", **options(x)):
            pyro.sample("z", dist.Normal(torch.ones(D), 0.9).to_event(1))

    return model, guide, net


@pytest.mark.parametrize("kind", ["size of the batch", "fixed", "subsampled", "indices", "no size"])
def test_plates_of_all_kinds(kind):
    model, guide, net = sizes(kind)
    x = randn(B, X)
    result = weigh(model, guide, x, K=6)
    z = result.values["z"].expand(6, B, D)
    with torch.no_grad():
        mean = net(z.reshape(-1, 1, D))[0].reshape(6, B, X)
    right = normal(x, mean, 0.5).sum(-1) + (normal(z, 0.0, 1.0) - normal(z, 1.0, 0.9)).sum(-1)
    assert_close(result.log_weight, right, atol=1e-9)
    assert result.executions[1] == ("loop" if kind == "indices" else "folded")  # made for these data by the program itself


def test_as_many_time_steps_as_data():
    """An argument has the size of the batch and is no datum: a wrong copy is seen, and the numbers are right."""
    vae = Recurrent()

    def model(x, decay):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(vae.decode(z) * decay.unsqueeze(-1), 0.5).to_event(2), obs=x)

    def guide(x, decay):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 0.9).to_event(1))

    x, decay = randn(T, T, X), torch.linspace(1, 0.5, T)
    result = weigh(model, guide, x, decay, K=3)
    z = result.values["z"]
    with torch.no_grad():
        mean = torch.stack([vae.decode(particle) for particle in z]) * decay.unsqueeze(-1)
    right = normal(x, mean, 0.5).sum((-1, -2)) + (normal(z, 0.0, 1.0) - normal(z, 0.0, 0.9)).sum(-1)
    assert_close(result.log_weight, right, atol=1e-9)


def test_a_site_that_the_model_enumerates_beside_a_recurrent_network():
    vae, shift = Recurrent(), torch.tensor([-1.0, 0.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer={"enumerate": "parallel"})
            mean = vae.decode(z) + shift[y].reshape(*y.shape[:-1], -1, 1, 1)
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 0.9).to_event(1))

    x = randn(B, T, X)
    result = weigh(model, guide, x, K=3)
    z = result.values["z"]
    with torch.no_grad():
        mean = torch.stack([vae.decode(particle) for particle in z])
    terms = [normal(x, mean + s, 0.5).sum((-1, -2)) + math.log(p) for s, p in zip(shift, (0.2, 0.3, 0.5), strict=True)]
    right = torch.stack(terms).logsumexp(0) + (normal(z, 0.0, 1.0) - normal(z, 0.0, 0.9)).sum(-1)
    assert_close(result.log_weight, right, atol=1e-9)
    assert result.executions[1] == "folded"


def test_gaps_of_a_guide_that_reads_lengths():
    """z ~ N(0, 1), x_t ~ N(z, 1) for n of T steps: the family holds the posterior N(sum x / (n + 1), 1 / (n + 1))."""
    net = nn.LSTM(1, 4, batch_first=True)

    def model(x, lengths):
        kept = torch.arange(T) < lengths.unsqueeze(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).mask(kept).to_event(1), obs=x)

    def parameters(x, lengths):
        longest = int(lengths.max())  # read into Python
        packed = nn.utils.rnn.pack_padded_sequence(
            x[:, :longest].unsqueeze(-1), lengths, batch_first=True, enforce_sorted=False
        )
        h = net(packed)[1][0][0]
        return h[:, 0], h[:, 1].exp()

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*parameters(x, lengths)))

    lengths = torch.tensor(LENGTHS)
    x = randn(B, T)
    kept = (torch.arange(T) < lengths.unsqueeze(-1)).to(F64)
    mean, precision = (x * kept).sum(-1) / (lengths + 1), lengths + 1.0
    zero = torch.zeros(B)
    right = (
        (normal(x, mean.unsqueeze(-1), 1.0) * kept).sum(-1) + normal(mean, 0.0, 1.0) - normal(zero, 0.0, precision.rsqrt())
    )
    pair = Pair(model, guide)
    with pair.open((x, lengths), {}, 0) as call:
        assert call.guide.execution == "folded"
    gaps = pv.InferenceGaps(model, guide, num_particles=300, seed=0)(x, lengths)
    assert torch.allclose(gaps.optimal_elbo, right, atol=2e-3)
    assert ((gaps.log_evidence - right).abs() < 5 * gaps.std_errors["log_evidence"] + 1e-3).all()
    with torch.no_grad():
        q = dist.Normal(*parameters(x, lengths))
    amortization = torch.distributions.kl_divergence(q, dist.Normal(mean, precision.rsqrt()))
    error = gaps.std_errors["amortization"]
    assert ((gaps.amortization - amortization).abs() < 5 * error + 2e-3).all() and bool((error < 0.3).all())


def test_offsets_of_latents_with_fewer_plates_than_others():
    """A plate inside the datum beside a latent outside of it, one datum: offsets have no axis of particles."""

    def model(x):
        with pyro.plate("data", x.shape[-1]):
            w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0))
            with pyro.plate("parts", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(w, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = 0.6 if float(x.sum()) > 0 else 0.7  # read into Python
        with pyro.plate("data", x.shape[-1]):
            w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), scale))
            with pyro.plate("parts", 2, dim=-2):
                pyro.sample("z", dist.Normal((w + x) / 2, math.sqrt(0.5)))

    for num_data in (1, 3):
        x = randn(2, num_data)
        with Pair(model, guide).open((x,), {}, 0) as call:
            assert call.guide.execution == "folded"
        gaps = pv.InferenceGaps(model, guide, num_particles=200, seed=0)(x)
        covariance = torch.full((2, 2), 1.0) + 2 * torch.eye(2)
        right = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x.T)
        assert torch.allclose(gaps.optimal_elbo, right, atol=5e-3)  # the family holds the posterior


def by_size(x):
    """Another model for more than fifty rows, which the data alone never have."""
    return 1.0 if len(x) > 50 else 0.0


@pytest.mark.parametrize("num_data", [1, 4])
def test_a_program_that_looks_at_the_size_of_its_batch(num_data):
    vae = Recurrent()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(vae.decode(z) + by_size(x), 0.5).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 0.9).to_event(1))

    x = randn(num_data, T, X)
    result = weigh(model, guide, x, K=60)
    z = result.values["z"]
    with torch.no_grad():
        mean = torch.stack([vae.decode(particle) for particle in z])
    right = normal(x, mean, 0.5).sum((-1, -2)) + (normal(z, 0.0, 1.0) - normal(z, 0.0, 0.9)).sum(-1)
    assert_close(result.log_weight, right, atol=1e-9)
    assert result.executions[1] == "loop"


def test_a_table_that_ends_before_all_copies_do():
    """Eight rows serve the copies of the check in part; a later run on more falls back to a loop."""
    vae, table = Recurrent(), torch.zeros(400, D)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(table[: len(x)], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(vae.decode(z), 0.5).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 0.9).to_event(1))

    x = randn(4, T, X)
    pair = Pair(model, guide)
    for K in (50, 200):
        result = weigh(None, None, x, pair=pair, K=K)
        z = result.values["z"]
        with torch.no_grad():
            mean = torch.stack([vae.decode(particle) for particle in z])
        right = normal(x, mean, 0.5).sum((-1, -2)) + (normal(z, 0.0, 1.0) - normal(z, 0.0, 0.9)).sum(-1)
        assert_close(result.log_weight, right, atol=1e-9)


SIZED = {
    "nonzero": lambda z: (z > 1.5).nonzero().numel(),
    "index": lambda z: z[z > 1.5].shape[0],
    "where": lambda z: len(torch.where(z > 1.5)[0]),
    "masked_select": lambda z: torch.masked_select(z, z > 1.5).numel(),
}


@pytest.mark.parametrize("read", SIZED)
def test_a_shape_that_depends_on_a_draw_is_a_read(read):
    """One datum, and a scale of four where z is above 1.5: by quadrature -3.8504. A particle axis would decide for all."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 4.0 if SIZED[read](z) else 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.2))

    x = torch.tensor([3.0])
    grid = torch.linspace(-12, 12, 24001)
    scale = torch.where(grid > 1.5, 4.0, 1.0)
    truth = (normal(grid, 0.0, 1.0) + dist.Normal(grid, scale).log_prob(x)).logsumexp(0) + math.log(1e-3)
    found = pv.ImportanceSampling(model, guide, num_particles=3000, seed=0, check=False)(x)
    assert abs(float(found.log_evidence) - float(truth)) < 5 * float(found.std_error) < 0.2
    assert "model" in found.looped


def test_an_unsized_plate_of_one_datum():
    model, guide, net = sizes("no size")
    x = randn(1, X)
    result = weigh(model, guide, x, K=5)
    z = result.values["z"].expand(5, 1, D)
    with torch.no_grad():
        mean = net(z.reshape(-1, 1, D))[0].reshape(5, 1, X)
    right = normal(x, mean, 0.5).sum(-1) + (normal(z, 0.0, 1.0) - normal(z, 1.0, 0.9)).sum(-1)
    assert_close(result.log_weight, right, atol=1e-9)


def test_a_guide_whose_support_has_tensors_for_ends():
    """The ends of the copies have another shape than the draws: z ~ U(0, 2), by quadrature."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(len(x)), torch.full((len(x),), 2.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        zero = 0.0 * float(x.sum())  # read into Python
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(x)) + zero, torch.full((len(x),), 2.0)))

    x = torch.tensor([0.3, 1.5, 2.0, -0.4])
    with Pair(model, guide).open((x,), {}, 0) as call:
        assert call.guide.execution == "folded"
    standard = dist.Normal(torch.zeros(()), 1.0)
    truth = (standard.cdf(2.0 - x) - standard.cdf(-x)).log() - math.log(2.0)
    found = pv.ImportanceSampling(model, guide, num_particles=2000, seed=0, check=False)(x)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error + 1e-3).all() and bool((found.std_error < 0.05).all())


def test_masked_counts_of_unequal_numbers_of_trials():
    """Masked latents are moved to other values of their support, which the copies of the data have more of."""
    x = torch.tensor([0.3, 2.2, -1.0, 4.5])
    present, trials = x > 0, x.abs().ceil() + 2

    def model(x, trials):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            n = pyro.sample("n", dist.Binomial(trials, torch.full((len(x),), 0.5)))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    def guide(x, trials):
        half = 0.5 + 0.0 * float(x.sum())  # read into Python
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            pyro.sample("n", dist.Binomial(trials, torch.full((len(x),), half)))

    n = torch.arange(8.0).unsqueeze(-1)
    log_prior = torch.where(n <= trials, dist.Binomial(trials, torch.tensor(0.5)).log_prob(n.minimum(trials)), -torch.inf)
    truth = torch.where(present, (log_prior + normal(x, n, 1.0)).logsumexp(0), 0.0)
    found = pv.ImportanceSampling(model, guide, num_particles=3000, seed=0, check=False)(x, trials)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error + 1e-9).all() and bool((found.std_error < 0.1).all())
