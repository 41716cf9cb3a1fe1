"""Parts of a VAE, each a plain `nn.Module`: bodies (tensor to tensor), heads (tensor to distribution) and priors."""

from .bodies import MLP, BatchApply, ConvNet, DeconvNet
from .counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial, ZeroInflatedPoisson
from .families import Flow, LowRankNormal, MixtureNormal
from .gaussian import MultivariateNormal, Normal
from .head import Head
from .heavy_tails import Laplace, StudentT
from .heterogeneous import Heterogeneous
from .inputs import BesideMask, Log, Log1p, OneHot, Scale
from .likelihoods import Bernoulli, Binomial, Categorical, ContinuousBernoulli, DiscretizedLogistic
from .logistic_mixture import DiscretizedLogisticMixture
from .positive import Gamma, LogNormal
from .priors import FlowPrior, MixturePrior, StandardNormal, VampPrior
from .recurrent import BackwardGRU

__all__ = [
    "BackwardGRU",
    "BatchApply",
    "Bernoulli",
    "BesideMask",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "ConvNet",
    "DeconvNet",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Flow",
    "FlowPrior",
    "Gamma",
    "Head",
    "Heterogeneous",
    "Laplace",
    "Log",
    "Log1p",
    "LogNormal",
    "LowRankNormal",
    "MLP",
    "MixtureNormal",
    "MixturePrior",
    "MultivariateNormal",
    "NegativeBinomial",
    "Normal",
    "OneHot",
    "Poisson",
    "Scale",
    "StandardNormal",
    "StudentT",
    "VampPrior",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
]
