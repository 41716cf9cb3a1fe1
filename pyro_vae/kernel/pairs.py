"""A (model, guide) pair. `Pair.open(args)` finds or looks up the structure and returns a `Call`."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from .. import isolation
from ..arguments import check_signature, devices_of, signature_of
from ..autocast import autocast_around, off_for_programs
from ..densities import bounds_of, support_of
from ..errors import AuxiliarySiteError, ProgramError, StructureError, quoted
from ..noise import Noise, checked_seed, noise_seed, seed_torch
from ..options import flag, names_of_sites, plate_or_none
from .calls import Call, check_data, refuse_shared
from .checks.agreement import choose_executions
from .checks.autoguides import refuse_guide
from .checks.failures import check_program, named_failure, named_late_failure
from .checks.plates import INFER, find_layout
from .checks.structure import Structure, analyse, kept_guide_sites, left_out_sites
from .checks.unpacked import check_unpacked
from .programs import Execution, Program
from .recorder import Layout, Site
from .records import leading_record

# The structure, the names of the sites of guide and model, and how the two are executed.
Found = tuple[Structure, frozenset[str], frozenset[str], Execution, Execution]


class Pair:
    """A Pyro model and guide, with the structures found so far, by the shapes of arguments."""

    in_training = False

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        check_support: bool = True,
        draws_rather: bool = False,
        takes_subsamples: bool = False,
    ) -> None:
        """A pair without known structures.

        :param draws_rather: run a guide that enumerates all latents so that it draws them.
        :param takes_subsamples: with `datum_plate=None`, allow plates of which a call has a part.
        """
        for name, program in (("model", model), ("guide", guide)):
            check_program(name, program)
        self.check_support = flag("check_support", check_support)
        self.model, self.guide = model, guide
        self.datum_plate, self.prior_sites = plate_or_none(datum_plate), names_of_sites("prior_sites", prior_sites)
        self.draws_rather, self.takes_subsamples = draws_rather, takes_subsamples
        self._known: dict[Any, Found] = {}

    @contextmanager
    def open(
        self, args: tuple, kwargs: Mapping[str, Any], seed: int | None, known: Mapping[str, Tensor] | None = None
    ) -> Iterator[Call]:
        """Open a call. Store, buffers, modes, settings and (with a seed) random state are restored on exit.

        :param known: values of latents outside the data, in the shapes of a plain run; everything is then conditional on
            them.
        """
        for name, program in (("model", self.model), ("guide", self.guide)):
            check_signature(name, program, args, kwargs)
        refuse_guide(self.guide, self.datum_plate, known or ())
        seed = checked_seed(seed)
        modules = isolation.modules_of(self.model, self.guide)
        devices = devices_of((args, kwargs), modules)
        with named_late_failure(), isolation.isolated(self.model, self.guide, devices=devices):
            indices: dict[str, Tensor] = {}

            def draw_indices(name: str, fn: Any) -> Tensor:
                if fn.subsample_size is None or fn.subsample_size >= fn.size:
                    return torch.arange(fn.size, device=fn.device)
                generator = torch.Generator().manual_seed(noise_seed(seed, Noise.SUBSAMPLE, len(indices)))
                return torch.randperm(fn.size, generator=generator)[: fn.subsample_size].to(fn.device)

            guide, model = self._programs(args, kwargs, indices, draw_indices, known)
            # The results of the checks may not hold any more once the parameters have changed.
            parameters = [*(p for m in modules for p in m.parameters()), *pyro.get_param_store()._params.values()]
            versions = tuple((id(p), p._version) for p in parameters)
            modes = tuple(m.training for top in modules for m in top.modules())
            key = (signature_of((args, kwargs)), modes, versions, guide.known)
            if key not in self._known:
                self._known[key] = self.find_out(guide, model, seed)
            structure, guide.names, model.names, guide.execution, model.execution = self._known[key]
            guide.layout = model.layout = structure.layout
            if structure.layout.fixed:
                guide.run()  # gives the latents outside the data their values
            yield Call(guide, model, structure, seed, devices[0], self.check_support, self)

    def _programs(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        indices: dict[str, Tensor],
        draw_indices: Callable[[str, Any], Tensor],
        known: Mapping[str, Tensor] | None = None,
    ) -> tuple[Program, Program]:
        shared: Any = {"indices": indices, "draw_indices": draw_indices, "fixed": dict(known or {}), "full_sizes": {}}
        return Program(self.guide, args, kwargs, side="guide", **shared), Program(self.model, args, kwargs, **shared)

    def find_out(self, guide: Program, model: Program, seed: int) -> Found:
        """Find the structure. The checks compare numbers up to rounding errors, so they run without autocast.

        A program that runs only under autocast, because it casts tensors, is checked under it.
        """
        if autocast_around():
            try:
                with off_for_programs():
                    return self._find_out(guide, model, seed)
            except ProgramError:
                pass
        return self._find_out(guide, model, seed)

    def _find_out(self, guide: Program, model: Program, seed: int) -> Found:
        seed_torch(noise_seed(seed, Noise.PROBE, 0))
        guide_sites, model_sites = self._probe(guide, model)
        kept = kept_guide_sites(self.guide, guide_sites, model_sites, self.in_training)
        structure = analyse(self.guide, kept, model_sites, layout=guide.layout, prior_sites=self.prior_sites)
        if self.draws_rather and structure.guide_enumerated and not structure.latents:
            kept = {name: replace(site, infer={}) for name, site in kept.items()}
            structure = analyse(self.guide, kept, model_sites, layout=guide.layout, prior_sites=self.prior_sites)
        if structure.indicators and self.in_training:
            raise AuxiliarySiteError(
                f"only the guide has {quoted(structure.indicators)}, discrete draws without a gradient: train with a "
                "mixture as the distribution of the latents (MixtureSameFamily). Evaluation sums them out"
            )
        structure = replace(structure, left_out=left_out_sites(self.guide, guide_sites, kept))
        guide.layout = model.layout = structure.layout
        guide.names, model.names = frozenset(guide_sites), frozenset(model_sites)
        check_unpacked(guide, structure)
        values = [*guide_sites.values(), *model_sites.values()]
        sizes = {size for s in values for size in (*s.value.shape, *s.fn.shape())} | {structure.layout.batch_size}
        structure = choose_executions(guide, model, structure, sizes, allow_dropout=self.in_training)
        return structure, guide.names, model.names, guide.execution, model.execution

    @torch.no_grad()
    def _probe(self, guide: Program, model: Program) -> tuple[dict[str, Site], dict[str, Site]]:
        """Run each program once, and again if the size of the datum plate is known only from the data."""
        with isolation.LayerWatch():
            for _ in range(2):
                with named_failure("guide", guide.fn, guide.args, guide.kwargs):
                    guide_sites = guide.run(values=guide.fixed if guide.known else None)
                with named_failure("model", model.fn, model.args, model.kwargs):
                    model_sites = self._probe_model(model, guide_sites)
                layout = self._layout(guide_sites, model_sites, guide.known)
                guide.layout = model.layout = layout
                if not layout.unsized:
                    break
        if self.in_training:
            refuse_shared(leading_record(model_sites, layout), layout)
        else:
            # Bounds that are tensors may depend on latents: these are checked with more than one particle.
            movable = {name for name, site in model_sites.items() if bounds_of(support_of(site.fn))}
            check_data(leading_record(model_sites, layout), layout, self.check_support, movable)
        return guide_sites, model_sites

    def _probe_model(self, model: Program, guide_sites: Mapping[str, Site]) -> dict[str, Site]:
        """Run the model at the guide's values. Where it fails, raise by name if the sites of the two do not match."""
        try:
            drawn = {n: s.value for n, s in guide_sites.items() if not s.is_observed}
            return model.run(values={**drawn, **{n: model.fixed[n] for n in model.known}})
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, StructureError):
                raise
            model_sites = model.run()
            kept = kept_guide_sites(self.guide, guide_sites, model_sites, self.in_training)
            layout = self._layout(guide_sites, model_sites, model.known)
            analyse(self.guide, kept, model_sites, layout=layout, prior_sites=self.prior_sites)
            raise

    def _layout(self, guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site], known: Collection[str]) -> Layout:
        kept = kept_guide_sites(self.guide, guide_sites, model_sites, self.in_training)
        layout = find_layout(self.guide, kept, model_sites, self.datum_plate, known, takes_givens=not self.in_training)
        return replace(layout, takes_subsamples=self.takes_subsamples)


def simulation(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    datum_plate: str | None,
    seed: int | None,
    fixed: Mapping[str, Tensor] | None = None,
    indices: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Site], dict[str, Site]]:
    """The sites of two plain runs of a model alone: with the observed values as given, and with drawn ones.

    :param fixed: values of latents outside the data, as `Call.fixed` has them.
    :param indices: indices of the data of subsampled plates, as `Call.subsamples` has them.
    """
    check_program("model", model)
    check_signature("model", model, args, kwargs)
    plate_or_none(datum_plate)
    seed = checked_seed(seed)
    devices = devices_of((args, kwargs), isolation.modules_of(model))
    with named_failure("model", model, args, kwargs), isolation.isolated(model, devices=devices):
        seed_torch(noise_seed(seed, Noise.SIMULATION, 0))
        known = dict(fixed or {})
        taken: Any = {"indices": dict(indices or {}), "draw_indices": lambda name, fn: fn.sample(), "full_sizes": {}}
        program = Program(model, args, kwargs, fixed=known, **taken)
        before = program.run(values=known)
        program.layout = find_layout(model, {}, before, datum_plate, known)
        return before, program.run(redraw_observed=True)
