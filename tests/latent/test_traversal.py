"""`traverse` and `manifold` against linear decoders, whose means are W z + b exactly, and other decoders run by hand."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, exact_family, guide_of, linear_gaussian, model_of
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae.errors import EnumerationError, InvalidDataError, NonFiniteError, OptionError, StructureError

# Standard error of the 5 % and the 95 % quantile of 1000 normal draws, 0.067; those between have smaller ones.
OUTER = math.sqrt(0.05 * 0.95 / 1000) * math.sqrt(2 * math.pi) * math.exp(1.645**2 / 2)


def data(num_data=40, seed=1):
    return torch.randn(num_data, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear_pair(**options):
    lm, x = linear_gaussian(latent_dim=3, data_dim=4, **options)
    return lm, x, model_of(lm), guide_of(exact_family(lm))


def decoded(lm, z):
    return z @ lm.weight.T + lm.bias


def vector_pair(prior, posterior, likelihood=lambda z, x: dist.Normal(z.sum(-1), 1.0)):
    """A latent vector 'z' per datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", prior(x)), x), obs=x)

    return model, guide_of(posterior)


# --- linear decoders ---


@pytest.mark.parametrize("datum", [0, 4])
def test_a_linear_decoder_in_closed_form(datum):
    """One unit at the quantile, the others at the posterior mean of this datum."""
    lm, x, model, guide = linear_pair()
    walk = pv.traverse(model, guide, x, datum=datum, num_steps=5, seed=0)
    mean = lm.posterior(x[datum]).mean
    assert walk.names == ("z[0]", "z[1]", "z[2]") and walk.start == "mean" and walk.site == "x"
    assert walk.means.shape == (3, 5, 4) and walk.values.shape == (3, 5) and walk.datum.shape == (4,)
    torch.testing.assert_close(walk.datum, decoded(lm, mean), rtol=0, atol=1e-10)
    for unit in range(3):
        for step in range(5):
            z = mean.clone()
            z[unit] = walk.values[unit, step]
            torch.testing.assert_close(walk.means[unit, step], decoded(lm, z), rtol=0, atol=1e-10)


def test_a_manifold_of_a_linear_decoder_in_closed_form():
    """`means[i, j]` is at the i-th value of the first unit and the j-th of the second, which is the last of three here."""
    lm, x, model, guide = linear_pair()
    grid = pv.manifold(model, guide, x, datum=1, units=("z[2]", 0), num_steps=3, seed=0)
    mean = lm.posterior(x[1]).mean
    assert grid.names == ("z[2]", "z[0]") and grid.means.shape == (3, 3, 4) and grid.values.shape == (2, 3)
    for i in range(3):
        for j in range(3):
            z = torch.stack([grid.values[1, j], mean[1], grid.values[0, i]])
            torch.testing.assert_close(grid.means[i, j], decoded(lm, z), rtol=0, atol=1e-10)


def test_values_are_quantiles_of_the_prior():
    """Of N(m, s^2) from 5 % to 95 %. False alarm: 20 numbers at 4.5 errors."""
    loc, scale = torch.tensor([0.0, 5.0], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    pair = vector_pair(
        lambda x: dist.Normal(loc.expand(len(x), 2), scale).to_event(1),
        lambda x: dist.Normal(x[:, None] + loc, 1.0).to_event(1),
    )
    walk = pv.traverse(*pair, data(3), num_steps=5, seed=0)
    assert walk.levels.tolist() == pytest.approx([0.05, 0.275, 0.5, 0.725, 0.95])
    truth = loc[:, None] + scale[:, None] * torch.special.ndtri(walk.levels)
    assert float(((walk.values - truth).abs() / scale[:, None]).max()) < 4.5 * OUTER
    assert bool((walk.values.diff(dim=1) > 0).all())
    other = pv.traverse(*pair, data(3), num_steps=5, seed=1)
    assert not torch.equal(walk.values, other.values)


def test_any_prior_will_do():
    """Log-normal quantiles are exp of the normal ones, and positive."""
    pair = vector_pair(
        lambda x: dist.LogNormal(x.new_zeros(len(x), 1), 1.0).to_event(1),
        lambda x: dist.LogNormal(x[:, None], 0.5).to_event(1),
    )
    x = data(3)
    walk = pv.traverse(*pair, x, num_steps=3, seed=0)
    assert float((walk.values.log() - torch.special.ndtri(walk.levels)).abs().max()) < 4.5 * OUTER
    torch.testing.assert_close(walk.means.flatten(), walk.values.flatten(), rtol=0, atol=1e-12)
    torch.testing.assert_close(walk.datum, (x[0] + 0.125).exp(), rtol=0, atol=1e-12)  # the mean of the log-normal


def test_units_by_name_and_number_and_at_most_ten_unasked():
    pair = vector_pair(
        lambda x: dist.Normal(x.new_zeros(len(x), 12), 1.0).to_event(1),
        lambda x: dist.Normal(x[:, None].expand(-1, 12), 1.0).to_event(1),
    )
    x = data(2)
    assert pv.traverse(*pair, x, seed=0).names == tuple(f"z[{unit}]" for unit in range(10))
    chosen = pv.traverse(*pair, x, units=[11, "z[3]"], num_steps=2, seed=0)
    assert chosen.names == ("z[11]", "z[3]")
    alone = pv.traverse(*pair, x, units="z[3]", num_steps=2, seed=0)
    assert alone.names == ("z[3]",) and torch.equal(alone.values[0], chosen.values[1])


# --- where the walk starts ---


def two_sites(x, is_model):
    """x = 10 a + b, a given nothing, b given a."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0) if is_model else dist.Normal(x, 0.5))
        b = pyro.sample("b", dist.Normal(a, 1.0) if is_model else dist.Normal(2 * a, 0.01))
        if is_model:
            pyro.sample("x", dist.Normal(10 * a + b, 1.0), obs=x)


def test_a_latent_drawn_given_another_starts_the_walk_at_a_draw():
    """One draw for both: b lies at twice a. The prior of b is N(0, 2), over that of a."""
    x = data(3)
    walk = pv.traverse(lambda x: two_sites(x, True), lambda x: two_sites(x, False), x, datum=2, num_steps=3, seed=0)
    assert walk.start == "draw" and walk.names == ("a", "b")
    # The lines through the walks say where the others stayed.
    b = walk.means[0] - 10 * walk.values[0]
    a = (walk.means[1] - walk.values[1]) / 10
    assert float(b.std()) < 1e-10 and float(a.std()) < 1e-10
    assert abs(float(b[0] - 2 * a[0])) < 0.06 and abs(float(a[0] - x[2])) < 3 and abs(float(a[0] - x[2])) > 1e-6
    torch.testing.assert_close(walk.datum, 10 * a[0] + b[0], rtol=0, atol=1e-10)
    for values, scale in ((walk.values[0], 1.0), (walk.values[1], math.sqrt(2))):
        assert float((values / scale - torch.special.ndtri(walk.levels)).abs().max()) < 4.5 * OUTER


def test_an_autoguide_of_transformed_latents_starts_at_a_draw():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    x = data(3)
    guide = AutoNormal(model)
    guide(x)
    walk = pv.traverse(model, guide, x, num_steps=2, seed=0)
    assert walk.start == "draw" and float(walk.datum) > 0 and walk.values.min() > 0
    torch.testing.assert_close(walk.means.squeeze(), walk.values.squeeze(), rtol=0, atol=1e-12)


# --- decoders ---


def test_a_convolutional_decoder_is_the_one_that_was_trained():
    torch.manual_seed(0)
    vae = pv.conv_vae((1, 8, 8), latent_dim=3, likelihood=pv.nn.Bernoulli(event_dim=3), channels=(4, 4)).eval()
    x = torch.bernoulli(torch.rand(5, 1, 8, 8))
    walk = pv.traverse(vae.model, vae.guide, x, datum=3, num_steps=4, seed=0)
    assert walk.means.shape == (3, 4, 1, 8, 8) and walk.datum.shape == (1, 8, 8)
    with torch.no_grad():
        mean = vae.encode(x).mean[3]
        torch.testing.assert_close(walk.datum, vae.decode(mean[None]).mean[0], rtol=0, atol=1e-5)
        for unit in range(3):
            z = mean.repeat(4, 1)
            z[:, unit] = walk.values[unit]
            torch.testing.assert_close(walk.means[unit], vae.decode(z).mean, rtol=0, atol=1e-5)
    grid = pv.manifold(vae.model, vae.guide, x, datum=3, num_steps=2, seed=0)
    assert grid.means.shape == (2, 2, 1, 8, 8)


@pytest.mark.parametrize("datum", [0, 2])
def test_a_conditional_model_keeps_the_label_of_the_datum(datum):
    torch.manual_seed(0)
    vae = pv.mlp_conditional_vae(6, 3, latent_dim=2, likelihood=pv.nn.Bernoulli(), hidden=(8,)).eval()
    x, y = torch.bernoulli(torch.rand(4, 6)), one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    walk = pv.traverse(vae.model, vae.guide, x, y, datum=datum, num_steps=3, seed=0)
    with torch.no_grad():
        z = vae.encode(x, y).mean[datum].repeat(3, 1)
        z[:, 1] = walk.values[1]
        expected = vae.decode(z, y[datum].expand(3, -1)).mean
    torch.testing.assert_close(walk.means[1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decoders_that_take_no_particles(batch_size):
    """A softmax over a fixed axis is right under vmap alone, reading a value in the loop alone; all give these means."""
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def softmax_of(z, x):
        return dist.Normal(torch.softmax(z @ weight, dim=1), 1.0).to_event(1)

    def branching(z, x):
        float(z.sum())
        return dist.Normal(torch.softmax(z @ weight, dim=-1), 1.0).to_event(1)

    x = torch.randn(batch_size, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    for likelihood in (softmax_of, branching):
        pair = vector_pair(
            lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1),
            lambda x: dist.Normal(x[:, :2], 0.5).to_event(1),
            likelihood,
        )
        walk = pv.traverse(*pair, x, num_steps=2, seed=0)
        z = x[0, :2].repeat(2, 1)
        z[:, 0] = walk.values[0]
        torch.testing.assert_close(walk.means[0], torch.softmax(z @ weight, -1), rtol=0, atol=1e-12)


def test_many_images_go_in_pieces(monkeypatch):
    lm, x, model, guide = linear_pair()
    whole = pv.manifold(model, guide, x, num_steps=6, seed=0)
    monkeypatch.setattr("pyro_vae.kernel.calls.CHUNK_BYTES", {"cpu": 1000, "cuda": 1000})
    torch.testing.assert_close(pv.manifold(model, guide, x, num_steps=6, seed=0).means, whole.means, rtol=0, atol=1e-12)


def test_plates_inside_a_datum_and_one_datum_for_all():
    """Latents and pixels in plates left of the data; with no plate of data, the whole call is the datum."""

    def program(is_model):
        def run(x):
            pixels, parts = pyro.plate("pixels", 3, dim=-2), pyro.plate("parts", 2, dim=-3)
            with pyro.plate("data", x.shape[1], dim=-1):
                loc = x[:2].reshape(2, 1, -1)
                with parts:
                    z = pyro.sample("z", dist.Normal(torch.zeros_like(loc), 1.0) if is_model else dist.Normal(loc, 0.5))
                if is_model:
                    with pixels:
                        pyro.sample("x", dist.Normal(z[0] + 10 * z[1] * torch.arange(3.0)[:, None], 1.0), obs=x)

        return run

    x = data(12).reshape(3, 4)
    walk = pv.traverse(program(True), program(False), x, datum=3, num_steps=2, seed=0)
    assert walk.names == ("z[0]", "z[1]") and walk.datum.shape == (3,)
    steps = torch.arange(3, dtype=F64)
    torch.testing.assert_close(walk.datum, x[0, 3] + 10 * x[1, 3] * steps, rtol=0, atol=1e-12)
    expected = x[0, 3] + 10 * walk.values[1][:, None] * steps
    torch.testing.assert_close(walk.means[1], expected, rtol=0, atol=1e-12)
    whole = pv.traverse(program(True), program(False), x, datum_plate=None, num_steps=2, seed=0)
    assert len(whole.names) == 8 and whole.datum.shape == (3, 4)
    torch.testing.assert_close(whole.datum[:, 3], walk.datum, rtol=0, atol=1e-12)
    moved = x[0].expand(3, 4) + 10 * x[1].expand(3, 4) * steps[:, None]
    moved[:, 1] += whole.values[1, 0] - x[0, 1]
    torch.testing.assert_close(whole.means[1, 0], moved, rtol=0, atol=1e-12)


def test_a_site_outside_an_inner_plate_has_no_axis_of_it():
    """The latents of a datum lie in a plate, its observation does not."""

    def program(is_model):
        def run(x):
            with pyro.plate("data", len(x), dim=-1):
                with pyro.plate("parts", 2, dim=-2):
                    z = pyro.sample("z", dist.Normal(0 * x[:, 0], 1.0) if is_model else dist.Normal(x.T[:2], 0.5))
                if is_model:
                    pyro.sample("x", dist.Normal(z.sum(-2)[..., None] * torch.ones(4), 1.0).to_event(1), obs=x)

        return run

    x = data(12).reshape(3, 4)
    walk = pv.traverse(program(True), program(False), x, datum=1, num_steps=2, seed=0)
    assert walk.datum.shape == (4,) and walk.means.shape == (2, 2, 4)
    torch.testing.assert_close(walk.datum, x[1, :2].sum().expand(4), rtol=0, atol=1e-12)


def test_the_first_likelihood_with_a_mean_is_shown():
    """Neither a factor, nor classes, nor a Cauchy."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.factor("nothing", 0 * z)
            pyro.sample("y", dist.Categorical(logits=z[..., None] * torch.ones(3)), obs=y)
            pyro.sample("far", dist.Cauchy(z, 1.0), obs=x)
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    x = data(3)
    walk = pv.traverse(model, guide, x, torch.zeros(3), num_steps=2, seed=0)
    assert walk.site == "x" and float(walk.datum) == pytest.approx(3 * float(x[0]))


# --- what cannot be walked ---


def mixed(x, is_model):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.5) if is_model else torch.sigmoid(x)))
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0) if is_model else dist.Normal(x, 0.5))
        if is_model:
            pyro.sample("x", dist.Normal(10 * c + z, 1.0), obs=x)


def test_a_discrete_latent_stays_and_cannot_be_moved():
    pair = (lambda x: mixed(x, True)), (lambda x: mixed(x, False))
    x = data(3)
    walk = pv.traverse(*pair, x, num_steps=2, seed=0)
    assert walk.names == ("z",) and walk.start == "draw"
    bit = (walk.means[0] - walk.values[0]) / 10
    assert float(bit[0]) == pytest.approx(round(float(bit[0])), abs=1e-12) and float(bit.std()) < 1e-10
    for units in ([0], ["c", "z"]):
        with pytest.raises(StructureError, match="'c' cannot be changed alone"):
            pv.traverse(*pair, x, units=units)
    with pytest.raises(StructureError, match="'c' cannot be changed alone"):
        pv.manifold(*pair, x)


def test_a_simplex_and_classes_alone_cannot_be_moved():
    pair = vector_pair(
        lambda x: dist.Dirichlet(torch.ones(len(x), 3, dtype=F64)),
        lambda x: dist.Dirichlet(torch.ones(len(x), 3, dtype=F64) + x[:, None] ** 2),
    )
    with pytest.raises(StructureError, match="part of a simplex"):
        pv.traverse(*pair, data(3))
    pair = vector_pair(
        lambda x: dist.Categorical(torch.ones(3, dtype=F64)),
        lambda x: dist.Categorical(torch.ones(len(x), 3, dtype=F64)),
        lambda z, x: dist.Normal(z.to(F64), 1.0),
    )
    with pytest.raises(StructureError, match="discrete"):
        pv.traverse(*pair, data(3))


def test_full_covariances_and_mixtures_can_be_moved():
    def mixture(x):
        component = dist.MultivariateNormal(torch.tensor([[-9.0, 0.0], [9.0, 0.0]], dtype=F64), torch.eye(2, dtype=F64))
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2, dtype=F64)), component)

    pair = vector_pair(mixture, lambda x: dist.MultivariateNormal(x[:, None].expand(-1, 2), torch.eye(2, dtype=F64)))
    walk = pv.traverse(*pair, data(3), num_steps=2, seed=0)
    assert float(walk.values[0, 0]) < -8 and float(walk.values[0, 1]) > 8 and float(walk.values[1].abs().max()) < 2.5


def test_enumeration_is_refused():
    pair = (lambda x: mixed(x, True)), (lambda x: mixed(x, False))
    with pytest.raises(EnumerationError, match="let the guide draw"):
        pv.traverse(pair[0], config_enumerate(pair[1]), data(3))
    assert pv.traverse(*pair, data(3), num_steps=2, seed=0).values.shape == (1, 2)  # the remedy


def test_options_are_named():
    lm, x, model, guide = linear_pair()
    for options, message in (
        ({"datum": 6}, "from 0 to 5, got 6"),
        ({"datum": -1}, "got -1"),
        ({"datum": True}, "got True"),
        ({"units": [3]}, r"no unit 3: pass a name \('z\[0\]', 'z\[1\]', 'z\[2\]'\) or a number from 0 to 2"),
        ({"units": ["w"]}, "no unit 'w'"),
        ({"units": []}, "at least one"),
        ({"units": [1, "z[1]"]}, "none twice"),
        ({"num_steps": 1}, "at least 2, got 1"),
    ):
        with pytest.raises(OptionError, match=message):
            pv.traverse(model, guide, x, **options)
    for units in ([0], [0, 1, 2], "z[0]"):
        with pytest.raises(OptionError, match="two names or indices"):
            pv.manifold(model, guide, x, units=units)


def test_numbers_that_are_not_finite_are_named():
    lm, x, model, guide = linear_pair()
    with pytest.raises(InvalidDataError, match="NaN"):
        pv.traverse(model, guide, torch.full_like(x, math.nan))
    pair = vector_pair(
        lambda x: dist.Normal(x.new_full((len(x), 2), math.nan), 1.0).to_event(1),
        lambda x: dist.Normal(x[:, None].expand(-1, 2), 1.0).to_event(1),
        lambda z, x: dist.Normal(x, 1.0),
    )
    with pytest.raises(NonFiniteError, match=r"prior of 'z\[0\]', 'z\[1\]'"):
        pv.traverse(*pair, data(3))


def test_no_likelihood_with_a_mean():
    pair = vector_pair(
        lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1),
        lambda x: dist.Normal(x[:, None].expand(-1, 2), 1.0).to_event(1),
        lambda z, x: dist.Cauchy(z.sum(-1), 1.0),
    )
    with pytest.raises(StructureError, match="with a mean"):
        pv.traverse(*pair, data(3))


# --- seeds, traces, records ---


def test_seed_and_nothing_left_behind():
    layer = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))

    def model(x):
        pyro.module("decoder", layer)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(layer(z), scale).to_event(1), obs=x)

    guide = guide_of(lambda x: dist.Normal(x[:, :2], 0.5).to_event(1))
    x = torch.randn(5, 4)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    first, again, other = (pv.traverse(model, guide, x, num_steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and len(pyro.get_param_store()) == 0
    assert torch.equal(first.means, again.means) and torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters()) and not first.means.requires_grad
    grids = [pv.manifold(model, guide, x, num_steps=2, seed=1) for _ in range(2)]
    assert torch.equal(grids[0].means, grids[1].means) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(grids[0].values, first.values)
    free = pv.traverse(model, guide, x, num_steps=2)
    assert not torch.equal(free.values, pv.traverse(model, guide, x, num_steps=2).values)


def test_grey_pixels_under_a_bernoulli_can_be_walked():
    """Only means are looked at."""
    pair = vector_pair(
        lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1),
        lambda x: dist.Normal(x[:, :2], 0.5).to_event(1),
        lambda z, x: dist.Bernoulli(logits=z).to_event(1),
    )
    x = torch.rand(3, 2)
    walk = pv.traverse(*pair, x, num_steps=2, seed=0)
    torch.testing.assert_close(walk.datum, torch.sigmoid(x[0]))


def test_records_print_and_can_be_written_as_json():
    lm, x, model, guide = linear_pair()
    walk, grid = pv.traverse(model, guide, x, num_steps=2, seed=0), pv.manifold(model, guide, x, num_steps=2, seed=0)
    assert str(walk).splitlines()[0] == (
        "Traversal from the mean of one datum, means of 'x' (4,), 2 quantiles of the prior each"
    )
    low, high = walk.values[1].tolist()
    assert str(walk).splitlines()[2] == f"  z[1]  from {low:.3g} to {high:.3g}"
    assert str(grid).startswith("Manifold of 2 x 2 means of 'x': z[0] from -1.")
    for record in (walk, grid):
        again = json.loads(json.dumps(record.to_dict()))
        assert again["names"] == list(record.names) and again["means"] == record.means.tolist()
