"""A guide for a program: the moments of its posterior, off by as much as the plan of the guide says."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .case import F64, Case, GuideSite
from .description import DISCRETE, POSITIVE, UNIT, Latent, Node, Site, read_node, real_value
from .oracle import Posterior, sample_posterior

NUM = 1000
LEAST_WIDTH, FLAT = 0.05, 0.15  # of a continuous site; the share of the uniform in a discrete one
MOST_SLOPE, DISCRETE_SLOPE = 3.0, 0.6


def with_guide(case: Case, posterior: Posterior) -> Case:
    draws = sample_posterior(case, posterior, NUM)
    plan, program = case.program.guide, case.program
    order = [latent for latent in program.latents if latent.enumerated != "model"]
    if plan.order == "reversed" and not plan.auto:
        order.reverse()
    generator = torch.Generator().manual_seed(program.seed + 4)
    sites: list[GuideSite] = []
    for number, latent in enumerate(order):
        read = what_it_reads(case, latent, order[:number], generator)
        sites.append(fitted(case, latent, read, draws, generator))
    return replace(case, guide=tuple(sites))


def what_it_reads(case: Case, latent: Latent, before: list[Latent], generator: torch.Generator) -> Site | None:
    plan = case.program.guide
    able = [b for b in before if readable(latent, b)]
    if plan.reads == "nothing" or not able:
        return None
    if plan.reads == "any":
        return able[int(torch.randint(len(able), (), generator=generator))]
    beside = [b for b in able if b.name == latent.parent or b.parent == latent.name]
    return beside[0] if beside else None


def readable(latent: Latent, read: Latent) -> bool:
    """Elements of plates and of events are not mixed."""
    return {latent.place, read.place} != {"plate", "event"}


def unconstrained(family: str, value: Tensor) -> Tensor:
    if family in POSITIVE:
        return value.log()
    return value.logit() if family in UNIT else value


def fitted(
    case: Case, latent: Latent, read: Site | None, draws: dict[Node, Tensor], generator: torch.Generator
) -> GuideSite:
    columns = [fitted_node(case, latent, k, read, draws, generator) for k in range(latent.width)]
    parameters = (torch.stack(column, 1).to(case.program.dtype).to(F64) for column in zip(*columns, strict=True))
    family = guide_family(latent.family, case.program.guide.family)
    return GuideSite(latent.name, family, None if read is None else read.name, *parameters)


def guide_family(family: str, plan: str) -> str:
    if family in DISCRETE:
        return family
    if family in POSITIVE:
        return "gamma" if plan == "matched" else "positive"
    if family in UNIT:
        return "beta" if plan == "matched" else "unit"
    return "student" if plan == "matched" else "real"


def fitted_node(
    case: Case, latent: Latent, k: int, read: Site | None, draws: dict[Node, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = case.program.guide
    value = draws[Node(latent.name, k)]
    zero = torch.zeros(case.num_data, dtype=F64)
    f = zero.unsqueeze(-1).expand(-1, NUM)
    if read is not None:
        f = real_value(read.family, draws[read_node(latent.width, k, read)], F64)
    middle = f.mean(-1)
    if latent.family in DISCRETE:
        num_values = DISCRETE[latent.family]
        share = torch.stack([(value == v).to(F64).mean(-1) for v in range(num_values)], -1)
        centre = ((1 - FLAT) * share + FLAT / num_values).log()
        return centre, zero + 1, zero + DISCRETE_SLOPE * (read is not None), middle
    u = unconstrained(latent.family, value)
    mean, deviation = u.mean(-1), f - middle.unsqueeze(-1)
    variance = deviation.square().mean(-1)
    slope = ((u * deviation).mean(-1) / variance.clamp(min=1e-6)).clamp(-MOST_SLOPE, MOST_SLOPE)
    slope = torch.where(variance > 1e-6, slope, zero)
    residual = (u - mean.unsqueeze(-1) - slope.unsqueeze(-1) * deviation).std(-1).clamp(min=LEAST_WIDTH)
    sign = torch.randint(2, zero.shape, generator=generator) * 2.0 - 1
    return mean + sign * plan.miss * residual, residual * plan.widen, slope, middle
