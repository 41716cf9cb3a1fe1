"""A head for rows of a table with columns of several kinds, with a separate head for each."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, OptionError, described
from ..options import amount, widths_of
from .checked import Accepts
from .columns import CheckedColumns, Columns, ColumnSupport
from .head import Family, Head
from .inputs import check_input


class Heterogeneous(Head):
    r"""Head for rows of a table with columns of several kinds: one head for each column or block of columns.

    The event is the row, and log p(x given z) the sum over its columns. Nazábal et al. (2020), "Handling Incomplete
    Heterogeneous Data using VAEs", https://arxiv.org/abs/1807.03653.

    :param heads: heads of `pyro_vae.nn` in the order of the columns, each with `event_dim=1`.
    :param widths: the number of columns of each head; by default one each.
    :raises OptionError: for no heads, for widths that do not fit them, or for a head whose numbers are not independent
        (`MultivariateNormal` and `Normal("optimal")`).

    Call it with raw numbers (..., R), those of the first head first, where R is `num_outputs(X)` and X the number of
    columns. It returns a distribution with batch shape (...) and event shape (X,), in nats. Classes are numbers in their
    column. Its `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on,
    for data outside the support of their column, which it names. `input_layer()` applies the input layer of each head to its
    columns, for encoders. `mean` is NaN in columns of classes. A missing value in a single column is masked inside the
    event::

        pyro.sample("obs", decoder(z).base_dist.mask(seen).to_event(1), obs=x)

    log p(x) adds log-densities of real-valued columns and log-probabilities of discrete ones, so it depends on the units of
    real-valued columns. Standardise these. Columns of counts have no size factor here.

    >>> head = Heterogeneous([Normal(), Bernoulli(), Categorical(4)], widths=(3, 1, 2))
    >>> head.num_outputs(6), head(torch.zeros(5, 15)).event_shape
    (15, torch.Size([6]))
    """

    def __init__(self, heads: Sequence[Head], *, widths: Sequence[int] | None = None) -> None:
        if not isinstance(heads, Sequence):
            raise OptionError(
                f"heads must be a list of heads of pyro_vae.nn, got {described(heads)}: write [pv.nn.Normal()]"
            )
        self.widths = list(widths_of("widths", (1,) * len(heads) if widths is None else widths))
        if not heads or len(self.widths) != len(heads):
            raise OptionError(
                f"expected heads, and one width for each, got {len(heads)} heads and {len(self.widths)} widths"
            )
        for head in heads:
            check_part(head)
        starts = [sum(self.widths[:i]) for i in range(len(heads))]
        self.parts = [
            replace(head.accepts, head=f"{head.accepts.head} ({columns(start, width)})")
            for head, start, width in zip(heads, starts, self.widths, strict=True)
        ]
        support = ColumnSupport([part.support for part in self.parts], self.widths)
        super().__init__(Accepts("Heterogeneous", support, "rows of a table", "see its columns"))
        self.heads = nn.ModuleList(heads)

    def num_outputs(self, event_size: int) -> int:
        if amount("event_size", event_size) != sum(self.widths):
            raise OptionError(
                f"the Heterogeneous head has {sum(self.widths)} columns, but the data {event_size}: pass a head for each"
            )
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        return [head.num_outputs(width) for head, width in zip(self.heads, self.widths, strict=True)]  # type: ignore[operator]

    def input_layer(self) -> nn.Module:
        return ColumnLayers([head.input_layer() for head in self.heads], self.widths)  # type: ignore[operator]

    def forward(self, raw: Tensor) -> Any:
        self.check_raw(raw)
        sizes, num_columns = self._sizes(), sum(self.widths)
        if raw.shape[-1] != sum(sizes):
            raise ArgumentError(
                f"the Heterogeneous head needs {sum(sizes)} numbers for {num_columns} columns, but its network gives "
                f"shape {tuple(raw.shape)}: give its last layer head.num_outputs(number of columns) outputs"
            )
        fns = [head(part).base_dist for head, part in zip(self.heads, raw.split(sizes, -1), strict=True)]
        fn = CheckedColumns(Columns(fns, validate_args=False), 1)
        fn.accepts, fn.parts, fn.widths = self.accepts, self.parts, self.widths
        return fn


class ColumnLayers(nn.Module):
    """A layer for each block of columns, joined again."""

    def __init__(self, layers: Sequence[nn.Module], widths: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.widths = nn.ModuleList(layers), list(widths)

    def forward(self, x: Tensor) -> Tensor:
        check_input("Heterogeneous", x)
        if not x.ndim or x.shape[-1] != sum(self.widths):
            raise ArgumentError(
                f"the Heterogeneous head has {sum(self.widths)} columns, but the data have shape {tuple(x.shape)}: "
                "pass a head for each"
            )
        return torch.cat([layer(part) for layer, part in zip(self.layers, x.split(self.widths, -1), strict=True)], -1)


def check_part(head: Any) -> None:
    if not isinstance(head, Head) or head.event_dim != 1:
        kind = f"{type(head).__name__} with event_dim={head.event_dim}" if isinstance(head, Head) else type(head).__name__
        raise OptionError(
            f"each of the heads must be a head of pyro_vae.nn with event_dim=1, such as pv.nn.Normal(), got {kind}"
        )
    if isinstance(head, Family) or getattr(head, "couples_batch", False):
        raise OptionError(
            f"{type(head).__name__} has no separate density for each number: for a column pass Normal(), "
            "Normal('learned') or Normal(0.1)"
        )


def columns(start: int, width: int) -> str:
    return f"column {start}" if width == 1 else f"columns {start} to {start + width - 1}"
