"""Base class of objectives with an importance weight per datum; the scale of the plate multiplies the bound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.util import warn_if_nan
from torch import Tensor

from ..errors import StructureError, quoted
from ..kernel import INFER, Call, LivePair, LogDensities, Record
from ..options import names_of_sites, plate_or_none
from .gradients import score_of_bound, scored_sites
from .objective import Objective
from .terms import Pass, Terms, terms_of
from .traces.matching import Betas
from .weighing import check_enumeration, pass_of, total
from .weights import snapshot


class DatumELBO(Objective):
    """Base class of objectives that are functions of the log-densities (K, B).

    A subclass implements `bound`, and its gradient is right for any draws. A subclass whose gradient is not that of its loss
    implements `_loss_and_surrogate` instead, which returns the loss and the surrogate whose gradient is used.
    """

    _loss: Tensor
    _recorded: Betas
    _plates: dict[str, int]
    _num_drawn: int

    def __init__(
        self,
        *,
        num_particles: int,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(num_particles=num_particles, **options)
        self.datum_plate, self.prior_sites = plate_or_none(datum_plate), names_of_sites("prior_sites", prior_sites)
        self._pairs: dict[str, LivePair] = {}

    def _loss_alone(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            loss = self._run(model, guide, args, kwargs)[0]
        warn_if_nan(loss, "loss")
        return loss

    def _loss_and_grads(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float:
        loss, surrogate = self._run(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward()
        value = float(loss)
        warn_if_nan(value, "loss")  # type: ignore[call-overload]
        return value

    def _value_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return self._run(model, guide, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pairs": {}, "_pass": None}

    def _forget(self) -> None:
        super()._forget()
        self._pass: Pass | None = None

    def _make_terms(self) -> Terms:
        assert self._pass is not None
        terms = terms_of([self._pass], self._num_drawn, self._recorded)
        return replace(terms, loss=self._loss, plates=self._plates)

    def _run(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        self._forget()
        loss, surrogate = self._loss_and_surrogate(model, guide, args, kwargs)
        self._loss, self._complete = loss.detach(), True
        return self._loss, surrogate

    def bound(self, log_weight: Tensor) -> Tensor:
        """The bound of each datum, (B,), from the log-weights (K, B) of any number K of particles; nats."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method bound: define bound(log_weight), from (K, B) to (B,)"
        )

    def _loss_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        call = self._call(model, guide, args, kwargs)
        drawn = call.draw(self.num_particles)
        weights, scale = self._weigh(call, drawn, scores_draws=True)
        bound = self.bound(weights.log_weight)
        loss = -(bound.detach() * scale).sum()
        if torch.is_grad_enabled() and (log_q := self._log_drawn(call, drawn, weights)):
            bound = bound + score_of_bound(self.bound, weights.log_weight, total(log_q.values()))
        return loss, -(bound * scale).sum()

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            "an abstract method of Pyro's class that is not used here, because the kernel runs the pair"
        )

    def _call(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        role: str = "guide",
        indices: dict[str, Tensor] | None = None,
    ) -> Call:
        """Open a call. The structure of a pair is kept while the objective is called with the same pair."""
        pair = self._pairs.get(role)
        if pair is None or pair.model != model or pair.guide != guide:
            pair = LivePair(model, guide, datum_plate=self.datum_plate, prior_sites=self.prior_sites)
            self._pairs[role] = pair
        return pair.call(args, kwargs, indices)

    def _weigh(
        self,
        call: Call,
        guide: Record,
        num_particles: int | None = None,
        betas: Betas = 1.0,
        *,
        scores_draws: bool = False,
    ) -> tuple[LogDensities, float | Tensor]:
        """The log-densities of drawn particles and the scale of the data; stores them for `terms`.

        With `scores_draws=True` the caller adds the score-function term of draws that are not reparameterised. Otherwise
        such draws raise: the gradient of autograd lacks this term and may have the wrong sign.
        """
        self._num_drawn = num_particles or self.num_particles
        model = call.score(call.latent_values(guide), self._num_drawn)
        weights = call.weigh(guide, model, self._num_drawn)
        check_enumeration(weights)
        if torch.is_grad_enabled() and not scores_draws and (scored := self._log_drawn(call, guide, weights)):
            raise StructureError(
                f"{quoted(scored)} are not reparameterised, and {type(self).__name__} has no score-function term for "
                "them, so the gradient would be wrong: use reparameterised draws. A subclass of DatumELBO that writes "
                "bound(log_weight) in place of _loss_and_surrogate takes any draws"
            )
        scale = datum_scale(call, guide, model)
        self._pass, self._recorded, self._plates = pass_of(weights, scale), snapshot(betas), plates_of(call, model)
        return weights, scale

    def _log_drawn(self, call: Call, guide: Record, weights: LogDensities) -> dict[str, Tensor]:
        """Log-densities of draws that autograd cannot differentiate with respect to parameters."""
        names = scored_sites(guide, call.structure.layout.enumerated)
        found = {name: weights.log_guide_by_site[name] for name in names}
        found |= {name: weights.log_drawn([name]) for name in self.prior_sites}
        return {name: log_q for name, log_q in found.items() if log_q.requires_grad}


def datum_scale(call: Call, *records: Record) -> float | Tensor:
    """The scale that all sites share, of a subsampled plate or of `poutine.scale`: a number, or one per datum, (B,)."""
    imputed = call.structure.prior_sites
    scales = [(name, site.scale) for record in records for name, site in record.items() if name not in imputed]
    first_name, first = scales[0]
    different = dict.fromkeys(name for name, scale in scales if not same_scale(scale, first))
    if different:
        raise StructureError(
            f"sites {quoted(different)} have another scale than '{first_name}' (poutine.scale on one side or on some "
            "sites, or a plate that not all sites share): all sites of a datum need the same scale. Scale model and "
            "guide as a whole, and weight the KL by beta="
        )
    if not isinstance(first, Tensor) or not first.dim():
        return first
    layout = call.layout
    shape = (1,) * (layout.num_plates - first.dim()) + first.shape
    if layout.datum_dim is None or first.numel() != shape[layout.datum_dim]:
        raise StructureError(
            f"the scale has shape {tuple(first.shape)}, so parts of one datum have different scales: all sites of a "
            "datum need the same scale. Use a number, or one number per datum"
        )
    return first.reshape(-1)


def same_scale(one: float | Tensor, other: float | Tensor) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-6, atol=0.0)
    return abs(one - other) <= 1e-6 * abs(other)


def plates_of(call: Call, record: Record) -> dict[str, int]:
    """The full size of the datum plate, by its name; none where the whole call is one datum."""
    name = call.layout.datum_plate
    sizes = [f.size if f.full_size is None else f.full_size for s in record.values() for f in s.frames if f.name == name]
    known = [int(size) for size in sizes if size >= 0]
    return {} if name is None else {name: max(known, default=call.batch_size)}
