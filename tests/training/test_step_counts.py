"""What a training step costs beside the networks, by counts, which no busy machine changes."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv

TORCH = str(Path(torch.__file__).parent)
X = torch.arange(6 * 8).reshape(6, 8).remainder(2).float()


def small_vae():
    encoder, decoder = nn.Sequential(nn.Linear(8, 4), pv.nn.Normal()), nn.Sequential(nn.Linear(2, 8), pv.nn.Bernoulli())
    return pv.VAE(encoder, decoder, pv.nn.StandardNormal(2))


def under_svi(vae):
    optim = pv.FusedOptim(torch.optim.Adam, {"lr": 1e-3}, {"clip_norm": 10.0})
    svi = SVI(vae.model, vae.guide, optim, pv.BetaTraceMeanField_ELBO())
    return lambda: svi.step(X)


def as_module(vae):
    loss = pv.BetaTraceMeanField_ELBO()(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        loss(X).backward()
        optimizer.step()

    return step


@contextmanager
def python_calls():
    """The files of the Python functions that are called, each as often as that happens."""
    files = Counter()

    def note(frame, event, _):
        if event == "call":
            files[frame.f_code.co_filename] += 1

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


def calls_of(step):
    step(), step()  # the first one builds what is kept
    with python_calls() as files:
        step()
    return files


@pytest.mark.parametrize("run, more", [(as_module, {}), (under_svi, {"TraceMessenger": 1})])
def test_handlers_of_a_step(run, more, monkeypatch):
    """Each is called at every site of the program, so one more costs more than it looks."""
    step = run(small_vae())
    step()
    entered = Counter()
    enter = Messenger.__enter__
    monkeypatch.setattr(Messenger, "__enter__", lambda self: entered.update([type(self).__name__]) or enter(self))
    step()
    assert entered == {"Tape": 2, "BetaMessenger": 2, "FillHoles": 2, "plate": 2, **more}


def test_python_calls_of_a_step_are_bounded():
    """Pyro's as well as ours; torch's are left out, which change with its version."""
    for run, limit in ((as_module, 540), (under_svi, 640)):
        files = calls_of(run(small_vae()))
        total = sum(number for file, number in files.items() if not file.startswith(TORCH))
        print(run.__name__, total)
        assert 0.5 * limit < total <= limit


def test_an_optimiser_step_does_not_call_python_for_each_parameter():
    """What `FusedOptim` adds to torch's own step is the same for 2 and for 100 parameters."""

    def added(number):
        pyro.clear_param_store()
        params = {pyro.param(f"p{i}", torch.ones(2)).unconstrained() for i in range(number)}
        optim = pv.FusedOptim(torch.optim.Adam, {"lr": 1e-3})

        def step():
            for param in params:
                param.grad = torch.ones(2)
            optim(set(params))

        files = calls_of(step)
        return sum(n for file, n in files.items() if "pyro" in file)

    assert added(2) == added(100) == 1


class LargeOnes(TorchDispatchMode):
    """Operations whose result has at least so many numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.size and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return out


def test_passes_over_the_data_in_a_bernoulli_likelihood():
    logits = torch.randn(6, 8, requires_grad=True)
    fn = pv.nn.Bernoulli()(logits)
    with LargeOnes(X.numel()) as large:
        fn.log_prob(X).sum().backward()
    # The check of the data, the cost, and its gradient.
    forward = ["round", "clamp_", "sub_", "binary_cross_entropy_with_logits"]
    assert large.names[:4] == forward
    assert "neg" not in large.names
    (gradient,) = torch.autograd.grad(torch.distributions.Bernoulli(logits=logits).log_prob(X).sum(-1).sum(), logits)
    assert torch.equal(logits.grad, gradient)
    assert torch.equal(fn.log_prob(X), torch.distributions.Bernoulli(logits=logits).log_prob(X).sum(-1))
