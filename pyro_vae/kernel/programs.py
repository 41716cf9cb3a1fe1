"""`draw` and `score`, and the four ways to execute a program for K particles."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..autocast import for_program
from ..densities import find_masks
from ..errors import StructureError, quoted
from .folding import folded_draws, folded_scores
from .outside_draws import OutsideDraws, scored_at_draws
from .recorder import Adjust, Cut, Layout, Recorder, Site
from .records import Record, SiteRecord, leading_record, looped_record, padded, select_particle, split_joint_draw

Values = Mapping[str, Tensor]
Execution = Literal["leading", "vmap", "folded", "loop"]


class Program:
    """One side of a (model, guide) pair, bound to the arguments of one call.

    `execution` is "leading" (a particle axis left of all plates), "vmap" (scoring only), "folded" (the data are repeated) or
    "loop", as chosen by the checks.
    """

    def __init__(
        self,
        fn: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        indices: dict[str, Tensor],
        draw_indices: Callable[[str, Any], Tensor],
        fixed: dict[str, Tensor],
        full_sizes: dict[str, int],
        side: str = "model",
    ) -> None:
        self.side = side  # "model" or "guide", for messages
        self.fn, self.args, self.kwargs = fn, args, kwargs
        self.indices, self.draw_indices, self.fixed, self.full_sizes = indices, draw_indices, fixed, full_sizes
        self.known = frozenset(fixed)  # sites outside the data whose value is given
        self.outside: OutsideDraws | None = None  # many values of these, see `outside_draws`
        self.layout = Layout()
        self.names: frozenset[str] | None = None
        self.execution: Execution = "loop"
        self.ran_plainly = False  # the program has put its parameters into the store
        self.why_looped = ""  # the failures of the other executions
        self.base_draws = False  # whether values given for flows without an inverse are draws of their bases

    def run(self, num_particles: int | None = None, **options: Any) -> dict[str, Site]:
        """One run of the program, plain or with a leading particle axis."""
        options |= {"num_particles": num_particles, "base_draws": self.base_draws}
        recorder = Recorder(self.layout, self.indices, self.draw_indices, self.fixed, self.full_sizes, **options)
        with recorder, for_program():
            self.fn(*self.args, **self.kwargs)
        self.ran_plainly = True
        if self.names is not None and self.names != recorder.sites.keys():
            raise StructureError(
                f"the sites changed between two runs: {quoted(sorted(self.names ^ recorder.sites.keys()))}. The sites of "
                "a program must not depend on drawn values or on the data of a batch"
            )
        if self.names is not None:
            self._check_batch_size(recorder.sites)
        return recorder.sites

    def _check_batch_size(self, sites: Mapping[str, Site]) -> None:
        for site in sites.values():
            for frame in site.frames:
                if frame.name == self.layout.datum_plate and frame.size not in (-1, self.layout.batch_size):
                    raise StructureError(
                        f"plate '{frame.name}' has size {frame.size} now and had {self.layout.batch_size} before with "
                        "arguments of the same shapes: pass what decides the size as an argument"
                    )

    def plain_values(self, values: Values, k: int) -> dict[str, Tensor]:
        """The values of particle `k` in the shapes that a plain run has."""
        plain = {}
        for name, value in values.items():
            width = self.layout.num_plates + self.layout.event_dims[name]
            value = select_particle(value, k, width)
            if value.ndim <= width:  # no enumerated axis: undo the padding of the plates
                shape = self.layout.plain_shapes[name]
                value = value.reshape(shape + value.shape[value.ndim - self.layout.event_dims[name] :])
            plain[name] = value
        return plain


def ancestral(program: Program) -> Program:
    """The same program, drawing the sites that it enumerates."""
    drawing = copy(program)
    drawing.layout = replace(program.layout, enumerated=(), expanded={})
    return drawing


@contextmanager
def looping_after_failure(program: Program) -> Iterator[None]:
    """If a program fails on many copies of its data (a table that ends), it then runs one particle at a time."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, StructureError):
            raise
        program.execution = "loop"


def draw(
    program: Program, num_particles: int, *, adjust: Adjust | None = None, cuts: list[list[Cut]] | None = None
) -> Record:
    """Draw K particles: values and distributions per site, log-densities computed when read.

    For a model, this draws from the prior and records the likelihood of its observations too. `cuts` is filled with the cuts
    of each run of the program, see `Recorder`.
    """
    if program.outside is not None:
        drawing = copy(program)
        drawing.execution = "leading" if program.execution == "leading" else "loop"
        return scored_at_draws(drawing, {}, num_particles, score)
    if program.execution == "folded" and num_particles > 1:
        with looping_after_failure(program):
            return folded_draws(program, num_particles, adjust)
    num_runs = 1 if program.execution == "leading" else num_particles
    chains: list[list[Cut] | None] = [None if cuts is None else [] for _ in range(num_runs)]
    if cuts is not None:
        cuts.extend(chain for chain in chains if chain is not None)
    if program.execution == "leading":
        sites = program.run(num_particles, adjust=adjust, cuts=chains[0])
        return leading_record(split_joint_draw(program.fn, sites), program.layout)
    runs = [split_joint_draw(program.fn, program.run(adjust=adjust, cuts=chain)) for chain in chains]
    return looped_record(runs, program.layout)


def score(program: Program, values: Values, num_particles: int, *, adjust: Adjust | None = None) -> Record:
    """Log-densities per site at given canonical values; latent sites without a value are drawn once and recorded."""
    if program.outside is not None:
        return scored_at_draws(program, values, num_particles, score)
    if program.execution == "leading":
        sites = program.run(num_particles, values=values, adjust=adjust)
        return leading_record(split_joint_draw(program.fn, sites), program.layout)
    if program.execution == "vmap":
        return vmapped_record(program, values, num_particles)
    if program.execution == "folded" and num_particles > 1:
        with looping_after_failure(program):
            return folded_scores(program, values, num_particles, adjust)
    plain = [program.plain_values(values, k) for k in range(num_particles)]
    runs = [split_joint_draw(program.fn, program.run(values=v, adjust=adjust)) for v in plain]
    return looped_record(runs, program.layout)


def vmapped_record(program: Program, values: Values, num_particles: int) -> Record:
    """Run the plain program under `torch.vmap`: right for `softmax(dim=1)`, `cat` with closures, convolutions."""
    if not program.ran_plainly:  # under vmap no parameter may be made
        program.run(values=program.plain_values(values, 0))
    layout, width = program.layout, program.layout.num_plates
    dims, expanded = {}, {}
    for name, value in values.items():
        dims[name] = value.ndim - 1 - width - layout.event_dims[name]
        shape = list(value.shape)
        shape[dims[name]] = num_particles
        expanded[name] = value.expand(shape)
    seen: dict[str, Site] = {}

    def once(values: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        values = {n: v.unsqueeze(v.ndim - width - layout.event_dims[n]) for n, v in values.items()}
        sites = split_joint_draw(program.fn, program.run(values=program.plain_values(values, 0)))
        seen.update(sites)
        outputs = {}
        for name, site in sites.items():
            if name in layout.fixed:
                continue
            mask, event_mask = find_masks(site.fn, site.mask, site.value)
            if event_mask is not None:
                raise StructureError(f"site '{name}' is masked inside its event: not read under vmap")
            outputs[name] = {"log_prob": padded(site.log_prob(), width)}
            if mask is not None:
                outputs[name]["mask"] = padded(mask, width)
        return outputs

    outputs = torch.vmap(once, in_dims=(dims,), randomness="different")(expanded)  # of dropout in training
    record: Record = {}
    for name, output in outputs.items():
        # The axis is moved explicitly: a negative `out_dims` crashes the process if an output does not depend on the inputs.
        moved = {key: tensor.movedim(0, -(width + 1)) for key, tensor in output.items()}
        site, mask = seen[name], moved.get("mask")
        value = site.value if site.is_observed else expanded.get(name, site.value)
        record[name] = SiteRecord(replace(site, value=value), value, partial(moved.__getitem__, "log_prob"), mask)
    return record
