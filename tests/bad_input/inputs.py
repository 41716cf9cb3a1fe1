"""The bad inputs, by the place where they are put. Each is the row of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv

from .entrances import Linear, data


class OwnError(Exception):
    """What the programs of a user raise."""


@dataclass(frozen=True)
class Bad:
    """One bad input.

    :ivar row: what it is, in words.
    :ivar make: gives it, from good data or from a good pair.
    :ivar same_as: the good data whose numbers are the right answer; `None` where only an error, or numbers that are finite
        or in doubt, will do.
    :ivar own: the error that the program itself raises.
    :ivar refused: whether there is no right answer but that of good data. Otherwise finite numbers, or doubts, will do.
    :ivar late: whether the first batch is good.
    """

    row: str
    make: Callable[..., Any]
    same_as: Callable[..., Any] | None = None
    own: type[BaseException] | None = None
    refused: bool = True
    late: bool = False


def with_row(value: float) -> Callable[[Tensor], Tensor]:
    def make(x: Tensor) -> Tensor:
        x = x.clone()
        x[1, 0] = value
        return x

    return make


def itself(x: Tensor) -> Tensor:
    return x


def times(factor: float) -> Bad:
    return Bad(f"data of size {factor:.0e}", lambda x: factor * x, refused=False)


ARGUMENTS = [
    Bad("`None`", lambda x: None),
    Bad("a string", lambda x: "data"),
    Bad("a number", lambda x: 3.0),
    Bad("a list of lists", lambda x: x.tolist()),
    Bad("a NumPy array", lambda x: x.numpy()),
    Bad("a dict", lambda x: {"x": x}),
    Bad("a tuple around the batch", lambda x: (x,)),
    Bad("a `DataLoader`", lambda x: DataLoader(TensorDataset(x), 2)),
    Bad("a `Dataset`", lambda x: TensorDataset(x)),
    Bad("one datum without its axis, `x[0]`", lambda x: x[0]),
    Bad("one axis too many, `x[None]`", lambda x: x[None]),
    Bad("a 0-d tensor", lambda x: x.sum()),
    Bad("too many columns", lambda x: torch.ones(4, 5)),
    Bad("one column, which would broadcast", lambda x: x[:, :1]),
    Bad("float64 data, float32 parameters", lambda x: x.double()),
    Bad("float16 data", lambda x: x.half()),
    Bad("bfloat16 data", lambda x: x.bfloat16()),
    Bad("integer data", lambda x: x.long()),
    Bad("boolean data", lambda x: x > 0),
    Bad("complex data", lambda x: x.to(torch.complex64)),
    Bad("data on another device", lambda x: x.to("meta")),
    Bad("a sparse tensor", lambda x: x.to_sparse()),
    Bad("no datum, `x[:0]`", lambda x: x[:0]),
    Bad("NaN in one row", with_row(math.nan)),
    Bad("infinity in one row", with_row(math.inf)),
    Bad("minus infinity in one row", with_row(-math.inf)),
    Bad("NaN everywhere", lambda x: math.nan * x),
    times(1e30),
    times(1e15),
    times(1e-30),
    Bad("data without variance", torch.ones_like, refused=False),
    Bad("data that require gradients", lambda x: x.clone().requires_grad_(), same_as=itself),
    Bad("data that are not contiguous", lambda x: x.T.contiguous().T, same_as=itself),
]


def batches(x: Tensor) -> list[tuple[Tensor]]:
    return [(x,)]


def exhausted(x: Tensor) -> Iterator[tuple[Tensor]]:
    generator = iter([(x,)])
    list(generator)
    return generator


def breaking(x: Tensor) -> Iterator[tuple[Tensor]]:
    yield (x,)
    raise OwnError("mine")


class SingleData(IterableDataset):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


LOADERS = [
    Bad("`None`", lambda x: None),
    Bad("a string", lambda x: "data"),
    Bad("a number", lambda x: 3),
    Bad("the tensor of the data", itself),
    Bad("a NumPy array", lambda x: x.numpy()),
    Bad("a dict", lambda x: {"x": x}),
    Bad("a `Dataset` of single data", TensorDataset),
    Bad("an `IterableDataset` of single data", SingleData),
    Bad("the class `DataLoader` itself", lambda x: DataLoader),
    Bad("an empty list", lambda x: []),
    Bad("a `DataLoader` without data", lambda x: DataLoader(TensorDataset(x[:0]), 2)),
    Bad("an exhausted generator", exhausted),
    Bad("batches that are strings", lambda x: ["a", "b"]),
    Bad("batches that are numbers", lambda x: [1.0, 2.0]),
    Bad("batches that are `None`", lambda x: [None]),
    Bad("batches that are empty tuples", lambda x: [()]),
    Bad("batches that are NumPy arrays", lambda x: [x.numpy()]),
    Bad("dicts with another keyword", lambda x: [{"y": x}]),
    Bad("a second batch of other width", lambda x: [(x,), (torch.ones(4, 5),)], late=True),
    Bad("a second batch of another dtype", lambda x: [(x,), (x.double(),)], late=True),
    Bad("a second batch with NaN", lambda x: [(x,), (math.nan * x,)], late=True),
    Bad("a second batch without data", lambda x: [(x,), (x[:0],)], late=True),
    Bad("a loader that raises an error of its own", breaking, own=OwnError),
    Bad("dicts of keywords", lambda x: [{"x": x}], same_as=batches),
    Bad("batches that are tensors", lambda x: [x], same_as=batches),
    Bad("a generator, which is gone through once", lambda x: iter(batches(x)), same_as=batches),
    Bad("a loader that shuffles", lambda x: DataLoader(TensorDataset(x), 4, shuffle=True), refused=False),
    Bad("a last batch that is smaller", lambda x: DataLoader(TensorDataset(x), 3), refused=False),
]


def raising(x):
    raise OwnError("mine")


def empty(x):
    pass


def without_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), torch.ones(3)).to_event(1), obs=x[0])


def guide_of_scale(scale: float) -> Callable[..., None]:
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), torch.full((len(x), 2), scale)).to_event(1))

    return guide


def model_of_scale(scale: float) -> Callable[..., None]:
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            mean = z.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(mean, torch.full((len(x), 3), scale)).to_event(1), obs=x)

    return model


def autoguide(model: Callable[..., None], x: Tensor) -> Any:
    guide = pyro.infer.autoguide.AutoNormal(model)
    guide(x)
    return guide


OTHER = Linear(latent="w")
VAE = pv.LinearVAE(3, 2)
WIDE = pv.LinearVAE(5, 2)

# `make(model, guide)` gives the pair.
PAIRS = [
    Bad("`None` for the model", lambda m, g: (None, g)),
    Bad("a string for the model", lambda m, g: ("model", g)),
    Bad("`vae` for `vae.model`", lambda m, g: (VAE, VAE.guide)),
    Bad("the class of a module for the model", lambda m, g: (Linear, g)),
    Bad("a model that takes no argument", lambda m, g: (lambda: None, g)),
    Bad("a model without a plate", lambda m, g: (without_plate, g)),
    Bad("a model that raises an error of its own", lambda m, g: (raising, g), own=OwnError),
    Bad("a likelihood of scale 0", lambda m, g: (model_of_scale(0.0), guide_of_scale(1.0)), refused=False),
    Bad("a likelihood of scale 1e-30", lambda m, g: (model_of_scale(1e-30), guide_of_scale(1.0)), refused=False),
    Bad("a likelihood of scale 1e30", lambda m, g: (model_of_scale(1e30), guide_of_scale(1.0)), refused=False),
    Bad("`None` for the guide", lambda m, g: (m, None)),
    Bad("a tensor for the guide", lambda m, g: (m, data())),
    Bad("model and guide swapped", lambda m, g: (g, m)),
    Bad("a guide of another latent", lambda m, g: (m, OTHER.guide)),
    Bad("a guide without a latent", lambda m, g: (m, empty)),
    Bad("a guide for data of another width", lambda m, g: (m, WIDE.guide)),
    Bad("an autoguide of other data", lambda m, g: (m, autoguide(m, torch.ones(7, 3)))),
    Bad("an autoguide of another model", lambda m, g: (m, autoguide(OTHER.model, data()))),
    Bad("a guide that raises an error of its own", lambda m, g: (m, raising), own=OwnError),
    Bad("a guide of scale 0", lambda m, g: (m, guide_of_scale(0.0)), refused=False),
    Bad("a guide of negative scale", lambda m, g: (m, guide_of_scale(-1.0)), refused=False),
    Bad("a guide of scale NaN", lambda m, g: (m, guide_of_scale(math.nan)), refused=False),
    Bad("a guide of scale 1e-30", lambda m, g: (m, guide_of_scale(1e-30)), refused=False),
    Bad("a guide of scale 1e30", lambda m, g: (m, guide_of_scale(1e30)), refused=False),
]
