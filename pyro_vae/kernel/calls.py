"""A (model, guide) pair and one call of it: structure looked up or found, data checked, noise and subsample fixed."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine import unwrap
from torch import Tensor

from ..errors import ArgumentError, EmptyBatchError, NonFiniteError, StructureError
from . import isolation
from .agreement import choose_executions, values_for_model, values_of
from .data import bounds_of, check_observed, rows
from .log_weights import LogWeights
from .programs import Program, draw, score
from .recorder import Adjust, Layout, Site
from .records import Record, leading_record, narrow_record
from .structure import INFER, Structure, analyse, find_layout, kept_guide_sites, refuse_guide

# Streams of noise within one call, so that no two uses share their draws.
PROBE, SUBSAMPLE, SIMULATION, GUIDE, FIT, PROPOSAL = range(6)
NOISE_BLOCK = 100  # particles whose noise is drawn together; part of what a seed means, so never a tuning knob
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}  # of the largest site: small enough for the caches of a processor


class Call:
    """One call of a pair with one set of arguments; everything in it is fixed while it lasts."""

    def __init__(
        self, guide: Program, model: Program, structure: Structure, seed: int, device: torch.device, check_support: bool
    ) -> None:
        self.guide, self.model, self.structure, self.seed = guide, model, structure, seed
        self.device = device
        self.layout = structure.layout
        self.batch_size = structure.layout.batch_size
        self.check_support = check_support
        self.data_checked = False
        self.cost = 0  # decoder evaluations per datum so far

    @property
    def index(self) -> Tensor | None:
        """Which data of a subsampled plate this call is about, shape (B,)."""
        name = self.layout.datum_plate
        return self.guide.indices.get(name) if self.structure.subsampled and name else None

    def set_noise(self, stream: int, block: int) -> None:
        torch.manual_seed(isolation.noise_seed(self.seed, stream, block))

    def draw(self, num_particles: int, *, adjust: Adjust | None = None) -> Record:
        return draw(self.guide, num_particles, adjust=adjust)

    def draw_prior(self, num_particles: int) -> Record:
        self.cost += num_particles
        return self._checked(draw(self.model, num_particles))

    def score(self, values: Mapping[str, Tensor], num_particles: int) -> Record:
        """The model at given values. Costs one decoder evaluation per particle, three where gradients are recorded."""
        self.cost += num_particles * (3 if torch.is_grad_enabled() else 1)
        record = score(self.model, values, num_particles)
        if not self.data_checked and self.model.execution == "vmap":  # which returns no distributions
            self._checked(leading_record(self.model.run(values=self.model.plain_values(values, 0))))
        return self._checked(record)

    def latent_values(self, record: Record) -> dict[str, Tensor]:
        """What the guide drew for the latent sites of the model, canonical shapes (*E, K, *plates, *event)."""
        return values_for_model(values_of(record, self.structure), self.structure)

    def first_particle(self, record: Record) -> Record:
        return narrow_record(record, self.layout, 0, 1)

    def weigh(self, guide: Record, model: Record, num_particles: int) -> LogWeights:
        return LogWeights(self.structure, guide, model, num_particles)

    def log_weights(self, num_particles: int, stream: int, *, adjust: Adjust | None = None) -> tuple[Tensor, Tensor]:
        """Log-weights and ELBO terms of K draws of the guide, two tensors (K, B); nothing larger is kept."""
        parts = []
        for block, start in enumerate(range(0, num_particles, NOISE_BLOCK)):
            size = min(NOISE_BLOCK, num_particles - start)
            self.set_noise(stream, block)
            guide = self.draw(size, adjust=adjust)
            for first, length in self.chunks(size):
                part = narrow_record(guide, self.layout, first, length)
                weights = self.weigh(part, self.score(self.latent_values(part), length), length)
                parts.append((weights.log_weight, weights.elbo))
        log_weight, elbo = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.check_finite(log_weight)
        return log_weight, elbo

    def chunks(self, num_particles: int) -> Iterator[tuple[int, int]]:
        """Cut a noise block into pieces of bounded memory. Sites drawn while scoring need their block whole."""
        size = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"]) // max(self.structure.bytes_per_particle, 1)
        size = num_particles if self.structure.prior_sites else min(max(size, 1), num_particles)
        for first in range(0, num_particles, size):
            yield first, min(size, num_particles - first)

    def _checked(self, record: Record) -> Record:
        """Observed values must be finite and inside the support of their likelihood; looked at once per call."""
        if not self.data_checked:
            self.data_checked = True
            check_data(record, self.layout, self.check_support, self.structure.latent_supports)
        return record

    def check_finite(self, log_weight: Tensor) -> None:
        """Raise on NaN or plus infinity in (K, B) log-weights; minus infinity is a weight of zero."""
        bad = (log_weight.isnan() | (log_weight == torch.inf)).any(0)
        if bool(bad.any()):
            raise NonFiniteError(
                f"the log-weights of data {rows(bad)} are NaN or infinite: look for NaN in the arguments, for a scale "
                "that underflows to 0 or for a logarithm of 0 in model or guide"
            )


class Pair:
    """Any Pyro model and guide, and what is known about them for the shapes they were called with so far."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        check_support: bool = True,
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise ArgumentError(f"{name} must be callable, got {type(program).__name__}")
        self.model, self.guide = model, guide
        self.datum_plate, self.prior_sites, self.check_support = datum_plate, tuple(prior_sites), check_support
        self._known: dict[Any, tuple[Structure, frozenset[str], frozenset[str], str, str]] = {}

    @contextmanager
    def open(self, args: tuple, kwargs: Mapping[str, Any], seed: int | None) -> Iterator[Call]:
        """Everything inside runs isolated: no store, buffer, mode, setting or (with a seed) random state changes."""
        for name, program in (("model", self.model), ("guide", self.guide)):
            check_signature(name, program, args, kwargs)
        refuse_guide(self.guide, self.datum_plate)
        seed = isolation.fresh_seed() if seed is None else seed
        modules = isolation.modules_of(self.model, self.guide)
        devices = devices_of((args, kwargs), modules)
        with isolation.isolated(self.model, self.guide, devices=devices):
            indices: dict[str, Tensor] = {}

            def draw_indices(name: str, fn: Any) -> Tensor:
                if fn.subsample_size is None or fn.subsample_size >= fn.size:
                    return torch.arange(fn.size, device=fn.device)
                generator = torch.Generator().manual_seed(isolation.noise_seed(seed, SUBSAMPLE, len(indices)))
                return torch.randperm(fn.size, generator=generator)[: fn.subsample_size].to(fn.device)

            guide, model = (
                Program(fn, args, kwargs, indices=indices, draw_indices=draw_indices) for fn in (self.guide, self.model)
            )
            key = (signature_of((args, kwargs)), tuple(m.training for top in modules for m in top.modules()))
            if key not in self._known:
                self._known[key] = self._find_out(guide, model, seed)
            structure, guide.names, model.names, guide.execution, model.execution = self._known[key]
            guide.layout = model.layout = structure.layout
            yield Call(guide, model, structure, seed, devices[0], self.check_support)

    def _find_out(
        self, guide: Program, model: Program, seed: int
    ) -> tuple[Structure, frozenset[str], frozenset[str], str, str]:
        torch.manual_seed(isolation.noise_seed(seed, PROBE, 0))
        guide_sites, model_sites = self._probe(guide, model)
        kept = kept_guide_sites(self.guide, guide_sites, model_sites)
        structure = analyse(self.guide, kept, model_sites, layout=guide.layout, prior_sites=self.prior_sites)
        guide.layout = model.layout = structure.layout
        guide.names, model.names = frozenset(guide_sites), frozenset(model_sites)
        values = [*guide_sites.values(), *model_sites.values()]
        sizes = {size for s in values for size in (*s.value.shape, *s.fn.shape())} | {structure.layout.batch_size}
        latent_supports = choose_executions(guide, model, structure, sizes)
        structure = replace(structure, latent_supports=latent_supports)
        return structure, guide.names, model.names, guide.execution, model.execution

    @torch.no_grad()
    def _probe(self, guide: Program, model: Program) -> tuple[dict[str, Site], dict[str, Site]]:
        """One plain run of each; a second one where the size of the datum plate shows only in the data."""
        with isolation.LayerWatch():
            for _ in range(2):
                try:
                    guide_sites = guide.run()
                    model_sites = self._probe_model(model, guide_sites)
                except ZeroDivisionError as error:
                    raise EmptyBatchError("the batch is empty: pass at least one datum") from error
                layout = self._layout(guide_sites, model_sites)
                known = guide.layout.batch_size
                guide.layout = model.layout = layout
                if not layout.unsized or known == layout.batch_size:
                    break
        # Bounds that are tensors may depend on latents: those are looked at with more than one particle.
        record = leading_record(model_sites)
        movable = {name for name, site in record.items() if bounds_of(getattr(site.fns[0], "support", None))}
        check_data(record, layout, self.check_support, movable)
        return guide_sites, model_sites

    def _probe_model(self, model: Program, guide_sites: Mapping[str, Site]) -> dict[str, Site]:
        """The model at the guide's values. Where it fails there, see whether the guide's sites do not fit."""
        try:
            return model.run(values={n: s.value for n, s in guide_sites.items() if not s.is_observed})
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, StructureError):
                raise
            model_sites = model.run()
            kept = kept_guide_sites(self.guide, guide_sites, model_sites)
            analyse(
                self.guide,
                kept,
                model_sites,
                layout=self._layout(guide_sites, model_sites),
                prior_sites=self.prior_sites,
            )
            raise

    def _layout(self, guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site]) -> Layout:
        kept = kept_guide_sites(self.guide, guide_sites, model_sites)
        return find_layout(self.guide, kept, model_sites, self.datum_plate)


def simulate_sites(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], *, datum_plate: str | None, seed: int | None
) -> dict[str, Site]:
    """One plain run of the model that draws its observed sites too."""
    check_signature("model", model, args, kwargs)
    seed = isolation.fresh_seed() if seed is None else seed
    devices = devices_of((args, kwargs), isolation.modules_of(model))
    with isolation.isolated(model, devices=devices):
        torch.manual_seed(isolation.noise_seed(seed, SIMULATION, 0))
        program = Program(model, args, kwargs, indices={}, draw_indices=lambda name, fn: fn.sample())
        program.layout = find_layout(model, {}, program.run(), datum_plate)
        return program.run(redraw_observed=True)


def check_data(
    record: Record, layout: Layout, check_support: bool, latent_supports: Collection[str] = frozenset()
) -> None:
    for site in record.values():
        if site.is_observed and site.value.numel():  # a factor has an empty value
            check_observed(site, layout, check_support and site.name not in latent_supports)


def check_signature(name: str, program: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    try:
        core = unwrap(program)
        signature = inspect.signature(core.forward if isinstance(core, torch.nn.Module) else core)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"the {name} takes {signature} but was called with {len(args)} positional and {sorted(kwargs)} keyword "
            f"arguments ({error}): model and guide must accept the same arguments"
        ) from error


def devices_of(tree: Any, modules: Sequence[torch.nn.Module]) -> list[torch.device]:
    """Where the arguments and parameters lie, the arguments first."""
    found = [t.device for t in tensors_in(tree)] + [p.device for m in modules for p in m.parameters()]
    return list(dict.fromkeys(found)) or [torch.get_default_device()]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, Mapping):
        yield from tensors_in(list(tree.values()))


def signature_of(tree: Any) -> Any:
    """A hashable description of arguments: shapes of tensors, values of plain Python objects."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device
    if isinstance(tree, (tuple, list)):
        return tuple(signature_of(item) for item in tree)
    if isinstance(tree, Mapping):
        return tuple((key, signature_of(value)) for key, value in tree.items())
    return tree if isinstance(tree, (bool, int, float, str, type(None))) else id(tree)
