"""Estimates under the posterior rather than the guide: expectations with errors, draws, imputation of missing data."""

from .expectation import Expectation
from .imputation import Imputation
from .impute import impute
from .posterior import posterior
from .posterior_expectation import PosteriorExpectation
from .posterior_sample import PosteriorSample

__all__ = ["Expectation", "Imputation", "PosteriorExpectation", "PosteriorSample", "impute", "posterior"]
