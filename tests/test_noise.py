"""Noise blocks: no two uses within one call share a random state, and seeding costs neither time nor memory."""

import inspect
import sys
from collections import defaultdict

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import quiet

import pyro_vae as pv
from pyro_vae.evidence import Estimator
from pyro_vae.kernel import Call
from pyro_vae.noise import Noise, noise_seed, seed_torch

X = torch.tensor([[0.3, 1.0], [-0.6, 0.2], [2.5, -1.0]])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z**2, 0.5).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.7).to_event(1))


CHAINS = {"num_steps": 20, "num_chains": 4, "progress": False}
LATENTS = {"z": torch.tensor([[0.5, 1.0], [0.1, 0.4], [1.6, 0.0]])}
SMALL = {"num_particles": 250, **CHAINS}
PUBLIC = [made for name in pv.__all__ if inspect.isclass(made := getattr(pv, name))]
ESTIMATORS = [made for made in PUBLIC if issubclass(made, Estimator) and made is not pv.BidirectionalMonteCarlo]


def call_of(estimator):
    options = {option: few for option, few in SMALL.items() if option in inspect.signature(estimator).parameters}
    further = {"f": lambda z: z["z"]} if "f" in inspect.signature(estimator).parameters else {}
    return lambda: estimator(model, guide, seed=0, **further, **options)(X)


CALLS = {made.__name__: call_of(made) for made in ESTIMATORS} | {
    "adaptive": lambda: pv.AdaptiveImportanceSampling(model, guide, num_particles=250, seed=0, check=True)(X),
    "annealed from the prior": lambda: pv.AnnealedImportanceSampling(model, guide, start="prior", seed=0, **CHAINS)(X),
    "bidirectional": lambda: pv.BidirectionalMonteCarlo(model, guide, latents=LATENTS, seed=0, **CHAINS)(X),
    "calibration": lambda: pv.GuideCalibration(model, guide, num_particles=250, seed=0)(X),
    "units": lambda: pv.ActiveUnits(model, guide, num_particles=3, seed=0)([X], args=lambda x: (x,), progress=False),
    "surgery": lambda: pv.ELBOSurgery(model, guide, seed=0)([X], args=lambda x: (x,), progress=False),
    "draws": lambda: pv.posterior(model, guide, X, num_particles=250, seed=0),
    "imputation": lambda: pv.impute(model, guide, X, num_particles=250, num_draws=3, seed=0),
    "samples": lambda: pv.SampleCheck(model, guide, seed=0)([X], train=[X], args=lambda x: (x,), progress=False),
}
# What is compared on the same noise, and fits of q* that start again.
SHARED_ON_PURPOSE = {
    ("mixture.py", "proposal_draws"): ("mixture.py", "proposal_log_weights"),  # weighed first, then made again for f
    ("mixture.py", "prior_draws"): ("mixture.py", "prior_blocks"),
    ("offsets.py", "check_terms"): "offsets",
    ("offsets.py", "ascend"): "steps",
    ("restart.py", "witness_terms"): "witnesses",
    ("optimum.py", "best_start"): "witnesses",
    ("optimum.py", "elbo_terms"): "measured",
    ("optimum.py", "controlled_terms"): "measured",
}


def user_of_noise(depth=2):
    """File and function that asked for the noise, through `Call.log_weights` where that draws for somebody."""
    frame = sys._getframe(depth)
    while frame.f_code.co_name == "log_weights" or "torch" in frame.f_code.co_filename.split("pyro_vae")[-1]:
        frame = frame.f_back
    return frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name


@pytest.mark.parametrize("name", CALLS)
def test_no_two_uses_share_a_random_state(name, monkeypatch):
    """Each (stream, block) of a call is set once, but for what compares two things on the same noise."""
    uses = defaultdict(list)
    set_noise = Call.set_noise

    def noted(self, stream, block):
        uses[id(self), stream, block].append(user_of_noise())
        kept.append(self)  # so that no other call gets its id
        set_noise(self, stream, block)

    kept = []
    monkeypatch.setattr(Call, "set_noise", noted)
    with quiet():
        CALLS[name]()
    assert uses
    for (_, stream, block), users in uses.items():
        alone = [user for user in users if user not in SHARED_ON_PURPOSE]
        purposes = {SHARED_ON_PURPOSE.get(user, user) for user in users}
        assert len(purposes) == 1 and len(alone) <= 1, (stream, block, users)
    seeds = {noise_seed(0, stream, block) for _, stream, block in uses}
    assert len(seeds) == len({(stream, block) for _, stream, block in uses})


def test_streams_have_one_number_each():
    assert sorted(Noise) == list(range(len(Noise)))


def test_seeding_is_that_of_torch_and_keeps_nothing():
    state = torch.get_rng_state()
    seed_torch(7)
    ours = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(ours, torch.rand(3))
    queued = len(torch.mtia._queued_calls) if hasattr(torch, "mtia") else 0
    for seed in range(50):
        seed_torch(seed)
    assert not hasattr(torch, "mtia") or len(torch.mtia._queued_calls) == queued
    torch.set_rng_state(state)
