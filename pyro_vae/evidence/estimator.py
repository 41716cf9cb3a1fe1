"""The base class of all estimators, with the options that they share."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, Field, dataclass, fields
from typing import Any, ClassVar

import torch

from ..errors import OptionError
from ..kernel import INFER, Call, Pair
from ..options import check_function, names_of_sites, plate_or_none, seed_or_none
from ..records import warn_about

SHARED = {
    "seed": "fixes the noise; the caller's random state is unchanged. `None` draws from that state.",
    "datum_plate": "the plate of the data; found if only one is common to all sites; `None` makes the\n"
    "        whole call one datum.",
    "prior_sites": "latent sites of the model without a counterpart in the guide, to be drawn from the prior.",
    "check_support": "raise on observations outside the support of their likelihood.",
}


@dataclass(repr=False, eq=False)
class OfPair:
    """Base class of everything that evaluates a model and guide.

    A subclass is a dataclass too, `@dataclass(repr=False, eq=False, kw_only=True)`. Its fields are its options. If its
    docstring does not document `seed`, `datum_plate`, `prior_sites` or `check_support`, their texts are added behind its
    other parameters.
    """

    model: Callable
    guide: Callable
    _: KW_ONLY
    seed: int | None = None
    datum_plate: str | None = INFER
    prior_sites: Collection[str] = ()
    check_support: bool = True
    draws_rather: ClassVar[bool] = False  # whether a guide that enumerates all latents is run so that it draws them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__doc__ and ":param guide:" in cls.__doc__:
            cls.__doc__ = with_shared_options(cls.__doc__)

    def __post_init__(self) -> None:
        self.seed = seed_or_none(self.seed)
        self.prior_sites = names_of_sites("prior_sites", self.prior_sites)
        self.datum_plate = plate_or_none(self.datum_plate)
        self.check_options()
        self._pair = Pair(
            self.model,
            self.guide,
            datum_plate=self.datum_plate,
            prior_sites=self.prior_sites,
            check_support=self.check_support,
            draws_rather=self.draws_rather,
        )

    def check_options(self) -> None:
        """Check the options of a subclass, and convert NumPy numbers to plain ones."""

    def __repr__(self) -> str:
        """One line with the options that are not the default ones."""
        options = [(f, getattr(self, f.name)) for f in fields(self) if f.kw_only]
        changed = [f"{f.name}={shown(value)}" for f, value in options if not is_default(f, value)]
        return f"{type(self).__name__}({', '.join([name_of(self.model), name_of(self.guide), *changed])})"


@dataclass(repr=False, eq=False)
class Estimator(OfPair):
    """An estimator: called with the model's arguments, it returns a record with a number for each of the B data.

    A subclass implements `estimate(call)`, which runs isolated: it changes no parameter, buffer, setting or (with a seed)
    random state of the caller.
    """

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._pair.open(args, kwargs, self.seed) as call:
            record = self.estimate(call)
        # stack level beyond the wrapper of torch.no_grad, so that the warning points at the caller
        warn_about(record, stacklevel=3)
        return record

    def estimate(self, call: Call) -> Any:
        """The record of the data of one call; its `warnings()` are issued to the caller."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method estimate(call): a subclass of Estimator must define it"
        )


def with_shared_options(doc: str) -> str:
    """The docstring with the shared options that it does not document, added behind its other parameters."""
    lines = doc.split("\n")
    found = [(i, match[1]) for i, line in enumerate(lines) if (match := re.match(r"( *):param ", line))]
    if not found:
        return doc
    last, indent = found[-1]  # with the indentation that this version of Python keeps in docstrings
    inside = indent + "    "
    end = next((i for i in range(last + 1, len(lines)) if not lines[i].startswith(inside)), len(lines))
    missing = [f"{indent}:param {name}: {text}" for name, text in SHARED.items() if f":param {name}:" not in doc]
    return "\n".join([*lines[:end], *(line.replace("\n        ", "\n" + inside) for line in missing), *lines[end:]])


def is_default(field: Field, value: Any) -> bool:
    plain = isinstance(value, (int, float, str, tuple))
    return value is field.default or (plain and type(value) is type(field.default) and bool(value == field.default))


def shown(value: Any) -> str:
    """Text of an option in one line; tensors, arrays and mappings are described, not printed."""
    return type(value).__name__ if hasattr(value, "shape") or isinstance(value, Mapping) else repr(value)


def name_of(program: Callable) -> str:
    return getattr(program, "__name__", type(program).__name__)


def check_builder(evidence: Any) -> None:
    """Check the option `evidence=`, which makes an estimator from model and guide."""
    if isinstance(evidence, OfPair):
        name = type(evidence).__name__
        raise OptionError(
            f"evidence must make an estimator from (model, guide), got one that is built: pass pv.{name}, or, with options, "
            f"functools.partial(pv.{name}, seed=0)"
        )
    check_function(
        "evidence", evidence, "a class of estimators, such as pv.ImportanceSampling, or a function that builds one"
    )
