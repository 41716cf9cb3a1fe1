"""One call, one page: what is wrong with this VAE."""

from .diagnose import diagnose
from .diagnosis import Diagnosis
from .findings import Finding
from .numbers import Number

__all__ = [
    "Diagnosis",
    "Finding",
    "Number",
    "diagnose",
]
