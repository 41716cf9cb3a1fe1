"""The only place that runs a model or a guide: `draw` and `score`, and the log-densities (K, B) they return."""

from .aggregate import (
    Sizes,
    as_particles,
    check_dimensions,
    check_draws,
    check_separate,
    first_dependent,
    joint_sites,
    log_q_by_dimension,
    read_by_prior,
    rows_of,
)
from .batches import arguments_of, check_loader, first_element, over_batches
from .calls import ANNEAL, CHECK, FIT, GUIDE, NOISE_BLOCK, PILOT, PROPOSAL, REVERSE, SIMULATION, SUBSAMPLE, Call
from .checks.agreement import READS
from .checks.data import first_particle, listed
from .checks.discrete import support_values
from .checks.plates import INFER
from .checks.precision import movement
from .checks.structure import Structure
from .checks.subsamples import check_plate_names, check_shared_plates, check_subsample
from .holes import FillHoles
from .isolation import batch_noise, eval_mode, isolated, isolated_store, kept_random_state, noise_seed
from .kl import known_kl
from .live import LivePair, moved_parameters, rehearsal
from .log_densities import LogDensities, check_event_masks, reduce_to_datum
from .one_way import is_one_way, lacks_inverse
from .pairs import Pair, checked_seed, devices_of, signature_of
from .recorder import Cut, Layout
from .records import Record, SiteRecord, close, find_masks, narrow_record, padded
from .simulation import reconstruct_sites, simulate_arguments, simulate_sites
from .supports import TRANSFORMED, bounds_of, has_own_mask, innermost, mask_hides_score, of_one_value, support_of

__all__ = [
    "ANNEAL",
    "CHECK",
    "Call",
    "Cut",
    "FIT",
    "FillHoles",
    "GUIDE",
    "INFER",
    "Layout",
    "LivePair",
    "LogDensities",
    "NOISE_BLOCK",
    "PILOT",
    "PROPOSAL",
    "Pair",
    "READS",
    "REVERSE",
    "Record",
    "SIMULATION",
    "SUBSAMPLE",
    "SiteRecord",
    "Sizes",
    "Structure",
    "TRANSFORMED",
    "arguments_of",
    "as_particles",
    "batch_noise",
    "bounds_of",
    "check_dimensions",
    "check_draws",
    "check_event_masks",
    "check_loader",
    "check_plate_names",
    "check_separate",
    "check_shared_plates",
    "check_subsample",
    "checked_seed",
    "close",
    "devices_of",
    "eval_mode",
    "find_masks",
    "first_dependent",
    "first_element",
    "first_particle",
    "has_own_mask",
    "innermost",
    "is_one_way",
    "isolated",
    "isolated_store",
    "joint_sites",
    "kept_random_state",
    "known_kl",
    "lacks_inverse",
    "log_q_by_dimension",
    "mask_hides_score",
    "moved_parameters",
    "movement",
    "narrow_record",
    "noise_seed",
    "of_one_value",
    "over_batches",
    "padded",
    "read_by_prior",
    "reconstruct_sites",
    "reduce_to_datum",
    "rehearsal",
    "listed",
    "rows_of",
    "signature_of",
    "simulate_arguments",
    "simulate_sites",
    "support_of",
    "support_values",
]
