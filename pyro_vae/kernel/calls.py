"""One call of a (model, guide) pair: checks the data, fixes noise and subsample, counts the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import AuxiliarySiteError, NonFiniteError, listed, quoted
from ..noise import NOISE_BLOCK, Noise, noise_seed, seed_torch
from .checks.agreement import choose_at_draws, values_for_model, values_of
from .checks.data import check_not_shared, check_observed
from .checks.masked import check_masked_latents
from .checks.structure import Structure
from .coarse import coarse_draws
from .fingerprints import Observed, fingerprint_of, measure_of, observed_in
from .indicators import summed_over, summed_site
from .log_densities import LogDensities
from .outside_draws import OutsideDraws, at_any_draw, padded_values
from .programs import Execution, Program, ancestral, draw, score
from .recorder import Adjust, Cut, Layout, Site
from .records import Record, leading_record, looped_record, narrow_record
from .selection import Comparison, call_for

if TYPE_CHECKING:
    from .pairs import Pair

# numbers of the largest site in a piece: small enough for the cache of a processor
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}

# Called with the guide's record of a noise block, the model's record of its last particles, and log-weights (K, B).
Watch = Callable[[Record, Record, Tensor], None]


class Call:
    """A model and guide with one set of arguments. Subsample indices and seed are fixed for its lifetime."""

    def __init__(
        self,
        guide: Program,
        model: Program,
        structure: Structure,
        seed: int,
        device: torch.device,
        check_support: bool,
        pair: Pair,
    ) -> None:
        self.guide, self.model, self.structure, self.seed = guide, model, structure, seed
        self.device = device
        self.layout = structure.layout
        self.batch_size = structure.layout.batch_size
        self.check_support = check_support
        self.data_checked = self.masks_checked = False
        self.pair = pair
        self.num_parts = 0  # number of parts opened so far
        self.compared: list[Comparison] | None = None  # latents and log-densities with which parts are checked
        self.further: Callable[[int], dict[str, Tensor]] | None = None  # draws of K latents, to check parts with too
        self.cost = 0  # decoder evaluations per datum so far
        self.weighed: LogDensities | None = None  # the last particles at given values, for the check of the precision
        self._scored: Record | None = None
        self._observed: list[Observed] | None = None
        # executions of guide and model at many draws of the latents outside the data
        self._wide: tuple[Execution, Execution] | None = None

    @property
    def index(self) -> Tensor | None:
        """Indices of the data of a subsampled plate, shape (B,)."""
        name = self.layout.datum_plate
        return self.guide.indices.get(name) if self.structure.subsampled and name else None

    @property
    def subsamples(self) -> dict[str, Tensor]:
        """The indices of the data of each plate, by name, once the programs have run."""
        return dict(self.guide.indices)

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The values of latents outside the data, by name."""
        return dict(self.guide.fixed)

    def fingerprint(self) -> Tensor | None:
        """(B,) int64, a hash of the observed values of each datum, the same for any model.

        It is computed in the first run of the model in this call. `None` before it, without observed sites, and where an
        observed value is computed from draws.
        """
        return fingerprint_of(self._observed or ())

    def measure(self) -> str:
        """The kind of p(x): "probability" for discrete data, "density", or "mixed"; empty where `fingerprint` is `None`."""
        return measure_of(self._observed or ())

    def set_noise(self, stream: int, block: int) -> None:
        seed_torch(noise_seed(self.seed, stream, block))

    def part(self, kept: Tensor) -> AbstractContextManager[Call | None]:
        """Open a call for the data with these indices, with different noise; `None` where the arguments cannot be cut."""
        self.num_parts += 1
        return call_for(self, kept, self.num_parts)

    def again(self, seed: int) -> Call:
        """The same call with other noise."""
        call = copy(self)
        call.seed, call.cost, call.num_parts, call.weighed, call._scored = seed, 0, 0, None, None
        return call

    def one_by_one(self, *, model_too: bool = True) -> None:
        """From now on, run the programs for one particle at a time: distributions keep their shapes in the program.

        :param model_too: otherwise the model keeps a leading particle axis if it has one.
        """
        self.guide.execution = "loop"
        if model_too or self.model.execution != "leading":
            self.model.execution = "loop"

    def at_draws(self, values: Mapping[str, Tensor], num_draws: int, seed: int) -> Call:
        """The same call at S draws of the latents outside the data: a call about S N data, see `outside_draws`.

        :param values: (S, *plates, *event) of each site that was opened as `known`.
        """
        values = padded_values(values, self.layout)
        if self._wide is None:
            self._wide = choose_at_draws(self.guide, self.model, values, self.structure)
        draws = OutsideDraws(values, num_draws, self.batch_size)
        layout = replace(self.layout, batch_size=num_draws * self.batch_size)
        guide, model = copy(self.guide), copy(self.model)
        guide.execution, model.execution = self._wide
        for program in (guide, model):
            program.outside, program.layout = draws, layout
        bytes_per_particle = num_draws * self.structure.bytes_per_particle
        structure = replace(self.structure, layout=layout, bytes_per_particle=bytes_per_particle, subsampled=False)
        call = Call(guide, model, structure, seed, self.device, self.check_support, self.pair)
        call.data_checked = True
        return call

    def run_prior(self) -> dict[str, Site]:
        """One plain run of the model under its prior: its sites with their distributions. Costs one decoder evaluation."""
        self.cost += 1
        return (self.model if self.model.outside is None else at_any_draw(self.model)).run()

    def draw(self, num_particles: int, *, adjust: Adjust | None = None, cuts: list[list[Cut]] | None = None) -> Record:
        """Draw from the guide. Discrete draws that only the guide has are summed out of log q."""
        indicators = self.structure.indicators
        if not indicators:
            return draw(self.guide, num_particles, adjust=adjust, cuts=cuts)

        def but_indicators(name: str, fn: Any) -> tuple[Any, Any]:
            return (fn, fn) if name in indicators or adjust is None else adjust(name, fn)

        drawn = draw(self.guide, num_particles, adjust=but_indicators)
        values = {name: value for name, value in values_of(drawn, self.structure).items() if name not in indicators}
        return summed_over(self.guide, drawn, values, self.structure, num_particles, but_indicators)

    def score_guide(self, values: Mapping[str, Tensor], num_particles: int) -> Record:
        """The guide at given values of its latents."""
        if not self.structure.indicators:
            return score(self.guide, values, num_particles)
        return summed_over(self.guide, draw(self.guide, 1), values, self.structure, num_particles)

    def summed(self, drawn: Record, model: Record, num_particles: int) -> Record:
        """Draws of `draw_latents` with the guide's enumerated sites summed out of the log-densities: no axis E, no formulas.

        :param model: the model at these draws, for its masks.
        """
        if not self.structure.guide_enumerated:
            return drawn
        scored = self.score_guide(self.latent_values(drawn), num_particles)
        log_probs = LogDensities(self.structure, scored, model, num_particles).log_guide_in_order
        mixed = self.structure.depend_on_enumerated
        return {n: summed_site(drawn[n], log_probs[n], self.layout) if n in mixed else drawn[n] for n in drawn}

    def draw_latents(self, num_particles: int) -> Record:
        """Draw from q(z given x), with sites that the guide enumerates summed out.

        These sites are drawn first where latents depend on them.

        Values have no axis E; log q(z given x) at the values is `log_guide`.
        """
        if not self.structure.guide_enumerated:
            return self.draw(num_particles)
        return draw(ancestral(self.guide), num_particles)

    def draw_prior(self, num_particles: int) -> tuple[dict[str, Tensor], Record]:
        """Draw latent values from the prior and run the model at them. Enumerated sites are drawn, then summed out."""
        self.cost += num_particles
        if not self.layout.enumerated:
            record = self._checked(draw(self.model, num_particles))
            return {name: record[name].value for name in self.structure.latents}, record
        drawn = draw(ancestral(self.model), num_particles)
        values = {name: site.value for name, site in drawn.items() if name in self.structure.latents}
        weighed = self.weighed
        record = self.score(values, num_particles)
        self.weighed, self._scored = weighed, None  # draws of the prior may be anywhere, see `weigh`
        return values, record

    def simulate(self) -> Record:
        """One draw of all sites of the model, also of the observed ones."""
        model = ancestral(self.model)
        return looped_record([model.run(redraw_observed=True)], model.layout)

    def reconstruct(self) -> Record:
        """Run the model once at one draw of the guide and record all sites. Sites that the guide enumerates are drawn."""
        guide, model = ancestral(self.guide), ancestral(self.model)
        values = {name: site.value for name, site in guide.run().items() if not site.is_observed}
        return self._checked(looped_record([model.run(values=values)], model.layout))

    def run_at(self, values: Mapping[str, Tensor], num_particles: int, *, together: bool = False) -> Record:
        """All sites of the model at given values of latents and enumerated sites, one plain run each.

        Distributions keep the shapes of the program. Sites without a value are drawn.

        :param together: one run with a leading particle axis if the model supports it: each site then has one distribution.
        """
        self.cost += num_particles
        model = ancestral(self.model)
        if together and model.execution == "leading":
            return self._checked(score(model, values, num_particles))
        runs = [model.run(values=model.plain_values(values, k)) for k in range(num_particles)]
        return self._checked(looped_record(runs, model.layout))

    def score(self, values: Mapping[str, Tensor], num_particles: int) -> Record:
        """Run the model at given values. Costs one decoder evaluation per particle, three where gradients are recorded."""
        self.cost += num_particles * (3 if torch.is_grad_enabled() else 1)
        self.weighed = self._scored = None  # their memory is needed now
        record = self._scored = score(self.model, values, num_particles)
        if not self.data_checked and self.model.execution in ("vmap", "folded"):  # no distributions, or those of copies
            self._checked(leading_record(self.model.run(values=self.model.plain_values(values, 0)), self.layout))
        return self._checked(record)

    def log_guide(self, values: Mapping[str, Tensor], num_particles: int, model: Record | None) -> Tensor:
        """log q(z given x) at given values of the latents, (K, B); the guide runs, the decoder does not.

        :param model: any record of the model, used for its masks: masked latents are left out of log q. `None` if no latent
            of the model is masked.
        """
        guide = self.score_guide(values, num_particles)
        fresh = [n for n, s in guide.items() if not s.is_observed and n not in values and n not in self.layout.enumerated]
        if fresh:
            raise AuxiliarySiteError(
                f"the guide computes its latents from {quoted(fresh)}, so log q is not known at other values than its "
                "own draws: write the latents as separate sample statements, or use a method that needs only draws of "
                "the guide"
            )
        return LogDensities(self.structure, guide, guide if model is None else model, num_particles).log_marginal_guide

    def latent_values(self, record: Record) -> dict[str, Tensor]:
        """The guide's draws for the latent sites of the model, in canonical shapes (*E, K, *plates, *event)."""
        return values_for_model(values_of(record, self.structure), self.structure)

    def coarse(self, drawn: Record, num_particles: int) -> Tensor:
        """(K, B) where floats are too coarse for draws of the guide.

        They do not distinguish these from one another, or from an end of their support.
        """
        return coarse_draws(drawn, self.structure.latents, self.layout, num_particles)

    def in_program_shapes(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical values without an axis E in their shapes in the program, with the particles in front.

        Plates of other sites, which have size one here, are removed.
        """
        shaped = {}
        for name, value in values.items():
            event = value.shape[value.ndim - self.layout.event_dims[name] :]
            shaped[name] = value.reshape(-1, *self.layout.plain_shapes[name], *event)
        return shaped

    def first_particle(self, record: Record) -> Record:
        return narrow_record(record, self.layout, 0, 1)

    def weigh(self, guide: Record, model: Record, num_particles: int) -> LogDensities:
        weights = LogDensities(self.structure, guide, model, num_particles)
        scored = self._scored
        if not self.masks_checked:
            self.masks_checked = True
            check_masked_latents(self, guide, model, weights, noise=(Noise.PROBE, 1))
        if model is scored:  # draws of the prior may be anywhere
            self.weighed = weights
        return weights

    def log_weights(
        self, num_particles: int, stream: int, *, adjust: Adjust | None = None, watch: Watch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-weights and ELBO terms of K draws of the guide, two tensors (K, B); nothing larger is kept.

        `watch` is called with each noise block before it is dropped. It may draw further noise, since the next block sets
        the seed.
        """
        kept = None
        for block, start in enumerate(range(0, num_particles, NOISE_BLOCK)):
            size = min(NOISE_BLOCK, num_particles - start)
            self.set_noise(stream, block)
            guide = self.draw(size, adjust=adjust)
            for first, length in self.chunks(size):
                part = narrow_record(guide, self.layout, first, length)
                weights = self.weigh(part, self.score(self.latent_values(part), length), length)
                if kept is None:  # allocated at once: small tensors between large ones would fragment memory
                    kept = weights.log_weight.new_empty(2, num_particles, self.batch_size)
                kept[0, start + first : start + first + length] = weights.log_weight
                kept[1, start + first : start + first + length] = weights.elbo
            if watch is not None and kept is not None:
                watch(guide, weights.model, kept[0, start : start + size])
        assert kept is not None
        log_weight, elbo = kept
        self.check_finite(log_weight)
        return log_weight, elbo

    def chunks(self, num_particles: int) -> Iterator[tuple[int, int]]:
        """Split a noise block into even pieces of bounded memory. Blocks with sites drawn while scoring stay whole."""
        largest = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"]) // max(self.structure.bytes_per_particle, 1)
        num_chunks = 1 if self.structure.prior_sites else math.ceil(num_particles / max(largest, 1))
        size = math.ceil(num_particles / num_chunks)
        for first in range(0, num_particles, size):
            yield first, min(size, num_particles - first)

    def _checked(self, record: Record) -> Record:
        """Check, once per call, that observed values are finite and inside the support of their likelihood."""
        if not self.data_checked:
            self.data_checked = True
            check_data(record, self.layout, self.check_support, self.structure.observed_with_moving_support)
            self._observed = observed_in(record, self.layout)
        return record

    def check_finite(self, log_weight: Tensor) -> None:
        """Raise on NaN or plus infinity in (K, B) log-weights; minus infinity is a weight of zero."""
        bad = (log_weight.isnan() | (log_weight == torch.inf)).any(0)
        if bool(bad.any()):
            raise NonFiniteError(
                f"the log-weights of data {listed(bad)} are NaN or infinite: look for NaN in the arguments, for a scale "
                "that underflows to 0 or for a logarithm of 0 in model or guide"
            )


def check_data(
    record: Record, layout: Layout, check_support: bool, observed_with_moving_support: Collection[str] = frozenset()
) -> None:
    for site in record.values():
        if site.is_observed and site.value.numel():  # a factor has an empty value
            check_not_shared(site, layout)
            check_observed(site, layout, check_support and site.name not in observed_with_moving_support)


def refuse_shared(record: Record, layout: Layout) -> None:
    for site in record.values():
        if site.is_observed and site.value.numel():
            check_not_shared(site, layout)
