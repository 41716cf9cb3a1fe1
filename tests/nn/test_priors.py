"""The standard normal prior."""

import copy

import pytest
import torch
from nn_helpers import F64

import pyro_vae.nn as nn
from pyro_vae.errors import SupportError


def test_it_is_the_standard_normal():
    z = torch.randn(5, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(nn.StandardNormal(3)().log_prob(z), expected)
    fn = nn.StandardNormal(3)().expand((4, 5))
    assert (fn.batch_shape, fn.event_shape) == ((4, 5), (3,))
    torch.testing.assert_close(fn.log_prob(z), expected.expand(4, 5))


def test_it_follows_types_and_devices():
    assert nn.StandardNormal(3).double()().sample().dtype == F64
    assert nn.StandardNormal(3).to("meta")().rsample().device.type == "meta"
    assert copy.deepcopy(nn.StandardNormal(3))().event_shape == (3,)


def test_latents_of_another_size_are_refused():
    """The three numbers of a prior would be stretched over the one, or one over the three."""
    for prior, width in ((3, 1), (1, 3)):
        with pytest.raises(SupportError, match=rf"StandardNormal.*\({prior},\).*\(5, {width}\)"):
            nn.StandardNormal(prior)().log_prob(torch.zeros(5, width))
