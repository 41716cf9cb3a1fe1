"""Two layers of latents, linear and Gaussian, with what is known about them, and both exact guides."""

import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

F64 = torch.float64


class Linear(nn.Module):
    """N(W_1 h_1 + W_2 h_2 + ... + b, S) for inputs h, each (..., width)."""

    def __init__(self, weights, bias, covariance):
        super().__init__()
        self.weights = nn.ParameterList(weight.clone() for weight in weights)
        self.bias = nn.Parameter(bias.clone())
        self.register_buffer("root", torch.linalg.cholesky(covariance))

    def forward(self, *inputs):
        loc = self.bias + sum(h @ weight.T for h, weight in zip(inputs, self.weights, strict=True))
        return dist.MultivariateNormal(loc, scale_tril=self.root)


class TwoLayers:
    """z_2 ~ N(0, I), two numbers; z_1 ~ N(V z_2 + v, S), three; x ~ N(W z_1 + w, R), four.

    The joint of u = (z_2, z_1, x) is N(mean, covariance); `given` conditions some of its numbers on others.
    """

    Z2, Z1, X = range(0, 2), range(2, 5), range(5, 9)

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.V, self.v, self.W, self.w = randn(3, 2), randn(3), randn(4, 3), randn(4)
        self.S, self.R = 0.5 * torch.eye(3, dtype=F64), 0.7 * torch.eye(4, dtype=F64)
        up = torch.zeros(9, 9, dtype=F64)  # u = up u + noise
        up[2:5, :2], up[5:, 2:5] = self.V, self.W
        spread = torch.linalg.inv(torch.eye(9, dtype=F64) - up)
        noise = torch.block_diag(torch.eye(2, dtype=F64), self.S, self.R)
        self.mean = spread @ torch.cat([torch.zeros(2, dtype=F64), self.v, self.w])
        self.covariance = spread @ noise @ spread.T

    def joint(self, places):
        return dist.MultivariateNormal(self.mean[places], self.covariance[places][:, places])

    def log_evidence(self, x):
        return self.joint([*self.X]).log_prob(x)

    def given(self, places, *known):
        """The conditional of some numbers given others, as a network of these."""
        places, all_known = [*places], [place for one in known for place in one]
        cross, own = self.covariance[places][:, all_known], self.covariance[all_known][:, all_known]
        gain = cross @ torch.linalg.inv(own)
        covariance = self.covariance[places][:, places] - gain @ cross.T
        bias = self.mean[places] - gain @ self.mean[all_known]
        return Linear(gain.split([len(one) for one in known], -1), bias, (covariance + covariance.T) / 2)

    def networks(self):
        return {
            "prior": Linear([], torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)),
            "layers": [Linear([self.V], self.v, self.S)],
            "decoder": Linear([self.W], self.w, self.R),
        }

    def exact_vae(self, kind):
        if kind == "bottom-up":
            guide = {"encoders": [self.given(self.Z1, self.X), self.given(self.Z2, self.Z1)]}
        else:
            encoders = [self.given(self.Z1, self.Z2, self.X), self.given(self.Z2, self.X)]
            guide = {"encoders": encoders, "features": [nn.Identity(), nn.Identity()]}
        return pv.HierarchicalVAE(**self.networks(), **guide)

    def amortized(self, kind):
        """The model, with a guide of the right form that has learned nothing yet."""
        if kind == "bottom-up":
            guide = {"encoders": [full(4, 3), full(3, 2)]}
        else:
            first, second = pv.models.Concatenated(full(2 + 4, 3)), full(4, 2)
            guide = {"encoders": [first, second], "features": [nn.Identity(), nn.Identity()]}
        vae = pv.HierarchicalVAE(**self.networks(), **guide).double()
        vae.model.requires_grad_(False)
        return vae

    def rates(self, x):
        """Mean KL of each layer under the posterior, z_2 first, by the formula for two Gaussians."""
        total = [torch.distributions.kl_divergence(self.posterior(row, 5), self.joint([*range(5)])) for row in x]
        top = [torch.distributions.kl_divergence(self.posterior(row, 2), self.joint([*range(2)])) for row in x]
        total, top = torch.stack(total).mean(), torch.stack(top).mean()
        return {"latent_2": float(top), "latent_1": float(total - top)}

    def posterior(self, x, count):
        with torch.no_grad():
            return self.given(range(count), self.X)(x)


def full(inputs, outputs):
    head = pv.nn.MultivariateNormal()
    return nn.Sequential(nn.Linear(inputs, head.num_outputs(outputs)), head)


def small_hierarchical(kind="ladder"):
    """Data of 6 numbers, latents of 4, 3 and 2."""

    def net(inputs, outputs, **options):
        head = pv.nn.Normal(**options)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, head.num_outputs(outputs)), head)

    model = {"prior": pv.nn.MixturePrior(2, 2), "layers": [net(3, 4), net(2, 3)], "decoder": net(4, 6, scale="learned")}
    if kind == "bottom-up":
        return pv.HierarchicalVAE(**model, encoders=[net(6, 4), net(4, 3), net(3, 2)])
    features = [nn.Sequential(nn.Linear(inputs, 5), nn.Tanh()) for inputs in (6, 5, 5)]
    encoders = [pv.models.Concatenated(net(3 + 5, 4)), pv.models.Concatenated(net(2 + 5, 3)), net(5, 2)]
    return pv.HierarchicalVAE(**model, encoders=encoders, features=features)
