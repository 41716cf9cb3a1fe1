"""What the posterior says, rather than the guide: expectations with their errors, draws, what is missing from data."""

from .expectation import Expectation
from .imputation import Imputation
from .impute import impute
from .posterior import posterior
from .posterior_expectation import PosteriorExpectation
from .posterior_sample import PosteriorSample

__all__ = ["Expectation", "Imputation", "PosteriorExpectation", "PosteriorSample", "impute", "posterior"]
