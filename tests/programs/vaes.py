"""Variational autoencoders as people write them with Pyro, small enough for sums over grids of their latents."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .program import Program

DOUBLE = torch.float64


def network(seed: int, *sizes: int, gain: float = 1.0) -> nn.Sequential:
    """A tanh network with fixed random weights, `gain` times those of torch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).double().eval()
    for parameter in net.parameters():
        parameter.data.mul_(gain)
    return net


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def coins(seed: int, logits: Tensor) -> Tensor:
    """Zeros and ones with these log-odds."""
    uniform = torch.rand(logits.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return (uniform < logits.sigmoid()).double()


def joined(*parts: Tensor) -> Tensor:
    """Concatenate vectors, with all other axes broadcast."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


def square(half_width: float = 7.0, number: int = 281) -> tuple[Tensor, Tensor]:
    """A grid over two latents: points (G, 1, 2), and the logarithm of the area of each (G, 1)."""
    line = torch.linspace(-half_width, half_width, number, dtype=DOUBLE)
    points = torch.cartesian_prod(line, line).unsqueeze(1)
    return points, (2 * (line[1] - line[0]).log()).expand(len(points), 1)


def sums(log_prior: Tensor, log_likelihood: Tensor, log_q: Tensor, log_area: Tensor) -> tuple[Tensor, Tensor, float]:
    """log p(x) (B,), ELBO (B,) and the mean KL by sums over G points, from log-densities (G, B)."""
    log_joint = log_prior + log_likelihood
    q = (log_q + log_area).exp()
    for total in ((log_prior + log_area).exp().sum(0), q.sum(0)):
        assert ((total - 1).abs() < 1e-4).all(), f"the grid does not hold prior and guide: {total}"
    log_evidence = (log_joint + log_area).logsumexp(0)
    return log_evidence, (q * (log_joint - log_q)).sum(0), float((q * (log_q - log_prior)).sum(0).mean())


@torch.no_grad()
def vae() -> Program:
    """Two latents, six pixels, nonlinear decoder, amortized diagonal guide; right values by sums over a square grid."""

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = network(0, 2, 8, 6, gain=2.0), network(348, 6, 8, 4)

        def model(self, x: Tensor) -> None:
            pyro.module("vae.decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        def q(self, x: Tensor) -> dist.Distribution:
            loc, log_scale = self.encoder(x).chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)

        def guide(self, x: Tensor) -> None:
            pyro.module("vae.encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.q(x))

    net = VAE()
    x = coins(0, net.decoder(randn(0, 6, 2)))
    z, log_area = square()
    log_prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1).log_prob(z)
    log_likelihood = dist.Bernoulli(logits=net.decoder(z)).to_event(1).log_prob(x)
    log_evidence, elbo, kl = sums(log_prior, log_likelihood, net.q(x).log_prob(z), log_area)
    return Program(
        title="VAE",
        model=net.model,
        guide=net.guide,
        args=(x,),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
    )


@torch.no_grad()
def conditional_vae() -> Program:
    """A VAE given a label that prior, decoder and encoder read; right values by sums over a square grid."""
    decoder, encoder = network(2, 2 + 3, 8, 6, gain=2.0), network(3, 6 + 3, 8, 4)
    prior_loc = network(4, 3, 2)

    def p(y: Tensor) -> dist.Distribution:
        return dist.Normal(prior_loc(y), 0.8).to_event(1)

    def q(x: Tensor, y: Tensor) -> dist.Distribution:
        loc, log_scale = encoder(torch.cat([x, y], -1)).chunk(2, -1)
        return dist.Normal(prior_loc(y) + loc, 0.8 * log_scale.exp()).to_event(1)

    def model(x: Tensor, label: Tensor) -> None:
        pyro.module("conditional_vae.decoder", decoder)
        pyro.module("conditional_vae.prior", prior_loc)
        y = one_hot(label, 3).to(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p(y))
            pyro.sample(
                "x", dist.Bernoulli(logits=decoder(torch.cat([z, y.expand(*z.shape[:-1], 3)], -1))).to_event(1), obs=x
            )

    def guide(x: Tensor, label: Tensor) -> None:
        pyro.module("conditional_vae.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x, one_hot(label, 3).to(x)))

    label = torch.tensor([0, 1, 2, 0, 1, 2])
    y = one_hot(label, 3).double()
    x = coins(1, decoder(torch.cat([randn(1, 6, 2), y], -1)))
    z, log_area = square()
    log_likelihood = dist.Bernoulli(logits=decoder(joined(z, y))).to_event(1).log_prob(x)
    log_evidence, elbo, kl = sums(p(y).log_prob(z), log_likelihood, q(x, y).log_prob(z), log_area)
    return Program(
        title="Conditional VAE, prior by label",
        model=model,
        guide=guide,
        args=(x, label),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
        refused={"surgery": ("StructureError", "the prior differs from datum to datum, so there is no p(z)")},
    )


@torch.no_grad()
def semi_supervised_vae() -> Program:
    """Unlabelled rows of M2, the label enumerated in the guide; right values by sums over labels and a square grid.

    The KL of z is that of q(z) = sum_y q(y) q(z given y).
    """

    class M2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = network(5, 2 + 3, 8, 6, gain=2.0), network(6, 6 + 3, 8, 4)
            self.classifier = network(7, 6, 5, 3, gain=1.5)

        def p(self, z: Tensor, y: Tensor) -> dist.Distribution:
            return dist.Bernoulli(logits=self.decoder(joined(z, one_hot(y, 3).to(z)))).to_event(1)

        def q(self, x: Tensor, y: Tensor) -> dist.Distribution:
            loc, log_scale = self.encoder(joined(x, one_hot(y, 3).to(x))).chunk(2, -1)
            return dist.Normal(loc, 0.9 * log_scale.exp()).to_event(1)

        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            pyro.module("semi_supervised_vae", self)
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(len(x), 3)), obs=y)
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", self.p(z, y), obs=x)

        @config_enumerate
        def guide(self, x: Tensor, y: Tensor | None = None) -> None:
            with pyro.plate("data", len(x)):
                if y is None:
                    y = pyro.sample("y", dist.Categorical(logits=self.classifier(x)))
                pyro.sample("z", self.q(x, y))

    net = M2()
    x = coins(2, net.decoder(joined(randn(2, 6, 2), one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).double())))
    z, log_area = square()
    log_normal = dist.Normal(0.0, 1.0).expand([2]).to_event(1).log_prob(z)
    labels = torch.arange(3)
    given = [sums(log_normal, net.p(z, y).log_prob(x), net.q(x, y).log_prob(z), log_area) for y in labels]
    log_evidence, elbo = (torch.stack([values[i] for values in given], -1) for i in range(2))
    log_q = net.classifier(x).log_softmax(-1)
    log_q_z = torch.stack([log_q[:, y] + net.q(x, y).log_prob(z) for y in labels]).logsumexp(0)
    kl = sums(log_normal, torch.zeros(1, dtype=DOUBLE), log_q_z, log_area)[2]
    return Program(
        title="Semi-supervised VAE (M2), unlabelled rows",
        model=net.model,
        guide=net.guide,
        args=(x,),
        log_evidence=log_evidence.logsumexp(-1) - math.log(3),
        elbo=(log_q.exp() * (elbo - math.log(3) - log_q)).sum(-1),
        site_kl={"z": kl},
    )


@torch.no_grad()
def mixture_vae() -> Program:
    """A VAE with a mixture prior whose cluster the model alone enumerates; right values by sums over clusters and a grid."""
    decoder, encoder = network(8, 2, 8, 6, gain=2.0), network(308, 6, 8, 4)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)
    mu = torch.tensor([[-1.0, 0.0], [0.8, 0.8], [0.8, -0.8]], dtype=DOUBLE)

    @config_enumerate
    def model(x: Tensor) -> None:
        pyro.module("mixture_vae.decoder", decoder)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(mu[c], 0.6).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def q(x: Tensor) -> dist.Distribution:
        loc, log_scale = encoder(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def guide(x: Tensor) -> None:
        pyro.module("mixture_vae.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    x = coins(3, decoder(mu.repeat(2, 1) + 0.6 * randn(3, 6, 2)))
    z, log_area = square()
    log_prior = (weights.log() + dist.Normal(mu, 0.6).to_event(1).log_prob(z)).logsumexp(-1, keepdim=True)
    log_likelihood = dist.Bernoulli(logits=decoder(z)).to_event(1).log_prob(x)
    log_evidence, elbo, kl = sums(log_prior, log_likelihood, q(x).log_prob(z), log_area)
    return Program(
        title="VAE with a mixture prior, clusters summed out",
        model=model,
        guide=guide,
        args=(x,),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
    )


@torch.no_grad()
def deep_markov_model() -> Program:
    """Ragged sequences under a linear-Gaussian state and a guide that reads a GRU; log p(x) by the Kalman filter.

    ELBO and KLs by sums over grids of two neighbouring states, forward in time.
    """
    lengths = torch.tensor([4, 2, 3, 4, 1])
    keep, drift, noise = 0.8, 0.6, 0.9
    emission = torch.tensor([[1.0, -0.5]], dtype=DOUBLE)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(552)
                self.rnn = nn.GRU(2, 3, batch_first=True, bidirectional=True).double()
            self.combiner = network(552, 1 + 6, 5, 2)

        def states(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]

        def q(self, z: Tensor, h: Tensor) -> dist.Distribution:
            loc, log_scale = self.combiner(joined(z, h)).chunk(2, -1)
            return dist.Normal(0.4 * z + loc, 0.65 * (0.3 * log_scale).exp()).to_event(1)

        def forward(self, x: Tensor, lengths: Tensor) -> None:
            pyro.module("deep_markov_model", self)
            h, z = self.states(x, lengths), x.new_zeros(len(x), 1)
            with pyro.plate("sequences", len(x)):
                for t in pyro.markov(range(x.shape[1])):
                    with poutine.mask(mask=t < lengths):
                        z = pyro.sample(f"z_{t}", self.q(z, h[:, t]))

    def model(x: Tensor, lengths: Tensor) -> None:
        z = x.new_zeros(len(x), 1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(keep * z, drift).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(z @ emission, noise).to_event(1), obs=x[:, t])

    guide = Guide().eval()
    x, z = torch.zeros(5, 4, 2, dtype=DOUBLE), torch.zeros(5, 1, dtype=DOUBLE)
    for t in range(4):
        z = keep * z + drift * randn(20 + t, 5, 1)
        x[:, t] = (z @ emission + noise * randn(30 + t, 5, 2)) * (t < lengths).unsqueeze(-1)

    log_evidence, mean, variance = (
        torch.zeros(5, dtype=DOUBLE),
        torch.zeros(5, 1, dtype=DOUBLE),
        torch.zeros(1, 1, dtype=DOUBLE),
    )
    elbo, site_kl = torch.zeros(5, dtype=DOUBLE), {}
    line = torch.linspace(-6.0, 6.0, 401, dtype=DOUBLE)
    before, q_before = (
        torch.zeros(1, dtype=DOUBLE),
        torch.ones(1, 5, dtype=DOUBLE),
    )  # points P of z_{t-1}, q times their width
    h = guide.states(x, lengths)
    for t in range(4):
        seen = t < lengths
        mean, variance = keep * mean, keep**2 * variance + drift**2
        covariance = variance * emission.T @ emission + noise**2 * torch.eye(2, dtype=DOUBLE)
        gain = variance * emission @ covariance.inverse()
        log_evidence += seen * dist.MultivariateNormal(mean @ emission, covariance).log_prob(x[:, t])
        mean, variance = mean + (x[:, t] - mean @ emission) @ gain.T, variance - variance * gain @ emission.T

        points = line.reshape(-1, 1, 1, 1)  # log-densities at (G, P, B): z_t, z_{t-1}, datum
        log_q = guide.q(before.reshape(-1, 1, 1), h[:, t]).log_prob(points)
        log_p = dist.Normal(keep * before.reshape(-1, 1, 1), drift).to_event(1).log_prob(points)
        q = q_before * log_q.exp() * (line[1] - line[0])
        log_likelihood = dist.Normal(line.reshape(-1, 1, 1) @ emission, noise).to_event(1).log_prob(x[:, t])  # (G, B)
        kl = seen * (q * (log_q - log_p)).sum((0, 1))
        before, q_before = line, q.sum(1)
        elbo += seen * (q_before * log_likelihood).sum(0) - kl
        site_kl[f"z_{t}"] = float(kl.mean())
    return Program(
        title="Deep Markov model, ragged minibatch, GRU guide",
        model=model,
        guide=guide,
        args=(x, lengths),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl=site_kl,
        refused={"surgery": ("MaskError", "sequences of other lengths have other latents, so there is no q(z) of all")},
    )


@torch.no_grad()
def prod_lda() -> Program:
    """A topic model over counts with a logistic-normal mixture of three topics; right values by sums over a square grid."""

    class ProdLDA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.topics, self.encoder = network(12, 3, 7, gain=4.0), network(510, 7, 6, 4)
            self.norm, self.drop = nn.BatchNorm1d(7, affine=False).double(), nn.Dropout(0.2)
            self.norm.running_mean.copy_(0.2 * randn(13, 7))
            self.norm.running_var.fill_(0.7)

        def words(self, theta: Tensor, docs: Tensor) -> dist.Distribution:
            theta = torch.cat([theta, torch.zeros_like(theta[..., :1])], -1).softmax(-1)
            shape = theta.shape[:-1]
            logits = self.norm(self.topics(self.drop(theta)).reshape(-1, 7)).reshape(*shape, 7)
            return dist.Multinomial(int(docs.sum(-1).max()), logits=logits)

        def q(self, docs: Tensor) -> dist.Distribution:
            loc, log_scale = self.encoder(docs / docs.sum(-1, keepdim=True)).chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)

        def model(self, docs: Tensor) -> None:
            pyro.module("prod_lda.decoder", self.topics)
            with pyro.plate("documents", len(docs)):
                theta = pyro.sample("theta", dist.Normal(docs.new_zeros(len(docs), 2), 1.0).to_event(1))
                pyro.sample("words", self.words(theta, docs), obs=docs)

        def guide(self, docs: Tensor) -> None:
            pyro.module("prod_lda.encoder", self.encoder)
            with pyro.plate("documents", len(docs)):
                pyro.sample("theta", self.q(docs))

    net = ProdLDA().eval()
    docs = torch.tensor(
        [[3, 0, 1, 0, 2, 0, 1], [0, 2, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 4, 0, 1, 0, 0], [0, 1, 0, 5, 0, 2, 0]]
    ).double()
    theta, log_area = square()
    log_prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1).log_prob(theta)
    log_probs = net.words(theta, docs).logits.log_softmax(-1)
    coefficient = (docs.sum(-1) + 1).lgamma() - (docs + 1).lgamma().sum(-1)
    log_likelihood = coefficient + (docs * log_probs).sum(-1)
    log_evidence, elbo, kl = sums(log_prior, log_likelihood, net.q(docs).log_prob(theta), log_area)
    return Program(
        title="ProdLDA, documents of different lengths",
        model=net.model,
        guide=net.guide,
        args=(docs,),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"theta": kl},
    )


@torch.no_grad()
def student_t_vae() -> Program:
    """StudentT prior, likelihood and guide, two latents; right values by sums over a grid of z = sinh(u), for the tails."""
    prior = dist.StudentT(4.0, torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1)

    class StudentTVAE(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = network(14, 2, 8, 4, gain=1.7), network(182, 4, 6, 4)

        def p(self, z: Tensor) -> dist.Distribution:
            return dist.StudentT(3.0, self.decoder(z), 0.7).to_event(1)

        def q(self, x: Tensor) -> dist.Distribution:
            loc, log_scale = self.encoder(x).chunk(2, -1)
            return dist.StudentT(4.0, loc, log_scale.exp()).to_event(1)

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior)
                pyro.sample("x", self.p(z), obs=x)

        def guide(self, x: Tensor) -> None:
            pyro.module("student_t_vae.encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.q(x))

    net = StudentTVAE()
    x = net.decoder(randn(15, 6, 2)) + 0.7 * randn(16, 6, 4)
    x[0, 0] += 4.0  # an outlier
    u, log_area = square(8.0, 321)
    z, log_area = u.sinh(), log_area + u.cosh().log().sum(-1)
    log_evidence, elbo, kl = sums(prior.log_prob(z), net.p(z).log_prob(x), net.q(x).log_prob(z), log_area)
    return Program(
        title="VAE with StudentT latents and data",
        model=net.model,
        guide=net.guide,
        args=(x,),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
    )


@torch.no_grad()
def flow_prior_vae() -> Program:
    """A VAE whose prior is a spline autoregressive flow; right values by sums over a square grid of the flow's density."""
    decoder, encoder = network(16, 2, 8, 6, gain=2.0), network(105, 6, 8, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(18)
        flow = T.spline_autoregressive(2, hidden_dims=[8], count_bins=4).double().eval()
    for parameter in flow.parameters():
        parameter.data.mul_(1.5)

    def prior() -> dist.Distribution:
        return dist.TransformedDistribution(dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0), [flow])

    def q(x: Tensor) -> dist.Distribution:
        loc, log_scale = encoder(x).chunk(2, -1)
        return dist.Normal(loc, 1.2 * log_scale.exp()).to_event(1)

    def model(x: Tensor) -> None:
        pyro.module("flow_prior_vae.flow", flow)
        pyro.module("flow_prior_vae.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("flow_prior_vae.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    x = coins(4, decoder(randn(4, 6, 2)))
    z, log_area = square(7.0, 421)
    log_likelihood = dist.Bernoulli(logits=decoder(z)).to_event(1).log_prob(x)
    log_evidence, elbo, kl = sums(prior().log_prob(z), log_likelihood, q(x).log_prob(z), log_area)
    return Program(
        title="VAE with a flow as prior",
        model=model,
        guide=guide,
        args=(x,),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
    )


@torch.no_grad()
def flow_guide_zuko() -> Program:
    """A VAE whose guide is a neural spline flow of zuko that reads the datum; right values by sums over a square grid."""
    import zuko
    from pyro.contrib.zuko import ZukoToPyro

    decoder = network(19, 2, 8, 6, gain=2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(136)
        flow = zuko.flows.NSF(features=2, context=6, transforms=1, bins=4, hidden_features=[8]).double().eval()

    def model(x: Tensor) -> None:
        pyro.module("flow_guide_zuko.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("flow_guide_zuko.flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(flow(x)))

    x = coins(5, decoder(randn(5, 5, 2)))
    z, log_area = square(7.0, 351)
    log_prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1).log_prob(z)
    log_likelihood = dist.Bernoulli(logits=decoder(z)).to_event(1).log_prob(x)
    log_q = flow(x).log_prob(z.expand(-1, len(x), 2))
    log_evidence, elbo, kl = sums(log_prior, log_likelihood, log_q, log_area)
    return Program(
        title="VAE with a zuko flow as guide",
        model=model,
        guide=guide,
        args=(x,),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
    )


@torch.no_grad()
def multimodal_vae() -> Program:
    """Pixels and numbers share z, some rows lack one of them, and a product of experts is the guide; sums over a grid."""
    pixels_of, numbers_of = network(21, 2, 6, 4, gain=2.0), network(22, 2, 6, 2, gain=1.5)
    pixel_expert, number_expert = network(112, 4, 6, 4), network(112, 2, 6, 4)

    def likelihoods(z: Tensor) -> tuple[dist.Distribution, dist.Distribution]:
        return dist.Bernoulli(logits=pixels_of(z)).to_event(1), dist.Normal(numbers_of(z), 0.8).to_event(1)

    def q(pixels: Tensor, numbers: Tensor, has_pixels: Tensor, has_numbers: Tensor) -> dist.Distribution:
        precision, weighted = pixels.new_ones(len(pixels), 2), pixels.new_zeros(len(pixels), 2)  # of the prior
        for expert, data, present in ((pixel_expert, pixels, has_pixels), (number_expert, numbers, has_numbers)):
            loc, log_precision = expert(data).chunk(2, -1)
            own = present.unsqueeze(-1) * 0.5 * log_precision.exp()
            precision, weighted = precision + own, weighted + own * loc
        return dist.Normal(weighted / precision, 1.1 * precision.rsqrt()).to_event(1)

    def model(pixels: Tensor, numbers: Tensor, has_pixels: Tensor, has_numbers: Tensor) -> None:
        with pyro.plate("data", len(pixels)):
            z = pyro.sample("z", dist.Normal(pixels.new_zeros(len(pixels), 2), 1.0).to_event(1))
            of_pixels, of_numbers = likelihoods(z)
            with poutine.mask(mask=has_pixels):
                pyro.sample("pixels", of_pixels, obs=pixels)
            with poutine.mask(mask=has_numbers):
                pyro.sample("numbers", of_numbers, obs=numbers)

    def guide(pixels: Tensor, numbers: Tensor, has_pixels: Tensor, has_numbers: Tensor) -> None:
        pyro.module("multimodal_vae.pixel_expert", pixel_expert)
        pyro.module("multimodal_vae.number_expert", number_expert)
        with pyro.plate("data", len(pixels)):
            pyro.sample("z", q(pixels, numbers, has_pixels, has_numbers))

    has_pixels = torch.tensor([True, True, False, True, True, False])
    has_numbers = torch.tensor([True, False, True, True, False, True])
    z = randn(6, 6, 2)
    pixels = coins(6, pixels_of(z)) * has_pixels.unsqueeze(-1)
    numbers = (numbers_of(z) + 0.8 * randn(7, 6, 2)) * has_numbers.unsqueeze(-1)
    args = (pixels, numbers, has_pixels, has_numbers)
    z, log_area = square()
    of_pixels, of_numbers = likelihoods(z)
    log_prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1).log_prob(z)
    log_likelihood = has_pixels * of_pixels.log_prob(pixels) + has_numbers * of_numbers.log_prob(numbers)
    log_evidence, elbo, kl = sums(log_prior, log_likelihood, q(*args).log_prob(z), log_area)
    return Program(
        title="Multimodal VAE, modalities missing, product of experts",
        model=model,
        guide=guide,
        args=args,
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
    )


@torch.no_grad()
def boosting_mixture_guide() -> Program:
    """A posterior with two modes under a mixture guide whose indicator the model does not have; sums over a line.

    Right are the numbers of the marginal guide q(z) = sum_i w_i Normal(z; loc_i, scale_i).
    """
    weights = torch.tensor([0.4, 0.6], dtype=DOUBLE)
    signs, scales = torch.tensor([-1.0, 1.0], dtype=DOUBLE), torch.tensor([0.5, 0.6], dtype=DOUBLE)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.2))
            pyro.sample("x", dist.Normal(z**2, 0.8), obs=x)

    def component(x: Tensor, i: Tensor) -> dist.Distribution:
        return dist.Normal(signs[i] * x.clamp(min=0.2).sqrt(), scales[i])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            i = pyro.sample("i", dist.Categorical(weights), infer={"is_auxiliary": True})
            pyro.sample("z", component(x, i))

    x = torch.tensor([0.1, 0.9, 1.6, 2.4, -0.3], dtype=DOUBLE)
    z = torch.linspace(-8.0, 8.0, 3201, dtype=DOUBLE).unsqueeze(-1)
    log_width = (z[1] - z[0]).log().expand(len(z), 1)
    log_q = torch.stack([weights[i].log() + component(x, i).log_prob(z) for i in torch.arange(2)]).logsumexp(0)
    log_prior, log_likelihood = dist.Normal(0.0, 1.2).log_prob(z), dist.Normal(z**2, 0.8).log_prob(x)
    log_evidence, elbo, kl = sums(log_prior, log_likelihood, log_q, log_width)
    return Program(
        title="Mixture guide (boosting), indicator in the guide alone",
        model=model,
        guide=guide,
        args=(x,),
        log_evidence=log_evidence,
        elbo=elbo,
        site_kl={"z": kl},
        other={"beta": "as in Pyro, the loss counts log q of the indicator, so minus the loss is no bound"},
    )
