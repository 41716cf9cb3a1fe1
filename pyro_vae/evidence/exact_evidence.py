"""log p(x) without Monte Carlo error, for the models that allow it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LocalFitError, NonFiniteError, quoted
from ..kernel import Call, LogDensities, movement
from ..noise import Noise
from ..proposals import LatentSpace, unchecked_gradient
from ..records import EXACT_VALUE
from .estimator import Estimator
from .evidence import Evidence
from .summary import check_precision, guide_draws, mean_std_error, summed_draws, unknown_supports

CHECKS = 300  # points from the prior and around the maximum at which a joint must look Gaussian
PRIOR_DRAWS = 1000  # to see how far the prior reaches
REACH = 15.0  # standard deviations of the prior on each side: logarithms of Gammas have long tails
FEWEST, MOST = 2**6, {1: 2**16, 2: 2**10}  # points per axis
# points per axis where each point needs one run of the program: a million of them take an hour
MOST_LOOPED = {1: 2**12, 2: 2**7}
TURNS = 8.0  # radians to each side of the centre of an angle; less than 1e-9 of its density lies beyond
COARSE, MOST_ZOOMS = {1: 2**10, 2: 2**6}, 20  # points per axis of the grid that finds where the joint density is
NEGLIGIBLE = 40.0  # nats below the highest point
BENT = 5e-4  # share of p(x) by which a linear continuation beyond the range of floats may be wrong
BLOCK = 2**14  # points at a time
TOLERANCE = 1e-6  # nats between two grids, the second twice as fine


@dataclass(repr=False, eq=False, kw_only=True)
class ExactEvidence(Estimator):
    r"""Exact log p(x): by enumeration, in closed form for a Gaussian joint density, or by quadrature for one or two latents.

    The first of these that applies is used:

    - all latents are enumerated: the sum over their values;
    - log p(x, z) is quadratic in the latents (checked at random points), as in probabilistic PCA::

          log p(x) = log p(x, m) + D/2 log 2 pi - 1/2 log |H|,   m the maximum, H minus the Hessian

    - D = 1 or 2 continuous latents per datum, others enumerated: the trapezoid rule in unconstrained space, refined until
      two grids agree to 1e-6 nats. It converges exponentially for smooth densities (Trefethen and Weideman, 2014,
      https://doi.org/10.1137/130932132). A coarse grid over 15 standard deviations of the prior on each side finds where the
      joint density is. It may miss a second mode narrower than 1/30 of such a standard deviation, or in two dimensions than
      half of one.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites; only `elbo` depends on it.
    :param seed: fixes the noise of `elbo`; the caller's random state is unchanged.
    :param datum_plate: the plate of the data, as in all estimators.
    :param prior_sites: must be empty here.

    Call it with the model's arguments. It returns `Evidence` for the B data, with bound "exact" and an error of zero.
    Rounding is not counted as an error: where float32 is too coarse, `doubts["precision"]` of the record is true.

    :raises LocalFitError: where none of the three methods applies.
    :raises NonFiniteError: where the grids do not agree: a posterior far narrower than its prior, a density with jumps, or
        rounding in float32.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.

    Example::

        truth = pv.ExactEvidence(model, guide)(x).log_evidence      # (B,)
    """

    def estimate(self, call: Call) -> Evidence:
        if call.structure.read_prior_sites:
            raise LocalFitError(
                f"{quoted(call.structure.read_prior_sites)} would be drawn from the prior, which is not exact: add to the "
                "guide"
            )
        guide, model, weights = guide_draws(call)
        return exact_record(call, exact(call, guide, model, weights), weights.elbo)


def exact(call: Call, guide: Any, model: Any, weights: LogDensities) -> Tensor:
    if not call.structure.latents:
        return weights.log_weight[0]
    space = LatentSpace(call, *summed_draws(call, guide, model))
    call.set_noise(Noise.GUIDE, 1)
    u = space.draw_prior(PRIOR_DRAWS)[0]
    log_evidence = gaussian_integral(space, u)
    if log_evidence is not None:
        return log_evidence
    if space.dim > 2:
        raise LocalFitError(
            f"no exact log p(x): {space.dim} continuous latents per datum, and a joint density that is not Gaussian. Use "
            "AnnealedImportanceSampling"
        )
    centre, spread = u.mean(0), u.std(0)
    if space.centre is not None:  # all turns of an angle that matter
        spread = torch.where(space.centre.isnan(), spread, TURNS / REACH)
    log_evidence = quadrature(space, space.near_centre(centre), spread)
    if bool(space.end_in_doubt(log_evidence, NEGLIGIBLE, BENT).any()):
        raise LocalFitError(
            "no exact log p(x): the joint density still changes so close to the end of a latent's support that floats round "
            "to the end. Use float64 (model.double(), guide.double(), data in double), or ImportanceSampling"
        )
    return log_evidence


def gaussian_integral(space: LatentSpace, u: Tensor) -> Tensor | None:
    """(B,), from gradients at D + 3 points; None where they are not affine in u."""
    centre, spread = u.mean(0), u.std(0)
    points = torch.cat([centre.unsqueeze(0), centre + torch.diag_embed(spread).movedim(-2, 0)])
    _, _, gradients = unchecked_gradient(space, points)
    hessian = (gradients[1:] - gradients[0]).movedim(0, -1) / spread.unsqueeze(1)
    hessian = 0.5 * (hessian + hessian.mT)
    root, failed = torch.linalg.cholesky_ex(-hessian)
    if bool((failed > 0).any()):
        return None
    maximum = centre + torch.cholesky_solve(gradients[0].unsqueeze(-1), root).squeeze(-1)
    posterior = torch.linalg.solve_triangular(root.mT, torch.randn_like(u[:CHECKS]).unsqueeze(-1), upper=True).squeeze(-1)
    checks = torch.cat([u[:CHECKS], maximum + posterior, maximum + 4 * posterior])
    _, _, found = unchecked_gradient(space, checks)
    predicted = gradients[0] + torch.einsum("kbd,bde->kbe", checks - centre, hessian)
    # not of the values found: one that overflows would make the test pass for all others
    scale = predicted.abs().amax((0, 2)) + 1
    tolerance = 1e3 * torch.finfo(u.dtype).eps
    if not bool(((predicted - found).abs().amax((0, 2)) <= tolerance * scale).all()):  # NaN does not count as agreement
        return None
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    highest = torch.stack([maximum, maximum + posterior[0]])  # two draws, for the check of the precision
    return space.log_joint(highest)[0] + 0.5 * (space.dim * math.log(2 * math.pi) - log_det)


def quadrature(space: LatentSpace, centre: Tensor, spread: Tensor) -> Tensor:
    """(B,), by the trapezoid rule on finer and finer grids over a box per datum that contains its joint density."""
    centre, half, highest = zoom(space, centre, REACH * spread)
    before = None
    num_points, most = FEWEST, (MOST_LOOPED if "model" in space.call.structure.looped else MOST)[space.dim]
    while num_points <= most:
        log_evidence = trapezoid(space, centre, half, num_points)
        # Sums of large terms in float32 do not agree to 1e-6 of a nat.
        tolerance = TOLERANCE + 100 * torch.finfo(log_evidence.dtype).eps * log_evidence.abs()
        if before is not None and bool(((log_evidence - before).abs() < tolerance).all()):
            wider = trapezoid(space, centre, 2 * half, 2 * num_points)  # check that nothing is left outside the box
            if bool(((wider - log_evidence).abs() < tolerance).all()):
                space.log_joint(highest)  # the precision matters most here, so this is computed last
                return log_evidence
        before, num_points = log_evidence, 2 * num_points
    space.log_joint(highest)
    shift, _ = movement(space.call)
    if shift is not None and bool((shift.abs() > tolerance).any()):
        raise NonFiniteError(
            f"two grids of up to {most} points per axis do not agree to {float(tolerance.max()):.1g} nats: "
            f"rounding in float32 moves log p(x, z) by up to {float(shift.abs().max()):.2g} nats. Cast model and data to "
            "float64 (model.double(), x.double())"
        )
    raise NonFiniteError(
        f"two grids of up to {most} points per axis do not agree to {TOLERANCE} nats: the density has heavy "
        "tails or jumps, or kinks in two dimensions"
        + (", or needs more points than a model can be run at one by one" if most < MOST[space.dim] else "")
        + ". Use AnnealedImportanceSampling"
    )


def zoom(space: LatentSpace, centre: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The box around all points of a coarse grid that are within 40 nats of the highest, and the highest two.

    Centre and half widths of the box, (B, D) each; the two highest points of each datum, (2, B, D).
    """
    for _ in range(MOST_ZOOMS):
        # One cell more on each side of the points that were kept: the joint may be high between the last of them and the
        # next.
        unit = unit_grid(centre, COARSE[space.dim])
        log_joint = values_on(space, centre, half, unit)
        highest = centre + half * unit[log_joint.topk(2, 0).indices, 0]
        near = (log_joint > log_joint.amax(0) - NEGLIGIBLE).unsqueeze(-1)
        cell = 2 / (COARSE[space.dim] - 1)
        low = torch.where(near, unit, 1.0).amin(0) - cell
        high = torch.where(near, unit, -1.0).amax(0) + cell
        low, high = low.clamp(min=-1), high.clamp(max=1)
        centre, half = centre + half * (low + high) / 2, half * (high - low) / 2
        if bool((high - low > 1.4).all()):  # the box is hardly smaller than before
            break
    return centre, half, highest


def trapezoid(space: LatentSpace, centre: Tensor, half: Tensor, num_points: int) -> Tensor:
    unit = unit_grid(centre, num_points)
    total = torch.full_like(centre[:, 0], -math.inf)
    for first in range(0, len(unit), BLOCK):
        total = torch.logaddexp(total, values_on(space, centre, half, unit[first : first + BLOCK]).logsumexp(0))
    return total + (half.log() + math.log(2 / (num_points - 1))).sum(-1)


def unit_grid(like: Tensor, num_points: int) -> Tensor:
    """All points of a grid over [-1, 1]^D, (P, 1, D)."""
    axis = torch.linspace(-1, 1, num_points, dtype=like.dtype, device=like.device)
    return torch.cartesian_prod(*[axis] * like.shape[-1]).reshape(-1, 1, like.shape[-1])


def values_on(space: LatentSpace, centre: Tensor, half: Tensor, unit: Tensor) -> Tensor:
    """log p(x, u), (P, B), on a grid in the box."""
    pieces = [space.log_joint(centre + half * unit[first : first + n]) for first, n in space.call.chunks(len(unit))]
    return torch.cat(pieces).nan_to_num(nan=-math.inf)


def exact_record(call: Call, log_evidence: Tensor, elbo: Tensor) -> Evidence:
    """From log p(x), (B,), without an error, and ELBO terms of the guide, (K, B)."""
    call.check_finite(log_evidence.unsqueeze(0))
    zero = torch.zeros_like(log_evidence)
    evidence = Evidence(
        log_evidence=log_evidence,
        std_error=zero,
        elbo=elbo.mean(0),
        elbo_std_error=mean_std_error(elbo),
        ess=zero + 1,
        pareto_k=zero - math.inf,
        smoothed=log_evidence,
        bound="exact",
        num_particles=1,
        cost=call.cost,
        index=call.index,
        fingerprint=call.fingerprint(),
        measure=call.measure(),
        stripped_scales=call.structure.stripped_scales,
        given=call.structure.given,
        left_out=call.structure.left_out,
        looped=call.structure.looped,
        support_checked=call.check_support,
        method=EXACT_VALUE,
        unchecked=unknown_supports(call),
    )
    return check_precision(call, evidence)
