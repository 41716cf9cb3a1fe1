"""Properties of a single distribution: support, masks, transforms, KL."""

from .holes import FillHoles, filled
from .kl import by_number, known_kl, without_mask
from .masks import check_event_masks, find_masks, has_own_mask, mask_hides_score
from .one_way import draw_base, is_one_way, lacks_inverse, log_prob_at, push
from .supports import (
    TRANSFORMED,
    bounds_of,
    has_edges,
    innermost,
    inside_support,
    is_angle,
    is_discrete,
    next_to_far_end,
    of_one_value,
    support_of,
    support_values,
)

__all__ = [
    "FillHoles",
    "TRANSFORMED",
    "bounds_of",
    "by_number",
    "check_event_masks",
    "draw_base",
    "filled",
    "find_masks",
    "has_edges",
    "has_own_mask",
    "innermost",
    "inside_support",
    "is_angle",
    "is_discrete",
    "is_one_way",
    "known_kl",
    "lacks_inverse",
    "log_prob_at",
    "mask_hides_score",
    "next_to_far_end",
    "of_one_value",
    "push",
    "support_of",
    "support_values",
    "without_mask",
]
