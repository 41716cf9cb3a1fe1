"""DESIGN 5.1 and 5.2: what a datum is. One weight per datum, whatever the plates look like."""

import math

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
    likelihood,
    linear_gaussian,
    normal,
    posterior,
    randn,
    standard_normal,
    tensor,
    weigh,
)

import pyro_vae as pv
from pyro_vae.errors import DatumPlateError, EmptyBatchError, GlobalLatentError, StructureError, SubsamplingError
from pyro_vae.exact import LinearGaussian
from pyro_vae.kernel import Pair

ZERO, ONE = tensor(0.0), tensor(1.0)


# --- one common plate ---


@pytest.mark.parametrize("num_particles", [1, 2, 5, 7])
@pytest.mark.parametrize("seed", [0, 17])
def test_exact_guide_gives_the_evidence_of_every_datum(num_particles, seed):
    lm, x = linear_gaussian(num_data=5)
    result = weigh(*exact_pair(lm), x, K=num_particles, seed=seed)
    assert_weights(result, lm.log_evidence(x))
    assert result.lw.log_prior.shape == result.lw.log_guide.shape == (num_particles, 5)
    assert result.lw.log_likelihood.shape == (num_particles, 5)
    assert_close(result.log_weight, result.lw.log_likelihood + result.lw.log_prior - result.lw.log_guide)


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_batch_of_one(num_particles):
    lm, x = linear_gaussian(num_data=1)
    result = weigh(*exact_pair(lm), x, K=num_particles)
    assert_weights(result, lm.log_evidence(x))


def test_the_draws_of_particles_and_data_differ():
    lm, x = linear_gaussian(num_data=5)
    z = weigh(*exact_pair(lm), x, K=6).values["z"]
    assert z.shape == (6, 5, 2)
    assert len(z.flatten().unique()) == z.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype_of_the_model(dtype):
    lm, x = linear_gaussian(dtype=dtype)
    result = weigh(*exact_pair(lm), x)
    for value in (
        result.log_weight,
        result.elbo,
        result.lw.log_likelihood,
        result.lw.log_prior,
        result.lw.log_guide,
    ):
        assert value.dtype == dtype
    assert_weights(result, lm.log_evidence(x), atol=1e-4 if dtype == torch.float32 else 1e-10)


def test_half_precision_densities_accumulate_in_float32():
    x = torch.zeros(4, dtype=torch.bfloat16)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    assert weigh(model, guide, x).log_weight.dtype == torch.float32


def test_a_guide_that_is_not_exact_matches_the_densities_by_hand():
    lm, x = linear_gaussian()
    loc = randn(5, 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))

    result = weigh(exact_pair(lm)[0], guide, x, K=6)
    z = result.values["z"]
    log_guide = normal(z, loc, 0.7).sum(-1)
    log_prior = normal(z, 0.0, 1.0).sum(-1)
    log_likelihood = normal(x, z @ lm.weight.T + lm.bias, lm.variance.sqrt()).sum(-1)
    assert_close(result.lw.log_guide, log_guide)
    assert_close(result.lw.log_prior, log_prior)
    assert_close(result.lw.log_likelihood, log_likelihood)
    assert_close(result.log_weight, log_likelihood + log_prior - log_guide)
    assert_close(result.elbo, result.log_weight)


def test_the_plate_need_not_be_the_only_one_of_the_guide():
    """The same plate, opened twice."""
    lm, x = linear_gaussian()
    _, guide = exact_pair(lm)

    def model(x):
        plate = pyro.plate("data", len(x))
        with plate:
            z = pyro.sample("z", standard_normal(lm))
        with plate:
            pyro.sample("x", likelihood(lm, z), obs=x)

    assert_weights(weigh(model, guide, x), lm.log_evidence(x))


# --- several latent sites ---


def bivariate(lm, x):
    """Posterior of two scalar latents as q(z1) q(z2 | z1)."""
    p = lm.posterior(x)
    m, s = p.loc, p.covariance_matrix
    first = dist.Normal(m[:, 0], s[:, 0, 0].sqrt())
    slope = s[:, 1, 0] / s[:, 0, 0]
    sd = (s[:, 1, 1] - slope * s[:, 1, 0]).sqrt()
    return first, lambda z1: dist.Normal(m[:, 1] + slope * (z1 - m[:, 0]), sd)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_several_latent_sites(num_particles):
    lm, x = linear_gaussian()

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(ZERO, 1.0))
            z1 = pyro.sample("z1", dist.Normal(ZERO, 1.0))
            pyro.sample("x", likelihood(lm, torch.stack([z1, z2], -1)), obs=x)

    def guide(x):
        first, second = bivariate(lm, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z2", second(pyro.sample("z1", first)))

    result = weigh(model, guide, x, K=num_particles)
    assert_weights(result, lm.log_evidence(x))
    assert set(result.lw.log_prior_by_site) == set(result.lw.log_guide_by_site) == {"z1", "z2"}
    for name in ("z1", "z2"):
        assert_close(result.lw.log_prior_by_site[name], normal(result.values[name], 0.0, 1.0))


def test_several_observed_sites():
    lm, x = linear_gaussian()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            for i in range(3):
                mean = z @ lm.weight[i] + lm.bias[i]
                pyro.sample(f"x{i}", dist.Normal(mean, lm.variance.sqrt()), obs=x[:, i])

    result = weigh(model, exact_pair(lm)[1], x)
    assert_weights(result, lm.log_evidence(x))
    assert set(result.lw.log_likelihood_by_site) == {"x0", "x1", "x2"}


A, S1, W, S = 0.8, 0.6, 1.7, 0.5  # the two-layer chain z2 -> z1 -> x


def two_layer_model(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(ZERO, 1.0))
        z1 = pyro.sample("z1", dist.Normal(A * z2, S1))
        pyro.sample("x", dist.Normal(W * z1, S), obs=x)


def two_layer_guide(x):
    prior = A**2 + S1**2
    precision = 1 / prior + W**2 / S**2
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(W * x / S**2 / precision, precision**-0.5))
        precision = 1 + A**2 / S1**2
        pyro.sample("z2", dist.Normal(A * z1 / S1**2 / precision, precision**-0.5))


def test_two_layer_hierarchy():
    x = randn(5)
    sd = math.sqrt(W**2 * (A**2 + S1**2) + S**2)
    assert_weights(weigh(two_layer_model, two_layer_guide, x), normal(x, 0.0, sd))


# --- nested plates ---


@pytest.mark.parametrize("data_dim", [-1, -2])
@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_pixels_in_a_plate_inside_the_datum(data_dim, num_particles):
    lm, x = linear_gaussian(latent_dim=1, data_dim=4)
    w, b = (v if data_dim == -2 else v[:, None] for v in (lm.weight[:, 0], lm.bias))

    def up(v):  # (B,) beside the data dim
        return v[:, None] if data_dim == -2 else v

    def model(x):
        data = pyro.plate("data", len(x), dim=data_dim)
        pixels = pyro.plate("pixels", 4, dim=-3 - data_dim)
        with data:
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with pixels:
                pyro.sample("x", dist.Normal(w * z + b, lm.variance.sqrt()), obs=x if data_dim == -2 else x.T)

    def guide(x):
        p = lm.posterior(x)
        with pyro.plate("data", len(x), dim=data_dim):
            pyro.sample("z", dist.Normal(up(p.loc[:, 0]), up(p.covariance_matrix[:, 0, 0].sqrt())))

    result = weigh(model, guide, x, K=num_particles)
    assert_weights(result, lm.log_evidence(x))
    assert result.structure.layout.datum_plate == "data"


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_a_latent_in_a_plate_inside_the_datum(data_dim):
    """z per datum, u per datum and part; the parts are independent given z."""
    num_data, parts, s = 5, 3, 0.5
    x = randn(num_data, parts)
    weight = torch.ones(parts, 1, dtype=F64)
    lm = LinearGaussian(weight, torch.zeros(parts, dtype=F64), tensor(1 + s**2))  # x = z + u + noise
    precision = 1 + 1 / s**2

    def turned(v):
        return v if data_dim == -2 else v.T

    def model(x):
        with pyro.plate("data", num_data, dim=data_dim):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with pyro.plate("parts", parts, dim=-3 - data_dim):
                u = pyro.sample("u", dist.Normal(ZERO, 1.0))
                pyro.sample("x", dist.Normal(z + u, s), obs=turned(x))

    def guide(x):
        p = lm.posterior(x)
        with pyro.plate("data", num_data, dim=data_dim):
            loc, sd = turned(p.loc), turned(p.covariance_matrix[:, :, 0].sqrt())
            if data_dim == -1:
                loc, sd = loc[0], sd[0]
            z = pyro.sample("z", dist.Normal(loc, sd))
            with pyro.plate("parts", parts, dim=-3 - data_dim):
                pyro.sample("u", dist.Normal((turned(x) - z) / s**2 / precision, precision**-0.5))

    result = weigh(model, guide, x)
    assert_weights(result, lm.log_evidence(x))
    assert result.lw.log_prior_by_site["u"].shape == (4, num_data)


def two_plates(x):
    with pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_plates_guide(x):
    with pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_two_common_plates_raise_and_name_both():
    with pytest.raises(DatumPlateError, match=r"'rows', 'columns'.*datum_plate="):
        weigh(two_plates, two_plates_guide, randn(3, 4))


@pytest.mark.parametrize("name, inner", [("rows", 1), ("columns", 0)])
def test_two_common_plates_with_the_datum_plate_named(name, inner):
    x = randn(3, 4)
    result = weigh(two_plates, two_plates_guide, x, datum_plate=name)
    assert_weights(result, normal(x, 0.0, 2**0.5).sum(inner))


def test_two_common_plates_as_one_datum():
    x = randn(3, 4)
    result = weigh(two_plates, two_plates_guide, x, datum_plate=None)
    assert_weights(result, normal(x, 0.0, 2**0.5).sum().reshape(1))


def test_an_unknown_datum_plate_is_refused():
    with pytest.raises(DatumPlateError, match=r"'row'.*'columns', 'rows'"):
        weigh(two_plates, two_plates_guide, randn(3, 4), datum_plate="row")


def test_no_common_name_is_refused():
    lm, x = linear_gaussian()

    def guide(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("z", posterior(lm, x))

    with pytest.raises(StructureError, match="'batch'"):  # the message has to show both names
        weigh(exact_pair(lm)[0], guide, x)


def test_sizes_that_differ_are_refused():
    lm, x = linear_gaussian()
    model, guide = exact_pair(lm)
    with pytest.raises(DatumPlateError, match=r"sizes \[3, 5\]"):
        weigh(model, lambda x: guide(x[:3]), x)


def test_dims_that_differ_are_refused():
    lm, x = linear_gaussian()

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            p = posterior(lm, x)
            pyro.sample("z", dist.MultivariateNormal(p.loc[:, None], scale_tril=p.scale_tril[:, None]))

    with pytest.raises(DatumPlateError, match="dim"):
        weigh(exact_pair(lm)[0], guide, x)


def test_a_batch_dimension_that_no_plate_declares_is_refused():
    lm, x = linear_gaussian()

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2, dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z @ lm.weight.T, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(5, 2, dtype=F64), 1.0))

    with pytest.raises(StructureError, match=r"batch dimension -1 of size 2 that no plate declares.*to_event"):
        weigh(model, guide, x)


def test_an_undeclared_dimension_of_size_one_left_of_the_data_is_harmless():
    x = randn(5)

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 5, dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal((x / 2)[None], 0.5**0.5))

    assert_weights(weigh(model, guide, x), normal(x, 0.0, 2**0.5))


def test_the_same_with_a_size_one_dimension_at_an_observed_site():
    x = randn(5)

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(5, dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(torch.zeros(1, 5, dtype=F64), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    try:
        result = weigh(model, guide, x)
    except StructureError:  # a named refusal is as good
        return
    assert_weights(result, normal(x, 0.0, 2**0.5) + normal(x, 0.0, 1.0))


# --- plates without a size ---


def test_plate_without_size():
    lm, x = linear_gaussian()

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", posterior(lm, x))

    result = weigh(model, guide, x)
    assert result.structure.layout.batch_size == 5
    assert_weights(result, lm.log_evidence(x))


@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_a_latent_without_batch_shape_in_a_plate_without_size_is_drawn_per_datum(num_particles):
    x = randn(5)

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(tensor(0.3), 0.8))

    result = weigh(model, guide, x, K=num_particles)
    z = result.values["z"]
    assert z.shape == (num_particles, 5)
    assert len(z.unique()) == z.numel()
    assert_close(result.log_weight, normal(x, z, 0.5) + normal(z, 0.0, 1.0) - normal(z, 0.3, 0.8))


def test_an_unsized_plate_whose_batch_shows_only_in_the_data():
    """log p(x) is that of a latent each, not of one latent for the whole batch."""
    x = randn(6)

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    assert_weights(weigh(model, guide, x), normal(x, 0.0, 2**0.5))


def test_an_unsized_plate_with_a_batch_of_one():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = randn(1)
    assert_weights(weigh(model, guide, x), normal(x, 0.0, 2**0.5))


def test_an_unsized_plate_with_a_sized_one_in_the_guide():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = randn(4)
    assert_weights(weigh(model, guide, x), normal(x, 0.0, 2**0.5))


def test_an_unsized_plate_inside_the_datum_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with pyro.plate("inner", dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[None])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    with pytest.raises(StructureError, match="'inner'.*has no size"):
        weigh(model, guide, randn(4))


# --- sequential plates ---


def test_a_sequential_datum_plate_is_refused():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(ZERO, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.5**0.5))

    with pytest.raises(DatumPlateError, match="'data' is sequential.*with pyro.plate"):
        weigh(model, guide, randn(3))


def test_a_sequential_plate_inside_the_datum_is_harmless():
    lm, x = linear_gaussian()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            for i in pyro.plate("pixels", 3):
                mean = z @ lm.weight[i] + lm.bias[i]
                pyro.sample(f"x{i}", dist.Normal(mean, lm.variance.sqrt()), obs=x[:, i])

    assert_weights(weigh(model, exact_pair(lm)[1], x), lm.log_evidence(x))


# --- subsampling ---


def subsampling_pair(lm, num_data, batch_size):
    seen = []

    def model(xs):
        with pyro.plate("data", num_data, subsample_size=batch_size) as index:
            seen.append(index)
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=xs[index])

    def guide(xs):
        with pyro.plate("data", num_data, subsample_size=batch_size) as index:
            seen.append(index)
            pyro.sample("z", posterior(lm, xs[index]))

    return model, guide, seen


def test_a_subsampled_data_plate():
    lm, xs = linear_gaussian(num_data=20)
    model, guide, seen = subsampling_pair(lm, 20, 5)
    result = weigh(model, guide, xs)
    assert result.index.shape == (5,)
    assert len(result.index.unique()) == 5
    assert_weights(result, lm.log_evidence(xs)[result.index])
    assert result.structure.stripped_scales == {"z": 4.0, "x": 4.0}
    assert result.structure.subsampled
    for index in seen:  # the same data in every pass of a call
        assert torch.equal(index, result.index)


def test_the_subsample_follows_the_seed_and_not_the_cache():
    lm, xs = linear_gaussian(num_data=50)
    pair = Pair(*subsampling_pair(lm, 50, 5)[:2])
    first, second, third = (weigh(None, None, xs, pair=pair, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.values["z"], second.values["z"])
    assert not torch.equal(first.index, third.index)
    assert_weights(third, lm.log_evidence(xs)[third.index])


def test_without_a_seed_every_call_draws_another_subsample():
    lm, xs = linear_gaussian(num_data=50)
    pair = Pair(*subsampling_pair(lm, 50, 5)[:2])
    first, second = (weigh(None, None, xs, pair=pair, seed=None) for _ in range(2))
    assert not torch.equal(first.index, second.index)


@pytest.mark.parametrize("where", ["both", "guide", "model"])
def test_a_subsample_that_is_given(where):
    """Both sides look at the same data, or the kernel says that they do not."""
    lm, xs = linear_gaussian(num_data=20)
    given = torch.tensor([3, 1, 17])

    def plate(side):
        subsample = given if where in (side, "both") else None
        return pyro.plate("data", 20, subsample_size=3, subsample=subsample)

    def model(xs):
        with plate("model") as index:
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=xs[index])

    def guide(xs):
        with plate("guide") as index:
            pyro.sample("z", posterior(lm, xs[index]))

    pair = Pair(model, guide)
    for _ in range(2):
        try:
            result = weigh(None, None, xs, pair=pair)
        except StructureError:
            assert where == "model"
            continue
        assert torch.equal(result.index, given)
        assert_weights(result, lm.log_evidence(xs)[given])


def test_a_subsample_that_is_given_and_changes_between_calls():
    lm, xs = linear_gaussian(num_data=20)

    def model(xs, index):
        with pyro.plate("data", 20, subsample=index):
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=xs[index])

    def guide(xs, index):
        with pyro.plate("data", 20, subsample=index):
            pyro.sample("z", posterior(lm, xs[index]))

    pair = Pair(model, guide)
    for index in (torch.tensor([3, 1, 17]), torch.tensor([0, 19, 5])):
        result = weigh(None, None, xs, index, pair=pair)
        assert torch.equal(result.index, index)
        assert_weights(result, lm.log_evidence(xs)[index])


def test_different_subsamples_in_model_and_guide_are_never_mixed():
    lm, xs = linear_gaussian(num_data=20)
    ours, theirs = torch.tensor([3, 1, 17]), torch.tensor([4, 5, 6])

    def model(xs):
        with pyro.plate("data", 20, subsample=ours) as index:
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=xs[index])

    def guide(xs):
        with pyro.plate("data", 20, subsample=theirs) as index:
            pyro.sample("z", posterior(lm, xs[index]))

    with pytest.raises(StructureError, match="data"):
        weigh(model, guide, xs)


def test_a_plate_without_subsampling_has_no_index():
    lm, x = linear_gaussian()
    result = weigh(*exact_pair(lm), x)
    assert result.index is None
    assert not result.structure.subsampled


def test_a_subsample_size_of_all_data_is_no_subsample():
    lm, xs = linear_gaussian(num_data=6)
    model, guide, _ = subsampling_pair(lm, 6, 6)
    result = weigh(model, guide, xs)
    assert result.index is None
    assert_weights(result, lm.log_evidence(xs))


@pytest.mark.parametrize("datum_plate", ["infer", None])
def test_a_subsampled_plate_inside_the_datum_is_refused(datum_plate):
    lm, x = linear_gaussian(latent_dim=1, data_dim=4)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with pyro.plate("pixels", 4, subsample_size=2, dim=-1) as index:
                pyro.sample("x", dist.Normal(lm.weight[index, 0] * z, 1.0), obs=x[:, index])

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(5, 1, dtype=F64), 1.0))

    with pytest.raises(SubsamplingError, match=r"'pixels'.*2 of 4"):
        weigh(model, guide, x, datum_plate=datum_plate)


def test_one_datum_of_the_whole_call_refuses_subsampling():
    lm, xs = linear_gaussian(num_data=20)
    model, guide, _ = subsampling_pair(lm, 20, 5)
    with pytest.raises(SubsamplingError, match="5 of 20"):
        weigh(model, guide, xs, datum_plate=None)


# --- the whole call as one datum ---


def regression(num_data=6, num_features=2, noise=0.5):
    features, y = randn(num_data, num_features), randn(num_data)
    precision = features.T @ features / noise**2 + torch.eye(num_features, dtype=F64)
    mean = torch.linalg.solve(precision, features.T @ y / noise**2)
    covariance = features @ features.T + noise**2 * torch.eye(num_data, dtype=F64)
    log_evidence = dist.MultivariateNormal(torch.zeros(num_data, dtype=F64), covariance).log_prob(y)

    def model(features, y):
        zero = torch.zeros(num_features, dtype=F64)
        w = pyro.sample("w", dist.Normal(zero, 1.0).to_event(1))
        with pyro.plate("data", num_data):
            pyro.sample("y", dist.Normal((features * w).sum(-1), noise), obs=y)

    def guide(features, y):
        pyro.sample("w", dist.MultivariateNormal(mean, precision_matrix=precision))

    return model, guide, (features, y), log_evidence


@pytest.mark.parametrize("num_particles", [1, 2, 6])
def test_bayesian_linear_regression_as_one_datum(num_particles):
    model, guide, args, log_evidence = regression()
    result = weigh(model, guide, *args, datum_plate=None, K=num_particles)
    assert result.log_weight.shape == (num_particles, 1)
    assert_weights(result, log_evidence.reshape(1))


def test_bayesian_linear_regression_with_a_matrix_product():
    """`features @ w` cannot take a leading axis: another execution has to give the same number."""
    _, guide, args, log_evidence = regression()

    def model(features, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(features @ w, 0.5), obs=y)

    result = weigh(model, guide, *args, datum_plate=None)
    assert_weights(result, log_evidence.reshape(1))


def test_a_global_latent_is_refused_with_the_ways_out():
    model, guide, args, _ = regression()
    with pytest.raises(GlobalLatentError, match=r"'w'.*'data'.*datum_plate=None"):
        weigh(model, guide, *args)


def test_a_global_latent_is_refused_where_the_plate_is_named():
    model, guide, args, _ = regression()
    with pytest.raises(GlobalLatentError, match="'w'"):
        weigh(model, guide, *args, datum_plate="data")


def test_global_and_local_latents_as_one_datum():
    """theta ~ N(0, 1), z_i ~ N(theta, 1), x_i ~ N(z_i, 1): x is N(0, 2 I + 1 1')."""
    x = randn(4)
    covariance = 2 * torch.eye(4, dtype=F64) + 1

    def model(x):
        theta = pyro.sample("theta", dist.Normal(ZERO, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        precision = 1 + len(x) / 2
        theta = pyro.sample("theta", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((theta + x) / 2, 0.5**0.5))

    log_evidence = dist.MultivariateNormal(torch.zeros(4, dtype=F64), covariance).log_prob(x)
    for num_particles in (1, 3, 4):
        assert_weights(weigh(model, guide, x, datum_plate=None, K=num_particles), log_evidence.reshape(1))


def test_no_plate_at_all():
    lm, x = linear_gaussian()

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(5, 2, dtype=F64), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(2), obs=x)

    def guide(x):
        pyro.sample("z", posterior(lm, x).to_event(1))

    with pytest.raises(DatumPlateError, match="no plate is common.*datum_plate=None"):
        weigh(model, guide, x)
    assert_weights(weigh(model, guide, x, datum_plate=None), lm.log_evidence(x).sum().reshape(1))


def test_no_plate_and_batch_shapes_as_one_datum():
    """Undeclared batch dimensions are summed where the whole call is one datum."""
    x = randn(4)

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    assert_weights(weigh(model, guide, x, datum_plate=None), normal(x, 0.0, 2**0.5).sum().reshape(1))


def test_one_scalar_latent_and_no_batch_shape_anywhere():
    x = randn(1)[0]

    def model(x):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    assert_weights(weigh(model, guide, x, datum_plate=None), normal(x, 0.0, 2**0.5).reshape(1))


# --- empty batches ---


def test_an_empty_batch_is_refused():
    lm, x = linear_gaussian()
    with pytest.raises(EmptyBatchError, match="empty"):
        weigh(*exact_pair(lm), x[:0])


def test_an_empty_batch_is_refused_after_a_full_one():
    lm, x = linear_gaussian()
    pair = Pair(*exact_pair(lm))
    weigh(None, None, x, pair=pair)
    with pytest.raises(EmptyBatchError, match="empty"):
        weigh(None, None, x[:0], pair=pair)


def test_batches_of_several_sizes_share_a_pair():
    lm, x = linear_gaussian(num_data=7)
    pair = Pair(*exact_pair(lm))
    for size in (7, 1, 4, 7):
        assert_weights(weigh(None, None, x[:size], pair=pair), lm.log_evidence(x[:size]))


def test_vectorised_and_plate_objects_are_one_plate():
    """A plate as a decorator of a function."""
    x = randn(5)

    def model(x):
        @pyro.plate("data", len(x))
        def body():
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        body()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    assert_weights(weigh(model, guide, x), normal(x, 0.0, 2**0.5))


def test_a_conditioned_program():
    """poutine.condition around the whole model is the usual way to pass data."""
    lm, x = linear_gaussian()

    def joint(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z))

    model = poutine.condition(joint, data={"x": x})
    assert_weights(weigh(model, exact_pair(lm)[1], x), lm.log_evidence(x))


# -------------------------------------------------------------------------------- one datum without any shape


def test_one_latent_without_any_shape():
    """z ~ N(0, 1), x ~ N(z, 1), x = 1.3: every estimator, and the split of the gap."""
    x = torch.tensor(1.3)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.5, 0.8))

    truth = dist.Normal(0.0, 2**0.5).log_prob(x).reshape(1)
    gaps = pv.InferenceGaps(model, guide, seed=0, datum_plate=None)(x)
    kl = torch.distributions.kl_divergence(dist.Normal(0.5, 0.8), dist.Normal(0.65, 0.5**0.5)).reshape(1)
    assert ((gaps.log_evidence - truth).abs() < 5 * gaps.std_errors["log_evidence"]).all()
    assert ((gaps.amortization - kl).abs() < 5 * gaps.std_errors["amortization"] + 0.01).all()
    assert (gaps.std_errors["amortization"] < 0.02).all()
    torch.testing.assert_close(pv.ExactEvidence(model, guide, datum_plate=None)(x).log_evidence, truth, rtol=1e-4, atol=1e-4)


def test_a_plate_without_a_size_inside_the_one_datum():
    """f ~ Beta(2, 2), four flips of which three are heads: a ratio of beta functions. Five errors."""
    y = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def model(y):
        f = pyro.sample("f", dist.Beta(2.0, 2.0))
        with pyro.plate("flips"):
            pyro.sample("y", dist.Bernoulli(f), obs=y)

    def guide(y):
        pyro.sample("f", dist.Beta(4.0, 3.0))

    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    evidence = pv.ImportanceSampling(model, guide, num_particles=2000, seed=0, datum_plate=None)(y)
    assert abs(float(evidence.log_evidence) - (log_beta(5, 3) - log_beta(2, 2))) < 5 * float(evidence.std_error)
    assert float(evidence.std_error) < 0.02


# --- a plate that the guide alone subsamples ---


def of_ten(x, size):
    with pyro.plate("data", 10) as index:
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def some_of_ten(x, size):
    with pyro.plate("data", 10, subsample_size=size) as index:
        pyro.sample("z", dist.Normal(0.5 * x[index], 0.5**0.5))


@pytest.mark.parametrize("size", [4, 10])
def test_the_model_takes_the_subsample_of_the_guide(size):
    """As Pyro's replay gives it. The guide is the posterior, so every weight is p(x_n) for the data that it chose."""
    x = randn(10)
    found = pv.ImportanceSampling(of_ten, some_of_ten, num_particles=7, seed=0)(x, size)
    assert_close(found.log_evidence, dist.Normal(ZERO, 2**0.5).log_prob(x)[found.index if size == 4 else slice(None)])
    assert len(found) == size and set(found.stripped_scales) == (set() if size == 10 else {"z", "x"})
    gaps = pv.InferenceGaps(of_ten, some_of_ten, num_particles=100, seed=0)(x, size)
    assert_close(gaps.elbo, found.log_evidence)


def test_the_objectives_take_it_too():
    """The loss is that of both sides subsampled, of which the indices are drawn alike."""
    x, losses = randn(10), []
    for model in (of_ten, lambda x, size: both(x, size)):
        for objective in (pv.BetaTrace_ELBO(), pv.BetaTraceMeanField_ELBO(), pv.ImportanceWeightedELBO(num_particles=1)):
            pyro.set_rng_seed(0)
            losses.append(objective.loss(model, some_of_ten, x, 4))
    assert losses[:3] == pytest.approx(losses[3:])


def both(x, size):
    with pyro.plate("data", 10, subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def test_another_size_of_the_subsample_is_refused():
    x = randn(10)
    with pytest.raises(DatumPlateError, match=r"sizes \[4, 6\]"):
        pv.ImportanceSampling(lambda x, size: both(x, 6), some_of_ten, seed=0)(x, 4)
    with pytest.raises(DatumPlateError, match=r"sizes \[4, 10\]"):  # the guide draws all, the model wants some
        pv.ImportanceSampling(both, lambda x, size: some_of_ten(x, 10), seed=0)(x, 4)
