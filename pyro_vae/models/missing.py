"""The VAE of data with missing values."""

from typing import ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor

from .checks import applied
from .programs import Guide, MissingDataGuide, MissingDataModel, Model
from .seen import zeros_and_mask
from .vae import VAE


class MissingDataVAE(VAE):
    r"""Variational autoencoder of data with missing values: NaN in x is a missing number.

    With x = (o, h), where o is observed and h is missing::

        log p(o) >= E_q log p(o given z) - KL(q(z given o) to p(z)), p(o given z) = prod over observed i of p(x_i given z)

    Nothing is imputed in the model: a missing value has no density and no gradient. The input of the encoder has zeros in
    place of missing values, and a mask. Source: Mattei and Frellsen (2019), "MIWAE: Deep Generative Modelling and Imputation
    of Incomplete Data Sets", https://arxiv.org/abs/1812.02633. Its objective is `ImportanceWeightedELBO`, its imputation
    `pyro_vae.impute`. log p(o) is the right likelihood if values are missing at random: whether a number is missing must not
    depend on the number.

    B data of shape X, latents of shape D.

    :param encoder: module that maps (B, 2 X) to a distribution with batch shape (B,) and event shape (D,): along dimension 1
        first x with zeros in place of missing values, then the mask, which is one where a number is observed. For images the
        input is (B, 2 C, H, W). `pyro_vae.nn.BesideMask(likelihood.input_layer())` as the first layer scales the first half.
    :param decoder: module that maps z, (..., D), to a distribution with batch shape (...) and event shape X, whose numbers
        are independent given z: any likelihood of `pyro_vae.nn` except `Normal("optimal")`.
    :param prior: module that returns a distribution with event shape (D,) when called.
    :raises OptionError: for a network that is not a module, or one that contains a `PyroModule`.

    Call `vae.model`, `vae.guide` and `vae.encode` with x, with NaN for missing values. A row may be complete, or have no
    number at all. Classes and counts must be floats, so that NaN is possible. When called, the model raises `StructureError`
    for a likelihood whose numbers depend on one another. Everything else is as in `VAE`. `mlp_missing_vae` builds one for
    vectors.

    Example::

        vae = pv.MissingDataVAE(
            encoder=nn.Sequential(nn.Linear(2 * 5, 16), nn.Tanh(), nn.Linear(16, 4), pv.nn.Normal()),
            decoder=nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 5), pv.nn.Normal("learned")),
            prior=pv.nn.StandardNormal(2),
        )
        table = torch.randn(100, 5)
        table[torch.rand(100, 5) < 0.3] = torch.nan
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pv.ImportanceWeightedELBO(num_particles=20))
        svi.step(table)
        pv.impute(vae.model, vae.guide, table, seed=0).mean["obs"]    # the table, filled in
    """

    programs: ClassVar[tuple[type[Model], type[Guide]]] = MissingDataModel, MissingDataGuide

    def encode(self, x: Tensor) -> TorchDistribution:
        """q(z given the observed part of x), with NaN for missing values: batch shape (B,), event shape (D,)."""
        return applied("encoder", lambda x: self.encoder(zeros_and_mask(x)), x)
