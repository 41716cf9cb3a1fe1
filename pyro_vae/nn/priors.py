"""Priors as modules: calling one gives the distribution."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints, transform_to

from ..errors import OptionError
from ..options import amount, is_real
from .checked import checked, finite_numbers
from .gaussian import positive

# share of the range: smallest distance from the bounds at which pseudo-inputs start, so that their gradient does not vanish
INSIDE = 0.01


class StandardNormal(nn.Module):
    """The standard normal prior p(z) = N(0, I_D). Its buffers follow `.to()` and `.double()`.

    :param latent_dim: D, the number of latents of a datum.
    :returns: when called, a distribution with event shape (D,) and no batch shape; plates expand it.
    :raises OptionError: if `latent_dim` is below 1.

    >>> StandardNormal(3)().event_shape
    torch.Size([3])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.loc: Tensor
        self.scale: Tensor
        size = amount("latent_dim", latent_dim, lowest=1)
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.accepts = finite_numbers("StandardNormal")

    def forward(self) -> Any:
        return checked(dist.Normal(self.loc, self.scale, validate_args=False), 1, self.accepts)


class MixturePrior(nn.Module):
    r"""A prior that is a learned mixture of M diagonal normals::

        p(z) = sum_m w_m N(z; loc_m, diag(scale_m^2))

    It is meant for latents whose aggregated posterior is not normal, for instance with clusters. The weights, means and
    scales are parameters of the model and are trained with it. Dilokthanakul et al., 2016, https://arxiv.org/abs/1611.02648.

    :param latent_dim: D, the number of latents of a datum.
    :param num_components: M. Means start as draws of N(0, I) from the caller's random state, scales at 1, weights at 1/M.
    :returns: when called, a distribution with event shape (D,) and no batch shape, in nats. Its KL has no formula, so the
        objectives sample it.
    :raises OptionError: if a number is below 1.

    >>> MixturePrior(3, num_components=5)().event_shape
    torch.Size([3])
    """

    def __init__(self, latent_dim: int, num_components: int) -> None:
        super().__init__()
        size = amount("num_components", num_components), amount("latent_dim", latent_dim)
        self.loc = nn.Parameter(torch.randn(size))
        self.raw_scale = nn.Parameter(torch.zeros(size))
        self.logits = nn.Parameter(torch.zeros(size[0]))

    def forward(self) -> Any:
        components = dist.Normal(self.loc, positive(self.raw_scale), validate_args=False).to_event(1)
        return mixture(self.logits, components)


class VampPrior(nn.Module):
    r"""A prior that is the mixture of the encoder's distributions at M learned pseudo-inputs u_m::

        p(z) = sum_m w_m q(z given x = u_m)

    It can approximate the aggregated posterior, which is the best prior for a given encoder. Tomczak and Welling, 2018, "VAE
    with a VampPrior", https://arxiv.org/abs/1705.07120, with w_m = 1/M.

    :param encoder: the encoder of the same VAE: model and guide then share its parameters, and both train them.
    :param pseudo_inputs: initial values of the u_m, `(M, *X)`, such as M rows of the training data. They are parameters.
    :param bounds: (low, high) between which the u_m stay, for encoders that need it: (0, 1) for binary data, (0, n) for
        counts of at most n. None for any real numbers. An encoder of class indices cannot have this prior.
    :returns: when called, a distribution with event shape (D,) and no batch shape, in nats. Its KL has no formula, so the
        objectives sample it. Each call runs the encoder on the M pseudo-inputs.
    :raises OptionError: for pseudo-inputs that are not a batch of floats, or are not within the bounds.

    `pv.refit_guide` raises for such a pair, because the model would change with the guide.

    >>> from pyro_vae import VAE
    >>> encoder = torch.nn.Sequential(MLP(64, 16), Normal())
    >>> decoder = torch.nn.Sequential(MLP(8, 64), Binomial(16))
    >>> vae = VAE(encoder, decoder, VampPrior(encoder, torch.full((20, 64), 8.0), bounds=(0, 16)))
    >>> vae.prior().event_shape
    torch.Size([8])
    """

    def __init__(self, encoder: nn.Module, pseudo_inputs: Tensor, *, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        start = pseudo_inputs
        if not isinstance(start, Tensor) or not start.is_floating_point() or start.ndim < 2 or not len(start):
            found = f"{tuple(start.shape)} {start.dtype}" if isinstance(start, Tensor) else type(start).__name__
            raise OptionError(
                f"pseudo_inputs must be a tensor of floats (M, *X) with M at least 1, such as M rows of data, got {found}"
            )
        self.encoder, self.bounds = encoder, checked_bounds(bounds, start)
        self.raw_inputs = nn.Parameter(self._between.inv(inside(start.detach(), self.bounds)).clone())
        self.logits = nn.Parameter(start.new_zeros(len(start)))

    @property
    def _between(self) -> Transform:
        constraint = constraints.real if self.bounds is None else constraints.interval(*self.bounds)
        return transform_to(constraint)

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs as they are passed to the encoder, `(M, *X)`."""
        return self._between(self.raw_inputs)

    def forward(self) -> Any:
        return mixture(self.logits, self.encoder(self.pseudo_inputs))


class FlowPrior(nn.Module):
    r"""A prior that is a normalizing flow: bijections T map the latents to standard normal noise::

        log p(z) = log N(T(z); 0, I) + log |det dT/dz|

    With the flow in this direction, a density takes one pass, as is best for training; draws invert the flow. Rezende and
    Mohamed, 2015, https://arxiv.org/abs/1505.05770; as a prior Chen et al., 2017, https://arxiv.org/abs/1611.02731.

    :param latent_dim: D, the number of latents of a datum.
    :param transforms: bijections with an inverse, from latents to noise, in this order, such as
        `pyro.distributions.transforms.spline_coupling(D)` or `affine_autoregressive(D)`. With the latter draws take D
        passes, and in Pyro 1.9.2 they work in the default dtype only. Transforms that are an `nn.Module` are trained with
        the model. A flow of zuko needs no `FlowPrior`: use a module whose `forward` returns
        `pyro.contrib.zuko.ZukoToPyro(flow())`.
    :returns: when called, a distribution with event shape (D,) and no batch shape, in nats. Its KL has no formula, so the
        objectives sample it.
    :raises OptionError: for a number below 1, or transforms that are not bijections.

    >>> from pyro.distributions.transforms import affine_autoregressive
    >>> FlowPrior(3, [affine_autoregressive(3, hidden_dims=[16])])().event_shape
    torch.Size([3])
    """

    def __init__(self, latent_dim: int, transforms: Sequence[Any]) -> None:
        super().__init__()
        self.base = StandardNormal(latent_dim)
        self.transforms = checked_transforms(transforms, Transform, "pyro.distributions.transforms.spline_coupling(D)")
        self.networks = nn.ModuleList(t for t in self.transforms if isinstance(t, nn.Module))

    def forward(self) -> Any:
        return dist.TransformedDistribution(self.base(), [t.inv for t in reversed(self.transforms)], validate_args=False)


class Mixture(dist.MixtureSameFamily):
    """`MixtureSameFamily` of vectors that expands values to the components, because conditional flows do not broadcast."""

    def log_prob(self, value: Tensor) -> Tensor:
        weights = self.mixture_distribution.logits
        values = value.unsqueeze(-2).expand(*value.shape[:-1], weights.shape[-1], value.shape[-1])
        return (weights + self.component_distribution.log_prob(values)).logsumexp(-1)


def mixture(logits: Tensor, components: Any) -> Any:
    return Mixture(dist.Categorical(logits=logits, validate_args=False), components, validate_args=False)


def checked_transforms(transforms: Sequence[Any], kind: type, example: str) -> list[Any]:
    is_list = isinstance(transforms, Sequence)
    wrong = [type(t).__name__ for t in transforms if not isinstance(t, kind)] if is_list else [type(transforms).__name__]
    if wrong or not len(transforms):
        raise OptionError(
            f"transforms must be a list of {kind.__name__}s such as [{example}], got {', '.join(wrong) or '[]'}"
        )
    return list(transforms)


def checked_bounds(bounds: Any, start: Tensor) -> tuple[float, float] | None:
    if bounds is None:
        return None
    pair = tuple(bounds) if isinstance(bounds, Sequence) else (bounds,)
    if len(pair) != 2 or not all(map(is_real, pair)) or not pair[0] < pair[1]:
        raise OptionError(f"bounds must be None or two numbers (low, high), low below high, got {bounds!r}")
    low, high = float(pair[0]), float(pair[1])
    if not bool(((start >= low) & (start <= high)).all()):
        raise OptionError(
            f"pseudo_inputs must lie within bounds={bounds}, got {float(start.min()):g} to {float(start.max()):g}"
        )
    return low, high


def inside(start: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    if bounds is None:
        return start
    margin = INSIDE * (bounds[1] - bounds[0])
    return start.clamp(bounds[0] + margin, bounds[1] - margin)
