"""Three latents per datum, linear and Gaussian on both sides, which the guide draws in any order: closed forms by site."""

import math

import pyro
import pyro.distributions as dist
import torch
from pair_helpers import F64

PRIOR = {"z1": {}, "z2": {"z1": 0.8}, "z3": {"z1": -0.5, "z2": 0.7}}  # of unit variance
OWN = {"z1": (0.6, 0.7), "z2": (-0.4, 1.2), "z3": (0.3, 0.5)}  # slope in x, scale
READ = 0.6  # slope in every draw that the guide makes before


class Chain:
    """p: z1, then z2 given z1, then z3 given both. q: in `order`, each given those drawn before, or x alone.

    Parameters are tensors of the chain, so that a closed form has a gradient.
    """

    def __init__(self, order=("z1", "z2", "z3"), reads=True):
        self.order, self.reads = tuple(order), reads
        self.slope, self.scale, self.read, self.weight = (
            torch.tensor(value, dtype=F64, requires_grad=True)
            for value in ([OWN[n][0] for n in PRIOR], [OWN[n][1] for n in PRIOR], READ, 1.0)
        )

    @property
    def parameters(self):
        return [self.slope, self.scale, self.read, self.weight]

    def before(self, name):
        return self.order[: self.order.index(name)] if self.reads else ()

    def model(self, x):
        z = {}
        with pyro.plate("data", len(x)):
            for name, weights in PRIOR.items():
                loc = sum((self.weight * w * z[n] for n, w in weights.items()), torch.zeros_like(x))
                z[name] = pyro.sample(name, dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z["z3"], 1.0), obs=x)

    def guide(self, x):
        z = {}
        with pyro.plate("data", len(x)):
            for name in self.order:
                i = list(PRIOR).index(name)
                loc = sum((self.read * z[n] for n in self.before(name)), self.slope[i] * x)
                z[name] = pyro.sample(name, dist.Normal(loc, self.scale[i]))

    def kl(self, x):
        """E_q[log q - log p] by site, (N,) each: a linear map of x and of three noises for every latent."""
        mean, noise = {}, {}
        for name in self.order:
            i = list(PRIOR).index(name)
            mean[name] = sum((self.read * mean[n] for n in self.before(name)), self.slope[i] * x)
            own = torch.nn.functional.one_hot(torch.tensor(i), 3) * self.scale[i]
            noise[name] = sum((self.read * noise[n] for n in self.before(name)), own)
        parts = {}
        for name, weights in PRIOR.items():
            i = list(PRIOR).index(name)
            off = mean[name] - sum(self.weight * w * mean[n] for n, w in weights.items())
            spread = noise[name] - sum(self.weight * w * noise[n] for n, w in weights.items())
            parts[name] = -self.scale[i].log() - 0.5 + 0.5 * (off**2 + spread.square().sum())
        last = (x - mean["z3"]) ** 2 + noise["z3"].square().sum()
        return parts, -0.5 * math.log(2 * math.pi) - 0.5 * last

    def loss(self, x):
        """Minus the ELBO, summed over the data."""
        parts, fit = self.kl(x)
        return (sum(parts.values()) - fit).sum()

    def sampled(self):
        """The latents of which the prior reads something drawn later and given them."""
        later = {n: self.order[self.order.index(n) + 1 :] if self.reads else () for n in PRIOR}
        return {n for n, weights in PRIOR.items() if set(weights) & set(later[n])}
