"""One pass over a data set: draws per datum, their prior densities, and the guide's densities at draws of other data."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..aggregate import as_particles, check_draws, check_unmasked, joint_sites, log_q_by_dimension, rows_of
from ..densities import by_number
from ..errors import NonFiniteError, StructureError, listed, quoted
from ..kernel import Call, Layout, LogDensities, Pair, Record, Structure, first_dependent, read_by_prior
from ..noise import batch_noise
from ..tolerance import close
from .per_unit import one_particle, unit_names
from .refusals import warn_if_coarse

Rows = dict[str, Tensor]  # draws by site, (R, 1, *plates, *event) with one datum in its plate
LogQ = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor | None]]  # rows to log q under B data: (R, B), (R, B, D)


@dataclass(frozen=True)
class BatchDraws:
    """K draws for each of the B data of a batch, in rows ordered (K, B), and the batch as columns of the mixture."""

    rows: Rows
    log_prior: Tensor  # (K, B)
    log_prior_by_dimension: Tensor | None  # (K, B, D), where the prior is a product over dimensions
    columns: "Distributions | Scored"
    units: tuple[str, ...]
    cost: int

    @property
    def size(self) -> int:
        return self.log_prior.shape[1]


@dataclass(frozen=True)
class Distributions:
    """Columns of data whose dimensions have separate distributions. These are kept: the guide does not run again."""

    drawn: Record
    names: tuple[str, ...]
    layout: Layout

    @contextmanager
    def opened(self) -> Iterator[LogQ]:
        def log_q(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            by_dimension = log_q_by_dimension(self.drawn, self.names, self.layout, rows)
            return by_dimension.sum(-1), by_dimension

        yield log_q


@dataclass(frozen=True)
class Scored:
    """Columns of data whose latents have a joint density only: the guide runs again, with the kept arguments."""

    pair: Pair
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    number: int
    seed: int

    @contextmanager
    def opened(self) -> Iterator[LogQ]:
        with batch_noise(self.number), self.pair.open(self.arguments, self.named, self.seed) as call:

            def log_q(rows: Mapping[str, Tensor]) -> tuple[Tensor, None]:
                num_rows = len(next(iter(rows.values())))
                values = as_particles(rows, call.layout)
                check_same_points(call, values, num_rows)
                found = call.log_guide(values, num_rows, None)  # masks are refused
                return found.to(torch.promote_types(found.dtype, torch.float32)), None

            yield log_q


class Collector:
    """Draws batch after batch, and checks that the parts of the KL are defined for the pair."""

    def __init__(self, pair: Pair, num_particles: int, seed: int) -> None:
        self.pair, self.num_particles, self.seed = pair, num_particles, seed
        self.batches: list[BatchDraws] = []
        # by id; the structure is kept, so that its id is not used again
        self._separate: dict[int, tuple[Structure, bool]] = {}
        self._prior_read: dict[int, bool] = {}
        self._last: tuple[dict[str, Tensor], Tensor] | None = None

    def add(self, *arguments: Any, **named: Any) -> None:
        number = len(self.batches)
        with self.pair.open(arguments, named, self.seed) as call:
            self.batches.append(self._collect(call, Scored(self.pair, arguments, named, number, self.seed)))

    def _collect(self, call: Call, scored: Scored) -> BatchDraws:
        latents = call.structure.latents
        check_structure(call.structure)
        call.one_by_one()
        warn_if_coarse(call)
        rows: list[Rows] = []
        priors, by_dimension = [], []
        first: Record | None = None
        for k in range(self.num_particles):
            guide, model, weights = one_particle(call, k)
            if first is None:
                first = guide
                self._check(call, guide, model, call.latent_values(guide), weights)
            log_prior = weights.log_marginal_prior[0]
            summed = call.structure.guide_enumerated
            log_q = torch.stack([q[0] for n, q in weights.log_guide_by_site.items() if n not in summed]).sum(0)
            check_finite(log_q - log_prior, latents)
            names = dict.fromkeys((*latents, *call.structure.unpacked))  # with the joint draws that Deltas unpack
            rows.append({name: rows_of(guide[name], call.layout) for name in names})
            priors.append(log_prior)
            by_dimension.append(self._prior_by_dimension(weights))
        assert first is not None
        separate = self._separate[id(call.structure)][1]
        found = [prior for prior in by_dimension if prior is not None]
        return BatchDraws(
            rows={name: torch.cat([r[name] for r in rows]) for name in rows[0]},
            log_prior=torch.stack(priors),
            log_prior_by_dimension=torch.stack(found) if found else None,
            columns=Distributions(first, latents, call.layout) if separate else scored,
            units=tuple(unit for name in latents for unit in unit_names(name, rows[0][name][0].numel())),
            cost=call.cost,
        )

    def _check(self, call: Call, guide: Record, model: Record, values: dict[str, Tensor], weights: LogDensities) -> None:
        structure = call.structure
        latents = structure.latents
        known = {*structure.guide_enumerated, *structure.indicators, *structure.unpacked}
        check_draws(guide, [n for n in structure.guide_sites if n not in known], latents)
        check_unmasked(weights)
        if id(structure) not in self._separate:
            plain = call.layout.datum_dim is not None and not joint_sites(guide, latents)
            plain = plain and not (structure.depend_on_enumerated or structure.indicators or structure.unpacked)
            separate = plain and (len(latents) == 1 or first_dependent(call, latents) is None)
            prior = {name: model[name].value for name in structure.prior_sites}
            read = set().union(*read_by_prior(call, {**values, **prior}, latents).values())
            if drawn := read & set(structure.prior_sites):
                raise StructureError(
                    f"the prior of the latents depends on {quoted(sorted(drawn))}, drawn from the prior, so p(z) is an "
                    "integral without a formula: let the guide draw those too"
                )
            self._separate[id(structure)] = structure, separate
            self._prior_read[id(structure)] = bool(read)
        self._check_one_prior(call, guide, values, weights.log_marginal_prior)

    def _check_one_prior(self, call: Call, guide: Record, values: dict[str, Tensor], log_prior: Tensor) -> None:
        """Check that all data share one prior: draws of other data must have the same prior density here."""
        others, expected = values, log_prior
        if self._last is not None and all(self._last[0][name].shape == value.shape for name, value in values.items()):
            others, expected = self._last
        if call.layout.datum_dim is not None:
            others = {n: v.roll(1, call.layout.datum_dim - call.layout.event_dims[n]) for n, v in others.items()}
            expected = expected.roll(1, -1)
        found = LogDensities(call.structure, guide, call.score(others, 1), 1).log_marginal_prior
        if not close(found, expected):
            raise StructureError(
                "the prior of the latents differs from datum to datum (it depends on arguments of the model), so there is "
                "no p(z) to compare the aggregated posterior with"
            )
        self._last = values, log_prior

    def _prior_by_dimension(self, weights: LogDensities) -> Tensor | None:
        """log p(z_d), (B, D), in the order of `log_q_by_dimension`."""
        structure, layout, guide, model = weights.structure, weights.layout, weights.guide, weights.model
        # the latents that depend on what is summed out
        mixed = any(weights.log_prior_by_site[name].ndim > 2 for name in structure.latents)
        if self._prior_read[id(structure)] or mixed or layout.datum_dim is None:
            return None
        parts = []
        for name in structure.latents:
            prior, value = by_number(model[name].fns[0]), guide[name].value[0]
            if prior.event_shape:
                return None
            log_prob = prior.log_prob(value).expand(value.shape).movedim(layout.datum_dim - guide[name].event_dim, 0)
            parts.append(log_prob.flatten(1) if log_prob.ndim > 1 else log_prob.unsqueeze(1))
        return torch.cat(parts, 1)


def check_same_points(call: Call, values: Mapping[str, Tensor], num_particles: int) -> None:
    """Check that Deltas set the same latents from the same draws for all data.

    Otherwise the densities of draws under other data would be wrong.
    """
    if not call.structure.unpacked:
        return
    guide = call.score_guide(values, num_particles)
    for name in call.structure.unpacked:
        found, given = torch.broadcast_tensors(guide[name].value, values[name])
        if not close(found, given):
            raise StructureError(
                f"the guide sets '{name}' from a joint draw in a way that differs from datum to datum, so the density of a "
                "draw under other data is not known: let the guide draw the latents themselves"
            )


def check_structure(structure: Structure) -> None:
    if not structure.latents:
        raise StructureError("the guide draws no latent site of the model, so there is no KL to split")


def check_finite(kl: Tensor, latents: tuple[str, ...]) -> None:
    if bool((bad := ~kl.isfinite()).any()):
        raise NonFiniteError(
            f"log q(z|x) - log p(z) of {quoted(latents)} is NaN or infinite for data {listed(bad)}: look for NaN in the "
            "arguments or parameters, for a scale that underflows to 0, or for draws of the guide outside the support of "
            "the prior"
        )
