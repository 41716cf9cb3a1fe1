"""Latent variable models beyond the plain VAE, as people write them with Pyro."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn.functional import logsigmoid, one_hot

from .program import Program

F64 = torch.float64


def real(values) -> Tensor:
    return torch.tensor(values, dtype=F64)


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """The module with weights that depend on the seed alone, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def initialised(guide: Callable, *args) -> Callable:
    """An autoguide makes its parameters in its first run; this one leaves no trace elsewhere."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        guide(*args)
    return guide


def fitted_linear(features: Tensor, targets: Tensor, ridge: float = 1.0) -> nn.Linear:
    """The layer that takes features (B, F) to targets (B, T) with a small squared error and small weights."""
    layer = seeded(0, lambda: nn.Linear(features.shape[1], targets.shape[1]))
    centred = features - features.mean(0)
    weight = torch.linalg.solve(centred.T @ centred + ridge * torch.eye(features.shape[1], dtype=F64), centred.T @ targets)
    layer.weight.copy_(weight.T)
    layer.bias.copy_(targets.mean(0) - features.mean(0) @ weight)
    return layer


def line(low: float = -10.0, high: float = 10.0, num: int = 2001) -> tuple[Tensor, float]:
    """Points (G, 1) on a line and the logarithm of their distance, which is the weight of each in the trapezoid rule."""
    return torch.linspace(low, high, num, dtype=F64)[:, None], math.log((high - low) / (num - 1))


def moments(points: Tensor, log_joint: Tensor) -> Tensor:
    """Mean and log standard deviation, (B, 2), of the posterior with log p(x, z), (G, B), at the points (G, 1)."""
    posterior = log_joint.softmax(0)
    mean = (posterior * points).sum(0)
    return torch.stack([mean, (posterior * (points - mean) ** 2).sum(0).log() / 2], -1)


def mean_under(log_q: Tensor, values: Tensor, log_step: float) -> Tensor:
    """E_q[values], (B,), of the values (G, B) at the points; log q, (G, B), is a density over the line."""
    return ((log_q + log_step).exp() * values).sum(0)


class Right(NamedTuple):
    """What is right for one latent on a line, (B,) each."""

    log_evidence: Tensor
    elbo: Tensor
    kl: Tensor


def quadrature(log_prior: Tensor, log_likelihood: Tensor, log_q: Tensor, log_step: float) -> Right:
    """Sums over the points of a line, where the three log-densities stand, (G, B) each."""
    kl = mean_under(log_q, log_q - log_prior, log_step)
    elbo = mean_under(log_q, log_likelihood, log_step) - kl
    return Right((log_prior + log_likelihood + log_step).logsumexp(0), elbo, kl)


@torch.no_grad()
def lda_enumerated_words() -> Program:
    """Latent Dirichlet allocation with two given topics; the sum over topics of words is written out, and the integral over
    the proportions of a document is a quadrature over their logit."""
    words = torch.tensor(
        [[0, 0, 1, 2, 0, 1], [4, 3, 4, 4, 2, 3], [0, 4, 1, 3, 2, 2], [1, 1, 0, 0, 0, 0], [3, 0, 4, 4, 1, 3]]
    ).T
    prior = real([1.5, 1.0])
    topics = real([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.2, 0.25, 0.4]])

    def model(words):  # (words, documents)
        with pyro.plate("topics", 2):
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(5, dtype=F64)))
        with pyro.plate("documents", words.shape[1]):
            proportions = pyro.sample("proportions", dist.Dirichlet(prior))
            with pyro.plate("words", len(words)):
                topic = pyro.sample("topic", dist.Categorical(proportions), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(topic_words[topic]), obs=words)

    def guide(words):
        pyro.module("lda_enumerated_words.encoder", encoder)
        with pyro.plate("topics", 2):
            pyro.sample("topic_words", dist.Delta(topics, event_dim=1))
        with pyro.plate("documents", words.shape[1]):
            counts = one_hot(words, 5).double().sum(0)
            pyro.sample("proportions", dist.Dirichlet(encoder(counts).exp()))

    logits, log_step = line(-40, 40, 4001)
    log_share, log_rest = logsigmoid(logits), logsigmoid(-logits)

    def log_density(a, b):  # of the logit, where the share is a Beta(a, b)
        return torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + a * log_share + b * log_rest

    log_prior = log_density(*prior)
    log_likelihood = (log_share.exp() * topics[0] + log_rest.exp() * topics[1]).log()[:, words].sum(1)
    share = ((log_prior + log_likelihood).softmax(0) * log_share.exp()).sum(0)
    counts = one_hot(words, 5).double().sum(0)
    encoder = fitted_linear(counts, (3 * torch.stack([share, 1 - share], -1)).log() + real([0.5, 0.0]))
    right = quadrature(log_prior, log_likelihood, log_density(*encoder(counts).exp().T), log_step)
    return Program(
        title="Latent Dirichlet allocation, topics of words enumerated",
        model=model,
        guide=guide,
        args=(words,),
        log_evidence=right.log_evidence,
        elbo=right.elbo,
        site_kl={"proportions": right.kl.mean().item()},
        particles_in_a_loop=True,
    )


@torch.no_grad()
def gaussian_mixture_map() -> Program:
    """A Gaussian mixture whose global parameters an AutoDelta holds at a point; log p(x) given that point is a log-sum-exp
    over the components."""
    data = real([-2.1, -1.3, 0.2, 1.4, 2.7])
    point = {"weights": real([0.3, 0.7]), "scale": real(0.8), "locs": real([-1.5, 1.5])}

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 0.5, dtype=F64)))
        scale = pyro.sample("scale", dist.LogNormal(real(0.0), 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(real(0.0), 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoDelta(poutine.block(model, expose=["weights", "locs", "scale"]), init_loc_fn=init_to_value(values=point))
    density = dist.Normal(point["locs"], point["scale"]).log_prob(data[:, None])
    log_evidence = (point["weights"].log() + density).logsumexp(-1)
    return Program(
        title="Gaussian mixture, global parameters at a point (AutoDelta)",
        model=model,
        guide=initialised(guide, data),
        args=(data,),
        log_evidence=log_evidence,
        elbo=log_evidence,
        gaps=torch.zeros(5, 2, dtype=F64),
        refused=dict.fromkeys(("units", "surgery"), ("StructureError", "the guide draws no latent of the data")),
        particles_in_a_loop=True,
    )


@torch.no_grad()
def gaussian_mixture_enumerated() -> Program:
    """A Gaussian mixture whose assignments are enumerated in model and guide; all values are sums over the components."""
    data = real([-2.1, -1.3, 0.2, 1.4, 2.7])
    weights, locs = real([0.3, 0.5, 0.2]), real([-1.5, 0.5, 2.0])

    @config_enumerate
    def model(data):
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], 0.8), obs=data)

    @config_enumerate
    def guide(data):
        pyro.module("gaussian_mixture_enumerated.classifier", classifier)
        with pyro.plate("data", len(data)):
            pyro.sample("assignment", dist.Categorical(logits=classifier(data[:, None])))

    log_joint = weights.log() + dist.Normal(locs, 0.8).log_prob(data[:, None])
    classifier = fitted_linear(data[:, None], log_joint.log_softmax(-1), ridge=15.0)
    log_q = classifier(data[:, None]).log_softmax(-1)
    log_evidence = log_joint.logsumexp(-1)
    elbo = (log_q.exp() * (log_joint - log_q)).sum(-1)
    return Program(
        title="Gaussian mixture, assignments enumerated in model and guide",
        model=model,
        guide=guide,
        args=(data,),
        log_evidence=log_evidence,
        elbo=elbo,
        gaps=torch.stack([log_evidence - elbo, torch.zeros(5, dtype=F64)], -1),
        site_kl={"assignment": (log_q.exp() * (log_q - weights.log())).sum(-1).mean().item()},
    )


@torch.no_grad()
def hidden_markov_model() -> Program:
    """Sequences of unequal length with a continuous level each and a chain of states, which the model enumerates; the right
    values are the forward algorithm at each point of a quadrature over the level."""
    lengths = torch.tensor([5, 3, 4, 2, 5])
    sequences = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=F64) * 1.5
    start, transition = real([0.5, 0.3, 0.2]), real([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])
    locs = real([-1.5, 0.0, 1.5])

    def model(sequences, lengths):
        with pyro.plate("sequences", len(sequences)):
            level = pyro.sample("level", dist.Normal(real(0.0), 1.0))
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=t < lengths):
                    probs = start if t == 0 else transition[state]  # noqa: F821
                    state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                    pyro.sample(f"obs_{t}", dist.Normal(locs[state] + level, 0.7), obs=sequences[:, t])

    def summary(sequences, lengths):
        inside = torch.arange(5) < lengths[:, None]
        return torch.stack([(sequences * inside).sum(-1) / lengths, lengths.double()], -1)

    def guide(sequences, lengths):
        pyro.module("hidden_markov_model.encoder", encoder)
        with pyro.plate("sequences", len(sequences)):
            loc, log_scale = encoder(summary(sequences, lengths)).unbind(-1)
            pyro.sample("level", dist.Normal(loc, log_scale.exp()))

    points, log_step = line()
    emission = dist.Normal(locs + points[..., None], 0.7).log_prob(sequences.T[:, None, :, None])  # (T, G, B, 3)
    forward = start.log() + emission[0]
    for t in range(1, 5):
        step = (forward[..., None] + transition.log()).logsumexp(-2) + emission[t]
        forward = torch.where((t < lengths)[:, None], step, forward)
    log_prior, log_likelihood = dist.Normal(0.0, 1.0).log_prob(points), forward.logsumexp(-1)
    wider = moments(points, log_prior + log_likelihood) + real([0.2, 0.3])
    encoder = fitted_linear(summary(sequences, lengths), wider)
    loc, log_scale = encoder(summary(sequences, lengths)).T
    right = quadrature(log_prior, log_likelihood, dist.Normal(loc, log_scale.exp()).log_prob(points), log_step)
    return Program(
        title="Hidden Markov model with a latent per sequence, unequal lengths",
        model=model,
        guide=guide,
        args=(sequences, lengths),
        log_evidence=right.log_evidence,
        elbo=right.elbo,
        site_kl={"level": right.kl.mean().item()},
    )


@torch.no_grad()
def capture_recapture() -> Program:
    """Cormack-Jolly-Seber: animals that live on with a probability of their own and are caught again or not; alive or dead
    is summed by the forward algorithm at each point of a quadrature over the logit of survival."""
    first = torch.tensor([0, 0, 1, 2, 0, 1])
    captures = real([[1, 0, 1, 0, 0], [1, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0]])

    def model(captures, first):  # (animals, times), (animals,)
        with pyro.plate("animals", len(captures)):
            vigour = pyro.sample("vigour", dist.Normal(real(1.0), 1.5))
            alive = torch.ones(len(captures), dtype=F64)
            for t in pyro.markov(range(captures.shape[1])):
                lives = torch.where(t > first, vigour.sigmoid() * alive, torch.ones_like(vigour))
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(lives), infer={"enumerate": "parallel"})
                with poutine.mask(mask=t > first):
                    pyro.sample(f"caught_{t}", dist.Bernoulli(0.6 * alive), obs=captures[:, t])

    def guide(captures, first):
        pyro.module("capture_recapture.encoder", encoder)
        with pyro.plate("animals", len(captures)):
            loc, log_scale = encoder(torch.cat([captures, first[:, None]], -1)).unbind(-1)
            pyro.sample("vigour", dist.Normal(loc, log_scale.exp()))

    points, log_step = line(-14, 16)
    survival = points.sigmoid()
    alive, dead = torch.ones(len(points), len(first), dtype=F64), torch.zeros(len(points), len(first), dtype=F64)
    for t in range(captures.shape[1]):
        now_alive = alive * survival * torch.where(captures[:, t] == 1, 0.6, 0.4)
        now_dead = (dead + alive * (1 - survival)) * (captures[:, t] == 0)
        alive, dead = torch.where(t > first, now_alive, alive), torch.where(t > first, now_dead, dead)
    log_prior, log_likelihood = dist.Normal(1.0, 1.5).log_prob(points), (alive + dead).log()
    features = torch.cat([captures, first[:, None]], -1)
    encoder = fitted_linear(features, moments(points, log_prior + log_likelihood) + real([1.0, 0.3]))
    loc, log_scale = encoder(features).T
    right = quadrature(log_prior, log_likelihood, dist.Normal(loc, log_scale.exp()).log_prob(points), log_step)
    return Program(
        title="Capture-recapture, alive or dead enumerated over time",
        model=model,
        guide=guide,
        args=(captures, first),
        log_evidence=right.log_evidence,
        elbo=right.elbo,
        site_kl={"vigour": right.kl.mean().item()},
    )


@torch.no_grad()
def cevae() -> Program:
    """A causal-effect VAE: treatment and outcome are observed in the guide as auxiliary sites, whose densities are no part
    of log q; one latent, by quadrature."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=F64)
    t = real([0, 1, 1, 0, 1, 0])
    y = torch.randn(6, generator=generator, dtype=F64)
    decoder = seeded(0, lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3)))
    outcome = seeded(1, lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
    treatment = seeded(2, lambda: nn.Linear(3, 1))

    def model(x, t, y):
        pyro.module("cevae.decoder", decoder)
        pyro.module("cevae.outcome", outcome)
        with pyro.plate("people", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.7).to_event(1), obs=x)
            t = pyro.sample("t", dist.Bernoulli(logits=1.5 * z[..., 0]), obs=t)
            mean = outcome(torch.cat([z, t[:, None].expand_as(z)], -1))[..., 0]
            pyro.sample("y", dist.Normal(mean, 0.8), obs=y)

    def guide(x, t, y):
        pyro.module("cevae.treatment", treatment)
        pyro.module("cevae.encoder", encoder)
        with pyro.plate("people", len(x)):
            t = pyro.sample("t", dist.Bernoulli(logits=treatment(x)[..., 0]), obs=t, infer={"is_auxiliary": True})
            y = pyro.sample("y", dist.Normal(x.sum(-1) + t, 2.0), obs=y, infer={"is_auxiliary": True})
            loc, log_scale = encoder(torch.cat([x, t[:, None], y[:, None]], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    points, log_step = line()
    log_prior = dist.Normal(0.0, 1.0).log_prob(points)
    log_likelihood = dist.Normal(decoder(points)[:, None], 0.7).log_prob(x).sum(-1) + logsigmoid(1.5 * points * (2 * t - 1))
    inputs = torch.stack(torch.broadcast_tensors(points, t), -1)
    log_likelihood = log_likelihood + dist.Normal(outcome(inputs)[..., 0], 0.8).log_prob(y)
    features = torch.cat([x, t[:, None], y[:, None]], -1)
    encoder = fitted_linear(features, moments(points, log_prior + log_likelihood) + real([0.4, 0.3]))
    loc, log_scale = encoder(features).T
    right = quadrature(log_prior, log_likelihood, dist.Normal(loc, log_scale.exp()).log_prob(points), log_step)
    return Program(
        title="Causal-effect VAE, auxiliary observations in the guide",
        model=model,
        guide=guide,
        args=(x, t, y),
        log_evidence=right.log_evidence,
        elbo=right.elbo,
        site_kl={"z": right.kl.mean().item()},
        refused={"beta": ("ObservedInGuideError", "losses that the guide adds are no part of the ELBO: hide them")},
    )


@torch.no_grad()
def scanvi_like() -> Program:
    """Counts of genes given a batch and a library size, with a label that the guide enumerates and a latent given the label;
    a sum over labels of quadratures."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.full((5, 4), 4.0, dtype=F64), generator=generator)
    batch, library = torch.tensor([0, 1, 0, 1, 1]), counts.sum(-1, keepdim=True)
    label_probs, label_locs = real([0.3, 0.3, 0.4]), real([[-1.0], [0.0], [1.5]])
    decoder = seeded(0, lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)))
    classifier = seeded(1, lambda: nn.Linear(4, 3))
    encoder = seeded(2, lambda: nn.Linear(7, 2))
    encoder.weight.mul_(0.3)
    encoder.weight[0, 4:].copy_(label_locs[:, 0])
    encoder.bias.copy_(real([0.4, 0.2]))

    def decode(z, batch, library):
        one_hot_batch = one_hot(batch, 2).double().expand(*z.shape[:-1], 2)
        return library * decoder(torch.cat([z, one_hot_batch], -1)).softmax(-1)

    def model(counts, batch, library):
        pyro.module("scanvi_like.decoder", decoder)
        with pyro.plate("cells", len(counts)):
            y = pyro.sample("y", dist.OneHotCategorical(label_probs))
            z = pyro.sample("z", dist.Normal(y @ label_locs, 1.0).to_event(1))
            logits = decode(z, batch, library).log() - math.log(3.0)
            pyro.sample("counts", dist.NegativeBinomial(3.0, logits=logits).to_event(1), obs=counts)

    @config_enumerate(expand=True)
    def guide(counts, batch, library):
        pyro.module("scanvi_like.classifier", classifier)
        pyro.module("scanvi_like.encoder", encoder)
        with pyro.plate("cells", len(counts)):
            features = (counts + 1).log()
            y = pyro.sample("y", dist.OneHotCategorical(logits=classifier(features)))
            inputs = torch.cat([features.expand(*y.shape[:-1], 4), y], -1)
            loc, log_scale = encoder(inputs).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    points, log_step = line()
    rate = decode(points[:, None].expand(-1, 5, 1), batch, library)
    log_likelihood = dist.NegativeBinomial(3.0, logits=rate.log() - math.log(3.0)).log_prob(counts).sum(-1)
    features = (counts + 1).log()
    log_q_y, log_p_y = classifier(features).log_softmax(-1), label_probs.log()
    loc, log_scale = encoder(
        torch.cat([features[:, None].expand(5, 3, 4), torch.eye(3, dtype=F64).expand(5, 3, 3)], -1)
    ).unbind(-1)
    log_q = dist.Normal(loc, log_scale.exp()).log_prob(points[..., None])  # (G, B, labels)
    log_prior = dist.Normal(label_locs[:, 0], 1.0).log_prob(points[..., None])
    right = quadrature(log_prior, log_likelihood[..., None], log_q, log_step)
    kl_y = (log_q_y.exp() * (log_q_y - log_p_y)).sum(-1)
    # Of z with the label summed out on both sides.
    log_q_z, log_p_z = (log_q + log_q_y).logsumexp(-1), (log_prior + log_p_y).logsumexp(-1)
    kl_z = mean_under(log_q_z, log_q_z - log_p_z, log_step)
    return Program(
        title="scANVI-like counts, label enumerated in the guide",
        model=model,
        guide=guide,
        args=(counts, batch, library),
        log_evidence=(right.log_evidence + log_p_y).logsumexp(-1),
        elbo=(log_q_y.exp() * right.elbo).sum(-1) - kl_y,
        site_kl={"y": kl_y.mean().item(), "z": kl_z.mean().item()},
    )


@torch.no_grad()
def air_like_switch() -> Program:
    """An object that is there or not, by a switch that is drawn, and what it looks like, masked where it is not there; a sum
    over the switch of a closed form and a quadrature."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    decoder = seeded(0, lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3)))
    detector = seeded(1, lambda: nn.Linear(3, 1))

    def model(x):
        pyro.module("air_like_switch.decoder", decoder)
        with pyro.plate("images", len(x)):
            switch = pyro.sample("switch", dist.Bernoulli(real(0.4)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1).mask(switch.bool()))
            image = decoder(z * switch[..., None]) * switch[..., None]
            pyro.sample("x", dist.Normal(image, 0.7).to_event(1), obs=x)

    def guide(x):
        pyro.module("air_like_switch.detector", detector)
        pyro.module("air_like_switch.encoder", encoder)
        with pyro.plate("images", len(x)):
            switch = pyro.sample("switch", dist.Bernoulli(logits=detector(x)[..., 0]))
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1).mask(switch.bool()))

    points, log_step = line()
    log_prior = dist.Normal(0.0, 1.0).log_prob(points)
    log_likelihood = dist.Normal(decoder(points)[:, None], 0.7).log_prob(x).sum(-1)
    encoder = fitted_linear(x, moments(points, log_prior + log_likelihood) + real([0.3, 0.2]))
    loc, log_scale = encoder(x).T
    on = quadrature(log_prior, log_likelihood, dist.Normal(loc, log_scale.exp()).log_prob(points), log_step)
    off = dist.Normal(0.0, 0.7).log_prob(x).sum(-1)
    prior, guess = dist.Bernoulli(real(0.4)), dist.Bernoulli(logits=detector(x)[..., 0])
    kl = kl_divergence(guess, prior)
    return Program(
        title="A discrete switch that masks a continuous latent",
        model=model,
        guide=guide,
        args=(x,),
        log_evidence=torch.logaddexp(math.log(0.4) + on.log_evidence, math.log(0.6) + off),
        elbo=guess.probs * on.elbo + (1 - guess.probs) * off - kl,
        site_kl={"switch": kl.mean().item(), "z": (guess.probs * on.kl).mean().item()},
        refused={
            "adaptive": ("LocalFitError", "the switch is drawn, and a fit needs latents with gradients or enumerated ones"),
            "surgery": ("MaskError", "not every datum has the latent, so there is no q(z) of all"),
        },
    )


@torch.no_grad()
def sparse_gamma_easyguide() -> Program:
    """Counts with a Gamma rate under a Gamma scale, both of one datum, with an EasyGuide that draws their logs jointly; a
    quadrature over the plane of the logarithms."""
    counts = real([[2, 4, 1], [1, 0, 2], [5, 4, 4], [1, 3, 0], [3, 2, 5]])

    def model(counts):
        with pyro.plate("data", len(counts)):
            top = pyro.sample("top", dist.Gamma(real(2.0), 2.0))
            bottom = pyro.sample("bottom", dist.Gamma(real(3.0), 1 / top))
            pyro.sample("counts", dist.Poisson(bottom[..., None].expand(*bottom.shape, 3)).to_event(1), obs=counts)

    class LogNormalGuide(EasyGuide):
        def guide(self, counts):
            with self.plate("data", len(counts)):
                loc = encoder(counts)
                self.group(match="top|bottom").sample("logs", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    scale_tril = real([[0.7, 0.0], [0.2, 0.5]])
    points, log_step = line(-12, 6, 601)
    log_top, log_bottom = points[:, None], points[None]  # (G, 1, 1) and (1, G, 1)
    prior = dist.Gamma(2.0, 2.0).log_prob(log_top.exp()) + log_top
    prior = prior + dist.Gamma(3.0, (-log_top).exp()).log_prob(log_bottom.exp()) + log_bottom
    likelihood = dist.Poisson(log_bottom.exp()[..., None]).log_prob(counts).sum(-1)
    plane = torch.stack(torch.broadcast_tensors(log_top, log_bottom), -1)
    posterior = (prior + likelihood).flatten(0, 1).softmax(0)
    encoder = fitted_linear(counts, posterior.T @ plane.flatten(0, 2), ridge=2.0)
    log_q = dist.MultivariateNormal(encoder(counts), scale_tril=scale_tril).log_prob(plane)
    log_prior, log_likelihood, log_q = (term.expand(601, 601, 5).flatten(0, 1) for term in (prior, likelihood, log_q))
    right = quadrature(log_prior, log_likelihood, log_q, 2 * log_step)
    return Program(
        title="Hierarchical Gamma model, EasyGuide over a group of sites",
        model=model,
        guide=LogNormalGuide(model),
        args=(counts,),
        log_evidence=right.log_evidence,
        elbo=right.elbo,
    )


@torch.no_grad()
def eight_schools() -> Program:
    """Schools with a common mean and spread, not centred, all in one datum; the effects and the mean are summed in closed
    form given the spread, over whose logarithm stands a quadrature."""
    y, sigma = real([1.4, 0.4, -0.3]), real([1.1, 0.8, 1.2])
    start = {"mu": real(0.4), "tau": real(0.4), "eta": real([0.5, 0.0, -0.3])}

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        tau = pyro.sample("tau", dist.HalfCauchy(real(1.0)))
        with pyro.plate("schools", len(sigma)):
            eta = pyro.sample("eta", dist.Normal(real(0.0), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start), init_scale=0.8)
    points, log_step = line(-40, 40, 4001)
    log_tau = points[:, 0]
    log_prior = dist.HalfCauchy(real(1.0)).log_prob(log_tau.exp()) + log_tau
    covariance = torch.ones(3, 3, dtype=F64) + torch.diag_embed(sigma**2 + log_tau.exp()[:, None] ** 2)
    log_likelihood = dist.MultivariateNormal(torch.zeros(3, dtype=F64), covariance).log_prob(y)

    q_log_tau, q_mu, q_eta = (dist.Normal(loc, 0.8) for loc in (start["tau"].log(), start["mu"], start["eta"]))
    kl = {"mu": kl_divergence(q_mu, dist.Normal(real(0.0), 1.0)).item()}
    kl["tau"] = mean_under(q_log_tau.log_prob(log_tau), q_log_tau.log_prob(log_tau) - log_prior, log_step).item()
    kl["eta"] = kl_divergence(q_eta, dist.Normal(real(0.0), 1.0)).sum().item()
    mean_tau, mean_tau_squared = start["tau"] * math.exp(0.8**2 / 2), start["tau"] ** 2 * math.exp(2 * 0.8**2)
    error = y - start["mu"]
    square = error**2 + 0.8**2 - 2 * error * mean_tau * start["eta"] + mean_tau_squared * (start["eta"] ** 2 + 0.8**2)
    reconstruction = -(square / sigma**2 + (2 * math.pi * sigma**2).log()).sum() / 2
    return Program(
        title="Eight schools (three of them), the whole call one datum",
        model=model,
        guide=initialised(guide, sigma, y),
        args=(sigma, y),
        log_evidence=(log_prior + log_likelihood + log_step).logsumexp(0, keepdim=True),
        elbo=(reconstruction - sum(kl.values())).reshape(1),
        site_kl=kl,
        options={"datum_plate": None},
        refused={"surgery": ("StructureError", "the aggregated posterior of one datum is its own posterior")},
    )


@torch.no_grad()
def bayesian_regression() -> Program:
    """Linear regression with Gaussian priors on weight and bias and known noise, all in one datum; closed form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, generator=generator, dtype=F64)
    y = x @ real([1.0, -0.5]) + 0.3 + 0.5 * torch.randn(8, generator=generator, dtype=F64)

    class BayesianRegression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(real(0.0), 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(real(0.0), 1.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)
            return mean

    model, scale = seeded(0, BayesianRegression), 0.25
    start = {"linear.weight": real([[1.1, -0.3]]), "linear.bias": real([0.4])}
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=start), init_scale=scale)
    inputs = torch.cat([x, torch.ones(8, 1, dtype=F64)], -1)
    covariance = inputs @ inputs.T + 0.25 * torch.eye(8, dtype=F64)
    loc = torch.cat([start["linear.weight"][0], start["linear.bias"]])
    q, prior = dist.Normal(loc, scale), dist.Normal(real(0.0), 1.0)
    square = (y - inputs @ loc) ** 2 + scale**2 * (inputs**2).sum(-1)
    reconstruction = -(square / 0.25 + math.log(2 * math.pi * 0.25)).sum() / 2
    kl = kl_divergence(q, prior)
    log_evidence, elbo = (
        dist.MultivariateNormal(torch.zeros(8, dtype=F64), covariance).log_prob(y),
        reconstruction - kl.sum(),
    )
    return Program(
        title="Bayesian regression (PyroModule, AutoMultivariateNormal), the whole call one datum",
        model=model,
        guide=initialised(guide, x, y),
        args=(x, y),
        log_evidence=log_evidence.reshape(1),
        elbo=elbo.reshape(1),
        gaps=torch.stack([log_evidence - elbo, real(0.0)]).reshape(1, 2),  # the family contains the posterior
        site_kl={"linear.weight+linear.bias": kl.sum().item()},  # drawn jointly
        options={"datum_plate": None},
        refused={"surgery": ("StructureError", "the aggregated posterior of one datum is its own posterior")},
        particles_in_a_loop=True,
    )


@torch.no_grad()
def sequence_world_model() -> Program:
    """Sequences of unequal length with a latent each, a recurrent decoder over actions and earlier observations, and a
    recurrent encoder; a quadrature over the latent."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 2, 5, 3, 5])
    actions, observations = torch.randn(2, 5, 5, 2, generator=generator, dtype=F64)
    first = seeded(0, lambda: nn.Linear(1, 6))
    cell = seeded(1, lambda: nn.GRUCell(4, 6))
    readout = seeded(2, lambda: nn.Linear(6, 2))
    lstm = seeded(3, lambda: nn.LSTM(4, 6, batch_first=True))
    first.weight.mul_(2), readout.weight.mul_(2)

    def model(actions, observations, lengths):  # (sequences, times, 2), (sequences, times, 2), (sequences,)
        for name, module in {"first": first, "cell": cell, "readout": readout}.items():
            pyro.module(f"sequence_world_model.{name}", module)
        with pyro.plate("sequences", len(actions)):
            z = pyro.sample("z", dist.Normal(actions.new_zeros(len(actions), 1), 1.0).to_event(1))
            hidden, previous = first(z).tanh(), torch.zeros_like(observations[:, 0])
            for t in range(int(lengths.max())):
                hidden = cell(torch.cat([actions[:, t], previous], -1), hidden)
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"obs_{t}", dist.Normal(readout(hidden), 0.8).to_event(1), obs=observations[:, t])
                previous = observations[:, t]

    def encode(actions, observations, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            torch.cat([actions, observations], -1), lengths.tolist(), batch_first=True, enforce_sorted=False
        )
        return lstm(packed)[1][0][0]

    def guide(actions, observations, lengths):
        pyro.module("sequence_world_model.lstm", lstm)
        pyro.module("sequence_world_model.head", head)
        with pyro.plate("sequences", len(actions)):
            loc, log_scale = head(encode(actions, observations, lengths)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    points, log_step = line()
    hidden = first(points).tanh().repeat_interleave(5, 0)  # (G * B, 6)
    log_likelihood, previous = 0.0, torch.zeros(5, 2, dtype=F64)
    for t in range(5):
        hidden = cell(torch.cat([actions[:, t], previous], -1).repeat(len(points), 1), hidden)
        density = dist.Normal(readout(hidden).reshape(-1, 5, 2), 0.8).log_prob(observations[:, t]).sum(-1)
        log_likelihood = log_likelihood + density * (t < lengths)
        previous = observations[:, t]
    log_prior = dist.Normal(0.0, 1.0).log_prob(points)
    codes = encode(actions, observations, lengths)
    head = fitted_linear(codes, moments(points, log_prior + log_likelihood) + real([0.4, 0.3]), ridge=0.1)
    loc, log_scale = head(codes).T
    right = quadrature(log_prior, log_likelihood, dist.Normal(loc, log_scale.exp()).log_prob(points), log_step)
    return Program(
        title="World model of sequences: GRU decoder, LSTM encoder, unequal lengths",
        model=model,
        guide=guide,
        args=(actions, observations, lengths),
        log_evidence=right.log_evidence,
        elbo=right.elbo,
        site_kl={"z": right.kl.mean().item()},
        particles_in_a_loop=True,
    )


@torch.no_grad()
def coin_svi_part_i() -> Program:
    """The coin of Pyro's first tutorial on SVI: ten flips in a loop, one fairness, all in one datum; closed form."""
    flips = real([1, 1, 1, 0, 1, 1, 0, 1, 0, 1])

    def model(flips):
        fairness = pyro.sample("latent_fairness", dist.Beta(real(10.0), real(10.0)))
        for i in range(len(flips)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(fairness), obs=flips[i])

    def guide(flips):
        alpha = pyro.param("coin_svi_part_i.alpha", real(14.0), constraint=constraints.positive)
        beta = pyro.param("coin_svi_part_i.beta", real(14.0), constraint=constraints.positive)
        pyro.sample("latent_fairness", dist.Beta(alpha, beta))

    def log_beta(a, b):
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    q, prior, heads, tails = (
        dist.Beta(real(14.0), real(14.0)),
        dist.Beta(real(10.0), real(10.0)),
        flips.sum(),
        (1 - flips).sum(),
    )
    kl = kl_divergence(q, prior)
    reconstruction = len(flips) * (torch.digamma(real(14.0)) - torch.digamma(real(28.0)))  # as q is symmetric
    log_evidence, elbo = log_beta(10 + heads, 10 + tails) - log_beta(real(10.0), real(10.0)), reconstruction - kl
    return Program(
        title="The coin of Pyro's SVI tutorial, the whole call one datum",
        model=model,
        guide=guide,
        args=(flips,),
        log_evidence=log_evidence.reshape(1),
        elbo=elbo.reshape(1),
        gaps=torch.stack([log_evidence - elbo, real(0.0)]).reshape(1, 2),  # the family contains the posterior
        site_kl={"latent_fairness": kl.item()},
        options={"datum_plate": None},
    )
