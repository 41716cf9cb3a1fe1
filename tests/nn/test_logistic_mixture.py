"""The mixture of rounded logistic variables."""

import pytest
import torch
from nn_helpers import F64

import pyro_vae.nn as nn
from pyro_vae.densities import is_discrete
from pyro_vae.errors import OptionError


def test_one_component_is_a_discretised_logistic():
    one, plain = nn.DiscretizedLogisticMixture(17, num_components=1), nn.DiscretizedLogistic(17)
    raw = torch.randn(4, 10, dtype=F64)
    x = torch.randint(17, (4, 5)).to(F64)
    found = one(torch.cat([torch.randn(4, 5, dtype=F64), raw], -1))  # whatever its weight
    torch.testing.assert_close(found.log_prob(x), plain(raw).log_prob(x))
    torch.testing.assert_close(found.mean, plain(raw).mean)


def test_it_is_a_weighted_sum_of_components_that_start_apart():
    head, size, count = nn.DiscretizedLogisticMixture(256, num_components=4), 3, 4
    raw = torch.randn(5, head.num_outputs(size), dtype=F64)
    x = torch.randint(256, (5, size)).to(F64)
    logits, loc, scale = (raw[:, i * count * size : (i + 1) * count * size].reshape(5, count, size) for i in range(3))
    plain = nn.DiscretizedLogistic(256)
    middle = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=F64)
    expected = torch.zeros(5, size, dtype=F64)
    for c in range(count):
        weight = logits.softmax(1)[:, c]
        for i in range(size):
            numbers = torch.stack([loc[:, c, i] + middle[c], scale[:, c, i]], -1)
            expected[:, i] += weight[:, i] * plain(numbers).log_prob(x[:, i : i + 1]).exp()
    torch.testing.assert_close(head(raw).log_prob(x), expected.log().sum(-1))


def test_it_holds_two_peaks_that_one_logistic_cannot():
    """Each of 40 pixels is 20 or 230: two components come near log 2 per pixel, one cannot."""
    torch.manual_seed(0)
    x = torch.where(torch.rand(64, 40) < 0.5, 20.0, 230.0)
    found = []
    for head in (nn.DiscretizedLogisticMixture(256, num_components=2), nn.DiscretizedLogistic(256)):
        raw = torch.zeros(head.num_outputs(40), requires_grad=True)
        adam = torch.optim.Adam([raw], 0.1)
        for _ in range(300):
            adam.zero_grad()
            loss = -head(raw).log_prob(x).mean() / 40
            loss.backward()
            adam.step()
        found.append(float(loss.detach()))
    assert found[0] < 1.0
    assert found[1] > 3.0


def test_its_support_is_discrete():
    """A mixture of torch says that it is continuous, whatever its components."""
    assert is_discrete(nn.DiscretizedLogisticMixture(6)(torch.zeros(15)))


def test_options():
    for make in (lambda: nn.DiscretizedLogisticMixture(1), lambda: nn.DiscretizedLogisticMixture(num_components=0)):
        with pytest.raises(OptionError, match="whole number of at least"):
            make()
