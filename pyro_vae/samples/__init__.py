"""Reconstructions and samples of a model beside its likelihood: error, sharpness, distance to the training data."""

from .check import SampleCheck

__all__ = ["SampleCheck"]
