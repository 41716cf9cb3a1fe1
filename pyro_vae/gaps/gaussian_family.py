"""Guides whose latents are Gaussian in unconstrained space, with their offsets expressed as means and covariances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from ..kernel import Call, LogDensities, Record
from ..noise import Noise
from ..proposals import GaussianProposal, LatentSpace
from .offsets import UNCONSTRAINED, GuideOffsets

SCALES = {"Normal": "scale", "MultivariateNormal": "scale_tril"}
POINTS = (-20.0, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 20.0)  # points at which transforms are compared
CHECKED, ROUNDING = 10, 0.05  # draws whose log q must equal that of the Gaussian, up to this many nats of rounding


@dataclass(frozen=True)
class GaussianFamily:
    """All Gaussians that offsets can express: each site has a separate mean and a diagonal or full covariance.

    :ivar guide: the Gaussian of the guide, per datum.
    :ivar blocks: (D, D) bool, where a covariance may differ from zero.
    """

    space: LatentSpace
    offsets: GuideOffsets
    sites: dict[str, str]  # of the guide, by latent
    guide: GaussianProposal
    blocks: Tensor

    def place(self, call: Call, q: GaussianProposal) -> bool:
        """Set the offsets so that the guide equals q.

        :return: whether it does. It may not: a latent with a tiny spread may influence others once it is wider, and a
            transform may differ in the region of q.
        """
        locs, scales = (self.space.split(t.unsqueeze(0)) for t in (q.loc, q.tril.diagonal(dim1=-2, dim2=-1)))
        start = 0
        for latent, site in self.sites.items():
            size = locs[latent].numel() // len(q.loc)
            block = q.tril[:, start : start + size, start : start + size]
            start += size
            self.offsets.put((site, "loc"), locs[latent])
            if "scale" in self.offsets.parameters_of(site):
                self.offsets.put((site, "scale"), transform_to(constraints.positive).inv(scales[latent]))
            else:
                self.offsets.put((site, "scale_tril"), transform_to(constraints.lower_cholesky).inv(block))
        call.set_noise(Noise.OFFSETS, 1)
        drawn, depends = self.offsets.draw(call, CHECKED)
        return not depends and is_density_of(call, self.space, drawn, q)


def gaussian_family(call: Call, space: LatentSpace, offsets: GuideOffsets) -> GaussianFamily | None:
    """The Gaussian family of a guide; `None` for another family, or where parameters depend on other latents.

    Creates the offsets, at zero.
    """
    call.set_noise(Noise.OFFSETS, 0)
    drawn, depends = offsets.draw(call, CHECKED)
    special = (space.masked, space.centre, space.num_values)
    if depends or call.structure.guide_enumerated or call.structure.indicators or any(s is not None for s in special):
        return None
    sites = {latent: latent if latent in offsets.sites else latent + UNCONSTRAINED for latent in space.sites}
    if set(sites.values()) != set(offsets.sites) or any(offsets.families[site] not in SCALES for site in sites.values()):
        return None
    if not all(same_transform(space, latent, offsets.transforms[site]) for latent, site in sites.items() if latent == site):
        return None
    guide = own_gaussian(space, offsets, sites)
    if guide is None or not is_density_of(call, space, drawn, guide[0]):
        return None
    return GaussianFamily(space, offsets, sites, *guide)


def same_transform(space: LatentSpace, latent: str, transforms: Sequence[Any]) -> bool:
    """Whether the guide transforms its Gaussian draws to values of a latent as the space transforms u, near and far."""
    for number in POINTS:
        value = own = torch.full(space.sites[latent], number, dtype=space.dtype, device=space.call.device)
        theirs = space.transforms[latent](value)
        try:
            for transform in transforms:
                own = transform(own)
        except (RuntimeError, ValueError, IndexError):  # the guide's transform was made for draws of another shape
            return False
        if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-5, atol=0.0, equal_nan=True):
            return False
    return True


def is_density_of(call: Call, space: LatentSpace, drawn: Record, q: GaussianProposal) -> bool:
    """Whether log q of draws of the guide equals the density of the Gaussian."""
    u, log_det = space.pack(call.latent_values(drawn))
    log_q = LogDensities(call.structure, drawn, drawn, CHECKED).log_marginal_guide + log_det
    return bool(((log_q - q.log_prob(u)).abs() < ROUNDING).all())


def own_gaussian(space: LatentSpace, offsets: GuideOffsets, sites: dict[str, str]) -> tuple[GaussianProposal, Tensor] | None:
    """The Gaussian given by the parameters of the guide, and the blocks of its covariance."""
    locs, trils = {}, []
    for latent, shape in space.sites.items():
        parameters = offsets.parameters_of(sites[latent])
        if set(parameters) not in ({"loc", "scale"}, {"loc", "scale_tril"}) or parameters["loc"].numel() != shape.numel():
            return None
        locs[latent] = parameters["loc"]
        if "scale" in parameters:
            if parameters["scale"].numel() != shape.numel():
                return None
            scale = transform_to(constraints.positive)(parameters["scale"])
            trils.append(space.flat(scale.reshape(1, *shape))[0].diag_embed())
        else:
            tril = transform_to(constraints.lower_cholesky)(parameters["scale_tril"])
            if tril.numel() != shape.numel() * shape[-1] or math.prod(shape[:-1]) != space.layout.batch_size:
                return None  # several vectors per datum
            trils.append(tril.reshape(-1, shape[-1], shape[-1]))
    tril = torch.stack([torch.block_diag(*blocks) for blocks in zip(*trils, strict=True)])
    diagonal = [
        torch.eye(t.shape[-1], dtype=torch.bool) | bool("scale_tril" in offsets.parameters_of(sites[n]))
        for n, t in zip(space.sites, trils, strict=True)
    ]
    return GaussianProposal(space.join(locs)[0], tril), torch.block_diag(*diagonal).bool().to(tril.device)
