"""Every private name of torch and Pyro that the package uses stands in one list, and each is where it was.

A new release of either may move them without a word. These tests then say which one moved and where it is used.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MarginalRing

import pyro_vae as pv

PACKAGE = Path(pv.__file__).parent
PRIVATE = re.compile(r"_[A-Za-z]\w*")
LIBRARIES = ("torch", "pyro")

# Where a name lives: its private members that are used here.
MEMBERS = {
    "pyro.infer.autoguide.AutoContinuous": ["_unpack_latent"],
    "pyro.infer.elbo.ELBO": ["_get_traces", "_guess_max_plate_nesting"],
    "pyro.infer.trace_elbo": ["_compute_log_r"],
    "pyro.infer.trace_elbo.Trace_ELBO": ["_differentiable_loss_particle", "_get_trace"],
    "pyro.infer.traceenum_elbo": ["_compute_model_factors"],
    "pyro.infer.tracegraph_elbo.TraceGraph_ELBO": ["_loss_and_surrogate_loss"],
    "pyro.optim.PyroOptim": ["_get_grad_clip_args", "_get_optim_args"],
    "pyro.params.param_store.ParamStoreDict()": ["_constraints", "_param_to_name", "_params"],
    "pyro.poutine.messenger": ["_bound_partial", "_context_wrap"],
    "pyro.poutine.messenger.Messenger": ["_postprocess_message", "_process_message"],
    "pyro.poutine.runtime": ["_PYRO_STACK"],
    "pyro.poutine.trace_messenger.TraceMessenger": ["_pyro_post_param", "_pyro_post_sample"],
    "pyro.poutine.replay_messenger.ReplayMessenger": ["_pyro_sample"],
    "pyro.poutine.lift_messenger.LiftMessenger": ["_pyro_param"],
    "torch": [
        "_C",
        "_foreach_add_",
        "_foreach_clamp_max_",
        "_foreach_mul",
        "_foreach_mul_",
        "_foreach_norm",
        "_foreach_reciprocal_",
        "_inductor",
        "_subclasses",
    ],
    "torch._C": ["_get_mkldnn_enabled", "_set_mkldnn_enabled"],
    "torch.Tensor": ["_backward_hooks", "_post_accumulate_grad_hooks", "_version"],
    "torch.distributions.Distribution": ["_extended_shape", "_get_checked_instance", "_validate_args", "_validate_sample"],
    "torch.distributions.Transform": ["_call", "_inverse"],
    "torch.distributions.Transform()": ["_inv"],
    "torch.distributions.transforms": ["_InverseTransform"],
    "torch.nn.Module()": ["_buffers", "_modules", "_parameters"],
    "torch.nn.Module": ["_load_from_state_dict"],
    "torch.nn.modules.batchnorm": ["_BatchNorm", "_NormBase"],
    "torch.utils": ["_pytree"],
}
# Names that only appear while a program runs: the tests below find each of them there.
SITES = ["_deterministic", "_do_not_trace", "_enumerate_dim", "_enumerate_symbol", "_intervener_id", "_mask"]
MARKOV_KEYS = ["_markov_depth", "_markov_scope"]
AUTOGUIDES = ["_latent", "_unconstrained", "_unconstrained_shapes", "_pyro_name"]
RINGS = ["_pyro_backward", "_pyro_backward_result", "_pyro_dims", "_get_log_factors"]
STATES = ["_extra_state", "_opt_called", "_state_waiting_to_be_consumed"]
WHILE_RUNNING = {*SITES, *MARKOV_KEYS, *AUTOGUIDES, *RINGS, *STATES}
# Strings of our own that look like private names: endings of names.
OURS = {"_after", "_before", "_constant", "_shape", "_total", "_unobserved"}


def parts_of(path):
    """The private names of one file that it defines, and those that it uses, each with its line."""
    own, used = set(), {}
    for node in ast.walk(ast.parse(path.read_text())):
        found = []
        if isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                own.add(node.attr)
            found = [node.attr]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            own |= {t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in LIBRARIES:
            found = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        for name in found:
            used.setdefault(name, f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return own, used


def overrides():
    """Private methods of the package's classes that a class of torch or Pyro below them has as well."""
    for module in pkgutil.walk_packages(pv.__path__, "pyro_vae."):
        for kind in vars(importlib.import_module(module.name)).values():
            if not isinstance(kind, type) or kind.__module__ != module.name:
                continue
            bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
            for name, member in vars(kind).items():
                if inspect.isfunction(member) and any(name in vars(base) for base in bases):
                    yield name, f"{module.name}.{kind.__name__}"


def used_names():
    own, used = set(), {}
    for path in PACKAGE.rglob("*.py"):
        defined, named = parts_of(path)
        own |= defined
        used = {**named, **used}
    foreign = {name: place for name, place in used.items() if name not in own | OURS}
    foreign |= dict(overrides())
    foreign |= {name: place for name, place in used.items() if name.startswith("_pyro_")}
    return {name: place for name, place in foreign.items() if PRIVATE.fullmatch(name)}


USED = used_names()


def test_each_private_name_of_torch_and_pyro_stands_in_the_list():
    listed = WHILE_RUNNING.union(*MEMBERS.values())
    unlisted = {name: place for name, place in USED.items() if name not in listed}
    assert not unlisted, f"private names of other libraries: list them in this file, with a test that they exist: {unlisted}"
    # Of names that the package also defines for itself no scan can tell; the members of `torch.distributions.Transform`,
    # of traces and of ELBOs are among them.
    unused = {name for name in listed if not any(name in path.read_text() for path in PACKAGE.rglob("*.py"))}
    assert not unused, f"names that nothing uses any more: {unused}"


def moved(name, owner):
    return f"{owner} has no {name} any more, which pyro_vae uses in {USED.get(name, 'several places')}: another release?"


@pytest.mark.parametrize("owner", MEMBERS)
def test_members_are_where_they_were(owner):
    head, *rest = owner.removesuffix("()").split(".")
    found = importlib.import_module(head)
    for depth, part in enumerate(rest, 1):
        if not hasattr(found, part):
            importlib.import_module(".".join([head, *rest[:depth]]))
        found = getattr(found, part)
    found = found() if owner.endswith("()") else found
    for name in MEMBERS[owner]:
        if inspect.ismodule(found) and not hasattr(found, name):
            importlib.import_module(f"{owner}.{name}")
        assert hasattr(found, name), moved(name, owner)


def chain():
    state = 0
    for i in pyro.markov(range(2)):
        probs = torch.tensor([0.3, 0.6])[state]
        state = pyro.sample(f"z_{i}", dist.Bernoulli(probs), infer={"enumerate": "parallel"}).long()
        pyro.deterministic(f"mean_{i}", state.float())
        pyro.sample(f"x_{i}", dist.Normal(state.float(), 1), obs=torch.tensor(1.0))


def test_keys_of_sites():
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
    trace, _ = next(iter(elbo._get_traces(chain, lambda: None, (), {})))
    enumerated = trace.nodes["z_0"]["infer"]
    for name in ("_enumerate_dim", "_enumerate_symbol"):
        assert name in enumerated, moved(name, "the infer dict of an enumerated site")
    for name in MARKOV_KEYS:
        assert name in enumerated, moved(name, "the infer dict of a site inside pyro.markov")
    assert trace.nodes["mean_0"]["infer"].get("_deterministic"), moved("_deterministic", "pyro.deterministic")
    assert hasattr(trace.nodes["x_0"]["packed"]["log_prob"], "_pyro_dims"), moved("_pyro_dims", "a packed tensor")
    assert hasattr(dist.Normal(0, 1).mask(torch.tensor(True)), "_mask"), moved("_mask", "a masked distribution")
    with pyro.poutine.trace() as hidden:
        pyro.sample("z", dist.Normal(0, 1), infer={"_do_not_trace": True, "is_auxiliary": True})
    assert "z" not in hidden.trace, f"poutine.trace traces what is marked: {moved('_do_not_trace', 'it')}"
    with pyro.poutine.trace() as done, pyro.poutine.do(data={"z": torch.tensor(0.0)}):
        pyro.sample("z", dist.Normal(0, 1))
    keys = [node.get("_intervener_id") for node in done.trace.nodes.values()]
    assert any(key is not None for key in keys), moved("_intervener_id", "a site under poutine.do")


def test_names_that_autoguides_make():
    def model():
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    one, joint = AutoNormal(model), AutoMultivariateNormal(model)
    joint()
    assert "z_unconstrained" in pyro.poutine.trace(one).get_trace(), moved("_unconstrained", "a site of AutoNormal")
    sites = pyro.poutine.trace(joint).get_trace().nodes
    assert "_AutoMultivariateNormal_latent" in sites, moved("_latent", "the site of AutoMultivariateNormal")
    assert joint._unconstrained_shapes == {"z": torch.Size([])}, moved("_unconstrained_shapes", "AutoContinuous")
    assert isinstance(joint._pyro_name, str), moved("_pyro_name", "a PyroModule")


def test_names_of_sums_over_enumerated_sites():
    assert hasattr(pyro.infer.util.Dice, "_get_log_factors"), moved("_get_log_factors", "Dice")
    ring = MarginalRing(dim_to_size={"a": 2})
    factor = torch.zeros(2)
    factor._pyro_dims = "a"
    require_backward(factor)
    total = ring.sumproduct([factor], {"a"})
    assert hasattr(total, "_pyro_backward"), moved("_pyro_backward", "a sum over enumerated sites")
    total._pyro_backward()
    assert hasattr(factor, "_pyro_backward_result"), moved("_pyro_backward_result", "a factor of a sum")


class Counting(torch.nn.Module):
    def get_extra_state(self):
        return 1


def test_names_in_states():
    assert "_extra_state" in Counting().state_dict(), moved("_extra_state", "the state of a module")
    optimiser = pyro.optim.Adam({"lr": 0.1})
    optimiser.set_state({})
    assert hasattr(optimiser, "_state_waiting_to_be_consumed"), moved("_state_waiting_to_be_consumed", "PyroOptim")
    inside = inspect.getsource(torch.optim.lr_scheduler)
    assert "_opt_called" in inside, moved("_opt_called", "an optimiser under a scheduler")
