"""Whatever ends an evaluation or a newer estimator, at whatever stage: nothing of the user's has changed."""

import random
import signal
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from checkpoint_helpers import Guide, Model, batches_of, data, estimator
from pair_helpers import quiet
from pyro.infer.autoguide import AutoNormal
from torch.nn.modules import module as torch_modules

import pyro_vae as pv
from pyro_vae import noise
from pyro_vae.errors import SkippedBatchWarning
from pyro_vae.evaluation import checkpoint as module


def snapshot(modules):
    """Everything that a call could leave behind, tensors as bytes."""
    store = pyro.get_param_store()
    return {
        "tensors": [(n, t.numpy().tobytes()) for m in modules for n, t in m.state_dict().items()],
        "gradients": [p.grad is None for m in modules for p in m.parameters()],
        "requires_grad": [p.requires_grad for m in modules for p in m.parameters()],
        "modes": [part.training for m in modules for part in m.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for m in modules for part in m.modules()],
        "global hooks": (len(torch_modules._global_forward_pre_hooks), len(torch_modules._global_forward_hooks)),
        "store": {n: (id(p), p.detach().numpy().tobytes()) for n, p in store._params.items()},
        "store's names": dict(store._param_to_name),
        "random state": (torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()),
        "validation": (torch.distributions.Distribution._validate_args, pyro.infer.util.is_validation_enabled()),
        "stack": len(pyro.poutine.runtime._PYRO_STACK),
        "gradient mode": torch.is_grad_enabled(),
        # A library that is imported late adds filters for warnings of its own.
        "filters": [kept for kept in warnings.filters if kept[2].__module__.startswith("pyro_vae") or kept[2] is Warning],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "batch": noise.batch_number,
    }


class Stop(BaseException):
    """As Ctrl-C: no Exception."""


class Fault(Exception):
    """Of no kind that the kernel takes for an answer about an execution."""


class StoppingModel(Model):
    """Raises in its n-th run."""

    def __init__(self, runs, error=Stop):
        super().__init__()
        self.left, self.error = [runs], error

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise self.error("in the model")
        super().forward(x)


@pytest.fixture
def quietly():
    """Filters of the tests are put back before a snapshot compares those that the call left."""
    with quiet():
        yield


def pair_in_training(model):
    """Modes that differ, a parameter in the store."""
    guide = Guide()
    guide.encoder.eval()
    pyro.module("decoder", model.decoder)
    pyro.param("other", torch.ones(2))
    return model, guide


def first_latent(latents):
    return latents["z"][..., 0]


@pytest.mark.parametrize("stage", ["done", "model", "loader", "args", "write", "skip", "early stop", "refused"])
def test_evaluate_with_all_options(tmp_path, monkeypatch, quietly, stage):
    model, guide = pair_in_training(StoppingModel(12 if stage == "model" else -1))
    x = data(120)
    batches = batches_of(x, 20)
    monkeypatch.setattr(module, "PAUSE", 0.0)
    options = {"seed": 0, "checkpoint": tmp_path, "on_error": "skip", "tolerance": 1e9 if stage == "early stop" else 1e-9}

    def loader():
        for number, batch in enumerate(batches):
            if stage == "loader" and number == 2:
                raise Stop
            yield batch * torch.nan if stage == "skip" and number == 2 else batch

    def args(batch):
        if stage == "args" and batch is batches[2]:
            raise Stop
        return (batch,)

    if stage == "write":
        saved, calls = module.save_value, []

        def save(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise Stop
            return saved(*arguments)

        monkeypatch.setattr(module, "save_value", save)
    found = pv.ImportanceSampling(model, guide, num_particles=100)
    if stage == "refused":
        pv.evaluate(estimator(), [x], checkpoint=tmp_path, progress=False)
    before = snapshot([model, guide])
    if stage in ("done", "early stop"):
        pv.evaluate(found, loader(), args=args, progress=True, **options)
    elif stage == "skip":
        with pytest.warns(SkippedBatchWarning):
            pv.evaluate(found, loader(), args=args, progress=False, **options)
    else:
        with pytest.raises((Stop, pv.errors.CheckpointError)):
            pv.evaluate(found, loader(), args=args, progress=False, **options)
    after = snapshot([model, guide])
    assert [name for name in before if before[name] != after[name]] == []


CHEAP = partial(pv.ImportanceSampling, num_particles=10)
CALLS = {
    "AutoEvidence": lambda m, g, x: pv.AutoEvidence(m, g, tolerance=1.0, max_cost=3000, seed=0)(x),
    "PosteriorExpectation": lambda m, g, x: pv.PosteriorExpectation(m, g, f=first_latent, num_particles=100, seed=0)(x),
    "GuideCalibration": lambda m, g, x: pv.GuideCalibration(m, g, num_particles=20, seed=0)(x),
    "EarlyStopping": lambda m, g, x: pv.EarlyStopping(m, g, [x], seed=0)(0),
    "ActiveUnits": lambda m, g, x: pv.ActiveUnits(m, g, seed=0)([x, x], progress=False),
    "ELBOSurgery": lambda m, g, x: pv.ELBOSurgery(m, g, seed=0)([x, x], progress=False),
    "SampleCheck": lambda m, g, x: pv.SampleCheck(m, g, seed=0)([x], train=[x], progress=False),
    "compare": lambda m, g, x: pv.compare(
        {n: pv.evaluate(CHEAP(m, g), [x], seed=int(n == "a"), progress=False) for n in "ab"}
    ),
}


@pytest.mark.parametrize("runs", [-1, 1, 8, 25])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_newer_estimators(quietly, name, runs):
    """Ended by an exception in the n-th run of the model, unless that many are not needed."""
    model, guide = pair_in_training(StoppingModel(runs))
    before = snapshot([model, guide])
    try:
        CALLS[name](model, guide, data(6))
    except Stop:
        assert runs > 0
    after = snapshot([model, guide])
    assert [part for part in before if before[part] != after[part]] == []
    assert runs > 0 or model.left[0] < -1


@pytest.mark.parametrize("runs", [1, 20, 40])
def test_refit_guide_after_an_error(quietly, runs):
    """The guide is put back too."""
    model, guide = pair_in_training(StoppingModel(runs, Fault))
    before = snapshot([model, guide])
    with pytest.raises(Fault, match="in the model"):
        options = {"num_epochs": 50, "num_data": 5, "num_particles": 10, "evidence": CHEAP, "progress": False, "seed": 0}
        pv.refit_guide(model, guide, [data(6)], pyro.optim.Adam({"lr": 0.01}), test=[data(5)], **options)
    after = snapshot([model, guide])
    assert [part for part in before if before[part] != after[part] and part != "gradients"] == []


@pytest.mark.parametrize("runs", [-1, 1, 6])
def test_leave_one_out(quietly, runs):
    left = [runs]

    def model(x):
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])

    guide = AutoNormal(model)
    before_left, left[0] = left[0], -1
    guide(data(6))
    left[0] = before_left
    before = snapshot([guide])
    try:
        pv.LeaveOneOut(model, guide, num_draws=100, seed=0)(data(6))
    except Stop:
        assert runs > 0
    after = snapshot([guide])
    assert [part for part in before if before[part] != after[part]] == []
