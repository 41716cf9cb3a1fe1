"""The Pyro programs of the deep Markov model, and the mask of padding."""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ..errors import ArgumentError, StructureError, described
from ..nn.recurrent import checked_lengths
from .checks import applied, called, check_data, check_rows, checked_network, distribution, num_rows
from .parameters import Program, announce
from .programs import sample_rows


class MarkovModel(Program):
    """z_1 ~ initial(), z_t ~ transition(z_{t-1}) and x_t ~ decoder(z_t): sites "latent_1", ... and "obs"."""

    def __init__(self, initial: nn.Module, transition: nn.Module, decoder: nn.Module) -> None:
        super().__init__("model")
        self.initial = checked_network("initial", initial)
        self.transition = checked_network("transition", transition)
        self.decoder = checked_network("decoder", decoder)
        shape = tuple(applied("initial", self.initial).event_shape)
        if len(shape) != 1:
            raise StructureError(
                f"initial must return a distribution over vectors, event shape (D,), got {shape}: declare the dimensions of "
                "a state as one event with .to_event(1)"
            )
        self.latent_dim = shape[0]

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> None:
        announce(self)
        kept, _ = real_steps(x, lengths)
        with pyro.plate("data", len(x)):
            z, rows = self.sample(1, "initial", self.initial(), (), (len(x),))
            path = [z]
            for t, mask in enumerate(kept.unbind(-1)[1:], start=2):
                with poutine.mask(mask=mask):
                    z, rows = self.sample(t, "transition", self.transition(z), rows)
                path.append(z)
            likelihood = distribution("decoder", self.decoder(torch.stack(torch.broadcast_tensors(*path), -2)))
            check_rows(likelihood, "decoder", (*rows, len(path)))
            check_data(x, likelihood, 2)
            pyro.sample("obs", likelihood.mask(kept).to_event(1), obs=without_padding(x, kept))

    def sample(self, t: int, role: str, fn: Any, *rows: tuple[int, ...]) -> tuple[Tensor, torch.Size]:
        check_state(role, fn, self.latent_dim)
        return sample_rows(f"latent_{t}", role, fn, *rows, drawn_by="combiner")


class MarkovGuide(Program):
    """z_t ~ combiner(z_{t-1}, h_t) with h = encoder(x, lengths): sites "latent_1", ...; z_0 is the parameter `start`."""

    def __init__(self, encoder: nn.Module, combiner: nn.Module, latent_dim: int) -> None:
        super().__init__("guide")
        self.encoder = checked_network("encoder", encoder)
        self.combiner = checked_network("combiner", combiner)
        like = next(self.combiner.parameters(), torch.zeros(()))
        self.start = nn.Parameter(torch.zeros(latent_dim, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> None:
        announce(self)
        kept, features = self.read(x, lengths)
        z, rows = self.start.expand(len(x), -1), x.shape[:1]
        with pyro.plate("data", len(x)):
            for t, (mask, h) in enumerate(zip(kept.unbind(-1), features.unbind(1), strict=True), start=1):
                fn = self.combiner(z, h)
                check_state("combiner", fn, len(self.start))
                with poutine.mask(mask=mask):
                    z, rows = sample_rows(f"latent_{t}", "combiner", fn, rows)

    def read(self, x: Tensor, lengths: Tensor | None) -> tuple[Any, Tensor]:
        """A mask of the real steps, (B, T), and the features of all steps, (B, T, H)."""
        kept, lengths = real_steps(x, lengths)
        features = called("encoder", self.encoder, without_padding(x, kept), lengths)
        if not isinstance(features, Tensor) or features.ndim != 3 or features.shape[:2] != kept.shape:
            raise StructureError(
                f"the encoder must return features (B, T, H) of x and lengths, with (B, T) = {tuple(kept.shape)}, got "
                f"{described(features)}: pass pv.nn.BackwardGRU, or a module that keeps batch and steps"
            )
        return kept, features


def check_state(role: str, fn: Any, latent_dim: int) -> None:
    """Raise for a state of another size; torch would broadcast a state of one number."""
    if (shape := tuple(distribution(role, fn).event_shape)) != (latent_dim,):
        raise StructureError(
            f"the {role} must return states of the same size as those of initial, event shape ({latent_dim},), got "
            f"{shape}: give it {latent_dim} latents, as one event with .to_event(1)"
        )


def real_steps(x: Tensor, lengths: Tensor | None) -> tuple[Any, Tensor]:
    """A mask of the real steps of padded sequences, (B, T), and the lengths, (B,)."""
    size = num_rows(x)
    if x.ndim < 3 or x.shape[1] == 0:
        raise ArgumentError(
            f"x must be sequences (B, T, ...) of at least one step, got {described(x)}: put the steps on the second "
            "dimension; sequences of plain numbers are (B, T, 1)"
        )
    if lengths is None:
        lengths = torch.full((size,), x.shape[1], device=x.device)
    lengths = checked_lengths(lengths, size, x.shape[1]).to(x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1), lengths


def without_padding(x: Tensor, kept: Tensor) -> Tensor:
    """Replace padding by the first step of its sequence, which every likelihood accepts; NaN would make gradients NaN."""
    return torch.where(kept.reshape(kept.shape + (1,) * (x.ndim - 2)), x, x[:, :1])
