"""Parts of a VAE: bodies from tensor to tensor, heads from tensor to distribution, priors. Each is a plain `nn.Module`."""

from .bodies import MLP, BatchApply, ConvNet, DeconvNet
from .gaussian import MultivariateNormal, Normal
from .head import Head
from .inputs import OneHot, Scale
from .likelihoods import Bernoulli, Binomial, Categorical, ContinuousBernoulli, DiscretizedLogistic
from .priors import StandardNormal

__all__ = [
    "BatchApply",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "ConvNet",
    "DeconvNet",
    "DiscretizedLogistic",
    "Head",
    "MLP",
    "MultivariateNormal",
    "Normal",
    "OneHot",
    "Scale",
    "StandardNormal",
]
