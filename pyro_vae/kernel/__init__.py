"""The only package that runs a model or a guide. `kernel.checks` has the checks that raise for a program.

Its interface:

Pair, Call
: a model and a guide; `Pair.open(args)` gives a `Call`, which draws, scores and weighs: `draw`, `draw_prior`, `run_prior`,
  `simulate`, `reconstruct`, `score`, `log_guide`, `weigh`, `log_weights`. `LivePair` is a pair in training. `INFER` is the
  default of `datum_plate=`.

Outside
: latents outside the plate of the data: which, their draws, their densities. `Call.at_draws` is about data given many draws.

Record, SiteRecord, LogDensities
: what a run gives back, by site: values and distributions, and log-densities per particle and datum. `narrow_record` takes
  some of the particles, `movement` weighs a few again in float64, `is_moved` says what that matters to.

Layout, Structure
: where particles, plates and events lie in a shape, and what the sites of a pair are to one another. `padded`,
  `first_particle` and `reduce_to_datum` go by a layout.

simulation, latent_sites
: data from a model alone, and the latents of a model alone.

first_dependent, read_by_prior, LostProvenance
: which draws depend on which.

rehearsed
: the first look at a pair in training, after which all is as before.

named_failures
: puts a line of ours before an error that torch or Pyro raise in a training step.

Cut, IMPUTED, is_imputed, check_subsample, same_indices
: for objectives: draws that were cut out of a graph, what `obs_mask` imputes, subsamples that must be the same.
"""

from .calls import Call
from .checks.data import first_particle
from .checks.failures import named_failures
from .checks.plates import INFER
from .checks.precision import is_moved, movement
from .checks.reads import LostProvenance
from .checks.structure import IMPUTED, Structure, is_imputed
from .checks.subsamples import check_subsample, same_indices
from .indicators import Summed
from .latent_sites import latent_sites
from .live import LivePair, rehearsed
from .log_densities import LogDensities, reduce_to_datum
from .outside import Outside
from .pairs import Pair, simulation
from .provenance import first_dependent, read_by_prior
from .recorder import Cut, Layout
from .records import Record, SiteRecord, narrow_record, padded

__all__ = [
    "Call",
    "Cut",
    "IMPUTED",
    "INFER",
    "Layout",
    "LivePair",
    "LogDensities",
    "LostProvenance",
    "Outside",
    "Pair",
    "Record",
    "SiteRecord",
    "Structure",
    "Summed",
    "check_subsample",
    "first_dependent",
    "first_particle",
    "is_imputed",
    "is_moved",
    "latent_sites",
    "movement",
    "named_failures",
    "narrow_record",
    "padded",
    "read_by_prior",
    "reduce_to_datum",
    "rehearsed",
    "same_indices",
    "simulation",
]
