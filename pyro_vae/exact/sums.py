"""log p(x) as a sum: over the values of discrete latents, or over the nodes of a quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .arguments import check_floats, check_function, check_whole, kind_of

# numpy's Gauss-Hermite weights exceed the range of float64 with 360 nodes or more.
MAX_QUADRATURE_NODES = 300


def enumerate_log_joint(log_joint: Callable[..., Tensor], supports: Sequence[Tensor]) -> Tensor:
    r"""Calls ``log_joint(z_1, ..., z_n)`` once, on all combinations of values of ``n`` discrete latents.

    ``supports[i]`` ``(S_i, *event_i)`` lists the values of latent ``i``, which are passed with a separate axis: ``(1, ...,
    S_i, ..., 1, 1, *event_i)``, ``n`` axes of latents, then one of data. The log joint must broadcast over them and return
    ``(S_1, ..., S_n, B)``, nats; that goes to `enumerate_log_evidence`.

    :raises ValueError: if the log joint returns another shape.

    >>> coin, x = torch.tensor([0.0, 1.0]), torch.tensor([0.3, 2.0])
    >>> log_joint = lambda z: Normal(z, 1.0).log_prob(x) - math.log(2)
    >>> enumerate_log_evidence(enumerate_log_joint(log_joint, [coin]), 1)
    tensor([-1.0589, -1.9107])
    """
    check_function("log_joint", log_joint)
    if not isinstance(supports, Sequence) or not len(supports):  # a tensor is not a Sequence
        raise TypeError(
            f"enumerate_log_joint expects a list of the values of each latent, but got {kind_of(supports)}. Pass one tensor "
            "for each, [torch.tensor([0.0, 1.0])]."
        )
    for support in supports:
        if not isinstance(support, Tensor) or not support.dim():
            raise TypeError(f"expected the values of a latent as a tensor (S, ...), but got {kind_of(support)}. List them.")
    num_latents = len(supports)
    values = [
        support.reshape((1,) * i + support.shape[:1] + (1,) * (num_latents - i) + support.shape[1:])
        for i, support in enumerate(supports)
    ]
    result = log_joint(*values)
    sizes = tuple(len(support) for support in supports)
    if tuple(result.shape[:-1]) != sizes:
        raise ValueError(
            f"enumerate_log_joint expects a log joint of {sizes} + (B,), but got {tuple(result.shape)}. "
            "Sum over the dimensions of each datum, and let the axes of the latents broadcast."
        )
    return result


def enumerate_log_evidence(log_joint: Tensor, num_latents: int = 1) -> Tensor:
    r"""``log sum_z p(x, z)`` over ``num_latents`` leading axes: ``(S_1, ..., S_n, B)`` gives ``(B,)``, nats.

    :raises ValueError: if there are fewer axes than latents.

    >>> enumerate_log_evidence(torch.tensor([[0.1, 0.2], [0.3, 0.4]]).log())
    tensor([-0.9163, -0.5108])
    """
    check_floats("log_joint", log_joint)
    check_whole("num_latents", num_latents)
    if not 1 <= num_latents <= log_joint.dim():
        raise ValueError(
            f"enumerate_log_evidence expects a log joint with an axis per latent, here {num_latents}, and at "
            f"least one, but got shape {tuple(log_joint.shape)}. Build it with enumerate_log_joint."
        )
    return log_joint.logsumexp(tuple(range(num_latents)))


def quadrature_log_evidence(
    log_joint: Callable[[Tensor], Tensor],
    num_latents: int,
    num_nodes: int = 200,
    loc: Tensor | None = None,
    scale: Tensor | None = None,
    chunk_size: int = 10_000,
) -> Tensor:
    r"""``log int p(x, z) dz`` over one or two continuous latents by Gauss-Hermite quadrature: ``(B,)``, nats.

    The sum is ``(sqrt(2) scale)^D sum_i w_i exp(t_i^2) p(x, z_i)`` with ``z_i = loc + sqrt(2) scale t_i``, computed in logs.
    Nodes ``t`` and weights ``w`` are those of Golub and Welsch (1969, https://doi.org/10.1090/S0025-5718-69-99647-1),
    centred per datum as in Liu and Pierce (1994, https://doi.org/10.1093/biomet/81.3.624).

    The nodes are about ``pi / sqrt(num_nodes)`` of a ``scale`` apart and must resolve the posterior. With 200 nodes and the
    default ``N(0, 1)``, a Gaussian posterior of standard deviation 0.3 is still accurate to 1e-8; one of 0.1 is not. For
    narrower posteriors pass their centre as ``loc``, and a ``scale`` near their standard deviation, rather above it. Check
    that more nodes do not change the result.

    :param log_joint: takes ``z`` of shape ``(N, 1, D)``, or ``(N, B, D)`` if centred, and returns ``(N, B)``.
    :param num_latents: ``D``.
    :param num_nodes: nodes per dimension, so that ``N = num_nodes ** D``.
    :param loc: centre ``(B, D)``, zero by default. ``z`` has its dtype and device; else float64 on the CPU.
    :param scale: width ``(B, D)``, positive, one by default.
    :param chunk_size: nodes per call of ``log_joint``, to bound its memory.
    :raises ValueError: for other numbers of latents, over 300 nodes, or a result of the wrong shape.

    >>> x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    >>> log_joint = lambda z: (Normal(0, 1).log_prob(z) + Normal(z, 1.0).log_prob(x.unsqueeze(-1))).sum(-1)
    >>> quadrature_log_evidence(log_joint, 1)  # N(0, 2)
    tensor([-1.3280, -2.2655], dtype=torch.float64)
    """
    check_function("log_joint", log_joint)
    for name, value in (("num_latents", num_latents), ("num_nodes", num_nodes), ("chunk_size", chunk_size)):
        check_whole(name, value)
    for name, tensor in (("loc", loc), ("scale", scale)):
        if tensor is not None:
            check_floats(name, tensor)
    if num_latents not in (1, 2):
        raise ValueError(
            f"quadrature_log_evidence expects 1 or 2 latent dimensions, but got {num_latents}. "
            "The nodes grow like num_nodes ** D: use an importance-sampling or annealed estimator instead."
        )
    if not 1 <= num_nodes <= MAX_QUADRATURE_NODES:
        raise ValueError(
            f"quadrature_log_evidence expects num_nodes in 1..{MAX_QUADRATURE_NODES}, but got {num_nodes}. "
            "Where that is too coarse, pass loc and scale of the posterior."
        )
    if chunk_size < 1:
        raise ValueError(f"quadrature_log_evidence expects chunk_size of at least 1, but got {chunk_size}. Take thousands.")
    points, point_weights = np.polynomial.hermite.hermgauss(num_nodes)
    t = torch.cartesian_prod(*[torch.from_numpy(points)] * num_latents).reshape(-1, 1, num_latents)
    log_w = torch.from_numpy(np.log(point_weights) + points**2 + 0.5 * math.log(2))
    log_w = torch.cartesian_prod(*[log_w] * num_latents).reshape(-1, 1, num_latents).sum(-1)

    loc = t.new_zeros(1, num_latents) if loc is None else loc
    scale = torch.ones_like(loc) if scale is None else scale.to(loc)
    if loc.dim() != 2 or loc.shape[-1] != num_latents or scale.dim() != 2 or scale.shape[-1] != num_latents:
        raise ValueError(
            f"quadrature_log_evidence expects loc and scale of shape (B, {num_latents}), but got {tuple(loc.shape)} and "
            f"{tuple(scale.shape)}. Add the missing axis with unsqueeze."
        )
    if not bool((scale > 0).all()):
        raise ValueError(
            "quadrature_log_evidence expects a positive scale, but got one that is not. Pass standard deviations."
        )
    z = loc + math.sqrt(2) * scale * t.to(loc)
    values = torch.cat([log_joint(chunk) for chunk in z.split(min(chunk_size, len(z)))])
    if values.dim() != 2 or len(values) != len(z) or z.shape[1] not in (1, values.shape[1]):
        raise ValueError(
            f"quadrature_log_evidence expects a log joint (N, B) for z {tuple(z.shape)}, but got "
            f"{tuple(values.shape)}. Sum over the dimensions of datum and latent, not over nodes or data."
        )
    return (values + log_w.to(loc)).logsumexp(0) + scale.log().sum(-1)
