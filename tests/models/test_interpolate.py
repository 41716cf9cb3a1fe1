"""Walks between two data: their ends, their line, and what has no mean to walk along."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from vae_helpers import small_data, small_vae, snapshot

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, OptionError, StructureError
from pyro_vae.models import VAE, LinearVAE


def test_it_goes_straight_from_one_reconstruction_to_the_other():
    """A linear decoder has the line between its ends; the ends are the means at the posterior means."""
    vae, x = LinearVAE(6, 2).double(), small_data().double()
    x0, x1 = x[:4], x[4:8]
    walk = vae.interpolate(x0, x1, 5)
    ends = [vae.decode(vae.encode(one).mean).mean.detach() for one in (x0, x1)]
    assert walk.shape == (5, 4, 6) and not walk.requires_grad
    for step, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        torch.testing.assert_close(walk[step], torch.lerp(*ends, share))


def test_it_decodes_the_line_of_the_latents_and_leaves_no_trace():
    vae, x = small_vae(), small_data()
    vae.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 6), pv.nn.Bernoulli())
    vae.train()
    before, state = snapshot(vae), torch.get_rng_state()
    with poutine.trace() as outer:
        walk = vae.interpolate(x[:3], x[3:6])
    assert walk.shape == (9, 3, 6) and not outer.trace.nodes
    assert vae.decoder.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(vae).values(), before.values(), strict=True))
    vae.eval()
    middle = (vae.encode(x[:3]).mean + vae.encode(x[3:6]).mean) / 2
    torch.testing.assert_close(walk[4], vae.decode(middle).mean.detach())


def test_images_keep_their_shape():
    vae = pv.conv_vae((1, 8, 8), 2, likelihood=pv.nn.Bernoulli(event_dim=3), channels=(2,))
    assert vae.interpolate(torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8), 2).shape == (2, 3, 1, 8, 8)


@pytest.mark.parametrize("num_steps", [1, 0, 2.5, None, True])
def test_it_takes_two_steps_or_more(num_steps):
    x = small_data()
    with pytest.raises(OptionError, match="num_steps must be a whole number of at least 2"):
        small_vae().interpolate(x, x, num_steps)


def test_both_ends_have_one_shape():
    vae, x = small_vae(), small_data()
    with pytest.raises(ArgumentError, match=r"the two ends of each row, got \(10, 6\) and \(1, 6\): expand one datum"):
        vae.interpolate(x, x[:1])
    assert vae.interpolate(x, x[:1].expand(len(x), *x.shape[1:])).shape == (9, 10, 6)
    with pytest.raises(ArgumentError, match="x must be a tensor of data"):
        vae.interpolate(x, None)


class FlowHead(nn.Module):
    def forward(self, raw):
        base = dist.Normal(raw, 1.0).to_event(1)
        return dist.TransformedDistribution(base, [dist.transforms.TanhTransform()])


def test_without_a_mean_the_message_names_what_works():
    vae, x = small_vae(), small_data()
    flow = VAE(nn.Sequential(nn.Linear(6, 2), FlowHead()), vae.decoder, vae.prior)
    with pytest.raises(
        StructureError, match=r"q\(z given x\), \w+, has no formula for its mean.*torch.lerp\(.*, 0.5\)\).mean"
    ):
        flow.interpolate(x, x)
    x0, x1 = x[:3], x[3:6]
    assert flow.decode(torch.lerp(flow.encode(x0).sample(), flow.encode(x1).sample(), 0.5)).mean.shape == (3, 6)
    classes = VAE(vae.encoder, nn.Sequential(nn.Linear(2, 18), pv.nn.Categorical(3)), vae.prior)
    with pytest.raises(StructureError, match="has no mean to reconstruct x with"):
        classes.interpolate(x, x)
