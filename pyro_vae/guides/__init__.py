"""A guide made from the model alone."""

from .amortized_guide import AmortizedGuide

__all__ = ["AmortizedGuide"]
