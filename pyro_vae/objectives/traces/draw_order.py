"""Which latents have a KL by formula: those whose prior depends on nothing that depends on their own draw.

KL(q(z given a) to p(z given b)), averaged over draws of the guide, is E[log q - log p] of the guide only if b says no more
about z than a does. What the guide draws before z depends on z in no way. What it draws later may.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.util import site_is_subsample

from ...kernel import LostProvenance, close, rehearsed
from .matching import UNCONSTRAINED
from .tape import Tape


def out_of_order(guide_sites: Iterable[str], model_sites: Iterable[str]) -> list[str]:
    """The latents that the guide draws before another one that stands before them in the model; sites in the order they ran.

    Only their priors can depend on their own draws. An autoguide draws a latent under another name before it is set.
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
    """The latents among `names` whose prior depends on their own draw, through later draws of the guide.

    Each draw is followed through guide and model by its provenance. A scripted function or `torch.vmap` loses that, so the
    draw is also replaced by another one, and the prior must stay as it was. In doubt a latent is named.
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
        except Exception:  # whatever a program may raise when its tensors are followed
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
    """A tape with provenance: a draw carries its name, and so does whatever is computed from it.

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
            other = None if replayed else msg["fn"]()  # in every run, so that all later noise is the same
            self.read[name] = read
            if not replayed:
                msg["value"] = track_provenance(other if name == self.moved else value, read | {name})
        super()._pyro_post_sample(msg)


def same_density(site: Any, other: Any) -> bool:
    """Whether two runs give the same density to the draw of the first."""
    value = detach_provenance(site["value"])
    return close(*(detach_provenance(run["fn"].log_prob(value)) for run in (site, other)))
