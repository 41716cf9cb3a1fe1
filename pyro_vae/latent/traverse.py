"""Latent traversals of one datum: decoded means at other values of the latents."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..kernel import INFER, Pair
from ..options import amount
from .traversal import Manifold, Traversal
from .walks import starting_point

LOWEST = 0.05  # and 1 - LOWEST: the range of a walk, in probability under the prior


@torch.no_grad()
def traverse(
    model: Callable,
    guide: Callable,
    *args: Any,
    datum: int = 0,
    units: Sequence[int | str] | None = None,
    num_steps: int = 9,
    seed: int | None = None,
    datum_plate: str | None = INFER,
    **kwargs: Any,
) -> Traversal:
    """Latent traversal: change one latent unit of a datum after the other, the others fixed, and decode.

    A unit is one number of one latent site. The traversal starts at the posterior mean E_q[z given x]. Where a latent has no
    formula for it (a transformed distribution, a latent drawn given another), it starts at one draw of the guide; the record
    says which. Each unit takes the quantiles of its prior, evenly spaced from 5 % to 95 % in probability. They come from
    1000 draws of the model's prior given the arguments of this datum, so any prior will do. In a hierarchy lower latents
    stay fixed too, although the model would draw them given the changed one.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param args: the model's arguments. The whole batch is decoded for each step, so pass few data.
    :param datum: index of the datum in the batch, from 0.
    :param units: names (`'z[3]'`) or indices, as in `UnitActivity`; by default the first 10 that are real numbers.
    :param num_steps: S, at least 2.
    :param seed: fixes the draws; the caller's random state is unchanged.
    :param datum_plate: the plate of the data; needed where two plates are common to all sites.
    :returns: a `Traversal` with `.means`, (U, S, X), those of the first observed site whose likelihood has a mean.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        enumerated sites, units that cannot change alone over the real numbers (discrete latents, parts of a simplex), and
        where no likelihood has a mean.
    :raises OptionError: for a unit or a datum that does not exist, or too few steps.

    Example::

        order = pv.ActiveUnits(vae.model, vae.guide)(loader).order.tolist()
        walk = pv.traverse(vae.model, vae.guide, x[:1], units=order[:8])
        pv.plots.plot_traversals(walk)
    """
    levels = evenly(num_steps)
    with Pair(model, guide, datum_plate=datum_plate, check_support=False).open(args, kwargs, seed) as call:
        start = starting_point(call, datum)
        chosen = start.chosen(units)
        values = start.prior_quantiles(levels, chosen)
        moved = start.row.repeat(*values.shape, 1)
        for place, unit in enumerate(chosen):
            moved[place, :, unit] = values[place]
        site, means = start.likelihood_means(torch.cat([start.row, moved.flatten(0, 1)]))
    return Traversal(
        means=means[1:].unflatten(0, values.shape),
        values=values,
        levels=levels.to(values),
        names=tuple(start.names[unit] for unit in chosen),
        datum=means[0],
        start=start.kind,
        site=site,
    )


@torch.no_grad()
def manifold(
    model: Callable,
    guide: Callable,
    *args: Any,
    datum: int = 0,
    units: Sequence[int | str] = (0, 1),
    num_steps: int = 15,
    seed: int | None = None,
    datum_plate: str | None = INFER,
    **kwargs: Any,
) -> Manifold:
    """Decode a grid over two latent units of one datum, the other units fixed.

    With only two latents this is the picture of Kingma and Welling (2014, https://arxiv.org/abs/1312.6114, figure 4). The
    datum then does not matter, except for inputs that the model conditions on. Everything else is as in `traverse`.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param args: the model's arguments. The whole batch is decoded for each step, so pass few data.
    :param datum: index of the datum in the batch, from 0.
    :param units: two names or indices.
    :param num_steps: S, at least 2, for a grid of S x S.
    :param seed: fixes the draws; the caller's random state is unchanged.
    :param datum_plate: the plate of the data; needed where two plates are common to all sites.

    :returns: a `Manifold` with `.means`, (S, S, X).
    :raises StructureError: as in `traverse`.
    :raises OptionError: for units that are not two, a unit or a datum that does not exist, or too few steps.

    Example::

        vae = pv.mlp_vae(64, latent_dim=2, likelihood=pv.nn.Binomial(16))
        pv.plots.plot_manifold(pv.manifold(vae.model, vae.guide, digits[:1]))
    """
    levels = evenly(num_steps)
    if isinstance(units, str) or not isinstance(units, Sequence) or len(units) != 2:
        raise OptionError(f"units must be two names or indices, got {units!r}")
    with Pair(model, guide, datum_plate=datum_plate, check_support=False).open(args, kwargs, seed) as call:
        start = starting_point(call, datum)
        chosen = start.chosen(units)
        values = start.prior_quantiles(levels, chosen)
        rows = start.row.repeat(len(levels) ** 2, 1)
        rows[:, chosen] = torch.cartesian_prod(*values)
        site, means = start.likelihood_means(rows)
    return Manifold(
        means=means.unflatten(0, (len(levels), len(levels))),
        values=values,
        levels=levels.to(values),
        names=tuple(start.names[unit] for unit in chosen),
        start=start.kind,
        site=site,
    )


def evenly(num_steps: int) -> Tensor:
    """Evenly spaced probabilities, (S,), of the quantiles."""
    return torch.linspace(LOWEST, 1 - LOWEST, amount("num_steps", num_steps, lowest=2))
