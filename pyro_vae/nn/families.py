"""Heads of encoders other than normal ones: families for q(z given x)."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import ConditionalTransform
from torch import Tensor, nn

from ..autocast import full_under_autocast
from ..errors import ArgumentError, NonFiniteError
from ..options import amount
from .checked import check_value, finite_numbers
from .gaussian import positive
from .head import Family
from .priors import StandardNormal, checked_transforms


class LowRankNormal(Family):
    r"""Head of encoders: a normal vector with low-rank plus diagonal covariance, N(loc, diag(scale^2) + F F^T).

    F has R columns. With R = 0 it is `Normal`; `MultivariateNormal` has a full covariance of D (D + 1) / 2 numbers. It is
    meant for many latents with few correlations. The network gives D numbers for loc, D for scale and D for each column of
    F. Rezende, Mohamed and Wierstra, 2014, https://arxiv.org/abs/1401.4082, use R = 1.

    :param rank: R, the number of columns of F.
    :raises OptionError: if the rank is below 1.
    :raises ArgumentError: when called, if no D gives the width of the raw numbers.

    Call it with raw numbers (..., D (2 + R)). It returns a distribution with batch shape (...) and event shape (D,), in
    nats. Its KL to `StandardNormal` is sampled.

    >>> head = LowRankNormal(3)
    >>> head.num_outputs(20), head(torch.zeros(5, 100)).event_shape
    (100, torch.Size([20]))
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = amount("rank", rank)
        self.num_params = 2 + self.rank

    def forward(self, raw: Tensor) -> Any:
        loc, scale, *columns = self.chunks(raw)
        try:
            return CheckedLowRank(loc, torch.stack(columns, -1), positive(scale).square(), validate_args=False)
        except torch.linalg.LinAlgError as error:
            raise NonFiniteError(
                f"the LowRankNormal head got numbers that give no covariance, such as NaN or infinity ({error}): its "
                "network has diverged. Lower the learning rate or standardise its input"
            ) from error


class CheckedLowRank(dist.LowRankMultivariateNormal):
    """`LowRankMultivariateNormal` whose `log_prob` checks its data like `CheckedIndependent`."""

    accepts = finite_numbers("LowRankNormal")

    def log_prob(self, value: Tensor) -> Tensor:
        check_value(value, self.event_shape, self.accepts)
        return super().log_prob(value)


class CheckedFlow(dist.TransformedDistribution):
    """`TransformedDistribution` whose `log_prob` checks its data and expands it to the rows of the network."""

    accepts = finite_numbers("Flow")

    def log_prob(self, value: Tensor) -> Tensor:
        check_value(value, self.event_shape, self.accepts)
        batch_shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        # a conditional flow does not broadcast, and it recognises a draw by its identity
        if value.shape[:-1] != batch_shape:
            value = value.expand(*batch_shape, -1)
        return super().log_prob(value)


class ImplicitMixture(dist.MixtureOfDiagNormals):
    """Pyro's mixture of diagonal normals with the right gradient of draws.

    The gradient of Pyro 1.9.2 is biased for the weights. Here it follows from the conditional distribution function F of
    each number given those before it, dz_d = -dF(z_d given z_<d) / q(z_d given z_<d). Figurnov, Mohamed and Mnih, 2018,
    "Implicit reparameterization gradients", https://arxiv.org/abs/1805.08498.
    """

    accepts = finite_numbers("MixtureNormal")

    def log_prob(self, value: Tensor) -> Tensor:
        check_value(value, self.event_shape, self.accepts)
        return super().log_prob(value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            drawn = super().rsample(torch.Size(sample_shape))
        log_weights, numbers = self.categorical.logits, []
        for d in range(self.dim):
            component = torch.distributions.Normal(self.locs[..., d], self.coord_scale[..., d], validate_args=False)
            weights, at = log_weights.softmax(-1), drawn[..., d, None]
            cdf = (weights * component.cdf(at)).sum(-1)
            density = (weights * component.log_prob(at).exp()).sum(-1)
            number = drawn[..., d] - (cdf - cdf.detach()) / density.detach()
            # weights of the components, given the numbers so far
            log_weights = log_weights + component.log_prob(number.unsqueeze(-1))
            numbers.append(number)
        return torch.stack(numbers, -1)


class MixtureNormal(Family):
    r"""Head of encoders: a mixture of M diagonal normals, q(z given x) = sum_m w_m N(z; loc_m, diag(scale_m^2)).

    It is meant for posteriors with several modes. Draws have gradients with respect to all parameters, including the weights
    (implicit reparameterization, Figurnov et al., 2018, https://arxiv.org/abs/1805.08498), so every objective accepts it.
    The ELBO favours one mode: train with `ImportanceWeightedELBO` or `InclusiveKL`.

    :param num_components: M, the number of components.
    :raises OptionError: if it is below 2.
    :raises ArgumentError: when called, if no D gives the width of the raw numbers.

    Call it with raw numbers (..., M (2 D + 1)): first the M D means, component by component, then the scales, then the M
    logits. It returns a distribution with batch shape (...) and event shape (D,), in nats. Its KL is sampled. Components
    with equal raw numbers have equal gradients, so the network's last layer must start at random, as torch's do.

    >>> head = MixtureNormal(4)
    >>> head.num_outputs(20), head(torch.zeros(5, 164)).event_shape
    (164, torch.Size([20]))
    """

    def __init__(self, num_components: int) -> None:
        super().__init__()
        self.num_components = amount("num_components", num_components, lowest=2)

    def num_outputs(self, event_size: int) -> int:
        return self.num_components * (2 * amount("event_size", event_size) + 1)

    def forward(self, raw: Tensor) -> Any:
        self.check_raw(raw)
        raw = full_under_autocast(raw)
        num_components, width = self.num_components, raw.shape[-1]
        event_size, rest = divmod(width - num_components, 2 * num_components)
        if event_size < 1 or rest:
            raise ArgumentError(
                f"the MixtureNormal head of {num_components} components needs {num_components} (2 D + 1) numbers for D "
                f"latents, got shape {tuple(raw.shape)}: give the network's last layer have head.num_outputs(D) "
                "outputs"
            )
        loc, scale, logits = raw.split([num_components * event_size] * 2 + [num_components], -1)
        shape = (num_components, event_size)
        return ImplicitMixture(loc.unflatten(-1, shape), positive(scale).unflatten(-1, shape), logits)


class Flow(Family):
    r"""Head of encoders: a conditional normalizing flow.

    Bijections T_x, which depend on the network's output, map noise to latents::

        z = T_x(e), e ~ N(0, I),   log q(z given x) = log N(e; 0, I) - log |det dT_x/de|

    Rezende and Mohamed, 2015, https://arxiv.org/abs/1505.05770; inverse autoregressive flows Kingma et al., 2016,
    https://arxiv.org/abs/1606.04934; splines Durkan et al., 2019, https://arxiv.org/abs/1906.04032.

    :param latent_dim: D.
    :param context_dim: width of the network's output, from which the transforms compute their parameters.
    :param transforms: conditional bijections from noise to latents, in this order, such as
        `pyro.distributions.transforms.conditional_affine_autoregressive(D, context_dim)` or `conditional_spline(D,
        context_dim)`.
    :raises OptionError: for a number below 1, or transforms that are not conditional bijections.
    :raises ArgumentError: when called, for raw numbers of another width.

    Call it with raw numbers (..., context_dim). It returns a distribution with batch shape (...) and event shape (D,), in
    nats. Its KL is sampled. The density at values that it did not draw (surgery, aggregated posteriors) inverts the flow.
    This takes D passes for an autoregressive flow, and one for coupling splines.

    >>> from pyro.distributions.transforms import conditional_affine_autoregressive
    >>> head = Flow(3, 8, [conditional_affine_autoregressive(3, 8, hidden_dims=[16])])
    >>> head.num_outputs(3), head(torch.zeros(5, 8)).event_shape
    (8, torch.Size([3]))
    """

    def __init__(self, latent_dim: int, context_dim: int, transforms: Sequence[Any]) -> None:
        super().__init__()
        self.base, self.context_dim = StandardNormal(latent_dim), amount("context_dim", context_dim)
        example = "pyro.distributions.transforms.conditional_affine_autoregressive(D, context_dim)"
        self.transforms = checked_transforms(transforms, ConditionalTransform, example)
        self.networks = nn.ModuleList(t for t in self.transforms if isinstance(t, nn.Module))

    def num_outputs(self, event_size: int) -> int:
        return self.context_dim

    def forward(self, raw: Tensor) -> Any:
        self.check_raw(raw)
        if raw.shape[-1] != self.context_dim:
            raise ArgumentError(
                f"the Flow head takes {self.context_dim} numbers, got shape {tuple(raw.shape)}: give the network's "
                "last layer head.num_outputs(D) outputs"
            )
        base = self.base().expand(raw.shape[:-1])
        return CheckedFlow(base, [t.condition(raw) for t in self.transforms], validate_args=False)
