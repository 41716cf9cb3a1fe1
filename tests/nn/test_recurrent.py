"""A sequence is read backwards from its own end: each one alone is what a batch of them gives."""

import pytest
import torch

from pyro_vae.errors import ArgumentError, OptionError
from pyro_vae.nn import BackwardGRU, OneHot

LENGTHS = torch.tensor([5, 3, 1, 4])


@pytest.mark.parametrize("padding", [0.0, 1e30, torch.nan])
def test_features_are_those_of_each_sequence_alone(padding):
    network, x = BackwardGRU(3, 4).double(), torch.randn(4, 5, 3, dtype=torch.float64)
    x = x.masked_fill((torch.arange(5) >= LENGTHS[:, None])[..., None], padding)
    features = network(x, LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone = network.gru(x[row : row + 1, :length].flip(1))[0].flip(1)
        torch.testing.assert_close(features[row : row + 1, :length], alone)
    real = torch.arange(5) < LENGTHS[:, None]
    features[real].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_data_of_another_kind_pass_a_first_module():
    x = torch.tensor([[[0], [2], [1], [0], [1]]]).expand(4, 5, 1)
    assert BackwardGRU(3, 4, first=OneHot(3))(x, LENGTHS).shape == (4, 5, 4)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, 3), torch.zeros(4, 5, 2), torch.zeros(4, 5, 3, dtype=torch.long), None],
    ids=["flat", "narrow", "whole numbers", "nothing"],
)
def test_other_data_are_refused(x):
    with pytest.raises(ArgumentError, match=r"expected sequences of floating-point numbers \(B, T, 3\), got.*first="):
        BackwardGRU(3, 4)(x, LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 3, 1, 4], "torch.tensor"),
        (LENGTHS[:3], r"\(4,\), got"),
        (LENGTHS + 1, "between 1 and the 5 steps of x, got 2 to 6"),
    ],
    ids=["a list", "too few", "too long"],
)
def test_lengths_are_those_of_the_sequences(lengths, message):
    with pytest.raises(ArgumentError, match=message):
        BackwardGRU(3, 4)(torch.zeros(4, 5, 3), lengths)


def test_dimensions_are_positive():
    with pytest.raises(OptionError, match="hidden_dim"):
        BackwardGRU(3, 0)
    with pytest.raises(OptionError, match="first must be"):
        BackwardGRU(3, 4, first="OneHot")
