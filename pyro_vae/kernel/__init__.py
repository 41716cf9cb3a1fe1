"""The only place that runs a model or a guide: `draw` and `score`, and the log-densities (K, B) they return."""

from .batches import arguments_of, check_loader, first_element, over_batches
from .beta import WeighedTraces, beta_at, weigh_traces
from .calls import ANNEAL, CHECK, FIT, GUIDE, NOISE_BLOCK, PILOT, PROPOSAL, REVERSE, Call
from .discrete import support_values
from .draw_order import depends_on_own_draw, out_of_order
from .holes import FillHoles
from .isolation import batch_noise, eval_mode, kept_random_state
from .kl import known_kl
from .latents import Beta, Betas, check_imputed
from .live import LivePair
from .log_weights import LogWeights, reduce_to_datum
from .one_way import is_one_way, lacks_inverse
from .pairs import Pair, checked_seed, signature_of
from .plates import INFER
from .precision import Movement, movement
from .recorder import Cut
from .records import Record, SiteRecord, find_masks, padded
from .simulation import reconstruct_sites, simulate_arguments, simulate_sites
from .structure import Structure
from .subsamples import check_plate_names
from .supports import TRANSFORMED, bounds_of, innermost, of_one_value, support_of
from .tape import tape_pair

__all__ = [
    "ANNEAL",
    "CHECK",
    "FIT",
    "GUIDE",
    "INFER",
    "NOISE_BLOCK",
    "PILOT",
    "PROPOSAL",
    "REVERSE",
    "TRANSFORMED",
    "Beta",
    "Betas",
    "Call",
    "Cut",
    "FillHoles",
    "LivePair",
    "LogWeights",
    "Movement",
    "Pair",
    "Record",
    "SiteRecord",
    "Structure",
    "WeighedTraces",
    "arguments_of",
    "batch_noise",
    "beta_at",
    "bounds_of",
    "check_imputed",
    "check_loader",
    "check_plate_names",
    "checked_seed",
    "depends_on_own_draw",
    "eval_mode",
    "find_masks",
    "first_element",
    "innermost",
    "is_one_way",
    "kept_random_state",
    "known_kl",
    "lacks_inverse",
    "movement",
    "of_one_value",
    "out_of_order",
    "over_batches",
    "padded",
    "reconstruct_sites",
    "reduce_to_datum",
    "signature_of",
    "simulate_arguments",
    "simulate_sites",
    "support_of",
    "support_values",
    "tape_pair",
    "weigh_traces",
]
