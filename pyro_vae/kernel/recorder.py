"""A Pyro messenger that supplies the value of every sample site and records the site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from ..autocast import for_program
from ..densities import draw_base, filled, has_edges, innermost, inside_support, is_one_way, log_prob_at, push
from ..errors import StructureError
from .checks.subsamples import check_subsample

Adjust = Callable[[str, Any], tuple[Any, Any]]
Cut = tuple[Tensor, Tensor]  # a draw, and the leaf that replaced it


@dataclass(frozen=True)
class Layout:
    """The positions of particles, enumerated values and data in a batch shape, counted from the right.

    A canonical batch shape is `(*E, K, *plates)`: `num_plates` plate dimensions, the particles left of them, one axis
    per enumerated site left of those. A plain run has no particle axis.
    """

    num_plates: int = 0
    datum_plate: str | None = None
    datum_dim: int | None = None
    batch_size: int = 1
    unsized: bool = False
    takes_subsamples: bool = False  # whether plates inside the one datum may be subsampled
    enumerated: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)  # of enumerated sites, left of the particles; chains reuse them
    expanded: Mapping[str, int] = field(default_factory=dict)  # sites enumerated with `expand=True`: number of values
    along_expanded: frozenset[str] = frozenset()  # latents that the guide draws along the axes of `expanded`
    fixed: frozenset[str] = frozenset()  # sites outside the data that have one value
    known: frozenset[str] = frozenset()  # those of them whose value was given, although the guide would draw it
    plain_shapes: Mapping[str, torch.Size] = field(default_factory=dict)  # batch shapes of latent sites in a plain run
    event_dims: Mapping[str, int] = field(default_factory=dict)

    def enum_dim(self, name: str, leading: bool) -> int:
        return -(self.num_plates + leading + 1 + self.axes[name])


@dataclass
class Site:
    """One recorded sample statement. `density` is the distribution that is scored, unscaled."""

    name: str
    fn: Any
    density: Any
    value: Tensor
    mask: Tensor | bool | None
    scale: Tensor | float
    frames: tuple[Any, ...]
    is_observed: bool
    infer: Mapping[str, Any]
    is_given: bool = False  # the value was not drawn from this distribution
    has_own_value: bool = False  # a latent that already had a value (`poutine.replay`)
    is_fixed: bool = False  # outside the data, with one value
    base_draw: Tensor | None = None  # the base draw of the value, for a flow without an inverse
    own_log_prob: Tensor | None = None  # log-density of such a flow, computed when the value was drawn

    @property
    def is_factor(self) -> bool:
        return type(self.fn).__name__ == "Unit"

    @property
    def is_enumerated(self) -> bool:
        return not self.is_observed and self.infer.get("enumerate") in ("parallel", "sequential")

    def log_prob(self) -> Tensor:
        """The log-density before sums and plate masks, shape (*E, K, *plates). A Delta counts only with its log_density."""
        if isinstance(self.density, dist.Delta) and not self.is_observed:
            log_prob = self.density.log_density
        elif self.own_log_prob is not None:
            log_prob = self.own_log_prob
        else:
            value = filled(self.density, self.value, self.mask)
            with for_program():  # a flow may run its network
                log_prob = log_prob_at(self.name, self.density, value)
            if self.is_given and has_edges(self.density):
                # Some densities are positive outside their support when argument checks are off.
                outside = ~inside_support(self.density, value)
                log_prob = torch.where(outside, log_prob.new_full((), -torch.inf), log_prob)
        return log_prob.float() if log_prob.dtype in (torch.float16, torch.bfloat16) else log_prob


def is_cut_off(msg: Any) -> bool:
    """Whether the site is an unused draw left by `poutine.do`."""
    return msg.get("_intervener_id") is not None


class Recorder(Messenger):
    """Supplies and records sample sites. Entered first, it acts after the program's own plates, masks and scales.

    :param layout: the positions of the axes.
    :param indices: subsample indices by plate, kept for all runs of one call; missing ones are drawn by `draw_indices`.
    :param num_particles: expand every latent site to a leading particle axis, or `None` for a plain run.
    :param values: values of latent sites; other latent sites are drawn.
    :param full_sizes: full sizes of the plates, kept like the indices.
    :param fixed: values of latents outside the data, set by the guide and used by the model.
    :param adjust: function from (name, distribution) of a latent site to (the distribution to draw from, the one for log q).
    :param redraw_observed: also draw the observed sites (`simulate`).
    :param base_draws: the values given for flows without an inverse are draws of their bases.
    :param cuts: filled, in order, with every reparameterised draw and the leaf that the program gets in its place.
        Log-densities then depend on the leaves, and the dependence of the draws on parameters is kept.
    """

    def __init__(
        self,
        layout: Layout,
        indices: dict[str, Tensor],
        draw_indices: Callable[[str, Any], Tensor],
        fixed: dict[str, Tensor],
        full_sizes: dict[str, int],
        *,
        num_particles: int | None = None,
        values: Mapping[str, Tensor] | None = None,
        adjust: Adjust | None = None,
        redraw_observed: bool = False,
        cuts: list[Cut] | None = None,
        base_draws: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.indices, self.draw_indices, self.fixed = layout, indices, draw_indices, fixed
        self.full_sizes = full_sizes
        self.num_particles, self.values, self.adjust = num_particles, values or {}, adjust
        self.redraw_observed, self.cuts, self.base_draws = redraw_observed, cuts, base_draws
        self.sites: dict[str, Site] = {}
        self.drawn: set[str] = set()
        self._own_value: set[str] = set()
        self._densities: dict[str, Any] = {}
        self._one_way: dict[str, tuple[Tensor, Tensor]] = {}  # draws of the base, log-densities

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._answer_subsample(msg)
        elif msg["infer"].get("_deterministic") or is_cut_off(msg):
            return
        elif msg["name"] in self.layout.fixed:
            self._answer_fixed(msg)
        elif not msg["is_observed"] or (self.redraw_observed and not site_is_factor(msg)):
            self._answer(msg)

    def _answer_fixed(self, msg: Any) -> None:
        """The value of a site outside the data: its given value, that of a Delta of the guide, or the guide's draw.

        A site with a known value is not a point of the guide: it has that value, or that of its particle.
        """
        if msg["name"] in self.layout.known and not msg["is_observed"]:
            value = self.values.get(msg["name"])
            msg["value"], msg["done"] = self.fixed[msg["name"]] if value is None else value, True
            return
        if msg["value"] is None:
            point = isinstance(innermost(msg["fn"]), dist.Delta)
            msg["value"], msg["done"] = msg["fn"]() if point else self.fixed[msg["name"]], True
        if not msg["is_observed"]:
            self.fixed[msg["name"]] = msg["value"]

    def _answer_subsample(self, msg: Any) -> None:
        """Give all runs of a call the same subsample."""
        name, given, known = msg["name"], msg["value"], self.indices.get(msg["name"])
        if known is not None:
            check_subsample(name, msg["fn"], given, known, self.full_sizes.get(name, len(known)))
        self.full_sizes.setdefault(name, msg["fn"].size)
        if given is not None:
            self.indices[name] = torch.as_tensor(given)
        elif known is None:
            self.indices[name] = self.draw_indices(name, msg["fn"])
        msg["value"], msg["done"] = self.indices[name], True

    def _answer(self, msg: Any) -> None:
        name = msg["name"]
        if msg["value"] is not None and not msg["is_observed"]:
            self._own_value.add(name)
            return
        fn = msg["fn"] = self._expanded(msg)
        if name in self.values and self.base_draws and is_one_way(fn):
            msg["value"] = self._pushed(name, fn, fn, self.values[name])
        elif name in self.values and not isinstance(fn, dist.Delta):
            if self.adjust is not None:
                self._densities[name] = self.adjust(name, fn)[1]
            msg["value"] = self._along_expanded(name, self.values[name], fn.event_dim)
        elif name in self.layout.enumerated:
            msg["value"] = self._support(name, fn)
        else:
            if self.adjust is not None and not isinstance(fn, dist.Delta):
                fn, self._densities[name] = self.adjust(name, fn)
            if is_one_way(fn):
                msg["value"] = self._pushed(name, fn, self._densities.get(name, fn), draw_base(fn))
            else:
                value = fn() if isinstance(fn, dist.Delta) else self._cut(fn())
                msg["value"] = self._along_expanded(name, value, fn.event_dim)
            self.drawn.add(name)
        msg["done"] = True

    def _pushed(self, name: str, fn: Any, density: Any, base: Tensor) -> Tensor:
        """Draw from a flow without an inverse and compute its density now, while the flow caches the draw."""
        if self.cuts is not None:
            raise StructureError(
                f"the guide's site '{name}' is a flow without an inverse, so the gradient of its density at a draw is not "
                "known: use a flow with an inverse, or ImportanceWeightedELBO(gradient='standard'), which does not need it"
            )
        value = push(fn, base)
        self._one_way[name] = base, density.log_prob(value)
        return value

    def _cut(self, value: Tensor) -> Tensor:
        if self.cuts is None or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self.cuts.append((value, leaf))
        return leaf

    def _expanded(self, msg: Any) -> Any:
        """Expand a latent site by the particle axis, and by the data axis if the data plate has no size."""
        layout, fn = self.layout, msg["fn"]
        width = layout.num_plates + (self.num_particles is not None)
        shape = list(fn.batch_shape)
        if self.num_particles is not None:
            shape = [1] * (width - len(shape)) + shape
            if shape[-width] == 1 and (msg["name"] not in layout.enumerated or msg["name"] in layout.expanded):
                shape[-width] = self.num_particles
        in_datum_plate = any(f.name == layout.datum_plate for f in msg["cond_indep_stack"])
        if layout.unsized and in_datum_plate and layout.datum_dim is not None:
            shape = [1] * (-layout.datum_dim - len(shape)) + shape
            if shape[layout.datum_dim] == 1:
                shape[layout.datum_dim] = layout.batch_size
        return fn if torch.Size(shape) == fn.batch_shape else fn.expand(torch.Size(shape))

    def _along_expanded(self, name: str, value: Tensor, event_dim: int) -> Tensor:
        """A value with the axes that draws of the guide have, so that `torch.cat` accepts it with an expanded site."""
        for other, size in self.layout.expanded.items() if name in self.layout.along_expanded else ():
            axis = self.layout.enum_dim(other, self.num_particles is not None) - event_dim
            value = value.reshape((1,) * (-axis - value.ndim) + value.shape)
            value = value.expand(*value.shape[:axis], size, *value.shape[value.ndim + axis + 1 :])
        return value

    def _support(self, name: str, fn: Any) -> Tensor:
        values = fn.enumerate_support(expand=False)
        width = -self.layout.enum_dim(name, self.num_particles is not None) - 1
        values = values.reshape(values.shape[:1] + (1,) * width + fn.event_shape)
        if name not in self.layout.expanded:
            return values
        plates = fn.batch_shape[max(0, len(fn.batch_shape) - self.layout.num_plates - (self.num_particles is not None)) :]
        return values.expand(values.shape[: width + 1 - len(plates)] + plates + fn.event_shape)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic") or is_cut_off(msg):
            return
        name = msg["name"]
        if name in self.sites:
            raise StructureError(f"two sample statements are named '{name}': give each site of a program its own name")
        base_draw, own_log_prob = self._one_way.get(name, (None, None))
        self.sites[name] = Site(
            base_draw=base_draw,
            own_log_prob=own_log_prob,
            name=name,
            fn=msg["fn"],
            density=self._densities.get(name, msg["fn"]),
            value=msg["value"],
            mask=msg["mask"],
            scale=msg["scale"],
            frames=msg["cond_indep_stack"],
            is_observed=msg["is_observed"],
            infer=dict(msg["infer"]),
            is_given=name not in self.drawn and name not in self.layout.enumerated,
            has_own_value=name in self._own_value,
            is_fixed=name in self.layout.fixed,
        )
