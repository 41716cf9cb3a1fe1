"""Every test starts from the same state and must leave torch and Pyro as it found them."""

import os

import matplotlib
import pyro
import pytest
import torch
from forks import ForkServer
from pyro.settings import get as get_settings

matplotlib.use("Agg")

SEED = 20240229
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for each core already
    torch.set_num_threads(1)


def global_state():
    return {
        "default dtype": torch.get_default_dtype(),
        "argument checks of torch distributions": torch.distributions.Distribution._validate_args,
        "number of Pyro settings": len(get_settings()),
        "values of the Pyro settings": get_settings(),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def fresh_start():
    """An empty parameter store, validation on, a fixed seed (`UNLOCK_SEED=1` draws another one each time)."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    if os.environ.get("UNLOCK_SEED") == "1":
        pyro.set_rng_seed(torch.seed() % 2**32)
    else:
        pyro.set_rng_seed(SEED)
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def nothing_left_behind(fresh_start):
    """Fail a test that leaves a changed global state, and put the state back for the next one."""
    before = global_state()
    yield
    after = global_state()
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    pyro.enable_validation(True)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test changed global state, (before, after): {changed}"


@pytest.fixture(scope="session")
def forks():
    with ForkServer() as server:
        yield server
