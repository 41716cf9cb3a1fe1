"""Every instance and every copy learns its own parameters, whatever happens to Pyro's store: judged by training by hand."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import quiet
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn
from vae_helpers import LEARNING_RATE, ByHand, assert_all_moved, assert_same, small_data, small_vae, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import ParameterStoreWarning
from pyro_vae.models import VAE
from pyro_vae.nn import Normal, StandardNormal


def store_names(vae):
    prefixes = (vae.model.store_name + "$$$", vae.guide.store_name + "$$$")
    return [name for name in pyro.get_param_store() if name.startswith(prefixes)]


def saved_and_loaded(vae):
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_loaded_state(vae):
    other = small_vae()
    other.load_state_dict(vae.state_dict())
    return other


INSTANCES = {
    "the first": lambda vae: vae,
    "a second one": lambda vae: small_vae(),
    "a deep copy": copy.deepcopy,
    "a deep copy of a deep copy": lambda vae: copy.deepcopy(copy.deepcopy(vae)),
    "unpickled": lambda vae: pickle.loads(pickle.dumps(vae)),
    "torch.save and torch.load": saved_and_loaded,
    "another one with the same state": with_loaded_state,
}


@pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES)
@pytest.mark.parametrize("trained_before", [False, True])
def test_every_instance_learns_by_itself_what_training_by_hand_learns(instance, trained_before):
    original, x = small_vae(), small_data()
    if trained_before:
        svi_of(original).step(x)
        dict(pyro.get_param_store().items())  # Pyro hangs its handles on what is looked at
    vae = instance(original)
    before, of_original = snapshot(vae), snapshot(original)
    reference = copy.deepcopy(vae)
    for train in (svi_of(vae), ByHand(reference)):
        torch.manual_seed(0)
        for _ in range(3):
            train.step(x)
    assert_all_moved(vae, before)
    assert_same(vae.state_dict(), reference.state_dict())
    if vae is not original:
        assert_same(original.state_dict(), of_original)
        assert not {id(p) for p in vae.parameters()} & {id(p) for p in original.parameters()}


def test_all_of_them_learn_side_by_side():
    x, first = small_data(), small_vae()
    svi_of(first).step(x)
    vaes = [first, *(instance(first) for name, instance in INSTANCES.items() if name != "the first")]
    names = [program.store_name for vae in vaes for program in (vae.model, vae.guide)]
    assert len(set(names)) == 2 * len(vaes)
    references = [copy.deepcopy(vae) for vae in vaes]
    svis, by_hand = [svi_of(vae) for vae in vaes], [ByHand(vae) for vae in references]
    for trainings in (svis, by_hand):
        torch.manual_seed(0)
        for _ in range(3):
            for training in trainings:
                training.step(x)
    for vae, reference in zip(vaes, references, strict=True):
        assert_same(vae.state_dict(), reference.state_dict())


def test_an_unpickled_one_learns_in_another_process(tmp_path):
    vae = small_vae()
    svi_of(vae).step(small_data())
    torch.save(vae, tmp_path / "vae.pt")
    program = """
import sys, torch, pyro
from vae_helpers import assert_all_moved, small_data, small_vae, snapshot, svi_of
built_first = small_vae()
vae = torch.load(sys.argv[1], weights_only=False)
for each in (vae, built_first):
    before = snapshot(each)
    svi_of(each).step(small_data())
    assert_all_moved(each, before)
"""
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    subprocess.run([sys.executable, "-W", "error", "-c", path + program, str(tmp_path / "vae.pt")], check=True)


# What may happen between two steps. Each is applied to the VAE and to the one that is trained by hand.


def clear(vae):
    pyro.clear_param_store()


def set_state_again(vae):
    pyro.get_param_store().set_state(pyro.get_param_store().get_state())


def empty_scope(vae):
    with pyro.get_param_store().scope():
        assert not pyro.get_param_store()


def seeded_linear(in_features, out_features):
    layer = nn.Linear(in_features, out_features)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(-0.5, 0.5 + number, parameter.numel()).reshape(parameter.shape))
    return layer


def replace_a_layer(vae):
    vae.model.decoder[0] = seeded_linear(2, 6)


def replace_a_network(vae):
    vae.encoder = nn.Sequential(seeded_linear(6, 4), Normal())


def replace_a_parameter(vae):
    vae.guide.encoder[0].weight = nn.Parameter(seeded_linear(6, 8).weight.detach())


def replace_by_a_copied_parameter(vae):
    """`copy.copy` copies Pyro's handle too, which leads to the tensor of before."""
    vae.guide.encoder[0].weight = copy.copy(vae.guide.encoder[0].weight)


def assign_a_state(vae):
    state = {name: value + 0.1 for name, value in vae.state_dict().items()}
    vae.load_state_dict(state, assign=True)


def load_a_state(vae):
    vae.load_state_dict({name: value + 0.1 for name, value in vae.state_dict().items()})


def freeze_the_decoder(vae):
    vae.decoder.requires_grad_(False)


def freeze_one_parameter(vae):
    vae.encoder[0].bias.requires_grad_(False)


def move(vae):
    vae.to("cpu").float()


def evaluate(vae):
    with quiet():
        torch.manual_seed(3)
        pv.ImportanceSampling(vae.model, vae.guide, num_particles=10, seed=0)(small_data())
        pv.InferenceGaps(vae.model, vae.guide, num_particles=10, seed=0)(small_data())
    torch.manual_seed(4)


def use_the_other_interface(vae):
    torch.manual_seed(3)
    Trace_ELBO()(vae.model, vae.guide)(small_data()).backward()
    vae.zero_grad()
    torch.manual_seed(4)


def copy_and_pickle(vae):
    copy.deepcopy(vae), pickle.dumps(vae), copy.copy(vae.model), saved_and_loaded(vae)


def train_a_copy(vae):
    svi_of(copy.deepcopy(vae)).step(small_data())
    torch.manual_seed(4)


def switch_modes(vae):
    vae.eval()


def share_a_layer(vae):
    vae.decoder[0], vae.encoder[0] = seeded_linear(2, 6), seeded_linear(6, 8)
    vae.model.tied = vae.encoder[0]


EVENTS = [
    clear,
    set_state_again,
    empty_scope,
    replace_a_layer,
    replace_a_network,
    replace_a_parameter,
    replace_by_a_copied_parameter,
    assign_a_state,
    load_a_state,
    freeze_the_decoder,
    freeze_one_parameter,
    move,
    evaluate,
    use_the_other_interface,
    copy_and_pickle,
    train_a_copy,
    switch_modes,
    share_a_layer,
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_what_happens_between_two_steps_stops_no_parameter(event):
    vae, x = small_vae(), small_data()
    reference = copy.deepcopy(vae)
    for each, training in ((vae, svi_of(vae)), (reference, ByHand(reference))):
        torch.manual_seed(0)
        for _ in range(2):
            training.step(x)
        event(each)
        before = snapshot(each)
        for _ in range(2):
            training.step(x)
        for name, parameter in each.named_parameters():
            assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    assert_same(vae.state_dict(), reference.state_dict())


def test_training_goes_on_in_other_stores():
    vae, other, x, store = small_vae(), small_vae(), small_data(), pyro.get_param_store()
    reference, svi = copy.deepcopy(vae), svi_of(vae)
    with store.scope() as of_other:
        svi_of(other).step(x)
    torch.manual_seed(0)
    svi.step(x)
    with store.scope() as empty_at_first:
        svi.step(x)
    with store.scope(of_other):
        svi.step(x)
    with store.scope(empty_at_first):
        svi.step(x)
    svi.step(x)
    torch.manual_seed(0)
    by_hand = ByHand(reference)
    for _ in range(5):
        by_hand.step(x)
    assert_same(vae.state_dict(), reference.state_dict())


def test_unfrozen_parameters_learn_again():
    vae, x = small_vae(), small_data()
    vae.requires_grad_(False)
    before, svi = snapshot(vae), svi_of(vae)
    svi.step(x)  # pyro.module would warn about each of them
    assert_same(vae.state_dict(), before)
    vae.requires_grad_(True)
    svi.step(x)
    assert_all_moved(vae, before)


def test_after_double_a_new_optimiser_learns_and_the_old_one_raises():
    vae, x = small_vae(), small_data()
    old = svi_of(vae)
    old.step(x)
    vae.double()
    with pytest.raises(RuntimeError, match="dtype"):  # Adam's own state is still in single precision
        old.step(x.double())
    before = snapshot(vae)
    svi_of(vae).step(x.double())
    assert_all_moved(vae, before)
    assert all(p.dtype is torch.float64 for p in vae.parameters())


def test_two_svis_train_one_vae_in_turn():
    vae, x = small_vae(), small_data()
    reference = copy.deepcopy(vae)
    for trainings in ([svi_of(vae), svi_of(vae)], [ByHand(reference), ByHand(reference)]):
        torch.manual_seed(0)
        for step in range(4):
            trainings[step % 2].step(x)
    assert_same(vae.state_dict(), reference.state_dict())


LOSSES = {
    "Trace": Trace_ELBO(),
    "several particles": Trace_ELBO(num_particles=3),
    "vectorized particles": Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField": TraceMeanField_ELBO(),
    "TraceMeanField, vectorized": TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "TraceGraph": TraceGraph_ELBO(),
    "TraceEnum": TraceEnum_ELBO(strict_enumeration_warning=False, max_plate_nesting=1),
    "Renyi": RenyiELBO(num_particles=3),
    "plain function": lambda model, guide, x: Trace_ELBO().differentiable_loss(model, guide, x),
}


@pytest.mark.parametrize("local_params", [False, True])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_trains_every_parameter_of_a_second_instance(loss, local_params):
    with pyro.settings.context(module_local_params=local_params):
        svi_of(small_vae()).step(small_data())
        vae = small_vae()
        before = snapshot(vae)
        svi_of(vae, loss).step(small_data())
        assert_all_moved(vae, before)


@pytest.mark.parametrize("local_params", [False, True])
@pytest.mark.parametrize("name", ["Trace", "vectorized particles", "TraceMeanField"])
def test_every_parameter_learns_under_torch_optim(name, local_params):
    with pyro.settings.context(module_local_params=local_params):
        svi_of(small_vae()).step(small_data())
        vae, x = small_vae(), small_data()
        reference = copy.deepcopy(vae)
        before, objective = snapshot(vae), LOSSES[name](vae.model, vae.guide)
        assert {id(p) for p in objective.parameters()} == {id(p) for p in vae.parameters()}
        optimizer = torch.optim.Adam(objective.parameters(), lr=LEARNING_RATE)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            objective(x).backward()
            optimizer.step()
    assert_all_moved(vae, before)
    if name == "Trace":
        torch.manual_seed(0)
        by_hand = ByHand(reference)
        for _ in range(3):
            by_hand.step(x)
        assert_same(vae.state_dict(), reference.state_dict())


def test_loss_and_grads_alone_leaves_gradients():
    """Pyro's losses go backward only where a parameter was announced."""
    vae = small_vae()
    Trace_ELBO().loss_and_grads(vae.model, vae.guide, small_data())
    assert all(bool(p.grad.abs().sum() > 0) for p in vae.parameters())


def test_values_that_others_put_into_the_store_are_not_taken_and_this_is_said(tmp_path):
    vae, x = small_vae(), small_data()
    svi = svi_of(vae)
    svi.step(x)
    pyro.get_param_store().save(tmp_path / "store.pt")
    svi.step(x)
    pyro.get_param_store().load(tmp_path / "store.pt")
    before = snapshot(vae)
    with pytest.warns(ParameterStoreWarning, match="state_dict") as caught:
        svi.step(x)
    assert len(caught) == 2  # one for the model and one for the guide, not one per parameter
    assert_all_moved(vae, before)
    held = pyro.get_param_store()._params
    assert {id(held[name]) for name in store_names(vae)} == {id(p) for p in vae.parameters()}
    svi.step(x)  # without a warning: the store has the right ones again
    pyro.get_param_store()[store_names(vae)[0]] = torch.zeros(8, 6)
    with pytest.warns(ParameterStoreWarning, match=store_names(vae)[0].replace("$", "[$]")):
        svi.step(x)


def test_a_store_with_the_same_values_is_no_cause_for_a_warning(tmp_path):
    vae, x = small_vae(), small_data()
    svi_of(vae).step(x)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    before = snapshot(vae)
    svi_of(vae).step(x)
    assert_all_moved(vae, before)


def test_a_parameter_that_is_not_contiguous_learns():
    """`pyro.module` stores a contiguous copy of it, and trains that one."""
    vae, x = small_vae(), small_data()
    vae.decoder[0].weight = nn.Parameter(torch.randn(2, 6).T)
    assert not vae.decoder[0].weight.is_contiguous()
    before = snapshot(vae)
    svi_of(vae).step(x)
    assert_all_moved(vae, before)


def test_lazy_layers_learn():
    vae = VAE(
        nn.Sequential(nn.LazyLinear(4), Normal()), nn.Sequential(nn.LazyLinear(6), Normal(scale=0.5)), StandardNormal(2)
    )
    svi, x = svi_of(vae), small_data()
    svi.step(x)
    before = snapshot(vae)
    svi.step(x)
    assert_all_moved(vae, before)


def test_temporary_tensors_in_place_of_the_parameters_stay_out_of_the_store():
    vae, x = small_vae(), small_data()
    objective = Trace_ELBO()(vae.model, vae.guide)
    values = {name: p.detach().clone() for name, p in objective.named_parameters()}

    def loss(values):
        return torch.func.functional_call(objective, values, (x,))

    gradients = torch.func.grad(loss)(values)
    assert all(bool(g.abs().sum() > 0) for g in gradients.values())
    assert store_names(vae) == []


def test_the_store_keeps_nothing_of_those_that_are_gone():
    x, kept = small_data(), small_vae()
    svi_of(kept).step(x)
    for _ in range(3):
        svi_of(small_vae()).step(x)
    gc.collect()
    last = small_vae()
    svi_of(last).step(x)
    assert len(pyro.get_param_store()) == len(list(kept.parameters())) + len(list(last.parameters()))
    assert store_names(kept) and store_names(last)


def test_a_network_that_two_vaes_share_keeps_its_name_when_one_is_gone():
    x, vae = small_data(), small_vae()
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
    SVI(vae.model, vae.guide, optimizer, Trace_ELBO()).step(x)
    svi_of(VAE(vae.encoder, small_vae().decoder, vae.prior)).step(x)
    gc.collect()
    svi_of(small_vae()).step(x)  # clears up after the one that is gone
    assert set(optimizer.get_state()) == set(store_names(vae))


def test_a_name_is_never_used_twice():
    names = [vae.model.store_name for vae in (small_vae() for _ in range(50))]  # gone at once: their ids come again
    assert len(set(names)) == 50


def test_building_one_changes_no_store_and_draws_no_more_than_its_layers():
    pyro.param("theirs", torch.zeros(2))
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(2, 6)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    vae = small_vae()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(vae.decoder[0].weight, layers[2].weight)
    assert list(pyro.get_param_store()) == ["theirs"]


def test_optimisers_know_the_parameters_by_name():
    vae, x = small_vae(), small_data()
    seen = []

    def options(name):
        seen.append(name)
        return {"lr": 0.0 if "encoder" in name else LEARNING_RATE}

    optimizer = pyro.optim.Adam(options)
    before = snapshot(vae)
    SVI(vae.model, vae.guide, optimizer, Trace_ELBO()).step(x)
    assert_same(vae.encoder.state_dict(), {n.removeprefix("guide.encoder."): v for n, v in before.items() if "encoder" in n})
    assert not torch.equal(vae.decoder[0].weight, before["model.decoder.0.weight"])
    assert f"{vae.guide.store_name}.encoder.0.weight" in seen
    assert set(optimizer.get_state()) == set(store_names(vae))


def test_the_messages_are_those_of_pyro_module():
    vae, x = small_vae(), small_data()
    ours = poutine.trace(vae.model).get_trace(x).nodes

    def program():
        pyro.module("decoder", vae.decoder)

    theirs = poutine.trace(program).get_trace().nodes["decoder$$$0.weight"]
    site = ours[f"{vae.model.store_name}$$$decoder.0.weight"]
    assert site.keys() == theirs.keys()
    assert all(site[key] == theirs[key] for key in ("type", "fn", "scale", "mask", "done", "stop", "is_observed", "infer"))
    assert site["value"] is vae.decoder[0].weight is site["value"].unconstrained()
    assert site["kwargs"].keys() == theirs["kwargs"].keys()


def test_handlers_can_hide_the_parameters():
    vae, x = small_vae(), small_data()
    before = snapshot(vae)
    SVI(poutine.block(vae.model, hide_types=["param"]), vae.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert torch.equal(vae.decoder[0].weight, before["model.decoder.0.weight"])
    assert not torch.equal(vae.encoder[0].weight, before["guide.encoder.0.weight"])


def test_handlers_that_turn_parameters_into_draws_reach_the_traces_around_them():
    """As Pyro's lift does. Traces alone are told directly."""

    class Lift(Messenger):
        def _pyro_param(self, msg):
            msg.update(type="sample", fn=dist.Delta(msg["value"], event_dim=msg["value"].dim()), args=(), kwargs={})

    vae, x = small_vae(), small_data()
    told = poutine.trace(vae.guide).get_trace(x)
    names = [name for name, site in told.nodes.items() if site["type"] == "param"]
    assert names == store_names(vae)
    lifted = poutine.trace(Lift()(vae.guide)).get_trace(x)
    assert [name for name, site in lifted.nodes.items() if site["type"] == "sample" and name in names] == names


def test_evaluation_leaves_no_entry_and_runs_on_a_leading_axis():
    vae, x = small_vae(), small_data()
    estimators = [pv.ImportanceSampling(vae.model, vae.guide, num_particles=20, seed=0)]
    estimators.append(pv.InferenceGaps(vae.model, vae.guide, num_particles=20, seed=0))
    for estimator in estimators:
        with quiet():
            estimator(x)
        executions = [known[-2:] for known in estimator._pair._known.values()]
        assert executions == [("leading", "leading")]
    assert not pyro.get_param_store()
    assert not any("unconstrained" in vars(p) for p in vae.parameters())
    pickle.dumps(vae)


def test_no_warning_reaches_the_user():
    vae, x = small_vae(), small_data()
    vae.decoder.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi_of(vae).step(x)
        svi_of(copy.deepcopy(vae)).step(x)
