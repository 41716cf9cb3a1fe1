"""Named errors with a remedy for programs at which Pyro's enumeration fails inside."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine

from ...errors import EnumerationError
from ...noise import kept_random_state

MOVED = "the shape of a site does not fit its plates, for instance because a program moves the axis of an enumerated site"
KEEP_DIMS = "Keep the positions of the plate dimensions, as in z[..., :1, :] in place of z[..., 0, :]"

# A part of Pyro's or torch's message, what it means, what to do.
KNOWN = {
    "cartesian product": (
        "an enumerated site has events of several numbers",
        "Write a site for each number, or remove infer={'enumerate': ...}",
    ),
    "Enumeration dim conflict": (
        "the guide draws a latent that depends on an enumerated site, and the model draws the two in the other order",
        "Draw them in the order of the model, or remove infer={'enumerate': ...} in the guide",
    ),
    "_pyro_backward": (
        "there are two discrete latents, one of them enumerated, and another latent is in a plate inside the datum",
        "Write that plate as an event (to_event)",
    ),
    "no more global than guide enumeration": (
        "the model sums out a site outside of a plate in which the guide enumerates another one",
        "Enumerate both in the guide",
    ),
    "tree-structured plate nesting": (
        "one site depends on summed-out sites of two plates, neither of which is inside the other",
        "Iterate over one of the plates, `for i in pyro.plate(...)`, with a separate name for each of its sites",
    ),
    "shapes disagree at site": (MOVED, KEEP_DIMS),
    "Shape mismatch inside plate": (MOVED, KEEP_DIMS),
    "must match the size of tensor": (MOVED, KEEP_DIMS),
    "same dtype": (
        "Pyro mixes numbers of the default dtype with those of the program",
        "Call torch.set_default_dtype with the dtype of the program",
    ),
}


# Messages of torch and Pyro that also occur for faults unrelated to enumeration.
GENERAL = ("shapes disagree at site", "Shape mismatch inside plate", "must match the size of tensor", "same dtype")


@contextmanager
def pyro_failures(model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except EnumerationError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        for part, (meaning, remedy) in KNOWN.items():
            if part in str(error) and (part not in GENERAL or fails_by_enumeration(model, guide, args, kwargs)):
                raise EnumerationError(f"Pyro's TraceEnum_ELBO cannot compute this loss: {meaning}. {remedy}") from error
        raise


def fails_by_enumeration(model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether some site is enumerated, and the pair runs where it is drawn instead."""
    try:
        with torch.no_grad(), kept_random_state():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    except Exception:
        return False
    sites = [*guide_trace.nodes.values(), *model_trace.nodes.values()]
    return any(site["type"] == "sample" and (site["infer"] or {}).get("enumerate") for site in sites)
