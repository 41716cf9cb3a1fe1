"""Pairs of model and guide: variational autoencoders that train with `SVI` and with `torch.optim`."""

from .builders import conv_vae, mlp_conditional_vae, mlp_missing_vae, mlp_vae
from .conditional import Concatenated, ConditionalVAE, WithSizeFactor
from .hierarchical import HierarchicalVAE
from .linear import LinearVAE
from .markov import MarkovVAE
from .missing import MissingDataVAE
from .semi_supervised import SemiSupervisedVAE
from .vae import VAE

__all__ = [
    "Concatenated",
    "ConditionalVAE",
    "HierarchicalVAE",
    "LinearVAE",
    "MarkovVAE",
    "MissingDataVAE",
    "SemiSupervisedVAE",
    "VAE",
    "WithSizeFactor",
    "conv_vae",
    "mlp_conditional_vae",
    "mlp_missing_vae",
    "mlp_vae",
]
