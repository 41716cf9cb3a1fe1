"""Claims about pythae that docs/coming_from.md makes, measured.

    pip install -c constraints.txt pythae
    python tests/benchmarks/peers/check_pythae.py

The model is linear, z ~ N(0, I) of 2 dimensions, x given z ~ N(W z, I) of 10, with orthogonal columns of W: log p(x) is that
of a normal distribution and the posterior is a diagonal Gaussian, which the encoder is given, or is given shifted.
"""

import contextlib
import dataclasses
import inspect
import io
import logging
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pythae.models
import pythae.samplers
import torch
from claims import run
from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models import IWAE, VAE, AutoModel, BetaTCVAE, BetaTCVAEConfig, BetaVAE, BetaVAEConfig, IWAEConfig, VAEConfig
from pythae.models.base import BaseAE
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.pipelines import TrainingPipeline
from pythae.samplers import BaseSampler
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import nn

import pyro_vae as pv

X, D = 10, 2
W = torch.linalg.qr(torch.randn(X, D, generator=torch.Generator().manual_seed(0)))[0] * 2
SHAPES = {"input_dim": (X,), "latent_dim": D}


class Encoder(BaseEncoder):
    """The posterior, with means `shift` standard deviations too high."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift, self.rows = nn.Parameter(torch.tensor(shift)), 0

    def forward(self, x):
        self.rows += len(x)
        variance = torch.tensor(1 / (1 + 4.0))  # of each latent given x: the columns of W have length 2
        mean = variance * x @ W + self.shift * variance.sqrt()
        return ModelOutput(embedding=mean, log_covariance=variance.log().expand_as(mean))


class Decoder(BaseDecoder):
    def forward(self, z):
        return ModelOutput(reconstruction=z @ W.T)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("latent", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(z @ W.T, 1.0).to_event(1), obs=x)


def guide_of(encoder):
    def guide(x):
        with pyro.plate("data", len(x)):
            out = encoder(x)
            pyro.sample("latent", dist.Normal(out.embedding, (0.5 * out.log_covariance).exp()).to_event(1))

    return guide


def data(num_data):
    pyro.set_rng_seed(0)
    return torch.randn(num_data, D) @ W.T + torch.randn(num_data, X)


def log_evidence(x):
    return dist.MultivariateNormal(torch.zeros(X), W @ W.T + torch.eye(X)).log_prob(x)


def is_log_evidence():
    """VAE.get_nll returns the mean of log p(x) over the data, not of -log p(x), and that mean is all it returns."""
    x = data(20)
    value = VAE(VAEConfig(**SHAPES), Encoder(), Decoder()).get_nll(x, n_samples=100, batch_size=100)
    truth = log_evidence(x).mean().item()
    line = f"encoder = posterior: {type(value).__name__} {value:.4f}, mean log p(x) {truth:.4f}"
    return np.ndim(value) == 0 and abs(value - truth) < 1e-4, line


def encoder_as_it_is():
    """VAE.get_nll draws from the encoder as it is, so that the error of the encoder is in the number."""
    x, encoder = data(50), Encoder(shift=3.0)
    vae = VAE(VAEConfig(**SHAPES), encoder, Decoder())
    theirs = torch.tensor([vae.get_nll(x, n_samples=1000, batch_size=1000) for _ in range(20)])
    as_it_is = pv.ImportanceSampling(model, guide_of(encoder), num_particles=1000, seed=0)(x)
    fitted = pv.AdaptiveImportanceSampling(model, guide_of(encoder), num_particles=1000, seed=0)(x)
    truth = log_evidence(x).mean()
    line = f"encoder 3 standard deviations off, K = 1,000: pythae {theirs.mean():.3f} +- {theirs.std() / 20**0.5:.3f}, "
    high = int(as_it_is.doubts["tails"].sum())
    line += f"ImportanceSampling {as_it_is.mean().value:.3f} (Pareto k high for {high} of 50), "
    line += f"AdaptiveImportanceSampling {fitted.mean().value:.3f}, log p(x) {truth:.3f}"
    return bool(truth - theirs.mean() > 0.5) and abs(fitted.mean().value - truth) < 0.01, line


def number_of_samples():
    """VAE.get_nll draws whole batches: n_samples is raised to batch_size, and what is left over a multiple is dropped."""
    encoder, x = Encoder(), data(1)
    vae, found = VAE(VAEConfig(**SHAPES), encoder, Decoder()), []
    for asked in (1, 150, 200):
        encoder.rows = 0
        vae.get_nll(x, n_samples=asked, batch_size=100)
        found.append(encoder.rows)
    return found == [100, 100, 200], f"asked for 1, 150, 200 with batch_size=100: drew {found}"


class NormalisedEncoder(BaseEncoder):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(X, 2 * D), nn.BatchNorm1d(2 * D))

    def forward(self, x):
        mean, log_var = self.net(x).chunk(2, -1)
        return ModelOutput(embedding=mean, log_covariance=log_var)


def mode():
    """VAE.get_nll runs the networks in the mode they are in: batch norm in train mode moves its statistics."""
    encoder = NormalisedEncoder()
    vae, before = VAE(VAEConfig(**SHAPES), encoder, Decoder()), encoder.net[1].running_mean.clone()
    vae.train().get_nll(data(5), n_samples=100)
    moved = (encoder.net[1].running_mean - before).abs().max().item()
    return moved > 0, f"largest change of a running mean by the evaluation: {moved:.3f}"


def unit_variance():
    """The "mse" loss is minus the ELBO of a normal likelihood with scale 1, without its constant (D / 2) log 2 pi."""
    x = data(2000)
    vae = VAE(VAEConfig(**SHAPES), Encoder(), Decoder())
    loss = vae(DatasetOutput(data=x)).loss.item()
    truth, constant = -log_evidence(x).mean().item(), X / 2 * math.log(2 * math.pi)
    line = f"encoder = posterior: loss {loss:.2f}, plus {constant:.2f} is {loss + constant:.2f}; -log p(x) {truth:.2f}"
    return abs(loss + constant - truth) < 0.15, line


def importance_weighted_value():
    """The loss of IWAE has the gradient of the importance-weighted bound, but as a value it is no bound on -log p(x)."""
    x, encoder = data(2000), Encoder(shift=2.0)
    iwae = IWAE(IWAEConfig(**SHAPES, number_samples=50), encoder, Decoder())
    pyro.set_rng_seed(1)
    loss = iwae(DatasetOutput(data=x)).loss
    theirs = -loss.item() - X / 2 * math.log(2 * math.pi)
    by_theirs = torch.autograd.grad(loss, encoder.shift)[0]
    pyro.set_rng_seed(1)
    out = encoder(x)  # the same draws, K in dimension 1
    q = dist.Normal(out.embedding[:, None].expand(-1, 50, -1), (0.5 * out.log_covariance).exp()[:, None]).to_event(1)
    z = q.rsample()
    log_weight = dist.Normal(z @ W.T, 1.0).to_event(1).log_prob(x[:, None]) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    bound = pv.ops.log_mean_exp(log_weight - q.log_prob(z), 1).mean()
    by_bound = -torch.autograd.grad(bound, encoder.shift)[0]
    truth = log_evidence(x).mean().item()
    line = f"encoder 2 standard deviations off, K = 50: minus the loss {theirs:.2f}, bound from the same draws {bound:.2f}, "
    line += f"log p(x) {truth:.2f}; gradients {by_theirs:.4f} and {by_bound:.4f}"
    return theirs > truth + 0.1 > bound and torch.allclose(by_theirs, by_bound, rtol=1e-3), line


def beta_is_a_number():
    """BetaVAE has a fixed beta and no schedule; a callback that sets model.beta anneals it, epoch by epoch."""
    fields = sorted({f.name for f in dataclasses.fields(BetaVAEConfig)} - {f.name for f in dataclasses.fields(VAEConfig)})
    vae, seen = BetaVAE(BetaVAEConfig(**SHAPES)), []

    class Anneal(TrainingCallback):
        def on_epoch_begin(self, training_config, **kwargs):
            kwargs["model"].beta = min(kwargs["epoch"] / 4, 1.0)
            seen.append(vae.beta)

    train(vae, num_epochs=5, callbacks=[Anneal()])
    return fields == ["beta"] and seen == [0.25, 0.5, 0.75, 1.0, 1.0], f"own fields {fields}; beta by epoch {seen}"


def train(vae, num_epochs, x=None, callbacks=None):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = BaseTrainerConfig(output_dir=folder, num_epochs=num_epochs, no_cuda=True)
        TrainingPipeline(vae, config)(data(200) if x is None else x, callbacks=callbacks)


def batch_means():
    """The loss of an epoch is the mean over batches: the data of a smaller last batch count for more."""
    x = torch.cat([torch.zeros(4, X), torch.full((1, X), 3.0)])
    encoder = Encoder()
    vae = VAE(VAEConfig(**SHAPES), encoder, Decoder())
    vae._sample_gauss = lambda mu, std: (mu, torch.zeros_like(mu))  # no noise: the same loss for a datum, wherever it is
    dataset = BaseDataset(x, torch.ones(5))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = BaseTrainerConfig(output_dir=folder, per_device_eval_batch_size=4, no_cuda=True)
        trainer = BaseTrainer(vae, dataset, dataset, config)
        trainer.prepare_training()
        reported = trainer.eval_step(1)
    of_data = vae(DatasetOutput(data=x)).loss.item()
    means = [vae(DatasetOutput(data=part)).loss.item() for part in (x[:4], x[4:])]
    line = f"batches of 4 and 1: reported {reported:.2f}, mean over data {of_data:.2f}"
    return abs(reported - sum(means) / 2) < 1e-3 and abs(reported - of_data) > 1, line


def trained_there():
    """A VAE that pythae trained, with its default networks, is a pair; ImportanceSampling then agrees with get_nll."""
    x = (data(1000) > 0).float()
    vae = VAE(VAEConfig(**SHAPES, reconstruction_loss="bce"))
    train(vae, num_epochs=20, x=x)
    vae.eval()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(vae.decoder(z).reconstruction).to_event(1), obs=x)

    x = x[:100]
    with torch.no_grad():
        theirs = torch.tensor([vae.get_nll(x, n_samples=1000, batch_size=1000) for _ in range(5)])
    ours = pv.ImportanceSampling(model, guide_of(vae.encoder), num_particles=1000, seed=0)(x).mean()
    gaps = pv.InferenceGaps(model, guide_of(vae.encoder), seed=0)(x).summary()
    line = f"get_nll {theirs.mean():.4f}, ImportanceSampling {ours.value:.4f} +- {ours.std_error:.4f}; gaps: amortization "
    line += f"{gaps['amortization'].value:.3f}, approximation {gaps['approximation'].value:.3f}"
    return abs(theirs.mean() - ours.value) < 5 * 1.1 * ours.std_error, line


def total_correlation():
    """The mutual information in BetaTCVAE's loss (stratified, the default) ends at log B, whatever the number of data."""
    num_data, batch = 50_000, 64
    config = BetaTCVAEConfig(**SHAPES, alpha=1.0, beta=0.0, gamma=0.0)
    apart = 100.0 * torch.randn(batch, D, generator=torch.Generator().manual_seed(0))
    log_var = torch.zeros(batch, D)

    class Apart(BaseEncoder):  # posteriors that do not overlap: I(x; z) = log N
        def forward(self, x):
            return ModelOutput(embedding=apart, log_covariance=log_var)

    vae = BetaTCVAE(config, Apart(), Decoder())
    theirs = vae(DatasetOutput(data=torch.zeros(batch, X)), dataset_size=num_data).reg_loss.item()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(apart, 1.0).to_event(1))

    objective = pv.TotalCorrelationELBO(dataset_size=num_data)
    objective.loss(model, guide, torch.zeros(batch, X))
    ours = objective.decomposition.mutual_information
    line = f"N = 50,000 posteriors that do not overlap, B = 64: {theirs:.2f}, ours {float(ours):.2f}, "
    return theirs < math.log(batch) + 0.2, line + f"log N {math.log(num_data):.2f}, log B {math.log(batch):.2f}"


def saved():
    """A model with networks of one's own is saved as a state_dict and pickles of the networks, and loaded with AutoModel."""
    vae = VAE(VAEConfig(**SHAPES), NormalisedEncoder(), Decoder())
    with tempfile.TemporaryDirectory() as folder:
        vae.save(folder)
        files = sorted(path.name for path in Path(folder).iterdir())
        loaded = AutoModel.load_from_folder(folder)
    same = all(torch.equal(a, b) for a, b in zip(vae.parameters(), loaded.parameters(), strict=True))
    return same and "encoder.pkl" in files and "model.pt" in files, ", ".join(files)


def grey_pixels():
    """The "bce" loss and get_nll score data between 0 and 1; the scores are no density."""

    class Constant(BaseDecoder):
        def forward(self, z):
            return ModelOutput(reconstruction=torch.full((len(z), 1), 0.9))

    class Prior(BaseEncoder):
        def forward(self, x):
            return ModelOutput(embedding=torch.zeros(len(x), 1), log_covariance=torch.zeros(len(x), 1))

    vae = VAE(VAEConfig(input_dim=(1,), latent_dim=1, reconstruction_loss="bce"), Prior(), Constant())
    grid = (torch.arange(1000) + 0.5) / 1000
    mass = np.mean([math.exp(vae.get_nll(x.reshape(1, 1), n_samples=1, batch_size=1)) for x in grid])
    return abs(mass - 1) > 0.1, f"integral over x in (0, 1) at probability 0.9: {mass:.3f}"


def zoo():
    """There are 25 models and 10 samplers of latents."""

    def kinds(module, base):
        return {kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, base)} - {base}

    models, samplers = kinds(pythae.models, BaseAE), kinds(pythae.samplers, BaseSampler)
    return len(models) == 25 and len(samplers) == 10, f"{len(models)} models, {len(samplers)} samplers"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)  # Pareto k stands in the lines
    checks = [is_log_evidence, encoder_as_it_is, number_of_samples, mode, unit_variance, importance_weighted_value]
    checks += [beta_is_a_number, batch_means, total_correlation, saved, trained_there, grey_pixels, zoo]
    run("pythae", "0.1.2", checks)
