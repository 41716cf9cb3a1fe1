"""`FusedOptim`: the parameters of pyro.optim, by one torch optimiser."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch.optim import lr_scheduler

import pyro_vae as pv
from pyro_vae.errors import OptionError

STEPS = 20
ADAM = (torch.optim.Adam, {"lr": 0.05})
OPTIMISERS = {
    "Adam": ADAM,
    "AMSGrad": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2}),
    "SGD": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "ClippedAdam": (ClippedAdam, {"lr": 0.05, "lrd": 0.9, "clip_norm": 0.5}),
}
SCHEDULERS = {
    "ExponentialLR": (lr_scheduler.ExponentialLR, {"gamma": 0.5}),
    "LambdaLR": (lr_scheduler.LambdaLR, {"lr_lambda": lambda epoch: 1 / (1 + epoch)}),
    "OneCycleLR": (lr_scheduler.OneCycleLR, {"max_lr": 0.1, "total_steps": 6}),
    "StepLR": (lr_scheduler.StepLR, {"step_size": 2}),
}
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def by_name(name):
    return {"lr": 0.1, "weight_decay": 0.3} if name in ("loc", "net.bias") else {"lr": 0.02}


def clip_by_name(module, name):
    return {"clip_norm": 0.3} if name == "weight" else {"clip_value": 0.05} if name == "loc" else {}


class Pair:
    """A model with a network and a guide with a constrained parameter; `late` and `without` change what a step uses."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = torch.nn.Linear(2, 3)
        self.late, self.without = False, False

    def model(self, x):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            mean = self.net(z)
            if self.late:
                mean = mean + pyro.param("late", torch.ones(3))
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", torch.zeros(len(x), 2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        if self.without:
            loc = loc.detach()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def values():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def train(optim, steps=STEPS, epoch=None, before=None, pair=None, fresh=True):
    """The parameters after some steps from the same start, on the same noise."""
    if fresh:
        pyro.clear_param_store()
    pair = pair or Pair()
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO())
    for step in range(steps):
        pyro.set_rng_seed(step + 1)
        if before:
            before(step, pair)
        svi.step(X)
        if epoch and step % epoch == epoch - 1:
            optim.step()
    return values()


def assert_same(ours, theirs, rtol=1e-5, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("clip", [None, {"clip_norm": 0.5}, {"clip_value": 0.1}, {"clip_norm": 2.0, "clip_value": 0.1}])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_moves_parameters_as_pyro_does(name, clip):
    theirs, ours = train(PyroOptim(*OPTIMISERS[name], clip)), train(pv.FusedOptim(*OPTIMISERS[name], clip))
    assert_same(ours, theirs)


@pytest.mark.parametrize("make", [torch.optim.Adam, ClippedAdam], ids=["Adam", "ClippedAdam"])
def test_options_and_clips_by_name(make):
    """The group with a weight decay comes first or last, and neither gives its options to the other."""
    ours = pv.FusedOptim(make, by_name, clip_by_name)
    assert_same(train(ours), train(PyroOptim(make, by_name, clip_by_name)))
    assert len(ours.optimizer.param_groups) == 2


def test_a_function_of_module_and_name_as_pyro_still_takes_it():
    def old(module, name):
        return {"lr": 0.1 if module == "net" else 0.01}

    assert_same(train(pv.FusedOptim(torch.optim.Adam, old)), train(PyroOptim(torch.optim.Adam, old)))


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "ClippedAdam"])
def test_parameters_that_come_later(name):
    def later(step, pair):
        pair.late = step >= 5

    ours = pv.FusedOptim(*OPTIMISERS[name])
    assert_same(train(ours, before=later), train(PyroOptim(*OPTIMISERS[name]), before=later))
    # With lrd the learning rate of the others has fallen by then: a new parameter starts with a group of its own.
    assert len(ours.optimizer.param_groups) == (2 if name == "ClippedAdam" else 1)


def test_parameters_that_a_step_does_not_use_stay_where_they_are():
    def now_and_then(step, pair):
        pair.late = step in (2, 3, 7, 11)

    assert_same(train(pv.FusedOptim(*ADAM), before=now_and_then), train(PyroOptim(*ADAM), before=now_and_then))


def test_a_parameter_that_is_replaced_in_the_store_starts_anew():
    def replace(step, pair):
        if step == 10:
            pyro.get_param_store()["loc"] = torch.full((12, 2), 0.5)

    ours, theirs = pv.FusedOptim(*ADAM), PyroOptim(*ADAM)
    assert_same(train(ours, before=replace), train(theirs, before=replace))
    assert float(ours.get_state()["loc"]["state"][0]["step"]) == 10.0


def test_a_parameter_without_a_gradient_is_skipped_as_torch_does():
    """Pyro hands zeros on, by which the momentum of Adam moves it."""
    seen = {}

    def without(step, pair):
        pair.without = step >= 5
        seen[step] = values().get("loc")

    train(pv.FusedOptim(*ADAM), before=without)
    assert torch.equal(seen[6], seen[19]) and not torch.equal(seen[4], seen[5])
    seen.clear()
    train(PyroOptim(*ADAM), before=without)
    assert not torch.equal(seen[6], seen[19])


def test_gradients_are_none_after_a_step():
    train(pv.FusedOptim(*ADAM), 2)
    assert all(param.grad is None for _, param in pyro.get_param_store().named_parameters())


def test_under_aggressive_training():
    def run(optim):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair = Pair()
        training = pv.AggressiveTraining(SVI(pair.model, pair.guide, optim, Trace_ELBO()), [(X,)], max_inner_steps=3)
        for _ in range(4):
            training.step()
        return values()

    assert_same(run(pv.FusedOptim(*ADAM)), run(PyroOptim(*ADAM)))


# Schedulers


def scheduled(name, options=None):
    make, own = SCHEDULERS[name]
    return make, {"optimizer": torch.optim.Adam, "optim_args": options or {"lr": 0.05}, **own}


@pytest.mark.parametrize("options", [{"lr": 0.05}, by_name], ids=["one", "by name"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_as_pyros(name, options):
    def later(step, pair):
        pair.late = step >= 9

    theirs = pyro.optim.lr_scheduler.PyroLRScheduler(*scheduled(name, options))
    ours = pv.FusedOptim(*scheduled(name, options))
    assert_same(train(ours, 20, epoch=4, before=later), train(theirs, 20, epoch=4, before=later))


def test_a_scheduler_that_looks_at_the_loss():
    options = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "patience": 0}
    optim = pv.FusedOptim(lr_scheduler.ReduceLROnPlateau, options)
    assert options.keys() == {"optimizer", "optim_args", "patience"}
    train(optim, 1)
    for _ in range(3):
        optim.step(1.0)
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_step_without_a_scheduler_is_refused():
    with pytest.raises(OptionError, match="there is none: SVI.step updates the parameters"):
        pv.FusedOptim(*ADAM).step()


def test_learning_rates_may_be_written_as_in_pyro():
    optim = pv.FusedOptim(*ADAM)
    train(optim, 2)
    for one in optim.optim_objs.values():
        one.param_groups[0]["lr"] = 0.0
    before = values()
    assert_same(train(optim, 1, fresh=False), before, rtol=0, atol=0)


# State


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "ours to ours": (pv.FusedOptim, pv.FusedOptim),
    "Pyro's to ours": (PyroOptim, pv.FusedOptim),
    "ours to Pyro's": (pv.FusedOptim, PyroOptim),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_goes_on_from_a_saved_state(name, way):
    """Seven steps, and the rest under another optimiser that has read the state, are as good as one run."""
    first, second = WAYS[way]
    options = OPTIMISERS[name]
    whole = train(PyroOptim(*options))
    pair, start = Pair(), first(*options)
    pyro.clear_param_store()
    train(start, 7, pair=pair)
    rest = second(*options)
    rest.set_state(through_a_file(start.get_state()))
    svi = SVI(pair.model, pair.guide, rest, Trace_ELBO())
    for step in range(7, STEPS):
        pyro.set_rng_seed(step + 1)
        svi.step(X)
    assert_same(values(), whole)


@pytest.mark.parametrize("name", ["ExponentialLR", "StepLR"])
def test_goes_on_from_a_saved_scheduler(name, tmp_path):
    theirs, ours = pyro.optim.lr_scheduler.PyroLRScheduler(*scheduled(name)), pv.FusedOptim(*scheduled(name))
    train(theirs, 9, epoch=3)
    theirs.save(tmp_path / "state")
    ours.load(tmp_path / "state")
    train(ours, 1)
    assert ours.optimizer.param_groups[0]["lr"] == next(iter(theirs.optim_objs.values())).optimizer.param_groups[0]["lr"]
    assert len(ours.optimizer.param_groups) == 1
    assert ours.get_state()["loc"]["scheduler"]["last_epoch"] == 3


def test_a_state_is_a_snapshot_and_reaches_parameters_that_have_moved():
    optim, pair = pv.FusedOptim(*ADAM), Pair()
    train(optim, 5, pair=pair)
    state, start = optim.get_state(), values()
    after = train(optim, 3, pair=pair, fresh=False)
    assert float(state["loc"]["state"][0]["step"]) == 5.0
    optim.set_state(state)
    with torch.no_grad():
        for name, param in pyro.get_param_store().named_parameters():
            param.copy_(start[name])
    assert_same(train(optim, 3, pair=pair, fresh=False), after, rtol=0, atol=0)


def test_a_loaded_state_that_has_met_no_parameter_is_saved_again():
    optim = pv.FusedOptim(*ADAM)
    train(optim, 2)
    other = pv.FusedOptim(*ADAM)
    other.set_state(optim.get_state())
    assert other.get_state().keys() == optim.get_state().keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda optim: pickle.loads(pickle.dumps(optim))])
def test_copies_go_on_from_the_same_state(copied):
    optim, pair = pv.FusedOptim(*ADAM, {"clip_norm": 5.0}), Pair()
    train(optim, 5, pair=pair)
    other, start = copied(optim), values()
    ours = train(optim, 3, pair=pair, fresh=False)
    with torch.no_grad():
        for name, param in pyro.get_param_store().named_parameters():
            param.copy_(start[name])
    assert_same(train(other, 3, pair=pair, fresh=False), ours, rtol=0, atol=0)


def test_copies_of_a_scheduled_one():
    optim = pv.FusedOptim(*scheduled("ExponentialLR"))
    train(optim, 4, epoch=2)
    other = copy.deepcopy(optim)
    train(other, 1)
    other.step()
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 8)
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)


# One torch optimiser, fused where that works


def test_one_torch_step_for_each_step_of_svi(monkeypatch):
    counted = []
    monkeypatch.setattr(torch.optim.Adam, "step", counting(torch.optim.Adam.step, counted))
    optim = pv.FusedOptim(*ADAM)
    train(optim, 2)
    counted.clear()
    train(optim, 5, fresh=False)
    assert len(counted) == 5 and len(optim.optimizer.param_groups) == 1


def counting(function, counted):
    def wrapper(*args, **kwargs):
        counted.append(args)
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_fused_where_torch_has_it(make):
    optim = pv.FusedOptim(make, {"lr": 0.01})
    train(optim, 1)
    assert optim.optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize(
    "make, options",
    [
        (torch.optim.RMSprop, {}),
        (torch.optim.Adam, {"fused": False}),
        (torch.optim.Adam, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_not_fused_where_torch_or_the_user_does_not_want_it(make, options):
    optim = pv.FusedOptim(make, {"lr": 0.01, **options})
    train(optim, 1)
    assert not optim.optimizer.param_groups[0].get("fused")


def test_complex_parameters_are_not_fused_and_move():
    def move(optim):
        pyro.clear_param_store()
        params = [pyro.param("real", torch.ones(2)), pyro.param("complex", torch.ones(2, dtype=torch.complex64))]
        for _ in range(3):
            for param in params:
                param.unconstrained().grad = torch.full_like(param, 0.1)
            optim({param.unconstrained() for param in params})
        return values()

    ours = pv.FusedOptim(*ADAM)
    assert_same(move(ours), move(PyroOptim(*ADAM)))
    assert {group["fused"] for group in ours.optimizer.param_groups} == {True, None}


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, ::2]], ids=["transposed", "with holes"])
def test_memory_that_is_not_contiguous(view):
    """torch's fused code would read other numbers, without a word."""

    def move(optim):
        param = view(torch.linspace(-1, 1, 16).reshape(4, 4)).requires_grad_()
        for _ in range(3):
            param.grad = (2 * param.detach()).contiguous()
            optim({param})
        return {"param": param.detach().clone()}

    assert_same(move(pv.FusedOptim(*ADAM)), move(PyroOptim(*ADAM)))


# Refusals


def closure():
    return 0.0


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((torch.optim.LBFGS, {"lr": 0.1}), "LBFGS needs a closure"),
        ((pyro.optim.Adam, {"lr": 0.1}), "not its wrapper in pyro.optim"),
        ((torch.optim.Adam, {"lr": -1.0}), "Invalid learning rate"),
        ((torch.optim.Adam, {"learning_rate": 0.1}), "learning_rate"),
        ((torch.optim.Adam, 0.1), "optim_args must be a dict"),
        ((torch.optim.Adam([torch.zeros(1, requires_grad=True)]), {}), "optim_constructor must be a class"),
        ((torch.optim.Adam, {"lr": 0.1}, 10.0), "clip_args must be a dict"),
        ((torch.optim.Adam, {"lr": 0.1}, {"clip": 10.0}), "clip_args must be a dict with 'clip_norm'"),
        ((torch.optim.Adam, {"lr": 0.1}, {"clip_norm": -1.0}), "clip_norm must be a number >= 0"),
        ((torch.optim.Adam, {"lr": 0.1}, {"clip_value": math.nan}), "clip_value must be a number >= 0"),
        ((lr_scheduler.StepLR, {"lr": 0.1}), "must be a dict with 'optimizer'"),
        ((lr_scheduler.StepLR, {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gama": 0.1}), "gama"),
    ],
)
def test_what_cannot_be_an_optimiser_is_refused_at_once(arguments, said):
    with pytest.raises(OptionError, match=said):
        pv.FusedOptim(*arguments)


def test_a_closure_is_refused():
    with pytest.raises(OptionError, match="SVI has no closure"):
        pv.FusedOptim(*ADAM)({torch.zeros(1, requires_grad=True)}, closure)


@pytest.mark.parametrize("options, clips", [(lambda name: 0.1, None), (lambda name: {"lr": 0.1}, lambda module, name: 0.1)])
def test_functions_that_return_no_dict_are_refused(options, clips):
    with pytest.raises(OptionError, match="cannot make .* a function that returns one"):
        train(pv.FusedOptim(torch.optim.Adam, options, clips), 1)


def test_options_by_name_are_refused_with_the_name():
    with pytest.raises(OptionError, match="the parameter 'net.*rate"):
        train(pv.FusedOptim(torch.optim.Adam, lambda name: {"rate" if "net" in name else "lr": 0.1}), 1)


def changed(state, change):
    state = copy.deepcopy(state)
    change(state["loc"])
    return state


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda one: one.pop("state"), "the same kind as saved it"),
        (lambda one: one["param_groups"][0].update(momentum=0.9), "another class of optimiser"),
        (lambda one: one["state"][0].update(exp_avg=torch.zeros(5, 2)), r"'exp_avg' of shape \(5, 2\)"),
    ],
)
def test_states_that_do_not_fit_are_refused_by_name(change, said):
    optim = pv.FusedOptim(*ADAM)
    train(optim, 1)
    optim.set_state(changed(optim.get_state(), change))
    with pytest.raises(OptionError, match=f"the parameter 'loc'.*{said}"):
        train(optim, 1, fresh=False)


def test_a_state_of_other_parameters_is_refused():
    """Pyro would start afresh, without a word."""
    optim, other, vae = pv.FusedOptim(*ADAM), pv.FusedOptim(*ADAM), pv.LinearVAE(3, 2)
    SVI(vae.model, vae.guide, optim, Trace_ELBO()).step(X)
    other.set_state(optim.get_state())
    copied = copy.deepcopy(vae)
    with pytest.raises(OptionError, match="no parameter of this step is in the loaded state: it has 'vae_.*same order"):
        SVI(copied.model, copied.guide, other, Trace_ELBO()).step(X)
    SVI(vae.model, vae.guide, other, Trace_ELBO()).step(X)


def test_a_state_is_a_dict():
    with pytest.raises(OptionError, match="a dict by name"):
        pv.FusedOptim(*ADAM).set_state([])


def test_parameters_without_a_name_move_but_cannot_be_saved():
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    optim = pv.FusedOptim(*ADAM)
    optim([param])
    assert param[0] < 1
    with pytest.raises(OptionError, match=r"shape \(2,\) has no name in Pyro's store"):
        optim.get_state()
    with pytest.raises(OptionError, match="so options by name are not possible"):
        pv.FusedOptim(torch.optim.Adam, by_name)([param])


def test_no_parameters_is_no_step():
    pv.FusedOptim(*ADAM)(set())


def test_halving_all_rates_through_optim_objs_halves_them_once():
    pyro.clear_param_store()
    for name in ("a", "b", "c"):
        pyro.param(name, torch.ones(2))
    params = [pyro.param(name).unconstrained() for name in ("a", "b", "c")]
    optim = pv.FusedOptim(torch.optim.Adam, {"lr": 0.1})
    for param in params:
        param.grad = torch.ones_like(param)
    optim(set(params))
    for one in optim.optim_objs.values():
        one.param_groups[0]["lr"] *= 0.5
    assert optim.optimizer is not None
    assert [group["lr"] for group in optim.optimizer.param_groups] == [0.05]
