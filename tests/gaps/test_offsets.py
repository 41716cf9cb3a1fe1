"""Offsets per datum: at zero the guide itself, for every wrapper; then as far as its family goes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, diagonal_family, exact_pair, guide_of, linear_gaussian, model_of
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from pyro_vae.errors import LocalFitError
from pyro_vae.gaps.adam import fit_offsets
from pyro_vae.gaps.families import rebuilt
from pyro_vae.gaps.offsets import GuideOffsets
from pyro_vae.kernel import Pair


def f64(*values):
    return torch.tensor(values, dtype=F64)


DISTRIBUTIONS = {
    "normal": lambda: dist.Normal(f64(0.1, 0.2, 0.3), 0.5),
    "independent": lambda: dist.Normal(torch.zeros(3, 2, dtype=F64), 0.5).to_event(1),
    "two events": lambda: dist.Normal(torch.zeros(3, 2, 2, dtype=F64), 0.5).to_event(2),
    "masked": lambda: dist.Normal(f64(0.1, 0.2, 0.3), 0.5).mask(torch.tensor([True, False, True])),
    "masked inside": lambda: dist.Normal(torch.zeros(3, 2, dtype=F64), 1.0).mask(torch.tensor([True, False])).to_event(1),
    "expanded": lambda: dist.Normal(f64(0.0).squeeze(), 0.5).expand([3]),
    "wrapped and expanded": lambda: dist.Normal(torch.zeros(2, dtype=F64), 0.5).to_event(1).expand([3]),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(f64(0.1, 0.2, 0.3), 0.5),
        [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.ExpTransform()],
    ),
    "log normal": lambda: dist.LogNormal(f64(0.1, 0.2, 0.3), 0.5),
    "joint": lambda: dist.MultivariateNormal(torch.zeros(3, 2, dtype=F64), torch.eye(2, dtype=F64) + 0.3),
    "low rank": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(3, 2, dtype=F64), torch.ones(3, 2, 1, dtype=F64), torch.ones(3, 2, dtype=F64)
    ),
    "gamma": lambda: dist.Gamma(f64(1.0, 2.0, 3.0), 1.5),
    "beta": lambda: dist.Beta(f64(1.0, 2.0, 3.0), 1.5),
    "dirichlet": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0], dtype=F64).expand(3, 2)),
    "laplace": lambda: dist.Laplace(f64(0.1, 0.2, 0.3), 0.5),
    "student": lambda: dist.StudentT(f64(5.0, 6.0, 7.0), 0.0, 0.5),
}


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_a_shift_of_zero_rebuilds_the_distribution(name):
    fn = DISTRIBUTIONS[name]()
    seen = []

    def shift(parameter, value, event_dim, unit):
        seen.append(parameter)
        assert value.shape[: value.ndim - event_dim] == fn.batch_shape, (parameter, value.shape, event_dim)
        return value

    new = rebuilt(fn, shift, fn.batch_shape)
    assert new.batch_shape == fn.batch_shape
    assert new.event_shape == fn.event_shape
    value = fn.sample()
    assert torch.allclose(new.log_prob(value), fn.log_prob(value), atol=1e-9)
    torch.manual_seed(1)
    a = fn.rsample()
    torch.manual_seed(1)
    assert torch.allclose(new.rsample(), a, atol=1e-9)
    assert seen


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_every_datum_and_parameter_has_its_own_offset(name):
    """A shift of one datum moves its own density and no other's."""
    fn = DISTRIBUTIONS[name]()
    value = fn.sample()

    def shift(parameter, value, event_dim, unit):
        flags = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
        return value + 0.3 * flags.reshape(-1, *(1,) * event_dim)

    moved = (rebuilt(fn, shift, fn.batch_shape).log_prob(value) - fn.log_prob(value)).abs() > 1e-9
    expected = [False, name != "masked", False]
    assert moved.tolist() == expected


def opened(model, guide, *args, **options):
    return Pair(model, guide, **options).open(args, {}, 0)


def wrapped_pair(wrap):
    lm, x = linear_gaussian(2, 4)
    family = diagonal_family(lm, 0.3, 1.4)
    return lm, x, model_of(lm), guide_of(lambda x: wrap(family(x)))


@pytest.mark.parametrize("wrap", [lambda fn: fn, lambda fn: fn.mask(True), lambda fn: fn.expand(fn.batch_shape)])
def test_without_a_fit_the_offsets_change_nothing(wrap):
    _, x, model, guide = wrapped_pair(wrap)
    with torch.no_grad(), opened(model, guide, x) as call:
        offsets = GuideOffsets(call)
        plain = call.log_weights(30, 1)[1]
        shifted = call.log_weights(30, 1, adjust=offsets.adjust)[1]
    assert torch.allclose(plain, shifted, atol=1e-10)
    assert {tuple(t.shape) for t in offsets.tensors} == {(6, 2)}
    assert "z: loc, scale" in offsets.family


@pytest.mark.parametrize("wrap", [lambda fn: fn, lambda fn: fn.mask(True), lambda fn: fn.expand(fn.batch_shape)])
def test_the_fit_reaches_the_best_of_the_family(wrap):
    lm, x, model, guide = wrapped_pair(wrap)
    with torch.no_grad(), opened(model, guide, x) as call:
        offsets = fit_offsets(call)
        base, _ = offsets.adjust("z", wrap(diagonal_family(lm, 0.3, 1.4)(x)))
    best = lm.optimal_diagonal(x).base_dist
    while hasattr(base, "base_dist"):
        base = base.base_dist
    assert bool(offsets.converged.all())
    loc, scale = base.loc.detach(), base.scale.detach()
    assert ((loc - best.loc).abs() < 0.25 * best.scale).all()
    assert ((scale / best.scale).log().abs() < 0.25).all()
    q = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
    shortfall = lm.elbo(x, torch.distributions.Independent(best, 1)) - lm.elbo(x, q)
    assert shortfall.mean() < 0.01
    assert shortfall.max() < 0.05


def test_the_elbo_never_falls_by_more_than_the_tolerance():
    """An exact guide can only lose."""
    lm, x = linear_gaussian(num_data=50)
    with torch.no_grad(), opened(*exact_pair(lm), x) as call:
        offsets = fit_offsets(call)
        fitted = call.log_weights(2000, 1, adjust=offsets.adjust)[1].mean(0)
    assert (lm.log_evidence(x) - fitted).max() < 0.05
    assert (lm.log_evidence(x) - fitted).mean() < 0.005
    assert bool(offsets.converged.all())


def test_sticking_the_landing():
    """At the exact posterior every gradient is zero, draw by draw (Roeder et al., 2017)."""
    lm, x = linear_gaussian()
    with torch.no_grad(), opened(*exact_pair(lm), x) as call:
        offsets = GuideOffsets(call)
        call.set_noise(4, 0)
        with torch.enable_grad():
            drawn = call.draw(3, adjust=offsets.adjust)
            scored = call.score(call.latent_values(drawn), 3)
            bound = call.weigh(drawn, scored, 3).elbo.sum()
            gradients = torch.autograd.grad(bound, offsets.tensors)
    assert len(gradients) == 2
    assert max(float(g.abs().max()) for g in gradients) < 1e-8


def test_restoring_puts_back_single_data():
    _, x, model, guide = wrapped_pair(lambda fn: fn)
    with torch.no_grad(), opened(model, guide, x) as call:
        offsets = GuideOffsets(call)
        call.log_weights(5, 1, adjust=offsets.adjust)
        before = offsets.state()
        for tensor in offsets.tensors:
            tensor.detach().add_(1.0)
        where = torch.arange(6) % 2 == 0
        offsets.restore(before, where)
    for tensor in offsets.tensors:
        assert torch.equal(tensor.detach()[where], torch.zeros(3, 2, dtype=F64))
        assert torch.equal(tensor.detach()[~where], torch.ones(3, 2, dtype=F64))


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_offsets_in_nested_plates(data_dim):
    """One set per datum and step; restored along the axis of the data."""
    w, s = 1.3, 0.6
    x = torch.randn(4, 3, dtype=F64)
    inner = -3 - data_dim

    def arranged(x):
        return x if data_dim == -2 else x.T

    def program(x, observe):
        with pyro.plate("data", 4, dim=data_dim), pyro.plate("steps", 3, dim=inner):
            if not observe:
                pyro.sample("z", dist.Normal(0.3 * arranged(x), 0.7))
                return
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(w * z, s), obs=arranged(x))

    pair = (lambda x: program(x, True)), (lambda x: program(x, False))
    with torch.no_grad(), opened(*pair, x, datum_plate="data") as call:
        offsets = fit_offsets(call)
        elbo = call.log_weights(2000, 1, adjust=offsets.adjust)[1].mean(0)
        assert {tuple(t.shape) for t in offsets.tensors} == {tuple(arranged(x).shape)}
        state = offsets.state()
        offsets.restore([torch.zeros_like(t) for t in state], torch.tensor([True, False, False, False]))
        for tensor in offsets.tensors:
            kept = tensor.detach().movedim(data_dim, 0)
            assert bool((kept[0] == 0).all())
            assert bool((kept[1:] != 0).any())
    truth = dist.Normal(x.new_zeros(()), math.sqrt(w * w + s * s)).log_prob(x).sum(-1)
    assert (truth - elbo).max() < 0.05
    assert (truth - elbo).min() > -0.02


def test_hierarchical_guides_keep_their_dependence():
    """The offset of a | b is added to a mean that depends on the draw of b: the family has the guide."""
    x = torch.randn(6, dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.5))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("a", dist.Normal(b, 0.5))

    with torch.no_grad(), opened(model, guide, x) as call:
        offsets = GuideOffsets(call)
        plain, shifted = (call.log_weights(40, 1, adjust=a)[1] for a in (None, offsets.adjust))
        assert torch.allclose(plain, shifted, atol=1e-10)
        assert {tuple(t.shape) for t in offsets.tensors} == {(6,)}
        assert len(offsets.tensors) == 4


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_autoguides_are_freed_per_datum(kind):
    lm, x = linear_gaussian(2, 4, num_data=8)
    guide = kind(model_of(lm), init_scale=0.5)
    guide(x)
    with torch.no_grad(), opened(model_of(lm), guide, x) as call:
        before = call.log_weights(200, 1)[1].mean(0)
        offsets = fit_offsets(call)
        after = call.log_weights(2000, 1, adjust=offsets.adjust)[1].mean(0)
    assert bool((after > before).all())
    best = lm.log_evidence(x) - lm.approximation_gap()
    assert (best - after).mean() < 0.05


def test_masked_latents_do_not_disturb_the_fit():
    lm, x = linear_gaussian(2, 4)
    seen = torch.arange(6) % 2 == 0
    family = diagonal_family(lm, 0.3, 1.4)

    def masked(program):
        return poutine.mask(program, mask=seen)

    model, guide = masked(model_of(lm)), masked(guide_of(family))
    with torch.no_grad(), opened(model, guide, x) as call:
        offsets = fit_offsets(call)
        elbo = call.log_weights(500, 1, adjust=offsets.adjust)[1].mean(0)
    assert bool((elbo[~seen] == 0).all())
    best = lm.log_evidence(x) - lm.approximation_gap()
    assert (best - elbo)[seen].abs().max() < 0.15


def test_a_guide_whose_support_would_move_is_refused_by_name():
    """Offsets on the ends of a uniform guide would draw outside the support of the model."""
    x = torch.randn(4, dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x.new_zeros(len(x)), 1.0))

    with torch.no_grad(), opened(model, guide, x) as call, pytest.raises(LocalFitError, match="Uniform"):
        fit_offsets(call)
