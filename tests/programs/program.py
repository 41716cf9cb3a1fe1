"""What the table knows about one program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model and guide as users write them, with their arguments and what is right.

    :ivar title: the row of the table, a few words.
    :ivar log_evidence: (B,), log p(x_n), given what lies outside the plate of the data; by closed form, sum or quadrature.
    :ivar elbo: (B,), L[q] of each datum, by closed form, sum or quadrature.
    :ivar gaps: (B, 2), amortization and approximation gap, where q* is known; otherwise `None`.
    :ivar site_kl: mean over the data of E_q[log q - log p] by latent site, for units and surgery.
    :ivar options: of all estimators, such as `datum_plate=`.
    :ivar particles_in_a_loop: whether the programs cannot take a plate for the particles of a loss.
    :ivar refused: by column, where no such quantity exists: the name of the error and the reason in a few words.
    :ivar other: by column, what the number there is instead of the one that the column is about; it is not judged.
    """

    title: str
    model: Callable
    guide: Callable
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    log_evidence: Tensor
    elbo: Tensor | None = None
    gaps: Tensor | None = None
    site_kl: Mapping[str, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    particles_in_a_loop: bool = False
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
