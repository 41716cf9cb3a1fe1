"""Parts of a VAE: bodies from tensor to tensor, heads from tensor to distribution, priors. Each is a plain `nn.Module`."""

from .bodies import MLP, BatchApply, ConvNet, DeconvNet
from .families import Flow, LowRankNormal, MixtureNormal
from .gaussian import MultivariateNormal, Normal
from .head import Head
from .inputs import OneHot, Scale
from .likelihoods import Bernoulli, Binomial, Categorical, ContinuousBernoulli, DiscretizedLogistic
from .priors import FlowPrior, MixturePrior, StandardNormal, VampPrior

__all__ = [
    "BatchApply",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "ConvNet",
    "DeconvNet",
    "DiscretizedLogistic",
    "Flow",
    "FlowPrior",
    "Head",
    "LowRankNormal",
    "MLP",
    "MixtureNormal",
    "MixturePrior",
    "MultivariateNormal",
    "Normal",
    "OneHot",
    "Scale",
    "StandardNormal",
    "VampPrior",
]
