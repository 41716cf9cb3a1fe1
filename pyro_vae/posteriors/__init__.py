"""What the posterior says, rather than the guide: expectations with their errors, and draws."""

from .expectation import Expectation
from .posterior import posterior
from .posterior_expectation import PosteriorExpectation
from .posterior_sample import PosteriorSample

__all__ = ["Expectation", "PosteriorExpectation", "PosteriorSample", "posterior"]
