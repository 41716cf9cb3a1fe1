"""Every test starts from the same state and must leave torch and Pyro as it found them."""

import gc
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

# For each kind of device that is not there, `torch.manual_seed` notes the seed with a formatted stack, for a device that may
# come later: 0.5 ms a call, at tens of thousands of calls.
for kind in (torch.cuda, torch.xpu, torch.mtia):
    if not kind.is_available():
        setattr(kind, "manual_seed_all", lambda seed: None)  # noqa: B010


def pytest_collection_finish():
    """What is imported by now stays to the end: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


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
