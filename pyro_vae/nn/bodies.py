"""Networks from tensor to tensor that accept any leading dimensions: (X,), (B, X), (K, B, X), ..."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError, OptionError, described
from ..options import MOST_DIMS, amount, check_function, whole_number, widths_of

Activation = Callable[[], nn.Module]


def apply_flat(network: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Call a network that takes `(B, *event)` on `(..., *event)`."""
    if not isinstance(x, Tensor) or x.ndim < event_dim:
        raise ArgumentError(
            f"expected a tensor (..., *event) with {event_dim} event dimensions, got {described(x)}: keep the "
            "dimensions of a datum together at the right"
        )
    leading, event = x.shape[: x.ndim - event_dim], x.shape[x.ndim - event_dim :]
    out = explained(network, x.reshape(leading.numel(), *event))
    return out.reshape(*leading, *out.shape[1:])


def explained(network: Callable[[Tensor], Tensor], x: Any, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Call a network. If torch cannot multiply the input with the weights, raise with both shapes and torch's message."""
    try:
        return (forward or network)(x)
    except (RuntimeError, TypeError) as error:
        if type(error) not in (RuntimeError, TypeError) or fits(network, x):
            raise
        weight = first_weight(network)
        raise ArgumentError(
            f"the input does not fit the network's weights, {described(weight)}, which multiply its last dimension or "
            f"its channels; got {described(x)} ({error}): convert and reshape it, or build the network for it"
        ) from error


def first_weight(network: Any) -> Tensor | None:
    return next(network.parameters(), None) if isinstance(network, nn.Module) else None


def fits(network: Any, x: Any) -> bool:
    """Whether an input fits the weights, so that it is not the cause of an error."""
    weight = first_weight(network)
    if weight is None or not isinstance(x, Tensor):
        return weight is None
    alike = x.dtype == weight.dtype and x.device == weight.device and x.ndim > 0
    return alike and (weight.ndim != 2 or x.shape[-1] == weight.shape[1])


class BatchApply(nn.Module):
    """Apply a network for `(B, *event)` to `(..., *event)`: leading dimensions are flattened, and restored in the output.

    Convolutions, recurrent layers and `nn.Flatten` need it; `MLP`, `ConvNet` and `DeconvNet` do this automatically.

    :param network: maps `(B, *event)` to `(B, *out)`.
    :param event_dim: dimensions of one input: 1 for vectors, 3 for images (C, H, W).

    >>> BatchApply(nn.Conv2d(1, 8, 3), event_dim=3)(torch.zeros(5, 2, 1, 28, 28)).shape
    torch.Size([5, 2, 8, 26, 26])
    """

    def __init__(self, network: nn.Module, *, event_dim: int = 1) -> None:
        super().__init__()
        check_function("network", network, "a module that takes (B, *event)")
        self.network, self.event_dim = network, whole_number("event_dim", event_dim, highest=MOST_DIMS)

    def forward(self, x: Tensor) -> Tensor:
        return apply_flat(self.network, x, self.event_dim)


class MLP(nn.Sequential):
    """Multilayer perceptron: linear layers with an activation between them, (..., in_features) to (..., out_features).

    :param in_features: width of the input.
    :param out_features: width of the output; for a head, `head.num_outputs(event size)`.
    :param hidden: widths of the hidden layers; `()` for a linear map.
    :param activation: function that returns the activation module, such as `torch.nn.Tanh`.
    :raises OptionError: for a width below 1.

    >>> encoder = nn.Sequential(MLP(784, 2 * 50), Normal())
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (400,),
        activation: Activation = nn.ReLU,
    ) -> None:
        inner = widths_of("hidden", hidden)
        widths = [amount("in_features", in_features), *inner, amount("out_features", out_features)]
        check_function("activation", activation, "a function that makes a module, such as torch.nn.ReLU")
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), activation()]
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return explained(self, x, super().forward)


class ConvNet(nn.Module):
    """Convolutional encoder: strided convolutions and a linear layer, images (..., C, H, W) to (..., out_features).

    Each convolution (kernel 4, stride 2) halves height and width, rounded down, so images may have any size.

    :param image_shape: (C, H, W).
    :param out_features: width of the output; for a head, `head.num_outputs(event size)`.
    :param channels: channels of the convolutions, in order.
    :param activation: function that returns the activation module.
    :raises OptionError: for images too small to be halved once per convolution.

    >>> encoder = nn.Sequential(ConvNet((1, 28, 28), 2 * 50), Normal())
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        out_features: int,
        *,
        channels: Sequence[int] = (32, 64),
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.image_shape, channels, sizes = checked_images(image_shape, channels, activation)
        layers: list[nn.Module] = []
        for before, after in zip((self.image_shape[0], *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), activation()]
        height, width = sizes[-1]
        self.network = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, amount("out_features", out_features))
        )

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or tuple(x.shape[-3:]) != self.image_shape:
            raise ArgumentError(f"expected images (..., {self.image_shape}), got {described(x)}: reshape them")
        return apply_flat(self.network, x, 3)


class DeconvNet(nn.Module):
    """Convolutional decoder: a linear layer and transposed convolutions, (..., in_features) to images (..., C, H, W).

    The reverse of `ConvNet`.

    :param in_features: width of the input.
    :param image_shape: (C, H, W) of the output; for a head with `event_dim=3`, C is `head.num_outputs(channels)`.
    :param channels: input channels of the transposed convolutions, in order.
    :param activation: function that returns the activation module.
    :raises OptionError: for images too small to be halved once per convolution.

    >>> decoder = nn.Sequential(DeconvNet(50, (1, 28, 28)), Bernoulli(event_dim=3))
    """

    def __init__(
        self,
        in_features: int,
        image_shape: Sequence[int],
        *,
        channels: Sequence[int] = (64, 32),
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.image_shape, channels, sizes = checked_images(image_shape, channels, activation)
        height, width = sizes.pop()
        layers: list[nn.Module] = [
            nn.Linear(amount("in_features", in_features), channels[0] * height * width),
            nn.Unflatten(1, (channels[0], height, width)),
        ]
        for before, after in zip(channels, (*channels[1:], self.image_shape[0]), strict=True):
            height, width = sizes.pop()
            odd = (height % 2, width % 2)  # halving rounded down; output padding restores the remainder
            deconv = nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, output_padding=odd)
            layers += [activation(), deconv]
        self.network = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return apply_flat(self.network, z, 1)


def checked_images(
    image_shape: Sequence[int], channels: Sequence[int], activation: Activation
) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]:
    """The image shape, the channels, and (height, width) before the first and after each halving."""
    check_function("activation", activation, "a function that makes a module, such as torch.nn.ReLU")
    shape, channels = widths_of("image_shape", image_shape), widths_of("channels", channels)
    if len(shape) != 3 or not channels or min(shape[1:]) < 2 ** len(channels):
        raise OptionError(
            f"image_shape must be (channels, height, width) with sides of at least {2 ** max(len(channels), 1)} for "
            f"{len(channels)} convolutions (at least one), each of which halves them, got {shape}: pass fewer "
            "channels, or use MLP"
        )
    return shape, channels, [(shape[1] >> n, shape[2] >> n) for n in range(len(channels) + 1)]
