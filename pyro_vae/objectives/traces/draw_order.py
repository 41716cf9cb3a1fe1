"""Find the latents with an analytic KL: those whose prior does not depend on the draw of the latent through later draws.

KL(q(z given a) to p(z given b)), averaged over draws of the guide, equals E[log q - log p] only if b has no more information
about z than a has. Draws that the guide makes before z do not depend on z. Later draws may.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.util import site_is_subsample

from ...kernel import LostProvenance, rehearsed
from ...tolerance import close
from .matching import UNCONSTRAINED
from .tape import Tape


def out_of_order(guide_sites: Iterable[str], model_sites: Iterable[str]) -> list[str]:
    """The latents that the guide draws before another latent that precedes them in the model.

    The sites are in the order in which they ran.

    Only the priors of these latents can depend on their draws. An autoguide draws a latent under another name before it is
    set.
    """
    place = {name: i for i, name in enumerate(guide_sites)}
    found, last = [], -1
    for name in model_sites:
        if name in place:
            if place.get(name + UNCONSTRAINED, place[name]) < last:
                found.append(name)
            last = max(last, place[name])
    return found


@torch.no_grad()
def depends_on_own_draw(
    names: Collection[str], guide: Callable, model: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> frozenset[str]:
    """The latents among `names` whose prior depends on the draw of the same latent, through later draws of the guide.

    Each draw is tracked through guide and model by its provenance. A scripted function or `torch.vmap` loses the provenance,
    so the draw is also replaced by another one, and the prior must not change. In doubt a latent is included.
    """
    with rehearsed(guide, model, args, kwargs):
        try:
            drawn, scored = run_followed(guide, model, args, kwargs)
            found = set()
            for name in names:
                draw = name + UNCONSTRAINED if name + UNCONSTRAINED in drawn.nodes else name
                _, other = run_followed(guide, model, args, kwargs, moved=draw)
                if scored.read[name] & {name, draw} or not same_density(scored.nodes[name], other.nodes[name]):
                    found.add(name)
            return frozenset(found)
        except Exception:  # a program may raise any error when its tensors are tracked
            return frozenset(names)


def run_followed(
    guide: Callable, model: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any], moved: str | None = None
) -> tuple[FollowedTape, FollowedTape]:
    """Run guide and model with the same noise; `moved` is the site that gets another draw."""
    pyro.set_rng_seed(0)
    with LostProvenance() as lost:
        with FollowedTape(lost, moved=moved) as drawn:
            guide(*args, **kwargs)
        with FollowedTape(lost, drawn) as scored:
            model(*args, **kwargs)
    return drawn, scored


class FollowedTape(Tape):
    """A tape with provenance: a draw is marked with its name, and so is everything computed from it.

    :ivar read: by latent, the names of the draws that its distribution and its mask depend on.
    """

    def __init__(self, lost: LostProvenance, guide: Tape | None = None, moved: str | None = None) -> None:
        super().__init__(guide)
        self.lost, self.moved = lost, moved
        self.read: dict[str, frozenset[str]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            name, value = msg["name"], msg["value"]
            replayed = self.guide is not None and name in self.guide.nodes
            log_prob = msg["fn"].log_prob(detach_provenance(value) if replayed else value)
            read = get_provenance(log_prob) | get_provenance(msg["mask"]) | self.lost.names
            other = None if replayed else msg["fn"]()  # drawn in every run, so that all later noise is the same
            self.read[name] = read
            if not replayed:
                msg["value"] = track_provenance(other if name == self.moved else value, read | {name})
        super()._pyro_post_sample(msg)


def same_density(site: Any, other: Any) -> bool:
    """Whether two runs give the same density to the draw of the first."""
    value = detach_provenance(site["value"])
    return close(*(detach_provenance(run["fn"].log_prob(value)) for run in (site, other)))
