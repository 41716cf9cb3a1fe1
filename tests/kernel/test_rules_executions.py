"""DESIGN 5.6: whatever a network does with its batch, the numbers are those of a loop, or an error."""

import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
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
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import BatchCouplingError, HiddenRandomnessError, StructureError
from pyro_vae.kernel import Pair

B, D, X = 5, 2, 4
PARTICLES = [1, 2, B, 7]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def pair_of(decode, *, latent=(D,), data=(X,), likelihood=None):
    """z ~ N(0, I), x ~ N(decode(z, *rest), 0.5); the guide is a fixed Gaussian around a function of x."""
    event = len(latent)

    def model(x, *rest):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), *latent), 1.0).to_event(event))
            pyro.sample("x", dist.Normal(decode(z, *rest), 0.5).to_event(len(data)), obs=x)

    def guide(x, *rest):
        with pyro.plate("data", len(x)):
            loc = x.flatten(1).mean(-1).reshape(-1, *[1] * event).expand(-1, *latent)
            pyro.sample("z", dist.Normal(loc, 0.8).to_event(event))

    return model, guide


def by_hand(decode, x, z, *rest):
    """One particle after the other."""
    loc = x.flatten(1).mean(-1).reshape(-1, *[1] * (z.ndim - 2))
    weights = []
    with torch.no_grad():
        for particle in z:
            log_p = normal(x, decode(particle, *rest), 0.5).flatten(1).sum(-1)
            ratio = (normal(particle, 0.0, 1.0) - normal(particle, loc, 0.8)).flatten(1).sum(-1)
            weights.append(log_p + ratio)
    return torch.stack(weights)


def check(decode, *rest, latent=(D,), data=(X,), num_data=B, execution=None):
    x = randn(num_data, *data)
    pair = Pair(*pair_of(decode, latent=latent, data=data))
    for num_particles in PARTICLES:
        result = weigh(None, None, x, *rest, pair=pair, K=num_particles)
        assert_close(result.log_weight, by_hand(decode, x, result.values["z"], *rest), atol=1e-9)
        if execution is not None:
            assert result.executions[1] == execution
    return result


def test_a_plain_network_takes_the_leading_axis():
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, X))
    result = check(lambda z: net(z), execution="leading")
    assert result.executions == ("leading", "leading")


def test_softmax_over_features_by_a_positive_dim():
    net = nn.Linear(D, X)
    check(lambda z: net(z).softmax(dim=1), execution="vmap")


def test_softmax_over_features_by_a_negative_dim():
    net = nn.Linear(D, X)
    check(lambda z: net(z).softmax(dim=-1), execution="leading")


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h.softmax(dim=0),
        lambda h: h - h.mean(0),
        lambda h: h.cumsum(0),
        lambda h: h.flip(0),
        lambda h: h.roll(1, 0),
        lambda h: (h @ h.T).softmax(-1) @ h,
        lambda h: h / h.norm(),
    ],
    ids=["softmax", "centred", "cumsum", "flip", "roll", "attention", "norm"],
)
@pytest.mark.parametrize("num_data", [2, B])
def test_data_that_see_one_another_are_refused(mix, num_data):
    net = nn.Linear(D, X)
    with pytest.raises(BatchCouplingError, match=r"'x'.*datum_plate=None"):
        weigh(*pair_of(lambda z: mix(net(z))), randn(num_data, X))


@pytest.mark.parametrize("pairs", [[(1, 2), (3, 4)], [(3, 4)], [(2, 4)]])
def test_coupling_among_some_data_only_is_refused(pairs):
    """The first datum is on its own; others share their mean."""
    net = nn.Linear(D, X)

    def decode(z):
        h = net(z)
        rows = list(h.unbind(-2))
        for i, j in pairs:
            rows[i] = rows[j] = (rows[i] + rows[j]) / 2
        return torch.stack(rows, -2)

    with pytest.raises(BatchCouplingError):
        weigh(*pair_of(decode), randn(B, X))


def test_coupled_data_as_one_datum():
    net = nn.Linear(D, X)
    x = randn(B, X)
    result = weigh(*pair_of(lambda z: net(z).softmax(dim=0)), x, datum_plate=None, K=3)
    z = result.values["z"].reshape(3, B, D)
    expected = by_hand(lambda z: net(z).softmax(dim=0), x, z).sum(-1, keepdim=True)
    assert_close(result.log_weight, expected, atol=1e-9)


def test_the_number_of_rows_in_the_decoder():
    """z.shape[0] is B in a plain run and K with a leading axis."""
    net = nn.Linear(D, X)
    check(lambda z: net(z) / z.shape[0])


def test_a_loop_over_the_rows_in_the_decoder():
    net = nn.Linear(D, X)
    check(lambda z: torch.stack([net(z[i]) for i in range(z.shape[0])]))


def test_view_to_a_matrix():
    net = nn.Linear(D, X)
    check(lambda z: net(z.reshape(-1, D)))


def test_view_to_a_matrix_for_a_batch_of_one():
    net = nn.Linear(D, X)
    check(lambda z: net(z.reshape(-1, D)), num_data=1)


def test_cat_with_an_argument():
    net = nn.Linear(D + 3, X)
    y = randn(B, 3)
    check(lambda z, y: net(torch.cat([z, y], -1)), y, execution="vmap")


def test_cat_with_an_argument_for_a_batch_of_one():
    net = nn.Linear(D + 3, X)
    y = randn(1, 3)
    check(lambda z, y: net(torch.cat([z, y], -1)), y, num_data=1)


def test_cat_with_the_first_axis_swapped():
    """cat along dim 1, written for two axes."""
    net = nn.Linear(D + 3, X)
    y = randn(B, 3)
    check(lambda z, y: net(torch.cat([z, y], 1)), y)


class ConvDecoder(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.linear = nn.Linear(D, 8)
        self.norm = nn.BatchNorm2d(2) if norm else nn.Identity()
        self.deconv = nn.ConvTranspose2d(2, 1, 2, stride=2)

    def forward(self, z):
        return self.deconv(self.norm(F.relu(self.linear(z)).view(-1, 2, 2, 2)))


def test_a_convolutional_decoder():
    check(ConvDecoder(), data=(1, 4, 4), execution="vmap")


def test_batch_norm_in_eval_mode():
    decoder = ConvDecoder(norm=True)
    decoder(randn(10, D))  # running statistics of its own
    decoder.eval()
    check(decoder, data=(1, 4, 4), execution="vmap")


def test_batch_norm_1d_in_eval_mode():
    net = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, X))
    net(randn(10, D))
    net.eval()
    check(net)


@pytest.mark.parametrize("kind", ["2d", "1d"])
@pytest.mark.parametrize("side", ["model", "guide"])
def test_batch_norm_in_train_mode_is_refused_and_its_buffers_stay(kind, side):
    if kind == "2d":
        net, data = ConvDecoder(norm=True), (1, 4, 4)
        norm = net.norm
    else:
        norm = nn.BatchNorm1d(6)
        net, data = nn.Sequential(nn.Linear(D, 6), norm, nn.Linear(6, X)), (X,)

    def plain(z):
        return z.sum(-1).reshape(-1, *[1] * len(data)).expand(-1, *data)

    model, guide = pair_of(net if side == "model" else plain, data=data)

    def encoder(x):
        if side == "guide":
            net(x.flatten(1)[:, :D])
        guide(x)

    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with pytest.raises(BatchCouplingError, match=r"batch norm is in train mode.*\.eval\(\)"):
        weigh(model, encoder, randn(B, *data))
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name])
    assert norm.training


def test_layer_norm_is_fine():
    net = nn.Sequential(nn.Linear(D, 6), nn.LayerNorm(6), nn.Linear(6, X))
    check(net, execution="leading")


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_decoder(kind):
    rnn = kind(1, 3, batch_first=True)
    head = nn.Linear(3, 1)

    def decode(z):
        return head(rnn(z[..., None])[0])[..., 0]

    check(decode, latent=(X,))


def test_a_recurrent_decoder_over_the_first_axis():
    """batch_first=False on (T, B, H), made by transpose."""
    rnn = nn.GRU(1, 3)
    head = nn.Linear(3, 1)

    def decode(z):
        return head(rnn(z.transpose(0, 1)[..., None])[0]).transpose(0, 1)[..., 0]

    check(decode, latent=(X,))


def test_a_latent_per_time_step():
    """A state-space model: a Markov chain of latents with a GRU cell in the guide."""
    cell = nn.GRUCell(1, 3)
    head = nn.Linear(3, 1)
    steps = 3

    def model(x):
        z = torch.zeros(len(x))
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(steps)):
                z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 0.5))
                pyro.sample(f"x{t}", dist.Normal(z, 0.3), obs=x[:, t])

    def guide(x):
        h, z = torch.zeros(len(x), 3), torch.zeros(len(x))
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(steps)):
                h = cell(x[:, t, None], h)
                z = pyro.sample(f"z{t}", dist.Normal(head(h)[..., 0] + 0.5 * z, 0.4))

    x = randn(B, steps)
    for num_particles in PARTICLES:
        result = weigh(model, guide, x, K=num_particles)
        expected = []
        with torch.no_grad():
            for k in range(num_particles):
                h, before, total = torch.zeros(B, 3), torch.zeros(B), 0
                for t in range(steps):
                    z = result.values[f"z{t}"][k]
                    h = cell(x[:, t, None], h)
                    log_q = normal(z, head(h)[..., 0] + 0.5 * before, 0.4)
                    total = total + normal(z, 0.9 * before, 0.5) + normal(x[:, t], z, 0.3) - log_q
                    before = z
                expected.append(total)
        assert_close(result.log_weight, torch.stack(expected), atol=1e-9)


def test_a_guide_whose_recurrent_cell_reads_the_latents():
    cell = nn.GRUCell(1, 3)
    head = nn.Linear(3, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            z0 = pyro.sample("z0", dist.Normal(torch.zeros(len(x)), 1.0))
            z1 = pyro.sample("z1", dist.Normal(z0, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z0 = pyro.sample("z0", dist.Normal(x, 0.7))
            h = cell(z0[:, None], torch.zeros(len(x), 3))
            pyro.sample("z1", dist.Normal(head(h)[:, 0], 0.6))

    x = randn(B)
    for num_particles in PARTICLES:
        result = weigh(model, guide, x, K=num_particles)
        z0, z1 = result.values["z0"], result.values["z1"]
        with torch.no_grad():
            loc = torch.stack([head(cell(z[:, None], torch.zeros(B, 3)))[:, 0] for z in z0])
        log_q = normal(z0, x, 0.7) + normal(z1, loc, 0.6)
        log_p = normal(z0, 0.0, 1.0) + normal(z1, z0, 1.0) + normal(x, z1, 1.0)
        assert_close(result.log_weight, log_p - log_q, atol=1e-9)


# --- programs that read values ---


@pytest.mark.parametrize("seed", range(8))
def test_a_python_if_on_drawn_values(seed):
    """For one datum a legal program; a leading axis would decide once for all particles."""

    def decode(z):
        mean = z.sum(-1, keepdim=True).expand(*z.shape[:-1], X)
        return mean if z.sum() > 0 else mean - 3

    x = randn(1, X)
    pair = Pair(*pair_of(decode))
    result = weigh(None, None, x, pair=pair, K=40, seed=seed)
    assert_close(result.log_weight, by_hand(decode, x, result.values["z"]), atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_rare_branch(seed):
    """A guard that only one particle in many trips: the check of a few particles never sees it."""

    def decode(z):
        if z.abs().max() > 2.5:
            z = z * 0
        return z.sum(-1, keepdim=True).expand(*z.shape[:-1], X)

    x = randn(1, X)
    pair = Pair(*pair_of(decode))
    result = weigh(None, None, x, pair=pair, K=200, seed=seed)
    assert_close(result.log_weight, by_hand(decode, x, result.values["z"]), atol=1e-9)


def test_item_in_the_decoder():
    def decode(z):
        return torch.stack([torch.full((X,), row.sum().item()) for row in z])

    check(decode)


def test_item_of_a_whole_batch_of_one():
    def decode(z):
        return torch.full((1, X), z.sum().item())

    check(decode, num_data=1)


def test_numpy_in_the_decoder():
    def decode(z):
        return torch.as_tensor(z.detach().numpy().sum(-1, keepdims=True)).expand(*z.shape[:-1], X)

    check(decode)


def test_index_of_the_largest_value():
    """argmax over the batch axis of one datum, by the flattened index."""

    def decode(z):
        return F.one_hot(z.reshape(-1).argmax() % D, X).to(F64).expand(z.shape[0], X)

    x = randn(1, X)
    result = weigh(*pair_of(decode), x, K=30)
    assert_close(result.log_weight, by_hand(decode, x, result.values["z"]), atol=1e-9)


def test_a_guide_whose_second_draw_branches_on_the_first():
    def model(x):
        with pyro.plate("data", 1):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(x if a.sum() > 0 else -x, 0.5))

    x = randn(1)
    for seed in range(6):
        result = weigh(model, guide, x, K=30, seed=seed)
        a, b = result.values["a"], result.values["b"]
        loc = torch.where(a > 0, x, -x)
        log_p = normal(a, 0.0, 1.0) + normal(b, 0.0, 1.0) + normal(x, a + b, 1.0)
        assert_close(result.log_weight, log_p - normal(a, x, 1.0) - normal(b, loc, 0.5), atol=1e-9)


# --- hidden randomness ---


def test_randn_in_the_guide_is_refused():
    lm, x = linear_gaussian()
    model, _ = exact_pair(lm)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = lm.posterior(x).loc
            pyro.sample("z", dist.Normal(loc + torch.randn(loc.shape), 1.0).to_event(1))

    with pytest.raises(HiddenRandomnessError, match="guide.*pyro.sample"):
        weigh(model, guide, x)


def test_randn_in_the_model_is_refused():
    decode = nn.Linear(D, X)
    with pytest.raises(HiddenRandomnessError, match="model.*pyro.sample"):
        weigh(*pair_of(lambda z: decode(z) + torch.randn(X)), randn(B, X))


@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_site_hidden_by_block_is_refused(side):
    def noise(x):
        with poutine.block():
            return pyro.sample("hidden", dist.Normal(torch.zeros(len(x)), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z + (noise(x) if side == "model" else 0), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + (noise(x) if side == "guide" else 0), 1.0))

    with pytest.raises(HiddenRandomnessError, match=side):
        weigh(model, guide, randn(B))


def test_sites_that_depend_on_drawn_values_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            name = "x" if z.sum() > 0 else "y"
            pyro.sample(name, dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(StructureError, match="sites changed between two runs: 'x', 'y'"):
        for seed in range(20):
            weigh(model, guide, randn(1), seed=seed)


def test_sites_that_depend_on_the_data_of_a_batch_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x" if x.sum() > 0 else "y", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    pair = Pair(model, guide)
    weigh(None, None, torch.ones(B), pair=pair)
    with pytest.raises(StructureError, match="'x', 'y'"):
        weigh(None, None, -torch.ones(B), pair=pair)


# --- dropout ---


@pytest.mark.parametrize("side", ["model", "guide"])
def test_dropout_is_refused(side):
    net = nn.Sequential(nn.Linear(D, X), nn.Dropout(0.5))
    model, guide = pair_of(net if side == "model" else net[0])

    def encoder(x):
        net[1](x) if side == "guide" else None
        guide(x)

    for _ in range(2):  # what was refused once is refused again
        with pytest.raises(HiddenRandomnessError, match=r"dropout is active.*\.eval\(\)"):
            weigh(model, encoder, randn(B, X))
    net.eval()  # the remedy
    weigh(model, encoder, randn(B, X))


def test_dropout_in_eval_mode_is_none():
    net = nn.Sequential(nn.Linear(D, X), nn.Dropout(0.5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(lambda z: net(z), execution="leading")


# --- the chosen execution ---


def test_executions_agree_on_given_draws():
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, X))
    pair = Pair(*pair_of(lambda z: net(z)))
    x = randn(B, X)
    with torch.no_grad(), pair.open((x,), {}, 0) as call:
        call.set_noise(1, 0)
        values = call.latent_values(call.draw(6))
        found = []
        for execution in ("leading", "vmap", "loop"):
            call.model.execution = call.guide.execution = execution
            found.append(call.score(values, 6)["x"].log_prob)
    assert_close(found[0], found[2], atol=1e-10)
    assert_close(found[1], found[2], atol=1e-10)


def test_gradients_agree_between_executions():
    net = nn.Linear(D, X)
    pair = Pair(*pair_of(lambda z: net(z)))
    x = randn(B, X)
    gradients = []
    for execution in ("leading", "vmap", "loop"):
        with pair.open((x,), {}, 0) as call:
            call.guide.execution = "leading"
            call.set_noise(1, 0)
            guide = call.draw(3)
            call.model.execution = execution
            lw = call.weigh(guide, call.score(call.latent_values(guide), 3), 3)
            gradients.append(torch.autograd.grad(lw.elbo.sum(), [net.weight, net.bias]))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert_close(a, b, atol=1e-9)


def test_a_likelihood_that_does_not_see_the_latent_under_vmap():
    """An observed site whose density has no particle axis, beside one that has."""
    net = nn.Linear(D + 3, X)
    y = randn(B, 3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1), obs=y)
            pyro.sample("x", dist.Normal(net(torch.cat([z, y], -1)), 0.5).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :D], 0.8).to_event(1))

    x = randn(B, X)
    result = weigh(model, guide, x, y, K=3)
    z = result.values["z"]
    with torch.no_grad():
        mean = torch.stack([net(torch.cat([particle, y], -1)) for particle in z])
    log_p = normal(x, mean, 0.5).sum(-1) + normal(y, 0.0, 1.0).sum(-1) + normal(z, 0.0, 1.0).sum(-1)
    assert_close(result.log_weight, log_p - normal(z, x[:, :D], 0.8).sum(-1), atol=1e-9)


def test_a_likelihood_without_a_particle_axis_has_the_documented_shape():
    x = randn(B)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    result = weigh(model, guide, x, K=3)
    assert_weights(result, normal(x, 0.0, 1.0))
    assert result.lw.log_likelihood.shape == (3, B)


def test_a_latent_under_vmap_with_a_plate_inside_the_datum():
    """Two plates and a decoder that only vmap can take."""
    y = randn(B, 3)
    net = nn.Linear(4, X)

    def model(x, y):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            mean = net(torch.cat([z, y], -1))
            with pyro.plate("pixels", X, dim=-1):
                pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, :1], 0.8))

    x = randn(B, X)
    for num_particles in PARTICLES:
        result = weigh(model, guide, x, y, K=num_particles)
        z = result.values["z"][..., 0]
        with torch.no_grad():
            mean = torch.stack([net(torch.cat([particle[:, None], y], -1)) for particle in z])
        ratio = normal(z, 0.0, 1.0) - normal(z, x[:, 0], 0.8)
        assert_close(result.log_weight, normal(x, mean, 0.5).sum(-1) + ratio, atol=1e-9)


def test_enumerated_sites_and_a_decoder_that_needs_vmap():
    y = randn(B, 3)
    net = nn.Linear(4, 1)
    p = tensor([0.3, 0.7])
    shift = tensor([-1.0, 1.0])

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            k = pyro.sample("k", dist.Categorical(p))
            mean = net(torch.cat([z[..., None], y], -1))[..., 0]
            pyro.sample("x", dist.Normal(mean + shift[k], 0.5), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.8))
            pyro.sample("k", dist.Categorical(p.flip(0)), infer={"enumerate": "parallel"})

    x = randn(B)
    for num_particles in (1, 2, 3, 7):
        result = weigh(model, guide, x, y, K=num_particles)
        z = result.values["z"]
        with torch.no_grad():
            mean = torch.stack([net(torch.cat([particle[:, None], y], -1))[:, 0] for particle in z])
        terms = torch.stack([p[k].log() + normal(x, mean + shift[k], 0.5) for k in range(2)])
        base = normal(z, 0.0, 1.0) - normal(z, x, 0.8)
        assert_close(result.log_weight, base + terms.logsumexp(0), atol=1e-9)
        q = p.flip(0)[:, None, None]
        assert_close(result.elbo, base + (q * (terms - q.log())).sum(0), atol=1e-9)


def test_batch_norm_in_a_closure_switched_to_train_mode_between_two_calls():
    norm = nn.BatchNorm1d(X).eval()
    net = nn.Linear(D, X)
    pair = Pair(*pair_of(lambda z: norm(net(z))))
    x = randn(B, X)
    weigh(None, None, x, pair=pair, K=3)
    norm.train()
    with pytest.raises(BatchCouplingError, match="eval"):
        weigh(None, None, x, pair=pair, K=3)
    assert int(norm.num_batches_tracked) == 0


# --------------------------------------------------------------------------------------- rare discrete latents


@pytest.mark.parametrize("seed", range(5))
def test_data_coupled_through_a_rare_discrete_latent_are_found_with_every_seed(seed):
    def model(x):
        with pyro.plate("data", 3):
            s = pyro.sample("s", dist.Bernoulli(0.05 * torch.ones(3)))
            pyro.sample("x", dist.Normal(3 * s.sum(-1, keepdim=True).expand(s.shape), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("s", dist.Bernoulli(0.5 * torch.ones(3)))

    with pytest.raises(BatchCouplingError):
        pv.ImportanceSampling(model, guide, num_particles=100, seed=seed)(torch.tensor([0.0, 0.0, 0.5]))


@pytest.mark.parametrize(
    "family", ["Poisson", "Binomial", "Categorical", "OneHotCategorical", "event of Bernoullis", "event of Poissons"]
)
@pytest.mark.parametrize("seed", range(3))
def test_coupling_through_other_rare_counts(family, seed):
    fns = {
        "Poisson": lambda: dist.Poisson(0.01 * torch.ones(3)),
        "Binomial": lambda: dist.Binomial(2, 0.01 * torch.ones(3)),
        "Categorical": lambda: dist.Categorical(torch.tensor([0.99, 0.01]).expand(3, 2)),
        "OneHotCategorical": lambda: dist.OneHotCategorical(torch.tensor([0.99, 0.01]).expand(3, 2)),
        "event of Bernoullis": lambda: dist.Bernoulli(torch.tensor([0.5, 0.01]).expand(3, 2)).to_event(1),
        "event of Poissons": lambda: dist.Poisson(torch.tensor([1.0, 0.01]).expand(3, 2)).to_event(1),
    }

    def model(x):
        with pyro.plate("data", 3):
            s = pyro.sample("s", fns[family]()).float()
            s = s[..., 1] if s.shape[-1] == 2 else s
            pyro.sample("x", dist.Normal(3 * s.sum(-1, keepdim=True).expand(s.shape), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("s", fns[family]())

    with pytest.raises(BatchCouplingError):
        pv.ImportanceSampling(model, guide, num_particles=100, seed=seed)(torch.tensor([0.0, 0.0, 0.5]))


@pytest.mark.parametrize("seed", range(8))
def test_a_particle_axis_that_is_turned_shows_although_draws_are_rare(seed):
    """The few particles of the comparison must not all draw the same class. Five errors per datum."""
    locs = torch.tensor([-1.2, 0.9])

    def model(x):
        with pyro.plate("data", 2):
            s = pyro.sample("s", dist.Bernoulli(torch.full((2,), 0.1)))
            m = locs[s.long()]
            m = m.flip(0) if m.dim() > 1 else m
            pyro.sample("x", dist.Normal(m, 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("s", dist.Bernoulli(torch.tensor([0.1, 0.9])))

    x = torch.tensor([-1.2, 2.0])
    truth = (dist.Normal(locs, 0.3).log_prob(x[:, None]) + torch.tensor([0.9, 0.1]).log()).logsumexp(1)
    evidence = pv.ImportanceSampling(model, guide, num_particles=1000, seed=seed)(x)
    assert ((evidence.log_evidence - truth).abs() < 5 * evidence.std_error).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [lambda z: z.sum(-1, keepdim=True), lambda z: z.sum(-1, keepdim=True) % 2])
def test_coupling_through_a_count_over_the_data_is_found_where_moves_cancel(count, seed):
    """One datum up and one down leave a sum as it is, and two moved data leave its parity."""
    x = torch.tensor([0.3, -1.0, 0.8, 2.0])

    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.4)))
            pyro.sample("x", dist.Normal(z + 0.3 * count(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.5)))

    with pytest.raises(BatchCouplingError):
        pv.ImportanceSampling(model, guide, num_particles=10, seed=seed)(x)


def test_a_second_call_under_vmap_finds_its_parameters():
    """A call starts from the user's store, where modules are not registered yet, and vmap cannot register them."""
    net = nn.Linear(D, X)

    def model(x):
        pyro.module("net of a second call", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z).softmax(dim=1), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 0.8).to_event(1))

    pair = Pair(model, guide)
    x, z = randn(B, X), randn(3, B, D)
    scores = []
    for _ in range(2):
        with pair.open((x,), {}, 0) as call:
            assert call.model.execution == "vmap"
            scores.append(call.score({"z": z}, 3)["x"].log_prob)
    assert torch.equal(*scores)


def test_a_layer_that_torch_cannot_batch_is_folded_without_a_warning():
    cell = nn.GRUCell(D, X)
    check(lambda z: cell(z), execution="folded")


def test_particles_in_the_place_of_a_plate_where_all_data_are_masked():
    """The guide drops an axis, so that particles take the place of a plate. Masked densities do not show it."""
    hidden = torch.zeros(1, dtype=torch.bool)

    def model(x):
        with pyro.plate("data", 1, dim=-1):
            with pyro.plate("two", 2, dim=-2), pyro.poutine.mask(mask=hidden):
                pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=hidden):
                k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1, dim=-1):
            with pyro.plate("two", 2, dim=-2), pyro.poutine.mask(mask=hidden):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=hidden):
                pyro.sample("k", dist.Bernoulli(logits=z.select(-2, 0)), infer={"enumerate": "parallel"})

    with pytest.raises(pv.errors.MaskError, match="change the density of what is not masked"):
        pv.PosteriorExpectation(model, guide, lambda values: values["k"] + values["z"][..., 0, :], num_particles=10)(
            torch.zeros(1)
        )
