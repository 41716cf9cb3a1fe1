"""Free bits, a floor under the KL, and capacity, a target for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import OptionError, StructureError, quoted
from ...options import one_of
from ..terms import like
from ..weights import Weight, checked_weight, checked_weights
from .beta_messenger import WeighedTraces, beta_at
from .matching import Beta, Betas
from .rates import Rate, Rates, data_dims, datum_plate, kl_of_site, rate_by_dimension, weight_of_data

Per = Literal["dimension", "site"]


@dataclass(frozen=True)
class FreeBits:
    """cost = sum over groups j of beta max(nats * num_data, KL_j): below the floor a KL costs the floor and has no gradient.

    :ivar nats: the floor per datum and group, by latent site or one for all.
    :ivar by_dimension: whether a group is a dimension of a site, or the whole site.
    """

    nats: Weight | Mapping[str, Weight]
    by_dimension: bool

    @property
    def weights(self) -> dict[str, Weight]:
        if isinstance(self.nats, Mapping):
            return {f"free_bits of '{name}'": weight for name, weight in self.nats.items()}
        return {"free_bits": self.nats}

    def now(self, value: Callable[[str], Beta]) -> Betas:
        if isinstance(self.nats, Mapping):
            return {name: value(f"free_bits of '{name}'") for name in self.nats}
        return value("free_bits")

    def measure(self, traces: WeighedTraces, analytic: Mapping[str, Tensor]) -> Rates:
        if isinstance(self.nats, Mapping) and (unknown := [n for n in self.nats if n not in traces.groups]):
            raise OptionError(f"free_bits names {quoted(unknown)}, but the latent sites are {quoted(traces.groups)}")
        check_latents(traces)
        given = self.nats if isinstance(self.nats, Mapping) else dict.fromkeys(traces.groups, self.nats)
        floored = [n for n in traces.groups if not is_zero(given.get(n, 0.0))]
        for name in floored:
            check_one_latent(traces, name)
        sites = [s for n, s in traces.model_sites.items() if s["is_observed"] or n in floored]
        plate = (
            datum_plate(sites, "free bits", ("Or name the latents that are in the plate: free_bits={'z': ...}"))
            if floored
            else ""
        )
        return {n: self._rate(traces, analytic, n, plate if n in floored else None) for n in traces.groups}

    def _rate(self, traces: WeighedTraces, analytic: Mapping[str, Tensor], name: str, plate: str | None) -> Rate:
        if plate is None:
            kl = kl_of_site(traces, analytic, name)
            return Rate(kl, torch.zeros_like(kl))
        dims = data_dims(traces.model_sites[name], plate)
        if self.by_dimension:
            return rate_by_dimension(traces, name, name in analytic, dims)
        kl = kl_of_site(traces, analytic, name)
        return Rate(kl, weight_of_data(traces, name, kl, dims).sum())

    def cost(self, rates: Rates, nats: Betas, betas: Betas) -> tuple[Tensor, Tensor]:
        """The cost, and the KL term without a floor."""
        costs, plain = [], []
        for name, (kl, num_data) in rates.items():
            beta = like(kl, beta_at(betas, name.split("+")[0]))
            floor = num_data * like(kl, nats.get(name, 0.0) if isinstance(nats, Mapping) else nats)
            # At the floor the gradient is that of the KL. There is no floor at zero, because a sampled KL may be negative.
            kept = torch.where((kl < floor) & (floor > 0), floor, kl)
            costs.append(beta * kept.sum())
            plain.append(beta * kl.sum())
        return reduce(operator.add, costs), reduce(operator.add, plain)


@dataclass(frozen=True)
class Capacity:
    """cost = weight |KL - nats * num_data|, with the KL of all latents together.

    :ivar nats: per datum.
    """

    nats: Weight
    weight: Weight

    @property
    def weights(self) -> dict[str, Weight]:
        return {"capacity": self.nats, "capacity_weight": self.weight}

    def now(self, value: Callable[[str], Beta]) -> tuple[Beta, Beta]:
        return value("capacity"), value("capacity_weight")

    def measure(self, traces: WeighedTraces, analytic: Mapping[str, Tensor]) -> Rates:
        check_latents(traces)
        plate = datum_plate(traces.model_sites.values(), "capacity", "A latent common to all data has no KL per datum")
        latents = [n for names in traces.groups.values() for n in names if n in traces.model_sites]
        kl = reduce(operator.add, [kl_of_site(traces, analytic, name) for name in traces.groups])
        weights = [weight_of_data(traces, n, kl, data_dims(traces.model_sites[n], plate)) for n in latents]
        return {"all": Rate(kl, reduce(torch.maximum, weights).sum())}

    def cost(self, rates: Rates, now: tuple[Beta, Beta], betas: Betas) -> tuple[Tensor, Tensor]:
        """The cost, and the KL term of an ELBO."""
        kl, num_data = rates["all"]
        nats, weight = (like(kl, value) for value in now)
        return weight * (kl - num_data * nats).abs(), kl


def target_of(
    free_bits: Weight | Mapping[str, Weight], free_bits_per: Per, capacity: Weight | None, capacity_weight: Weight
) -> FreeBits | Capacity | None:
    """The target given by the options; None for the plain sum of the KLs."""
    one_of("free_bits_per", free_bits_per, Per)
    bits = FreeBits(checked_weights(free_bits, "free_bits"), free_bits_per == "dimension")
    capacity_weight = checked_weight(capacity_weight, "capacity_weight")
    capacity = None if capacity is None else checked_weight(capacity, "capacity")
    wanted = bool(bits.weights) and not is_zero(bits.nats)
    if wanted and capacity is not None:
        raise OptionError(
            "free_bits is a floor of the KL and capacity a target for it, and the two cannot be combined: give one of them"
        )
    return bits if wanted else None if capacity is None else Capacity(capacity, capacity_weight)


def check_beta(target: FreeBits | Capacity | None, beta: Any) -> None:
    if isinstance(target, Capacity) and not (isinstance(beta, (int, float)) and beta == 1):
        raise OptionError(
            f"capacity has a separate weight, so beta must stay at 1.0: set capacity_weight, got beta={beta!r}"
        )


def is_zero(value: Any) -> bool:
    """Whether a value is the plain number zero; a tensor is not read, because that would synchronise the device."""
    return isinstance(value, (int, float)) and value == 0


def check_latents(traces: WeighedTraces) -> None:
    if not traces.groups:
        raise StructureError(
            "model and guide share no latent site, so there is no KL: free_bits and capacity are for latents"
        )


def check_one_latent(traces: WeighedTraces, name: str) -> None:
    sites = traces.groups[name]
    if name not in traces.model_sites or any(s not in (name, f"{name}_unconstrained") for s in sites):
        raise StructureError(
            f"the guide's '{name}' ({quoted(sites)}) is a joint or an auxiliary draw, so its KL is not that of one "
            "latent and cannot have free bits: use AutoNormal, draw each latent separately, or use capacity"
        )
