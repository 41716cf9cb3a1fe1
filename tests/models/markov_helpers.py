"""A linear Gaussian state space model as a `MarkovVAE`, its exact guide, and a Kalman filter that knows neither."""

import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

F64 = torch.float64


class StateSpace:
    """z_1 ~ N(0, P), z_t ~ N(A z_{t-1} + a, Q), x_t ~ N(C z_t + c, R): two latents, three numbers per step."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        def covariance(size, scale):
            root = 0.3 * randn(size, size) + torch.eye(size, dtype=F64)
            return scale * root @ root.T

        self.A, self.a, self.C, self.c = 0.6 * randn(2, 2), 0.5 * randn(2), randn(3, 2), randn(3)
        self.P, self.Q, self.R = covariance(2, 1.3), covariance(2, 0.5), 0.4 * torch.eye(3, dtype=F64)

    def log_evidence(self, x):
        """log p of one sequence (T, 3) without padding, by the Kalman filter."""
        m, P, total = torch.zeros(2, dtype=F64), self.P, 0.0
        for step in x.double():
            S = self.C @ P @ self.C.T + self.R
            total = total + dist.MultivariateNormal(self.C @ m + self.c, S).log_prob(step)
            gain = P @ self.C.T @ torch.linalg.inv(S)
            m, P = m + gain @ (step - self.C @ m - self.c), P - gain @ self.C @ P
            m, P = self.A @ m + self.a, self.A @ P @ self.A.T + self.Q
        return total

    def log_evidences(self, x, lengths):
        return torch.stack([self.log_evidence(row[:length]) for row, length in zip(x, lengths, strict=True)])

    def networks(self):
        """Initial, transition and decoder of a `MarkovVAE`."""
        return {
            "initial": Gaussian(None, torch.zeros(2, dtype=F64), self.P),
            "transition": Gaussian(self.A, self.a, self.Q),
            "decoder": Gaussian(self.C, self.c, self.R),
        }

    def exact_vae(self):
        return pv.MarkovVAE(**self.networks(), encoder=BackwardMessages(self), combiner=ExactCombiner()).double()


class Gaussian(nn.Module):
    """N(W z + b, S), or N(b, S) without z."""

    def __init__(self, weight, bias, covariance):
        super().__init__()
        self.weight, self.bias = None if weight is None else nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.register_buffer("root", torch.linalg.cholesky(covariance))

    def forward(self, *z):
        loc = z[0] @ self.weight.T + self.bias if z else self.bias
        return dist.MultivariateNormal(loc, scale_tril=self.root)


class BackwardMessages(nn.Module):
    """Precision and information about z_t in x_t and what comes later, and the prior of z_t given z_{t-1}."""

    def __init__(self, system):
        super().__init__()
        self.system = system

    def forward(self, x, lengths):
        s = self.system
        Q, R = torch.linalg.inv(s.Q), torch.linalg.inv(s.R)
        J, b = x.new_zeros(len(x), 2, 2), x.new_zeros(len(x), 2)  # of what comes after t
        features = []
        for t in reversed(range(x.shape[1])):
            real = t < lengths
            J = torch.where(real[:, None, None], J + s.C.T @ R @ s.C, 0.0)
            b = torch.where(real[:, None], b + (x[:, t] - s.c) @ R @ s.C, 0.0)
            prior = torch.linalg.inv(s.P) if t == 0 else Q
            drift = (prior @ s.A, prior @ s.a) if t else (torch.zeros_like(s.A), torch.zeros_like(s.a))
            given = [*(part.expand(len(x), *part.shape) for part in (prior, *drift)), J, b]
            features.append(torch.cat([part.reshape(len(x), -1) for part in given], -1))
            gain = torch.linalg.inv(J + Q) @ Q  # integrate z_t out
            b = ((b.unsqueeze(-2) - (J @ s.a).unsqueeze(-2)) @ gain @ s.A).squeeze(-2)
            J = s.A.T @ (J - J @ torch.linalg.inv(J + Q) @ J) @ s.A
        return torch.stack(features[::-1], 1)


class ExactCombiner(nn.Module):
    def forward(self, z, h):
        prior, drift, shift, J, b = h.split([4, 4, 2, 4, 2], -1)
        prior, drift, J = (part.unflatten(-1, (2, 2)) for part in (prior, drift, J))
        information = (drift @ z.unsqueeze(-1)).squeeze(-1) + shift + b
        precision = prior + J
        loc = torch.linalg.solve(precision, information.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=precision.expand(*loc.shape, 2))


def ragged(system, lengths, padding=torch.nan, seed=1):
    """Sequences of the system, with what is called padding behind their ends."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = system.exact_vae().generate(len(lengths), max(lengths))
    lengths = torch.tensor(lengths)
    return x.masked_fill((torch.arange(x.shape[1]) >= lengths[:, None])[..., None], padding), lengths


def small_markov(data_dim=3, latent_dim=2, features=8):
    return pv.MarkovVAE(
        initial=pv.nn.MixturePrior(latent_dim, 2),
        transition=nn.Sequential(pv.nn.MLP(latent_dim, 2 * latent_dim, hidden=(8,)), pv.nn.Normal()),
        decoder=nn.Sequential(nn.Linear(latent_dim, data_dim), pv.nn.Normal("learned")),
        encoder=pv.nn.BackwardGRU(data_dim, features),
        combiner=pv.models.Concatenated(nn.Sequential(nn.Linear(latent_dim + features, 2 * latent_dim), pv.nn.Normal())),
    )


class Returns(nn.Module):
    """A network that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)
