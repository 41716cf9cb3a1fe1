"""Estimators over whole data sets."""

from .processes import single_process

__all__ = [
    "single_process",
]
