"""The records of latent traversals: decoded means along changes of the latents."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..records import Result, page, to_plain


@dataclass(frozen=True, eq=False, repr=False)
class Traversal(Result):
    """A latent traversal of one datum, as returned by `traverse`: one unit after the other changes, the others stay fixed.

    U units, S steps, data event X.

    :ivar means: (U, S, X) the mean of the likelihood with this unit at this value and the others fixed.
    :ivar values: (U, S) the values of the unit: quantiles of its prior.
    :ivar levels: (S,) the probabilities of these quantiles.
    :ivar names: U names, `'z[3]'` for the fourth number of the latent site `'z'`.
    :ivar datum: (X,) the mean of the likelihood with no unit changed.
    :ivar start: the fixed values of the units: "mean" (E_q[z given x] of the datum) or "draw" (one draw of the guide).
    :ivar site: the observed site.

    Example::

        walk = pv.traverse(vae.model, vae.guide, x[:1])
        walk.means, walk.values     # (U, S, X), (U, S)
    """

    means: Tensor
    values: Tensor
    levels: Tensor
    names: tuple[str, ...]
    datum: Tensor
    start: str
    site: str

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "names": list(self.names)}

    def _columns(self) -> dict[str, list[Any]]:
        """A row for each unit and step."""
        return {
            "unit": [name for name in self.names for _ in self.levels],
            "level": self.levels.tolist() * len(self.names),
            "value": self.values.flatten().tolist(),
        }

    def _num_rows(self) -> int:
        return self.values.numel()

    def _in_short(self) -> str:
        return f"{len(self.names)} units, {len(self.levels)} steps"

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        rows = [
            f"  {name:<{width}}  from {float(values[0]):.3g} to {float(values[-1]):.3g}"
            for name, values in zip(self.names, self.values, strict=True)
        ]
        shape = tuple(self.datum.shape)
        steps = f"{len(self.levels)} quantiles of the prior each"
        return page([f"Traversal from the {self.start} of one datum, means of '{self.site}' {shape}, {steps}", *rows])


@dataclass(frozen=True, eq=False, repr=False)
class Manifold(Result):
    """Decoded means over a grid of two latent units of one datum, as returned by `manifold`. S steps, data event X.

    :ivar means: (S, S, X) the mean of the likelihood with the first unit at `values[0, i]` and the second at `values[1, j]`.
    :ivar values: (2, S) the values of the units: quantiles of their priors.
    :ivar levels: (S,) the probabilities of these quantiles.
    :ivar names: the two units.
    :ivar start: the values of the other units: "mean" (E_q[z given x] of the datum) or "draw" (one draw of the guide).
    :ivar site: the observed site.

    Example::

        grid = pv.manifold(vae.model, vae.guide, x[:1], units=[0, 1])
        grid.means      # (S, S, X)
    """

    means: Tensor
    values: Tensor
    levels: Tensor
    names: tuple[str, ...]
    start: str
    site: str

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "names": list(self.names)}

    def _columns(self) -> dict[str, list[Any]]:
        """A row for each step."""
        units = dict(zip(self.names, self.values.tolist(), strict=True))
        return {"level": self.levels.tolist(), **{f"values[{name}]": values for name, values in units.items()}}

    def _num_rows(self) -> int:
        return len(self.levels)

    def _in_short(self) -> str:
        return f"{len(self.levels)} x {len(self.levels)} steps of {self.names[0]} and {self.names[1]}"

    def __str__(self) -> str:
        ranges = ", ".join(
            f"{name} from {float(values[0]):.3g} to {float(values[-1]):.3g}"
            for name, values in zip(self.names, self.values, strict=True)
        )
        return f"Manifold of {len(self.levels)} x {len(self.levels)} means of '{self.site}': {ranges}"
