"""Heads of counts: means, dispersions, gates and size factors."""

import math

import pyro
import pytest
import torch
from nn_helpers import F64
from scipy import stats

import pyro_vae.nn as nn
from pyro_vae.errors import ArgumentError

HEADS = {
    "Poisson": nn.Poisson,
    "NegativeBinomial": nn.NegativeBinomial,
    "NegativeBinomial-learned": lambda **options: nn.NegativeBinomial("learned", **options),
    "ZeroInflatedPoisson": nn.ZeroInflatedPoisson,
    "ZeroInflatedNegativeBinomial": nn.ZeroInflatedNegativeBinomial,
}
every_head = pytest.mark.parametrize("name", HEADS)


def raw_for(head, size=3, batch=(4,), dtype=F64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*batch, head.num_outputs(size), generator=generator, dtype=F64).to(dtype)


def test_parameters_come_from_the_raw_numbers_as_the_docstrings_say():
    raw = torch.tensor([0.3, -2.0, 1.5], dtype=F64)
    mean, theta, gate = math.exp(0.3), math.exp(-2) + 1e-4, 1 / (1 + math.exp(-1.5))
    negative_binomial = stats.nbinom(theta, theta / (theta + mean))
    for x in (0, 1, 6):
        value = torch.tensor([float(x)], dtype=F64)
        more = gate if x == 0 else 0.0
        expected = {
            nn.Poisson(): (raw[:1], stats.poisson(mean).pmf(x)),
            nn.NegativeBinomial(): (raw[:2], negative_binomial.pmf(x)),
            nn.NegativeBinomial(4): (raw[:1], stats.nbinom(4, 4 / (4 + mean)).pmf(x)),
            nn.NegativeBinomial("learned").double(): (raw[:1], stats.nbinom(1, 1 / (1 + mean)).pmf(x)),
            nn.ZeroInflatedPoisson(): (raw[[0, 2]], more + (1 - gate) * stats.poisson(mean).pmf(x)),
            nn.ZeroInflatedNegativeBinomial(): (raw, more + (1 - gate) * negative_binomial.pmf(x)),
        }
        for head, (numbers, probability) in expected.items():
            assert float(head(numbers).log_prob(value).exp().detach()) == pytest.approx(probability, rel=1e-9), (head, x)


@every_head
def test_a_size_factor_multiplies_the_mean_of_each_datum(name):
    head = HEADS[name]().double()
    raw, size = raw_for(head), torch.tensor([[0.2], [1.0], [5.0], [3000.0]], dtype=F64)
    fn = head(raw, size_factor=size)
    torch.testing.assert_close(fn.mean, size * head(raw).mean)
    shifted = raw.clone()
    shifted[:, :3] += size.log()  # exp(raw + log size), below where the link is a line
    x = head(raw, size_factor=size).sample()
    torch.testing.assert_close(fn.log_prob(x), head(shifted).log_prob(x))
    torch.testing.assert_close(head(raw, size_factor=torch.ones(4, 1)).log_prob(x), head(raw).log_prob(x))


@every_head
def test_size_factors_stand_under_particles_and_for_images(name):
    head = HEADS[name]().double()
    raw, size = raw_for(head, batch=(5, 4)), torch.tensor([[1], [2], [3], [40]])  # of whole numbers, too
    fn = head(raw, size)
    assert (fn.batch_shape, fn.event_shape) == ((5, 4), (3,))
    x = fn.sample()
    one_by_one = torch.stack([head(raw[k], size).log_prob(x[k]) for k in range(5)])
    torch.testing.assert_close(fn.log_prob(x), one_by_one)
    with pyro.validation_enabled(False):
        torch.testing.assert_close(torch.vmap(lambda r, x: head(r, size).log_prob(x))(raw, x), fn.log_prob(x))
    assert head(raw[0, 0], size).batch_shape == (4,)
    assert head.float()(raw.float(), size.double()).mean.dtype == torch.float32
    images = HEADS[name](event_dim=3).double()
    raw = torch.zeros(4, images.num_outputs(2), 5, 6, dtype=F64)
    torch.testing.assert_close(images(raw, size.reshape(4, 1, 1, 1)).mean, images(raw).mean * size.reshape(4, 1, 1, 1))


@every_head
def test_size_factors_of_another_shape_are_refused(name):
    """(B,) against (B, X) with B = X would be stretched along the genes without a word."""
    head = HEADS[name]()
    raw = raw_for(head, dtype=torch.float32)
    for shape in ((4,), (3,), (), (4, 3), (1, 3), (2, 1), (4, 2, 1)):
        with pytest.raises(ArgumentError, match=r"one size factor for each datum, shape \(4, 1\).*reshape\(-1, 1\)"):
            head(raw, torch.ones(shape))
    head(raw, torch.ones(4).reshape(-1, 1))  # the remedy
    head(raw, torch.ones(1, 1))
    images = HEADS[name](event_dim=3)
    with pytest.raises(ArgumentError, match=r"shape \(4, 1, 1, 1\).*got \(4, 1\): pass size_factor.reshape\(-1, 1, 1, 1\)"):
        images(torch.zeros(4, images.num_outputs(2), 5, 6), torch.ones(4, 1))


@every_head
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_size_factors_must_be_positive(name, bad):
    head = HEADS[name]()
    raw, size = raw_for(head, dtype=torch.float32), torch.ones(4, 1)
    size[2] = bad
    with pytest.raises(ArgumentError, match=r"positive and finite, but 1 of 4 are not, in rows \[2\]: leave out"):
        head(raw, size)
    with pyro.validation_enabled(False):
        assert not head(raw, size).log_prob(torch.ones(4, 3))[2].isfinite() or bad == math.inf


def test_one_theta_per_gene_is_learned():
    head = nn.NegativeBinomial("learned", theta_shape=(3,))
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {"theta.log_value": (3,)}
    with torch.no_grad():
        head.theta.log_value.copy_(torch.tensor([0.0, 2.0, 9.0]))
    raw = torch.zeros(5, 4, 3)
    fn = head(raw)
    torch.testing.assert_close(fn.variance[0, 0], 1 + torch.tensor([0.0, -2.0, -9.0]).exp())
    x = fn.sample()
    single = [nn.NegativeBinomial(math.exp(t))(raw[..., :1]).log_prob(x[..., i : i + 1]) for i, t in enumerate((0, 2, 9))]
    torch.testing.assert_close(fn.log_prob(x), sum(single))
    fn.log_prob(x).sum().backward()
    assert (head.theta.log_value.grad != 0).all()
    with pytest.raises(ArgumentError, match=r"learned theta has shape \(3,\).*events of shape \(2,\)"):
        head(torch.zeros(5, 2))


def test_encoders_see_logarithms():
    x = torch.tensor([[0, 3, 100_000]])
    for make in HEADS.values():
        torch.testing.assert_close(make().input_layer()(x), (x + 1.0).log())
    for head in (nn.Gamma(), nn.LogNormal()):
        torch.testing.assert_close(head.input_layer()(torch.tensor([0.1, 7.0])), torch.tensor([0.1, 7.0]).log())


def test_the_remedy_for_what_is_no_count():
    with pytest.raises(ValueError, match="Poisson head takes whole numbers from 0 on.*pass raw counts, neither normalised"):
        nn.Poisson()(torch.zeros(2)).log_prob(torch.tensor([0.5, 1.0]))
