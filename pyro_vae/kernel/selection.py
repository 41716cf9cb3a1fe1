"""A call for some of the data of another call, where its arguments can be cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import selected
from ..noise import Noise, noise_seed

if TYPE_CHECKING:
    from .calls import Call

COMPARED = 10  # draws of each kind at which log-densities must be the same

# Values of the latents, and the log-densities there that parts must have too, (1 or 2, K, B).
Comparison = tuple[Mapping[str, Tensor], Tensor]


@contextmanager
def call_for(call: Call, kept: Tensor, number: int) -> Iterator[Call | None]:
    """A call for the data with the indices `kept`, (b,), or `None` where the arguments cannot be cut.

    Arguments are cut along their first axis that is as long as the call has data, also inside lists and mappings. The result
    is then checked. log p(x, z) and log q(z given x) at draws of the guide must be the same as before. So must log p(x, z)
    at draws of the prior and at `call.further`, because a guide that is far too narrow covers little of the model. Data that
    the program does not get as arguments are not cut.

    :param number: number of parts of this call opened so far, so that each has different noise.
    """
    seed = noise_seed(call.seed, Noise.PART, number)
    if torch.equal(kept.cpu(), torch.arange(call.batch_size)):
        yield call.again(seed)
        return
    # the program selects the data, or each datum is many rows
    if call.structure.subsampled or call.model.outside is not None:
        yield None
        return
    args, kwargs = (selected(tree, call.batch_size, kept) for tree in (tuple(call.model.args), dict(call.model.kwargs)))
    with ExitStack() as stack:
        try:
            part = stack.enter_context(call.pair.open(args, kwargs, seed))
            right = agrees(call, part, kept)
        except Exception:  # a program may raise any error for unexpected arguments
            right = False
        yield part if right else None


def agrees(call: Call, part: Call, kept: Tensor) -> bool:
    """Whether the part has the sites of the call, and the same log-densities at the same latents."""
    if part.batch_size != len(kept) or sites_of(part) != sites_of(call):
        return False
    if call.compared is None:
        call.compared = comparisons(call)
    return all(
        same(log_densities(part, cut(values, call, kept), guide_too=len(expected) > 1), expected.index_select(-1, kept))
        for values, expected in call.compared
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Equality up to the last digits of floats: 1e-5 of log p(x) of an image may be a nat, and rounding is much less."""
    return torch.allclose(
        a, b, rtol=max(1e-9, 4 * torch.finfo(a.dtype).eps), atol=1e-9 if a.dtype == torch.float64 else 1e-4, equal_nan=True
    )


def comparisons(call: Call) -> list[Comparison]:
    """The comparisons at draws of the guide, of the prior, and at further values, if there are any."""
    call.set_noise(Noise.PROBE, 3)
    of_guide = call.latent_values(call.draw_latents(COMPARED))
    others = [call.draw_prior(COMPARED)[0]]
    if call.further is not None:
        call.set_noise(Noise.PROBE, 4)
        others.append(call.further(COMPARED))
    return [
        (of_guide, log_densities(call, of_guide, guide_too=True)),
        *((values, log_densities(call, values, guide_too=False)) for values in others),
    ]


def sites_of(call: Call) -> tuple[Any, ...]:
    structure = call.structure
    return structure.latents, structure.guide_enumerated, structure.model_enumerated, structure.prior_sites


def log_densities(call: Call, values: Mapping[str, Tensor], *, guide_too: bool) -> Tensor:
    """log p(x, z), and log q(z given x) where `guide_too`, at given latents, (1 or 2, K, B)."""
    guide = call.first_particle(call.draw_latents(1))  # for its masks
    model = call.score(values, COMPARED)
    found = [call.weigh(guide, model, COMPARED).log_joint]
    if guide_too:
        found.append(call.log_guide(values, COMPARED, model))
    return torch.stack([log_density.expand(COMPARED, call.batch_size) for log_density in found])


def cut(values: Mapping[str, Tensor], call: Call, kept: Tensor) -> dict[str, Tensor]:
    """Canonical values, (K, *plates, *event), of some of the data."""
    layout = call.layout
    assert layout.datum_dim is not None  # a call with one datum cannot be cut
    return {
        name: value.index_select(layout.datum_dim - layout.event_dims[name], kept)
        if value.shape[layout.datum_dim - layout.event_dims[name]] == call.batch_size
        else value
        for name, value in values.items()
    }
