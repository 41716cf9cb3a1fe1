"""The hierarchical VAE: several layers of latents, each given the layer above."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..options import amount
from .checks import applied, called, check_rows, distribution, drawn, num_rows
from .hierarchical_programs import BottomUpGuide, HierarchicalModel, LadderGuide, check_number
from .vae import Pair, Part, evaluating, mean_of


class HierarchicalVAE(Pair):
    r"""VAE with L layers of latents, from z_L at the top to z_1 next to the data::

        p(z_L) = prior    p(z_l given z_{l+1}) = layers[l - 1](z_{l+1})    p(x given z_1) = decoder(z_1)

    The decoder depends on z_1 only. There are two kinds of guide. The first goes from the data up, as in a deep latent
    Gaussian model::

        q(z_1 given x) = encoders[0](x)    q(z_l given z_{l-1}) = encoders[l - 1](z_{l-1})

    The second, with `features`, is a ladder: it goes down in the order of the model, and every layer depends on x (Sønderby
    et al. 2016, https://arxiv.org/abs/1602.02282; their product of q and p in each layer is left out here)::

        h_1 = features[0](x)                  h_l = features[l - 1](h_{l-1})
        q(z_L given x) = encoders[L - 1](h_L)    q(z_l given z_{l+1}, x) = encoders[l - 1](z_{l+1}, h_l)

    Since x depends on z_1 only, the posterior has both forms, so either guide can be exact. With the ladder, the rate KL(q(z
    given x) to p(z)) is a sum of one KL per layer. Objectives have them in nats in their `terms`, and
    `BetaTraceMeanField_ELBO` computes them by formula. With the first guide, model and guide draw in different orders: a
    term may be negative, and only the sum over layers is a rate.

    B data of shape X, latents of shape D_l. Lists are in the order from the data up.

    :param prior: module that returns a distribution with event shape (D_L,) when called.
    :param layers: L - 1 modules; number l maps z_{l+1}, (..., D_{l+1}), to a distribution with batch shape (...) and event
        shape (D_l,).
    :param decoder: module that maps z_1, (..., D_1), to a distribution with batch shape (...) and event shape X.
    :param encoders: L modules that return distributions with event shape (D_l,); their inputs are given above.
        `pyro_vae.models.Concatenated` joins two inputs, z (..., B, D) and h (B, H).
    :param features: L modules from tensor to tensor, (B, X) to (B, H_1) and so on, for the ladder. `None` for the guide from
        the data up.
    :raises OptionError: for a wrong number of modules, a network that is not a module, or one that contains a `PyroModule`.

    `vae.model` and `vae.guide` are called with x. They sample "latent_1" to "latent_L" and observe "obs", in the plate
    "data". Everything else is as in `VAE`.

    Example::

        vae = pv.HierarchicalVAE(
            prior=pv.nn.StandardNormal(2),
            layers=[nn.Sequential(nn.Linear(2, 2 * 4), pv.nn.Normal())],
            decoder=nn.Sequential(pv.nn.MLP(4, 64), pv.nn.Binomial(16)),
            features=[pv.nn.MLP(64, 32), pv.nn.MLP(32, 16)],
            encoders=[
                pv.models.Concatenated(nn.Sequential(nn.Linear(2 + 32, 2 * 4), pv.nn.Normal())),
                nn.Sequential(nn.Linear(16, 2 * 2), pv.nn.Normal()),
            ],
        )
        objective = pv.BetaTraceMeanField_ELBO()
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective)
        svi.step(x)
        objective.terms.kl      # by layer: {"latent_1": ..., "latent_2": ...}
        vae.generate(16)        # (16, 64)
    """

    model: HierarchicalModel
    guide: BottomUpGuide | LadderGuide
    prior, layers, decoder = Part("model"), Part("model"), Part("model")
    encoders, features = Part("guide"), Part("guide")

    def __init__(
        self,
        prior: nn.Module,
        layers: Sequence[nn.Module],
        decoder: nn.Module,
        encoders: Sequence[nn.Module],
        features: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.model = HierarchicalModel(prior, layers, decoder)
        self.guide = BottomUpGuide(encoders) if features is None else LadderGuide(encoders, features)
        check_number("encoders", self.encoders, len(self.layers) + 1)

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x given z_1) for z_1 of shape (..., D_1): a distribution with batch shape (...) and event shape X."""
        return applied("decoder", self.decoder, z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of the likelihood at one draw of the guide per row: (B, X) to (B, X); as `VAE.reconstruct`."""
        num_rows(x)
        with evaluating(self):
            return mean_of(self.decode(called("guide", lambda x: self.guide.latents(x, draw_rows), x)))

    def generate(self, n: int) -> Tensor:
        """Draw n data from the model: (n, X), as `VAE.generate`.

        :raises OptionError: for n below 1.
        """
        n = amount("n", n)
        with evaluating(self):
            z = drawn("prior", applied("prior", self.prior), n)
            for number in reversed(range(len(self.layers))):
                role = f"layers[{number}]"
                z = drawn(role, applied(role, self.layers[number], z))
            return drawn("decoder", self.decode(z))


def draw_rows(name: str, role: str, fn: Any, rows: torch.Size) -> tuple[Tensor, torch.Size]:
    """`sample_rows` outside a program."""
    fn = distribution(role, fn)
    check_rows(fn, role, rows)
    return drawn(role, fn), rows
