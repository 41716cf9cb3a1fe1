"""Bodies: shapes, any leading dimensions, odd image sizes, refusals."""

import pytest
import torch
from torch import nn as torch_nn

import pyro_vae.nn as nn
from pyro_vae.errors import ArgumentError, OptionError


def flattening():
    """A network that takes exactly (B, 2, 3)."""
    return torch_nn.Sequential(torch_nn.Flatten(), torch_nn.Linear(6, 3))


SIZES = [(1, 8, 8), (1, 28, 28), (2, 27, 27), (3, 5, 11), (1, 4, 4)]
BODIES = {
    "MLP": (lambda: nn.MLP(6, 3), (6,)),
    "linear": (lambda: nn.MLP(6, 3, hidden=()), (6,)),
    "ConvNet": (lambda: nn.ConvNet((2, 9, 8), 3, channels=(4, 5)), (2, 9, 8)),
    "DeconvNet": (lambda: nn.DeconvNet(6, (2, 9, 8), channels=(5, 4)), (6,)),
    "BatchApply": (lambda: nn.BatchApply(flattening(), event_dim=2), (2, 3)),
}
every_body = pytest.mark.parametrize("name", BODIES)


@every_body
@pytest.mark.parametrize("leading", [(), (5,), (4, 5), (2, 4, 5), (0,), (4, 0)])
def test_any_leading_dimensions(name, leading):
    make, event = BODIES[name]
    body = make()
    x = torch.randn(*leading, *event)
    out = body(x)
    expected = [body(row.unsqueeze(0)).squeeze(0) for row in x.reshape(-1, *event)] if x.numel() else []
    assert out.shape[: len(leading)] == leading
    for row, one in zip(out.reshape(-1, *out.shape[len(leading) :]) if expected else (), expected, strict=True):
        torch.testing.assert_close(row, one, rtol=1e-4, atol=1e-5)


@every_body
def test_under_vmap(name):
    make, event = BODIES[name]
    body = make()
    x = torch.randn(4, 5, *event)
    torch.testing.assert_close(torch.vmap(body)(x), body(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(torch.vmap(body))(x), body(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("image_shape", SIZES)
def test_images_of_any_size_go_in_and_come_out(image_shape):
    encoder, decoder = nn.ConvNet(image_shape, 7, channels=(4, 5)), nn.DeconvNet(7, image_shape, channels=(5, 4))
    out = decoder(encoder(torch.randn(3, *image_shape)))
    assert out.shape == (3, *image_shape)
    out.sum().backward()
    # Every weight takes part; the first layer's gradient is zero only where a ReLU is off for all.
    assert all(bool((p.grad != 0).any()) for p in (*encoder.parameters(), *decoder.parameters()))


def test_every_pixel_is_seen_and_every_pixel_is_made():
    """No row or column is lost to rounding."""
    torch.manual_seed(0)
    for shape in ((1, 27, 27), (1, 28, 28)):
        x = torch.randn(1, *shape, requires_grad=True)
        nn.ConvNet(shape, 9, activation=torch_nn.Softplus)(x).square().sum().backward()
        seen = x.grad[0, 0] != 0
        assert bool(seen.all())
        images = nn.DeconvNet(3, shape, activation=torch_nn.Softplus)(torch.randn(20, 3))
        assert bool((images.std(0) > 0).all())


def test_mlp_is_the_layers_it_says():
    body = nn.MLP(6, 3, hidden=(5, 4), activation=torch_nn.Tanh)
    x = torch.randn(7, 6)
    h = x
    for i in (0, 2):
        h = torch.tanh(h @ body[i].weight.T + body[i].bias)
    torch.testing.assert_close(body(x), h @ body[4].weight.T + body[4].bias)
    assert [type(layer).__name__ for layer in body] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [p.shape for p in nn.MLP(6, 3).parameters()] == [(400, 6), (400,), (3, 400), (3,)]


def test_dtype_is_kept():
    for make, event in BODIES.values():
        assert make().double()(torch.randn(2, *event, dtype=torch.float64)).dtype == torch.float64


def test_refusals():
    for make in (
        lambda: nn.ConvNet((28, 28), 3),
        lambda: nn.ConvNet((1, 3, 28), 3),
        lambda: nn.DeconvNet(3, (1, 28, 7), channels=(8, 8, 8)),
        lambda: nn.DeconvNet(3, (1, 28, 28), channels=()),
    ):
        with pytest.raises(OptionError, match="image_shape must be"):
            make()
    with pytest.raises(ArgumentError, match=r"expected images .*\(1, 8, 8\).*\(5, 1, 8, 9\)"):
        nn.ConvNet((1, 8, 8), 3)(torch.zeros(5, 1, 8, 9))
    with pytest.raises(ArgumentError, match="2 event dimensions"):
        BODIES["BatchApply"][0]()(torch.zeros(3))
