"""A VAE of counts with size factors: trained, evaluated, and better than a Poisson one where counts vary more."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import quiet
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, OptionError, PrecisionWarning
from pyro_vae.models import Concatenated, ConditionalVAE, WithSizeFactor

GENES = 20


def simulated(num_cells=400, theta=1.0, seed=0):
    """Counts (B, 20) of negative binomial noise, of cells whose sizes span a factor of ten, and the sizes (B, 1)."""
    generator = torch.Generator().manual_seed(seed)
    z, weight = torch.randn(num_cells, 2, generator=generator), torch.randn(2, GENES, generator=generator)
    size = (1.2 * torch.rand(num_cells, 1, generator=generator) * 2 - 1.2).exp()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pv.nn.NegativeBinomial(theta)(1.5 + 0.5 * z @ weight, size).sample(), size


def count_vae(likelihood, num_conditions=0):
    hidden, posterior = 16, pv.nn.Normal()
    encoder = nn.Sequential(pv.nn.MLP(GENES + 1 + num_conditions, posterior.num_outputs(2), hidden=(hidden,)), posterior)
    decoder = pv.nn.MLP(2 + num_conditions, likelihood.num_outputs(GENES), hidden=(hidden,))
    return ConditionalVAE(
        Concatenated(encoder, first=likelihood.input_layer()),
        WithSizeFactor(decoder, likelihood),
        pv.nn.StandardNormal(2),
    )


def train(vae, x, y, num_steps, seed=0):
    torch.manual_seed(seed)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = torch.tensor([svi.step(x, y) for _ in range(num_steps)])
    vae.eval()
    return losses / len(x)


@pytest.mark.parametrize("name", ["Poisson", "NegativeBinomial", "ZeroInflatedPoisson", "ZeroInflatedNegativeBinomial"])
def test_it_trains_in_20_steps_and_every_estimator_runs_on_it(name):
    """The loss of the last five steps is below that of the first five by more than 4.5 of their errors."""
    x, size = simulated()
    torch.manual_seed(0)
    vae = count_vae(getattr(pv.nn, name)())
    losses = train(vae, x, size, 20)
    first, last = losses[:5], losses[-5:]
    assert float(first.mean() - last.mean()) > 4.5 * float(last.std()) / 5**0.5
    with quiet():
        evidence = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=200, seed=0)(x[:4], size[:4])
        gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=50, seed=0)(x[:4], size[:4])
    for found in (evidence.log_evidence, gaps.inference, gaps.amortization):
        assert bool(found.isfinite().all())
    assert evidence.support_checked
    within = (gaps.log_evidence - evidence.log_evidence).abs() < 4.5 * (
        gaps.std_errors["inference"] + evidence.std_error
    ) + 0.1
    assert bool(within.all())


def test_negative_binomial_beats_poisson_where_counts_vary_more():
    """By more than 3 standard errors of the mean difference over held-out cells."""
    x, size = simulated()
    results = {}
    for likelihood in (pv.nn.NegativeBinomial("learned", theta_shape=(GENES,)), pv.nn.Poisson()):
        torch.manual_seed(0)
        vae = count_vae(likelihood)
        train(vae, x[:300], size[:300], 150)
        estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=100, seed=0)
        with quiet():
            results[type(likelihood).__name__] = estimator(x[300:], size[300:]).log_evidence
    difference = results["NegativeBinomial"] - results["Poisson"]
    assert float(difference.mean()) > 3 * float(difference.std()) / len(difference) ** 0.5
    assert float(difference.mean()) > 1


def test_the_size_factor_counts_and_is_no_input_of_the_decoder():
    """The mean of the decoder is proportional to it; a network that gets no conditions sees z alone."""
    likelihood = pv.nn.Poisson()
    decoder = WithSizeFactor(nn.Linear(2, GENES), likelihood)
    z = torch.randn(3, 5, 2)
    size = torch.tensor([[1.0], [2.0], [3.0], [4.0], [50.0]])
    torch.testing.assert_close(decoder(z, size).mean, size * decoder(z, torch.ones(5, 1)).mean)
    torch.testing.assert_close(decoder(z, torch.ones(5, 1)).mean, likelihood(decoder.network(z)).mean)


def test_conditions_follow_the_size_factor():
    x, size = simulated(60)
    batch = nn.functional.one_hot(torch.arange(60) % 3, 3)
    y = torch.cat([size, batch], -1)
    vae = count_vae(pv.nn.NegativeBinomial(), num_conditions=3)
    fn = vae.decode(torch.zeros(4, 60, 2), y)
    assert fn.batch_shape == (4, 60)
    joined = torch.cat([torch.zeros(60, 2), batch.float()], -1)
    expected = vae.decoder.head(vae.decoder.network(joined), size)
    torch.testing.assert_close(fn.mean[1], expected.mean)
    assert bool(train(vae, x, y, 5).isfinite().all())
    assert vae.generate(y).shape == vae.reconstruct(x, y).shape == (60, GENES)


def test_images_have_size_factors_too():
    likelihood = pv.nn.Poisson(event_dim=3)
    decoder = WithSizeFactor(pv.nn.DeconvNet(2, (1, 4, 4), channels=(3,)), likelihood)
    z, size = torch.randn(3, 5, 2), torch.tensor([[1.0], [2.0], [3.0], [4.0], [50.0]])
    fn = decoder(z, size)
    assert (fn.batch_shape, fn.event_shape) == ((3, 5), (1, 4, 4))
    torch.testing.assert_close(fn.mean, size.reshape(5, 1, 1, 1) * decoder(z, torch.ones(5, 1)).mean)


@pytest.mark.parametrize("head", [pv.nn.Normal(), nn.Linear(2, 2), pv.nn.Poisson], ids=["Normal", "Linear", "a class"])
def test_a_head_without_size_factors_is_refused(head):
    with pytest.raises(OptionError, match="head must be a head of counts, whose forward takes a size_factor, got"):
        WithSizeFactor(nn.Linear(2, GENES), head)


def test_rows_without_a_size_factor_are_refused():
    decoder = WithSizeFactor(nn.Linear(2, GENES), pv.nn.Poisson())
    z = torch.zeros(5, 2)
    for y in (torch.ones(5), torch.ones(5, 0), torch.ones(())):
        with pytest.raises(ArgumentError, match=r"first column is its size factor, \(B, 1 \+ C\).*unsqueeze"):
            decoder(z, y)
    with pytest.raises(ArgumentError, match=r"positive and finite, but 1 of 5 are not, in rows \[3\]"):
        decoder(z, torch.tensor([[1.0], [1], [1], [0], [1]]))
    with pytest.raises(ArgumentError, match=r"one size factor for each datum, shape \(5, 1\)"):
        decoder(z, torch.ones(4, 1))


@pytest.mark.slow
def test_it_trains_compiled():
    """The same loss on the same noise, to rounding, and 10 steps."""
    x, size = simulated(100)
    vae = count_vae(pv.nn.ZeroInflatedNegativeBinomial("learned", theta_shape=(GENES,)))
    losses = []
    for compiled in (False, True):
        objective = pv.BetaTraceMeanField_ELBO(compile=compiled)
        objective.loss_and_grads(vae.model, vae.guide, x, size)
        torch.manual_seed(0)
        losses.append(objective.loss_and_grads(vae.model, vae.guide, x, size))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), objective)  # the compiled one
    found = torch.tensor([svi.step(x, size) for _ in range(10)])
    assert bool(found.isfinite().all())
    assert found[-1] < found[0]


def cells(theta):
    """A pair of one latent and 200 genes whose dispersion is known, and four cells."""
    weight, prior = 0.3 * torch.randn(1, 200, generator=torch.Generator().manual_seed(0)), pv.nn.StandardNormal(1)
    torch.manual_seed(0)
    x = pv.nn.NegativeBinomial(theta)(2 + torch.randn(4, 1) @ weight).sample()

    def pair_of(counts):
        def model(x):
            with pyro.plate("cells", len(x)):
                z = pyro.sample("z", prior())
                pyro.sample("x", counts(2 + z @ weight.to(z.dtype)), obs=x)

        def guide(x):
            with pyro.plate("cells", len(x)):
                pyro.sample("z", prior())

        return model, guide

    z = torch.linspace(-6, 6, 4001, dtype=torch.float64).reshape(-1, 1, 1)
    log_likelihood = pv.nn.NegativeBinomial(theta)(2 + z @ weight.double()).log_prob(x.double())
    log_joint = log_likelihood + dist.Normal(0.0, 1.0).log_prob(z.squeeze(-1))
    return x, pair_of, log_joint.logsumexp(0) + math.log(12 / 4000)


def test_large_dispersions_are_no_doubt_in_float32():
    """Log p(x) of the head is that of quadrature, within 4.5 errors; that of Pyro is nats away and in doubt."""
    x, pair_of, truth = cells(1e6)
    theirs = pair_of(lambda raw: dist.GammaPoisson(raw.new_tensor(1e6), 1e6 / raw.exp()).to_event(1))
    records = {}
    for name, pair in (("ours", pair_of(pv.nn.NegativeBinomial(1e6))), ("theirs", theirs)):
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            records[name] = pv.AdaptiveImportanceSampling(*pair, num_particles=500, seed=0)(x)
    assert not bool(records["ours"].doubts["precision"].any())
    assert bool(records["theirs"].doubts["precision"].all())
    assert bool(((records["ours"].log_evidence - truth).abs() < 4.5 * records["ours"].std_error).all())
    assert float(records["ours"].std_error.max()) < 0.05, "blunt"
    assert float((records["theirs"].log_evidence - truth).abs().max()) > 1


def test_over_a_loader_and_on_simulated_data():
    x, size = simulated(40)
    vae = count_vae(pv.nn.NegativeBinomial("learned"))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, size), batch_size=16)
    estimator = functools.partial(pv.ImportanceSampling, num_particles=20)(vae.model, vae.guide)
    with quiet():
        whole = pv.evaluate(estimator, loader, args=lambda batch: tuple(batch), seed=0, progress=False)
    assert whole.log_evidence.shape == (40,)
    with pyro.validation_enabled(True):
        assert vae.generate(size).shape == x.shape
