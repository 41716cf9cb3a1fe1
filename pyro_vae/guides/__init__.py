"""A guide that is built from the model."""

from .amortized_guide import AmortizedGuide

__all__ = ["AmortizedGuide"]
