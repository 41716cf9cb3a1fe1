"""A function of the latents, with checks, called on the particles of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchCouplingError, HiddenRandomnessError, NonFiniteError, OptionError, listed, quoted
from ..kernel import Call
from ..noise import Noise
from ..tolerance import close
from .enumerated import Labels
from .weighted_draws import hide

Values = dict[str, Tensor]
PROBE = 0  # noise block
FEW_FLIPPED = 1e-3  # share of whole numbers or truth values that rounding may change
CHUNK_NUMBERS = 2**22  # results of f that are compared at once


class Function:
    """The function f for one call: from draws by site, canonical (K, *plates, *event), to results (K, B, F) in float64.

    F is flattened.

    :ivar shape: F, the shape of the result for one particle and datum.
    :ivar dtype: of floating point results, otherwise `None`.
    :ivar is_event: whether f returns truth values, so that its mean is a probability.
    :ivar kept: where latents are not masked, by site that has a mask; f gets NaN where they are.
    """

    def __init__(self, call: Call, f: Callable[[Values], Tensor]) -> None:
        self._call, self._f = call, f
        self.kept: Mapping[str, Tensor] = {}
        self._num_data_axes = 1 if call.layout.datum_dim is not None else 0
        self._labels = Labels(call) if call.structure.guide_enumerated else None
        call.set_noise(Noise.POSTERIOR, PROBE)
        num_particles = 3 if call.batch_size != 3 else 2  # so that the axes of particles and data have different sizes
        values = self.program_values(drawn_values(call, num_particles))
        result = self._checked(values, num_particles)
        self.shape = result.shape[1 + self._num_data_axes :]
        self.is_event = result.dtype == torch.bool and self._labels is None
        self.dtype = result.dtype if result.is_floating_point() else None
        self._check_particles_and_data(values, result)

    def program_values(self, values: Mapping[str, Tensor]) -> Values:
        return self._call.in_program_shapes(hide(values, {n: kept for n, kept in self.kept.items() if n in values}))

    def chunks(self, num_particles: int) -> Iterator[tuple[int, int]]:
        """Split a block into pieces, (first, length), of bounded memory."""
        of_result = max(1, CHUNK_NUMBERS // max(1, self._call.batch_size * math.prod(self.shape)))
        for first, length in self._call.chunks(num_particles) if self._labels else [(0, num_particles)]:
            for start in range(first, first + length, of_result):
                yield start, min(of_result, first + length - start)

    def __call__(self, values: Mapping[str, Tensor], num_particles: int) -> Tensor:
        """f at draws of the latents. Sites that the guide enumerates are summed out: E[f(z, e) given z and x]."""
        if self._labels is None:
            return self.plain(self.program_values(values), num_particles)
        total = torch.zeros((), dtype=torch.float64, device=self._call.device)
        program_values = self.program_values(values)
        for share, labels in self._labels(values, num_particles):
            result = self.plain({**program_values, **self.program_values(labels)}, num_particles)
            share = share.unsqueeze(-1)
            total = total + torch.where(share > 0, share * result, 0.0)  # f need not be finite at values of probability zero
        return total

    def plain(self, values: Values, num_particles: int) -> Tensor:
        result = self._checked(values, num_particles)
        return result.reshape(num_particles, self._call.batch_size, -1).double()

    def _checked(self, values: Values, num_particles: int) -> Tensor:
        result = self._asked(values)
        expected = (num_particles, self._call.batch_size)[: 1 + self._num_data_axes]
        if not isinstance(result, Tensor):
            raise OptionError(f"f must return a tensor of shape {shown(expected)}, got {type(result).__name__}")
        if result.is_complex():
            raise OptionError("f must return real numbers, got complex ones: return their real part or absolute value")
        if result.shape[: len(expected)] != expected:
            shapes = ", ".join(f"'{name}' {tuple(value.shape)}" for name, value in values.items())
            raise OptionError(
                f"f must keep the axes of particles and data and return {shown(expected)}, got {tuple(result.shape)} "
                f"from {shapes}: reduce over the last axes only, as in lambda z: "
                f"z['{next(iter(values))}'].square().sum(-1)"
            )
        return result

    def _asked(self, values: Values) -> Any:
        try:
            return self._f({name: value.clone() for name, value in values.items()})  # copies, because f may write into them
        except KeyError as error:
            if error.args and error.args[0] in values:
                raise
            structure = self._call.structure
            hidden = set(error.args) & {*structure.model_enumerated, *structure.prior_sites, *structure.given}
            why = "use one of these names"
            if hidden:
                why = (
                    "this site is not drawn by the guide; a site that only the model enumerates must be enumerated in "
                    "the guide too"
                )
            raise OptionError(f"f uses {error}, but the latents are {quoted(values)}: {why}") from error

    def _check_particles_and_data(self, values: Values, result: Tensor) -> None:
        # A result may be in float64 although the networks that computed it are not.
        single = all(value.dtype != torch.float64 for value in values.values())
        same = partial(same_results, single=single)
        if not same(self._checked(values, len(result)), result):
            raise HiddenRandomnessError(
                "f gives different results for the same latents, so it draws random numbers: return the mean of "
                "these, which has the same expectation, and put its networks in eval mode"
            )
        first = {name: value[:1] for name, value in values.items()}
        if not same(self._checked(first, 1), result[:1]):
            raise OptionError(
                "f gives a different result for a particle when it is called with that particle alone: it must treat "
                "all particles alike, and not reduce over the first axis"
            )
        if self._num_data_axes == 0 or self._call.batch_size == 1:
            return
        odd = torch.arange(self._call.batch_size, device=self._call.device) % 2 == 1
        for kept in (odd, ~odd):
            mixed = {name: self._with_others_moved(name, value, kept) for name, value in values.items()}
            if not same(self._checked(mixed, len(result))[:, kept], result[:, kept]):
                raise BatchCouplingError(
                    "f gives a different result for a datum when the latents of other data change: it must treat data "
                    "separately, and not reduce over their axis"
                )

    def _with_others_moved(self, name: str, value: Tensor, kept: Tensor) -> Tensor:
        """Values in which the latents of data outside `kept`, (B,) bool, are replaced by those of other particles."""
        layout = self._call.layout
        assert layout.datum_dim is not None
        axis = layout.datum_dim - layout.event_dims[name]
        flags = kept.reshape(-1, *[1] * (-axis - 1))
        moved = [value[k : k + 1].roll(1 + k, axis) for k in range(len(value))]
        return torch.where(flags, value, torch.cat(moved).roll(1, 0))


def drawn_values(call: Call, num_particles: int) -> Values:
    """Draws of the guide by site, canonical, including sites that it enumerates."""
    record = call.draw_latents(num_particles)
    values = call.latent_values(record)
    return {**values, **{name: record[name].value for name in call.structure.guide_enumerated}}


def same_results(a: Tensor, b: Tensor, *, single: bool) -> bool:
    """:param single: compare floats in single precision."""
    if a.is_floating_point():
        return close(a.float(), b) if single else close(a, b)
    return not a.numel() or float((a != b).double().mean()) <= FEW_FLIPPED


def shown(expected: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, expected))}, ...)"


def check_results(result: Tensor, weights: Tensor, whose: str, *, may_hide: bool) -> None:
    """Raise where f, (K, B, F), is not finite at a draw of positive weight.

    :param may_hide: latents are masked, so f may be NaN at all draws.
    """
    wrong = ~result.isfinite() & (weights > 0).unsqueeze(-1)
    if may_hide:
        wrong = wrong & ~result.isnan().all(0)
    bad = wrong.any(-1).any(0)
    if bool(bad.any()):
        raise NonFiniteError(
            f"f is NaN or infinite at draws {whose} for the data {listed(bad)}: look for a logarithm of 0 or a division by "
            "0 in f, or clamp its latents"
        )
