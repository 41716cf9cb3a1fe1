"""A call for some of the data of another call, where its arguments can be cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import selected
from ..errors import StructureError
from ..noise import Noise, noise_seed
from .records import close

if TYPE_CHECKING:
    from .calls import Call

COMPARED = 10  # draws of the guide at which log p(x, z) must be the same


@contextmanager
def call_for(call: Call, kept: Tensor, number: int) -> Iterator[Call | None]:
    """A call for the data with the indices `kept`, (b,), or `None` where the arguments cannot be cut.

    Arguments are cut along their first axis that is as long as the call has data, also inside lists and mappings. Whether
    that was right is then compared: log p(x, z) at the same latents must be what it was. Data that the program finds
    elsewhere than in its arguments are not cut.

    :param number: of the parts of this call that were opened so far, so that each has noise of its own.
    """
    seed = noise_seed(call.seed, Noise.PART, number)
    if torch.equal(kept.cpu(), torch.arange(call.batch_size)):
        yield call.again(seed)
        return
    if call.structure.subsampled or call.model.outside is not None:  # the program chooses the data itself, or each is many
        yield None
        return
    args, kwargs = (selected(tree, call.batch_size, kept) for tree in (tuple(call.model.args), dict(call.model.kwargs)))
    with ExitStack() as stack:
        try:
            part = stack.enter_context(call.pair.open(args, kwargs, seed))
            right = agrees(call, part, kept)
        except (StructureError, RuntimeError, ValueError, IndexError, TypeError, KeyError):  # what a wrong shape may cause
            right = False
        yield part if right else None


def agrees(call: Call, part: Call, kept: Tensor) -> bool:
    """Whether the part has the sites of the call, and log p(x, z) at the same latents is the same."""
    if part.batch_size != len(kept) or sites_of(part) != sites_of(call):
        return False
    if call.compared is None:
        call.set_noise(Noise.PROBE, 3)
        values = call.latent_values(call.draw_latents(COMPARED))
        call.compared = values, log_joint(call, values)
    values, expected = call.compared
    return close(log_joint(part, cut(values, call, kept)), expected.index_select(-1, kept))


def sites_of(call: Call) -> tuple[Any, ...]:
    structure = call.structure
    return structure.latents, structure.guide_enumerated, structure.model_enumerated, structure.prior_sites


def log_joint(call: Call, values: Mapping[str, Tensor]) -> Tensor:
    """log p(x, z), (K, B), at given latents."""
    guide = call.first_particle(call.draw_latents(1))  # for its masks
    return call.weigh(guide, call.score(values, COMPARED), COMPARED).log_joint.expand(COMPARED, -1)


def cut(values: Mapping[str, Tensor], call: Call, kept: Tensor) -> dict[str, Tensor]:
    """Canonical values, (K, *plates, *event), of some of the data."""
    layout = call.layout
    assert layout.datum_dim is not None  # a call that is one datum cannot be cut
    return {
        name: value.index_select(layout.datum_dim - layout.event_dims[name], kept)
        if value.shape[layout.datum_dim - layout.event_dims[name]] == call.batch_size
        else value
        for name, value in values.items()
    }
