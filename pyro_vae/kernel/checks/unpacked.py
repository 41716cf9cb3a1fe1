"""Auxiliary draws of a guide that Deltas unpack into latents: log q is the density of the draws times a Jacobian.

EasyGuide and user-defined guides draw several latents together, or in unconstrained space, as ``u = pyro.sample("u", fn,
infer={"is_auxiliary": True})`` and ``pyro.sample("z", Delta(f(u), log_density=-log|f'(u)|))``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AuxiliarySiteError, MaskError, quoted
from ..log_densities import reduce_to_datum
from ..programs import Program
from ..recorder import Layout, Site
from .structure import Structure

TOLERANCE = 1e-3  # nats per datum


def check_unpacked(guide: Program, structure: Structure) -> None:
    """Check on two draws that the points are a bijection of the auxiliary draws with the stated log-Jacobian."""
    points = [name for name in structure.unpacked if name in structure.latents]
    auxiliary = [name for name in structure.unpacked if name not in points]
    if not points:
        return
    for _ in range(2):
        drawn = guide.run()
        if any(drawn[name].mask is not None and drawn[name].mask is not True for name in structure.unpacked):
            raise MaskError(
                f"the guide masks some of {quoted(structure.unpacked)}, whose densities belong together: mask none of them"
            )
        with torch.enable_grad():
            values = {name: drawn[name].value.detach().requires_grad_() for name in auxiliary}
            sites = guide.run(values=values)
            outputs = torch.cat([per_datum(sites[name].value, sites[name], structure.layout) for name in points], 1)
            columns = [
                torch.autograd.grad(outputs[:, i].sum(), list(values.values()), retain_graph=True, allow_unused=True)
                for i in range(outputs.shape[1])
            ]
        inputs = [per_datum(values[name], sites[name], structure.layout) for name in auxiliary]
        rows = [
            torch.cat([
                torch.zeros_like(x) if g is None else per_datum(g, sites[name], structure.layout)
                for name, g, x in zip(auxiliary, gradients, inputs, strict=True)
            ], 1)
            for gradients in columns
        ]  # fmt: skip
        jacobian = torch.stack(rows, 1)  # (B, latents, draws)
        stated = torch.stack([reduce_to_datum(sites[name].log_prob(), structure.layout)[0] for name in points]).sum(0)
        square = jacobian.shape[1] == jacobian.shape[2]
        if not square or not bool((torch.linalg.slogdet(jacobian)[1] + stated).abs().le(TOLERANCE).all()):
            raise AuxiliarySiteError(
                f"the guide sets {quoted(points)} from {quoted(auxiliary)}, but not one to one with the log-Jacobian that "
                "their Deltas state: give Delta(f(u), log_density=-log|f'(u)|), with as many numbers in u as in the "
                "latents, or draw the latents themselves"
            )


def per_datum(value: Tensor, site: Site, layout: Layout) -> Tensor:
    """The numbers of a site in a plain run, (*plates, *event), by datum: (B, numbers)."""
    if layout.datum_dim is None:
        return value.reshape(1, -1)
    shape = torch.broadcast_shapes(value.shape, layout.plain_shapes[site.name] + site.fn.event_shape)
    moved = value.expand(shape).movedim(layout.datum_dim - site.fn.event_dim, 0)
    return moved.reshape(len(moved), -1)
