"""The deep Markov model: a variational autoencoder for sequences of unequal lengths."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..options import amount
from .checks import applied, drawn
from .markov_programs import MarkovGuide, MarkovModel
from .vae import Pair, Part, evaluating, mean_of


class MarkovVAE(Pair):
    r"""Deep Markov model of sequences x_1, ..., x_T with latents z_1, ..., z_T::

        p(z_1) = initial    p(z_t given z_{t-1}) = transition(z_{t-1})    p(x_t given z_t) = decoder(z_t)
        q(z_t given z_{t-1}, x) = combiner(z_{t-1}, h_t)    h_1, ..., h_T = encoder(x, lengths)

    Krishnan, Shalit and Sontag (2017, https://arxiv.org/abs/1609.09869). B sequences of at most T steps, steps of shape X,
    latents of shape D, features of shape H. Given z_{t-1}, the posterior of z_t depends only on x_t and later steps. The
    guide is exact if h_t contains all their information and the combiner is flexible enough.

    :param initial: module that returns a distribution with event shape (D,) when called, such as
        `pyro_vae.nn.StandardNormal`.
    :param transition: module that maps z, (..., D), to a distribution with batch shape (...) and event shape (D,).
    :param decoder: module that maps z, (..., D), to a distribution with batch shape (...) and event shape X. It is called
        once for all steps, with (..., B, T, D).
    :param encoder: module that maps x, (B, T, \*X), and lengths, (B,), to features (B, T, H), such as
        `pyro_vae.nn.BackwardGRU`.
    :param combiner: module that maps z_{t-1}, (..., B, D), and h_t, (B, H), to a distribution with batch shape (..., B) and
        event shape (D,), such as `pyro_vae.models.Concatenated`. In place of z_0, which does not exist, it gets the
        parameter `guide.start`.
    :raises OptionError: for a network that is no module, or one that contains a `PyroModule`.

    `vae.model` and `vae.guide` are called with x, (B, T, \*X), and `lengths`, (B,), whole numbers from 1 to T; without
    lengths all sequences have T steps. They sample "latent_1" to "latent_T" and observe "obs" in the plate "data" of B rows.
    Steps after the end of a sequence are masked. log p(x), in nats, is that of the real steps, whatever values the padding
    has, and a batch may be cut to its longest sequence. Everything else is as in `VAE`.

    When called, model and guide raise `ArgumentError` for x or lengths of a wrong type or shape, `EmptyBatchError` for no
    rows, and `StructureError` where a network does not return one distribution per row.

    Example::

        vae = pv.MarkovVAE(
            initial=pv.nn.StandardNormal(2),
            transition=nn.Sequential(nn.Linear(2, 4), pv.nn.Normal()),
            decoder=nn.Sequential(nn.Linear(2, 3), pv.nn.Normal("learned")),
            encoder=pv.nn.BackwardGRU(3, 16),
            combiner=pv.models.Concatenated(nn.Sequential(nn.Linear(2 + 16, 4), pv.nn.Normal())),
        )
        x, lengths = torch.randn(5, 7, 3), torch.tensor([7, 6, 4, 4, 1])
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        svi.step(x, lengths)
        pv.AdaptiveImportanceSampling(vae.model, vae.guide, seed=0)(x, lengths)      # log p(x) of each sequence
        vae.generate(100, num_steps=7)       # (100, 7, 3)
    """

    model: MarkovModel
    guide: MarkovGuide
    initial, transition, decoder = Part("model"), Part("model"), Part("model")
    encoder, combiner = Part("guide"), Part("guide")

    def __init__(
        self, initial: nn.Module, transition: nn.Module, decoder: nn.Module, encoder: nn.Module, combiner: nn.Module
    ) -> None:
        super().__init__()
        self.model = MarkovModel(initial, transition, decoder)
        self.guide = MarkovGuide(encoder, combiner, latent_dim=self.model.latent_dim)

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x_t given z_t) for z of shape (..., T, D): a distribution with batch shape (..., T) and event shape X."""
        return applied("decoder", self.decoder, z)

    def reconstruct(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        r"""The mean of the likelihood at one draw of q(z given x) per sequence: (B, T, \*X), NaN in the padding.

        Draws from the caller's random state. The networks run in eval mode and without gradients; their modes are restored.

        :raises StructureError: for a likelihood without a mean, such as a categorical one.
        """
        with evaluating(self):
            kept, features = self.guide.read(x, lengths)
            path = [self.guide.start.expand(len(x), -1)]
            for h in features.unbind(1):
                path.append(drawn("combiner", applied("combiner", self.combiner, path[-1], h)))
            mean = mean_of(self.decode(torch.stack(path[1:], -2)))
            return mean.masked_fill(~kept.reshape(kept.shape + (1,) * (mean.ndim - 2)), torch.nan)

    def generate(self, n: int, num_steps: int) -> Tensor:
        r"""Draw n sequences of `num_steps` steps from the model: (n, num_steps, \*X), as `VAE.generate`.

        :raises OptionError: for a number below 1.
        """
        n, num_steps = amount("n", n), amount("num_steps", num_steps)
        with evaluating(self):
            path = [drawn("initial", applied("initial", self.initial), n)]
            while len(path) < num_steps:
                path.append(drawn("transition", applied("transition", self.transition, path[-1])))
            return drawn("decoder", self.decode(torch.stack(path, -2)))
