"""The fingerprint of a datum: the same for the same data, whatever the program; another one for any other data."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import linear_gaussian, model_of, quiet

import pyro_vae as pv
from pyro_vae.kernel import Pair
from pyro_vae.kernel.fingerprints import CHUNK, Observed, fingerprint_of, mixed


def guide(x, *rest):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def observing(observe):
    """A model with one latent number per datum; `observe(z, x)` makes the observations."""

    def model(x, *rest):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            observe(z, x, *rest)

    return model


def normals(z, x):
    pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(z.shape + x.shape[1:]).to_event(1), obs=x)


def opened(model, *args, particles=2, guide=guide, **options):
    with Pair(model, guide, **options).open(args, {}, 0) as call, torch.no_grad():
        drawn = call.draw(particles)
        before = call.cost
        call.score(call.latent_values(drawn), particles)
        assert call.cost == before + particles  # no run of its own
        return call.fingerprint(), call.measure()


def fingerprint(model, *args, **options):
    return opened(model, *args, **options)[0]


def binary(rows=200, columns=64, seed=0):
    return torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def bernoullis(z, x):
    pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1)).expand(z.shape + x.shape[1:]).to_event(1), obs=x)


def test_all_binary_images_of_twelve_pixels_differ():
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12)
    found = fingerprint(observing(bernoullis), x)
    assert found.dtype == torch.int64 and found.shape == (4096,)
    assert len(found.unique()) == 4096


def test_bits_are_even_and_flip_by_half_when_one_pixel_does():
    """So the chance that two data collide is about 2^-64. Errors of the shares: 1 / sqrt(4 * 200 * 64) = .0044."""
    x = binary()
    other = x.clone()
    other[:, 17] = 1 - other[:, 17]
    ours, theirs = (fingerprint(observing(bernoullis), data) for data in (x, other))
    bits = 2 ** torch.arange(63)
    assert abs(float(((ours ^ theirs).unsqueeze(-1) & bits != 0).float().mean()) - 0.5) < 0.02
    assert abs(float((ours.unsqueeze(-1) & bits != 0).float().mean()) - 0.5) < 0.02


def test_the_same_data_in_another_order():
    x, order = binary(), torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = fingerprint(observing(bernoullis), x)
    assert torch.equal(fingerprint(observing(bernoullis), x[order]), found[order])
    assert torch.equal(fingerprint(observing(bernoullis), x[:7]), found[:7])  # by datum


def test_pixels_in_another_order_are_other_data():
    x = binary()
    assert bool((fingerprint(observing(bernoullis), x.flip(1)) != fingerprint(observing(bernoullis), x)).all())


def test_dtype_and_shape_of_an_event_do_not_count():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    found = fingerprint(observing(normals), x)
    assert torch.equal(fingerprint(observing(normals), x.double()), found)

    def images(z, x):
        pyro.sample("pixels", dist.Normal(z.reshape(z.shape + (1, 1)), 2.0).expand(z.shape + (3, 4)).to_event(2), obs=x)

    assert torch.equal(fingerprint(observing(images), x.reshape(5, 3, 4)), found)
    counts = torch.randint(0, 9, (5, 12), generator=torch.Generator().manual_seed(0))

    def poissons(z, x):
        pyro.sample("x", dist.Poisson(z.exp().unsqueeze(-1)).expand(z.shape + (12,)).to_event(1), obs=x)

    assert torch.equal(fingerprint(observing(poissons), counts), fingerprint(observing(poissons), counts.double()))


def test_zero_has_no_sign():
    x = torch.zeros(3, 2)
    assert torch.equal(fingerprint(observing(normals), x), fingerprint(observing(normals), -x))


def test_a_plate_inside_the_datum_is_an_event():
    """Rows of the plate lie left or right of the data."""
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))

    def plated(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            with pyro.plate("rows", 3, dim=-2):
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([3, 5, 4]).to_event(1), obs=x.transpose(0, 1))

    assert torch.equal(fingerprint(plated, x), fingerprint(observing(normals), x.flatten(1)))


def test_one_value_for_a_whole_plate_counts_at_each_of_its_places():
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))

    def plated(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            with pyro.plate("rows", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    assert torch.equal(fingerprint(plated, x), fingerprint(observing(normals), x.expand(5, 3)))


@pytest.mark.parametrize("hidden", [0.0, 7.0, math.nan])
def test_what_a_mask_hides_is_empty(hidden):
    """By `fn.mask` inside an event, by `poutine.mask` of a whole datum, and as NaN of a density that allows it."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(6, 4, dtype=torch.bool)
    kept[0, 1] = kept[2, 3] = False

    def masked(z, x, kept):
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(z.shape + (4,)).mask(kept).to_event(1), obs=x)

    filled = x.where(kept, torch.tensor(hidden))
    found = fingerprint(observing(masked), filled, kept)
    whole = fingerprint(observing(normals), x)
    assert (found == whole).tolist() == [False, True, False, True, True, True]
    assert torch.equal(fingerprint(observing(masked), x, kept), found)
    assert not bool((fingerprint(observing(masked), x, kept.flip(0)) == found)[0])

    def rows(z, x, kept):
        with pyro.poutine.mask(mask=kept.all(-1)):
            normals(z, x)

    whole_rows = fingerprint(observing(rows), filled, kept)
    assert (whole_rows == whole).tolist() == [False, True, False, True, True, True]
    assert whole_rows[0] == whole_rows[2] == 0


def test_longer_padding_of_a_sequence_changes_nothing():
    x = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1, 2, 3, 4, 2, 4])

    def sequences(z, x):
        kept = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        steps = dist.Normal(z.reshape(z.shape + (1, 1)), 1.0).expand(z.shape + x.shape[1:]).to_event(1)
        pyro.sample("x", steps.mask(kept).to_event(1), obs=x)

    longer = torch.cat([x, torch.zeros(6, 3, 2)], 1)
    assert torch.equal(fingerprint(observing(sequences), x), fingerprint(observing(sequences), longer))


def test_two_sites_by_any_name_in_any_order():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def two(first, second):
        def observe(z, x):
            for name, part in ((first, x[:, :2]), (second, x[:, 2:]))[:: 1 if first < second else -1]:
                pyro.sample(name, dist.Normal(z.unsqueeze(-1), 1.0).expand(z.shape + (2,)).to_event(1), obs=part)

        return fingerprint(observing(observe), x)

    found = two("a", "b")
    assert torch.equal(two("right", "left"), found) and len(found.unique()) == 5
    only = fingerprint(observing(normals), x[:, :2])
    assert not bool((only == found).any())


def test_equal_values_at_two_sites_do_not_cancel():
    def twice(z, x):
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(z.unsqueeze(-1), 1.0).expand(z.shape + (2,)).to_event(1), obs=x)

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert len(fingerprint(observing(twice), x).unique()) == 5
    assert not bool((fingerprint(observing(twice), x) == fingerprint(observing(normals), x)).any())


def test_factors_do_not_count():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def with_factor(z, x):
        normals(z, x)
        pyro.factor("penalty", -z.abs())

    assert torch.equal(fingerprint(observing(with_factor), x), fingerprint(observing(normals), x))

    def alone(z, x):
        pyro.factor("likelihood", -(x.sum(-1) - z).square())

    assert opened(observing(alone), x) == (None, "")


def test_a_subsampled_plate_gives_the_fingerprints_of_its_subsample():
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))

    def part(run):
        def program(x):
            with pyro.plate("data", 9, subsample_size=4, dim=-1) as index:
                run(x[index])

        return program

    def model(x):
        normals(pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0)), x)

    def encode(x):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with quiet():
        record = pv.ImportanceSampling(part(model), part(encode), num_particles=10, seed=0)(x)
    assert torch.equal(record.fingerprint, fingerprint(observing(normals), x)[record.index])


def test_the_whole_call_as_one_datum():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    found = fingerprint(observing(normals), x, datum_plate=None)
    assert found.shape == (1,)
    assert not torch.equal(fingerprint(observing(normals), x.flip(0), datum_plate=None), found)


@pytest.mark.parametrize("side", ["model", "both"])
def test_enumeration_changes_nothing(side):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def mixture(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            normals(z + c, x)

    def encode(x):
        guide(x)
        if side == "both":
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})

    assert torch.equal(fingerprint(mixture, x, guide=encode), fingerprint(observing(normals), x))


def loop(z, x):
    z.sum().item()  # reads a draw, so each particle has a run of its own
    normals(z, x)


def vmapped(z, x):
    normals(torch.cat([z.reshape(len(x), 1), z.reshape(len(x), 1)], 1).mean(1), x)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("observe", [loop, vmapped])
def test_however_the_model_is_run(observe, particles):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fingerprint(observing(observe), x, particles=particles), fingerprint(observing(normals), x))


def test_a_recurrent_model_sees_copies_of_the_data_and_its_fingerprint_does_not():
    cell = torch.nn.GRU(1, 1, batch_first=True)

    def recurrent(z, x):
        hidden, _ = cell(x.unsqueeze(-1), z.reshape(1, len(x), 1))
        pyro.sample("x", dist.Normal(hidden[..., 0], 1.0).to_event(1), obs=x)

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fingerprint(observing(recurrent), x, particles=4), fingerprint(observing(normals), x))


def test_an_observation_computed_from_draws_has_none():
    def residual(z, x):
        pyro.sample("r", dist.Normal(0.0, 1.0).expand(z.shape), obs=x[:, 0] - z)

    assert opened(observing(residual), torch.randn(4, 1)) == (None, "")


def test_what_kind_of_number_the_evidence_is():
    x = binary(5, 3)

    def continuous(z, x):
        pyro.sample("x", dist.ContinuousBernoulli(logits=z.unsqueeze(-1)).expand(z.shape + (3,)).to_event(1), obs=x)

    def both(z, x):
        bernoullis(z, x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 0])

    assert [opened(observing(o), x)[1] for o in (bernoullis, continuous, both)] == ["probability", "density", "mixed"]
    assert torch.equal(fingerprint(observing(bernoullis), x), fingerprint(observing(continuous), x))


def test_large_data_are_taken_in_pieces():
    values = torch.randn(5, CHUNK // 2, generator=torch.Generator().manual_seed(0))
    found = fingerprint_of([Observed(values, None, False)])
    assert torch.equal(found[3:4], fingerprint_of([Observed(values[3:4], None, False)]))


def test_the_mixing_is_that_of_splitmix64():
    """First outputs of the generator with seed 1234567 (Vigna, https://prng.di.unimi.it/splitmix64.c)."""
    seed = 1234567
    states = torch.tensor([(seed + i * 0x9E3779B97F4A7C15) % 2**64 for i in (1, 2, 3)], dtype=torch.uint64).view(torch.int64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(n) % 2**64 for n in mixed(states)] == expected


def test_records_carry_join_and_cut_it():
    lm, x = linear_gaussian(num_data=6)
    model = model_of(lm)

    def encode(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))

    with quiet():
        whole = pv.ImportanceSampling(model, encode, num_particles=20, seed=0)(x)
        exact = pv.ExactEvidence(model, encode, seed=0)(x)
        gaps = pv.InferenceGaps(model, encode, num_particles=100, seed=0)(x)
        halves = pv.evaluate(pv.ImportanceSampling(model, encode, num_particles=20), [x[:4], x[4:]], progress=False)
        sim = pv.simulate(model, x, seed=0)
        sandwich = pv.BidirectionalMonteCarlo(model, encode, latents=sim.latents, num_steps=10, num_chains=2, seed=0)(
            sim.observed["x"]
        )
    for record in (exact, gaps.evidence, halves):
        assert torch.equal(record.fingerprint, whole.fingerprint) and record.measure == "density"
    assert torch.equal(sandwich.lower.fingerprint, sandwich.upper.fingerprint)
    assert torch.equal(whole.select(torch.tensor([4, 1])).fingerprint, whole.fingerprint[[4, 1]])
    own = pv.Evidence.cat([whole, replace(whole, fingerprint=None)])
    assert own.fingerprint is None and len(own) == 12
    assert whole.to_dict()["fingerprint"] == whole.fingerprint.tolist()
