"""What the posterior says, rather than the guide: expectations with their errors, and draws."""

from .expectation import Expectation
from .posterior_expectation import PosteriorExpectation

__all__ = ["Expectation", "PosteriorExpectation"]
