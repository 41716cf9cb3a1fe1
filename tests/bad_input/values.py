"""What is put in the place of an option, or of an argument of what takes no pair: values of wrong kind, shape or size."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch

VALUES: dict[str, Any] = {
    "`None`": None,
    "a string": "many",
    "NaN": math.nan,
    "infinity": math.inf,
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "`True`": True,
    "10^12": 10**12,
    "10^400": 10**400,
    "a list": [1, 2],
    "an empty list": [],
    "a dict": {},
    "an object": object(),
    "a 0-d tensor": torch.tensor(3.0),
    "a vector": torch.tensor([1.0, 2.0]),
    "a matrix": torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]]),
    "a vector of NaN": torch.full((3,), math.nan),
    "a tensor without numbers": torch.zeros(0),
    "whole numbers": torch.tensor([0, 1, 2]),
    "complex numbers": torch.ones(3, dtype=torch.complex64),
    "a tensor on another device": torch.ones(3, device="meta"),
    "a NumPy array": numpy.ones(3),
}
OF_OPTIONS = list(VALUES)[:16]  # an option is no array of data, and one of each shape is enough
HOPELESS = ("a string", "NaN", "-1", "an object", "a vector")  # for what takes seconds where it is right
