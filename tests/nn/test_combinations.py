"""Guide family x prior x likelihood: whatever is put together trains, and every estimator runs on it.

All families with all priors, each with another likelihood, and every likelihood. Log p(x) is held against quadrature over
two latents, whose grids follow each posterior. Other files hold the densities of the parts.
"""

import itertools
import warnings

import pyro
import pytest
import torch
from head_specs import SPECS
from nn_helpers import simulated
from pyro.distributions import transforms as T
from pyro.infer import SVI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SIZE, DIM, NUM_DATA = 4, 2, 24
CONTEXT = 6
FAMILIES = {
    "diagonal": pv.nn.Normal,
    "low rank": lambda: pv.nn.LowRankNormal(1),
    "full": pv.nn.MultivariateNormal,
    "mixture": lambda: pv.nn.MixtureNormal(2),
    "flow": lambda: pv.nn.Flow(DIM, CONTEXT, [T.conditional_affine_autoregressive(DIM, CONTEXT, hidden_dims=[8])]),
}
PRIORS = {
    "vamp": lambda encoder, u: Seen(encoder, u),
    "standard": lambda encoder, u: pv.nn.StandardNormal(DIM),
    "mixture": lambda encoder, u: pv.nn.MixturePrior(DIM, 3),
    "flow": lambda encoder, u: pv.nn.FlowPrior(DIM, [T.affine_autoregressive(DIM, hidden_dims=[8])]),
}
PAIRS = itertools.product(PRIORS, FAMILIES)
NAMES = [(family, prior, likelihood) for (prior, family), likelihood in zip(itertools.cycle(PAIRS), SPECS, strict=False)]


def Seen(encoder, u):
    """Pseudo-inputs as the encoder sees data: behind its input layer, which classes and counts do not leave."""
    see, rest = encoder[0], encoder[1:]
    return pv.nn.VampPrior(rest, see(u[:3]).clone())


def combined(family, prior, likelihood):
    torch.manual_seed(0)
    head, posterior = SPECS[likelihood].make(), FAMILIES[family]()
    x = simulated(head, num_data=NUM_DATA, size=SIZE, spread=1.0)
    see = head.input_layer()
    width = see(torch.zeros(1, SIZE)).shape[-1]
    encoder = nn.Sequential(see, pv.nn.MLP(width, posterior.num_outputs(DIM), hidden=(8,)), posterior)
    decoder = nn.Sequential(pv.nn.MLP(DIM, head.num_outputs(SIZE), hidden=(8,)), head)
    return pv.VAE(encoder, decoder, PRIORS[prior](encoder, x)), x


@pytest.mark.parametrize(("family", "prior", "likelihood"), NAMES, ids=["-".join(names) for names in NAMES])
def test_it_trains_and_every_estimator_runs(family, prior, likelihood):
    vae, x = combined(family, prior, likelihood)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), pv.BetaTraceMeanField_ELBO(num_particles=4))
    losses = torch.tensor([svi.step(x) for _ in range(40)])
    assert losses.isfinite().all() and losses[-10:].mean() < losses[:10].mean()
    vae.eval()
    pair, loader = (vae.model, vae.guide), DataLoader(TensorDataset(x), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few particles, guides that have only begun to train
        evidence = pv.AdaptiveImportanceSampling(*pair, num_particles=400, seed=0)(x[:3])
        gaps = pv.InferenceGaps(*pair, num_particles=100, seed=0)(x[:3])
        surgery = pv.ELBOSurgery(*pair, seed=0)(loader, progress=False)
        wanted = pv.ExactEvidence(*pair)(x[:3]).log_evidence
        units = pv.ActiveUnits(*pair, seed=0)(loader, progress=False)
    for found in (evidence, gaps.evidence):
        assert ((found.log_evidence - wanted).abs() < 5 * found.std_error + 0.03)[found.reliable].all()
    assert evidence.reliable.any()
    for name in ("elbo", "optimal_elbo", "amortization", "approximation"):
        assert getattr(gaps, name).isfinite().all(), name
    rate = float(surgery.kl.value)
    assert float(surgery.mutual_information.value + surgery.marginal_kl.value) == pytest.approx(rate, abs=0.02 + 0.02 * rate)
    assert len(units.variance_of_means) == DIM and units.variance_of_means.isfinite().all()
