"""The model stands still to the last bit, whatever belongs to whom; everything else is put back."""

import random

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, linear_gaussian, model_of, one_line, quiet
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from refit_helpers import FEW, Linear, Network, adam, batches_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, DatumPlateError, EmptyBatchError, NonFiniteError, OptionError, StructureError

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.fixture(autouse=True)
def no_search(monkeypatch):
    """The gaps are no subject here: their proposals are fitted without the search for further modes."""
    monkeypatch.setattr("pyro_vae.evidence.fitted.why_not_searched", lambda proposal, dim: "left out here")


def refit(model, guide, x=X, optim=None, num_epochs=3, **options):
    options = {**FEW, "num_data": 10, "num_particles": 20, **options}  # gaps of one batch of training data
    loader = batches_of(x[:20], 10, shuffle=True)
    with quiet():
        return pv.refit_guide(model, guide, loader, optim or adam(), test=[x[20:]], num_epochs=num_epochs, **options)


def noisy(side, dtype=F64):
    """Batch norm and dropout."""
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3 * (1 + (side == "guide")))).to(
        dtype
    )


class Pairs:
    """One way each to write a model and a guide: `model`, `guide`, the tensors of the model and those of the guide."""

    @staticmethod
    def methods(registers_all=False):
        class VAE(nn.Module):
            def __init__(self):
                super().__init__()
                self.decoder, self.encoder = noisy("model"), noisy("guide")

            def model(self, x):
                pyro.module("vae" if registers_all else "decoder", self if registers_all else self.decoder)
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

            def guide(self, x):
                pyro.module("vae" if registers_all else "encoder", self if registers_all else self.encoder)
                with pyro.plate("data", len(x)):
                    loc, log_scale = self.encoder(x).chunk(2, -1)
                    pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        vae = VAE()
        return vae.model, vae.guide, list(vae.decoder.state_dict().values()), list(vae.encoder.parameters())

    @staticmethod
    def methods_that_register_all():
        """`pyro.module("vae", self)` in both, as in Pyro's own SS-VAE and DMM."""
        return Pairs.methods(registers_all=True)

    @staticmethod
    def closures_with_params():
        """`pyro.param` with constraints on both sides, and a module that nobody registers."""
        decoder = nn.Linear(3, 3, dtype=F64)

        def model(x):
            scale = pyro.param("noise", x.new_ones(3), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

        def guide(x):
            weight = pyro.param("gain", 0.1 * torch.eye(3, dtype=F64))
            scale = pyro.param("scale", x.new_ones(3), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ weight, scale).to_event(1))

        model(X), guide(X)
        store = pyro.get_param_store()._params
        return model, guide, [store["noise"], *decoder.parameters()], [store["gain"], store["scale"]]

    @staticmethod
    def pyro_modules():
        class Model(PyroModule):
            def __init__(self):
                super().__init__()
                self.net = PyroModule[nn.Linear](3, 3, dtype=F64)
                self.noise = PyroParam(torch.ones(3, dtype=F64), dist.constraints.positive)

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.net(z), self.noise).to_event(1), obs=x)

        class Guide(PyroModule):
            def __init__(self):
                super().__init__()
                self.net = PyroModule[nn.Linear](3, 3, dtype=F64)
                self.scale = PyroParam(torch.ones(3, dtype=F64), dist.constraints.positive)

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(self.net(x), self.scale).to_event(1))

        model, guide = Model(), Guide()
        return model, guide, list(model.parameters()), list(guide.parameters())

    @staticmethod
    def ready_made():
        vae = pv.mlp_vae(3, latent_dim=2, likelihood=pv.nn.Normal(scale=1.0), hidden=(8,)).double()
        return vae.model, vae.guide, list(vae.decoder.parameters()), list(vae.encoder.parameters())

    @staticmethod
    def an_autoguide():
        """Not amortised: its means are one per datum of a batch of 20, as the loader has."""
        decoder = nn.Linear(3, 3, dtype=F64)

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        guide = AutoNormal(model, init_scale=0.5)
        guide(X[:10])
        return model, guide, list(decoder.parameters()), list(guide.parameters())

    @staticmethod
    def a_messenger():
        """A guide that runs the model itself, and so meets the model's parameters."""
        decoder = nn.Linear(3, 3, dtype=F64)

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        guide = AutoNormalMessenger(model, init_scale=0.5)
        guide(X[:10])
        own = [p for name, p in pyro.get_param_store()._params.items() if not name.startswith("decoder")]
        return model, guide, list(decoder.parameters()), own


NAMES = [name for name in vars(Pairs) if not name.startswith("_")]
SIZED = ("an_autoguide", "a_messenger")  # for batches of ten data


def everything(tensors):
    return [t.detach().clone() for t in tensors]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_moves_and_the_model_does_not(name):
    """Values, buffers, gradients and `requires_grad` of the model; modes of all; random state; and each step moves all."""
    torch.manual_seed(0)
    model, guide, of_model, of_guide = getattr(Pairs, name)()
    owner = getattr(model, "__self__", None)
    for param in of_model:
        if param.requires_grad:
            param.grad = torch.full_like(param, 3.0)
    if owner is not None and name == "methods":
        owner.encoder[2].eval()  # a mode of its own
    modes = [m.training for m in owner.modules()] if isinstance(owner, nn.Module) else []
    before, guide_before = everything(of_model), everything(of_guide)
    flags = [p.requires_grad for p in of_model]
    random_state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    x = X[:10].repeat(4, 1) if name in SIZED else X
    options = {"test": [x[:10]], "num_epochs": 3}
    fit = pv.refit_guide(
        model, guide, batches_of(x[:20], 10), adam(), **options, **{**FEW, "num_data": 20, "num_particles": 20}
    )
    assert same(before, of_model), "the model moved"
    assert [p.requires_grad for p in of_model] == flags
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in of_model if p.grad is not None)
    assert all(not torch.equal(a, b) for a, b in zip(guide_before, of_guide, strict=True)), "some of the guide stood still"
    assert ([m.training for m in owner.modules()] if isinstance(owner, nn.Module) else []) == modes
    assert torch.equal(torch.get_rng_state(), random_state[0]) and random.getstate() == random_state[1]
    assert numpy.random.get_state()[1].tolist() == random_state[2]
    assert len(fit.trained) == len(of_guide) and fit.shared == () and fit.num_updates == 6
    assert torch.equal(fit.test_before.evidence.log_evidence.isfinite(), torch.ones(10, dtype=torch.bool))


def test_dropout_and_batch_norm_are_on_in_the_guide_and_off_in_the_model():
    model, guide, _, _ = Pairs.methods()
    vae = model.__self__
    seen = {"encoder": set(), "decoder": set()}
    for side in seen:
        getattr(vae, side)[2].register_forward_hook(lambda module, args, out, side=side: seen[side].add(module.training))
    mean = vae.encoder[1].running_mean.clone()
    watched = pv.BetaTrace_ELBO()
    inner = watched.loss_and_grads

    def loss_and_grads(*args, **kwargs):
        for side in seen.values():
            side.clear()
        loss = inner(*args, **kwargs)
        assert seen == {"encoder": {True}, "decoder": {False}}
        return loss

    watched.loss_and_grads = loss_and_grads
    refit(model, guide, loss=watched)
    assert not torch.equal(vae.encoder[1].running_mean, mean)  # the guide's own statistics are learnt


def tied(detach=False, transposed=True):
    """A decoder whose weight is that of the encoder, transposed."""
    encoder, head = nn.Linear(3, 2, dtype=F64), nn.Linear(2, 4, dtype=F64)
    bias = nn.Parameter(torch.zeros(3, dtype=F64))

    def model(x):
        pyro.param("bias", bias)
        weight = encoder.weight.detach() if detach else encoder.weight
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight + bias, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("head", head)
        loc, log_scale = head(encoder(x).tanh()).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, encoder, head


def test_tied_weights_stay_frozen_and_are_named():
    model, guide, encoder, head = tied()
    weight, others = encoder.weight.detach().clone(), everything([encoder.bias, *head.parameters()])
    fit = refit(model, guide)
    assert torch.equal(encoder.weight, weight)
    assert not any(torch.equal(a, b) for a, b in zip(others, [encoder.bias, *head.parameters()], strict=True))
    assert fit.shared == ("encoder$$$weight",) and "depends on them too: encoder$$$weight" in one_line(fit)


def test_a_model_that_reads_the_guide_past_autograd_is_found_and_the_guide_put_back():
    """Nothing in the graph tells that this weight is the model's; its densities do."""
    model, guide, encoder, head = tied(detach=True)
    before = everything([*encoder.parameters(), *head.parameters()])
    with pytest.raises(StructureError, match="without autograd.*restored"):
        refit(model, guide)
    assert same(before, [*encoder.parameters(), *head.parameters()])
    # the remedy: modules of their own
    other, own = tied(), nn.Linear(3, 2, dtype=F64)
    own.load_state_dict(encoder.state_dict())
    refit(other[0], Network(3, 2, 4))


def test_a_guide_that_shares_all_is_refused():
    shared = nn.Parameter(torch.zeros(3, dtype=F64))

    def model(x):
        mean = pyro.param("mean", shared)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("mean", shared), 0.5).to_event(1))

    with pytest.raises(OptionError, match="'mean' belong to the model too"):
        refit(model, guide)
    with pytest.raises(OptionError, match="no parameter to train that the model does not use"):
        refit(model, lambda x: model_free(x))


def model_free(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.5).to_event(1))


def test_a_network_that_nobody_registers_is_refused():
    net = nn.Linear(3, 3, dtype=F64)
    model, _, _, _ = Pairs.closures_with_params()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    with pytest.raises(OptionError, match="registered with Pyro"):
        refit(model, guide)


def test_a_branch_that_the_first_batch_does_not_take():
    """A parameter of each side that only some batches use: the model's stays, the guide's is trained."""
    encoder, late_encoder, late_decoder = (nn.Linear(3, 3, dtype=F64) for _ in range(3))

    def model(x, late):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            if late:
                pyro.module("late_decoder", late_decoder)
                z = late_decoder(z)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, late):
        pyro.module("encoder", encoder)
        if late:
            pyro.module("late_encoder", late_encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((late_encoder if late else encoder)(x), 0.5).to_event(1))

    batches = [(X[:10], False), (X[10:20], True)]
    kept = everything(late_decoder.parameters()), everything(late_encoder.parameters()), everything(encoder.parameters())
    options = {**FEW, "num_data": 20, "num_particles": 20}
    pv.refit_guide(model, guide, batches, adam(), test=[(X[20:], False)], num_epochs=4, args=tuple, **options)
    assert same(kept[0], late_decoder.parameters()) and all(p.requires_grad for p in late_decoder.parameters())
    assert not same(kept[1], late_encoder.parameters()) and not same(kept[2], encoder.parameters())


@pytest.mark.parametrize("make", [
    lambda: pyro.optim.Adam({"lr": 1e-2, "weight_decay": 0.5}),
    lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "weight_decay": 0.5}),
    lambda: pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.5}),
    lambda: pv.FusedOptim(torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.5}),
    lambda: pyro.optim.StepLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "step_size": 2}),
    lambda: pyro.optim.ReduceLROnPlateau({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}}),
    lambda: pv.FusedOptim(torch.optim.lr_scheduler.ReduceLROnPlateau,
                          {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}}),
])  # fmt: skip
def test_an_optimiser_with_momenta_for_the_model_does_not_move_it(make):
    """It has trained the whole pair before, so it has a state for the decoder, and decays weights without a gradient."""
    model, guide, of_model, of_guide = Pairs.methods()
    optim = make()
    svi = SVI(model, guide, optim, Trace_ELBO())
    for _ in range(3):
        svi.step(X[:20])
    before, guide_before = everything(of_model), everything(of_guide)
    refit(model, guide, optim=optim, num_epochs=4)
    assert same(before, of_model) and not same(guide_before, of_guide)
    svi.step(X[:20])  # and it goes on with the whole pair
    assert not same(before, of_model)


def test_schedulers_step_once_per_epoch():
    model, guide, _, _ = Pairs.pyro_modules()
    optim = adam(1.0e-2, fall=0.5)
    refit(model, guide, optim=optim, num_epochs=3)
    assert [group["lr"] for group in optim.optimizer.param_groups] == [1.0e-2 / 8]
    optim = pyro.optim.StepLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-2}, "step_size": 1, "gamma": 0.5})
    refit(model, guide, optim=optim, num_epochs=3)
    assert {one.get_last_lr()[0] for one in optim.optim_objs.values()} == {1.0e-2 / 8}


OBJECTIVES = [
    pv.BetaTrace_ELBO,
    pv.BetaTraceGraph_ELBO,
    pv.BetaTraceMeanField_ELBO,
    lambda: pv.ImportanceWeightedELBO(num_particles=5),
    lambda: pv.ImportanceWeightedELBO(num_particles=5, gradient="dreg"),
    lambda: pv.InclusiveKL(num_particles=5),
    Trace_ELBO,
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_objective_trains_it(objective):
    model, guide, of_model, of_guide = Pairs.ready_made()
    before, guide_before = everything(of_model), everything(of_guide)
    fit = refit(model, guide, loss=objective(), num_epochs=2)
    assert same(before, of_model) and not any(torch.equal(a, b) for a, b in zip(guide_before, of_guide, strict=True))
    assert fit.num_updates == 4


def test_enumerated_sites_are_summed_by_default(monkeypatch):
    """A mixture whose component the guide enumerates beside a continuous latent.

    The best guide of each datum is no subject here, and is sought in one round instead of three.
    """
    monkeypatch.setattr("pyro_vae.gaps.adam.MAX_ROUNDS", 1)
    means = torch.tensor([[-2.0, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=F64)
    net, choose = nn.Linear(3, 3, dtype=F64), nn.Linear(3, 2, dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=x.new_zeros(2)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(means[k] + z, 0.5).to_event(1), obs=x)

    @config_enumerate
    def guide(x):
        pyro.module("net", net)
        pyro.module("choose", choose)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=choose(x)))
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    before = everything([*net.parameters(), *choose.parameters()])
    fit = refit(model, guide, num_epochs=30)
    assert not any(torch.equal(a, b) for a, b in zip(before, [*net.parameters(), *choose.parameters()], strict=True))
    assert float(fit.changes["elbo"].value) > 0
    refit(model, guide, loss=TraceEnum_ELBO(max_plate_nesting=1), num_epochs=1)


def test_two_latents_in_another_order_masks_and_keyword_arguments():
    net = nn.Linear(3, 2, dtype=F64)

    def model(*, x, seen):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(x.new_full((len(x),), 2.0), 1.0))
            b = pyro.sample("b", dist.Normal(x.new_zeros(len(x)), 1.0))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal((b + a).unsqueeze(-1).expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(*, x, seen):
        pyro.module("net", net)
        loc, scale = net(x.nan_to_num(0.0)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(loc, 0.5))
            pyro.sample("a", dist.LogNormal(scale, 0.5))

    x = X.abs().clone()
    x[3] = torch.nan
    seen = ~x.isnan().any(-1)
    batches = [{"x": part, "seen": kept} for part, kept in zip(x.split(20), seen.split(20), strict=True)]
    options = {**FEW, "num_data": 20, "num_particles": 20}
    fit = pv.refit_guide(model, guide, batches[:1], adam(), test=batches[1:], num_epochs=30, **options)
    assert float(fit.changes["elbo"].value) > 0 and fit.trained == ("net$$$bias", "net$$$weight")


def test_sites_of_the_prior_and_a_whole_call_as_one_datum():
    model, guide, of_model, _ = Pairs.pyro_modules()

    def with_noise(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            extra = pyro.sample("extra", dist.Normal(x.new_zeros(3), 0.1).to_event(1))
            pyro.sample("x", dist.Normal(z + extra, 1.0).to_event(1), obs=x)

    assert refit(with_noise, guide, prior_sites=("extra",)).num_updates == 6
    before = everything(of_model)
    options = {**FEW, "num_data": 3, "num_particles": 20, "datum_plate": None}
    pv.refit_guide(model, guide, X[:20].split(5), adam(), test=X[20:].split(5), num_epochs=2, **options)
    assert same(before, of_model)


def test_a_seed_fixes_all_of_it():
    def run(seed):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, _, of_guide = Pairs.methods()
        torch.manual_seed(random.randrange(1000))
        fit = refit(model, guide, seed=seed, held_out=[X[20:30]], every=2)
        return everything(of_guide), fit.test_after.elbo, fit.history.elbo

    one, again, other = run(1), run(1), run(2)
    assert same(one[0], again[0]) and torch.equal(one[1], again[1]) and torch.equal(one[2], again[2])
    assert not same(one[0], other[0])


def test_a_subsampled_plate_holds_the_same_data_both_times():
    """Without a seed, too: changes are paired by datum."""
    encoder, decoder = nn.Linear(3, 4, dtype=F64), nn.Linear(2, 3, dtype=F64)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=8) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x[index])

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=8) as index:
            loc, log_scale = encoder(x[index]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    with quiet():
        options = {**FEW, "num_particles": 20, "seed": None}
        fit = pv.refit_guide(model, guide, [X], adam(), test=[X], num_epochs=20, held_out=[X], every=5, **options)
    for data in ("test", "train"):
        before, after = (getattr(fit, f"{data}_{when}").evidence.index for when in ("before", "after"))
        assert torch.equal(before, after)
    near = 5 * float(fit.changes["log_evidence"].std_error)
    assert abs(float(fit.changes["log_evidence"].value)) < near < 0.5
    assert len(fit.history) == 5


def test_it_trains_under_no_grad_and_inside_of_handlers():
    model, guide, of_model, of_guide = Pairs.pyro_modules()
    before, guide_before = everything(of_model), everything(of_guide)
    with torch.no_grad(), pyro.poutine.trace() as trace, pyro.poutine.mask(mask=False):
        refit(model, guide)
    assert not list(trace.trace.nodes)
    assert same(before, of_model) and not any(torch.equal(a, b) for a, b in zip(guide_before, of_guide, strict=True))


@pytest.mark.parametrize("objective", [pv.BetaTraceMeanField_ELBO, pv.ImportanceWeightedELBO])
def test_compiled_steps_train_the_guide_alone(objective):
    model, guide, of_model, of_guide = Pairs.ready_made()
    before, guide_before = everything(of_model), everything(of_guide)
    optim = pv.FusedOptim(torch.optim.Adam, {"lr": 1e-2})
    refit(model, guide, loss=objective(num_particles=2, compile=True), optim=optim, held_out=[X[20:]], every=2)
    assert same(before, of_model) and not any(torch.equal(a, b) for a, b in zip(guide_before, of_guide, strict=True))


# Ends of a training


class Fails:
    """An objective that fails, or is interrupted, at its n-th call."""

    def __init__(self, number, error):
        self.inner, self.number, self.error, self.calls = pv.BetaTrace_ELBO(), number, error, 0

    def loss_and_grads(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.number:
            if isinstance(self.error, float):
                return self.error
            raise self.error
        return self.inner.loss_and_grads(*args, **kwargs)


def test_an_interrupt_keeps_the_best_so_far():
    model, guide, of_model, of_guide = Pairs.methods()
    before = everything(of_guide)
    fit = refit(model, guide, loss=Fails(4, KeyboardInterrupt()), num_epochs=10)
    assert fit.stopped == "interrupted" and fit.num_updates == 3 and "was interrupted" in one_line(fit)
    assert not same(before, of_guide) and all(p.requires_grad for p in model.__self__.parameters())
    bad = adam(1.0)  # every step makes it worse, so the best is the start
    before = everything(of_guide)
    fit = refit(model, guide, optim=bad, loss=Fails(6, KeyboardInterrupt()), num_epochs=10, held_out=[X[20:]], every=1)
    assert fit.stopped == "interrupted" and same(before, of_guide)


def test_held_out_data_under_which_it_diverges_say_so():
    model, guide, _, of_guide = Pairs.methods()
    before = everything(of_guide)
    with pytest.raises(NonFiniteError, match="learning rate"):
        refit(model, guide, optim=pyro.optim.SGD({"lr": 10.0}), num_epochs=10, held_out=[X[20:]], every=1)
    assert same(before, of_guide)


@pytest.mark.parametrize("error", [RuntimeError("boom"), float("nan"), float("inf")])
def test_an_error_puts_the_guide_back_and_everything_else(error):
    model, guide, of_model, of_guide = Pairs.methods()
    vae = model.__self__
    before, guide_before = everything(of_model), everything(of_guide)
    statistics = everything(vae.encoder.buffers())
    modes, hooks = [m.training for m in vae.modules()], len(torch.nn.modules.module._global_forward_pre_hooks)
    state = torch.get_rng_state()
    expected = RuntimeError if isinstance(error, RuntimeError) else NonFiniteError
    with pytest.raises(expected, match="boom|learning rate"):
        refit(model, guide, loss=Fails(4, error))
    assert same(before, of_model) and same(guide_before, of_guide) and same(statistics, vae.encoder.buffers())
    assert [m.training for m in vae.modules()] == modes and all(p.requires_grad for p in vae.parameters())
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == hooks
    assert torch.equal(torch.get_rng_state(), state)


# Simulated data


def test_data_simulated_from_the_model_count_as_updates():
    lm, x = linear_gaussian(latent_dim=2, data_dim=4, num_data=60)
    seen = []
    objective = pv.BetaTrace_ELBO()
    inner = objective.loss_and_grads
    objective.loss_and_grads = lambda model, guide, x: (seen.append(x.clone()), inner(model, guide, x))[1]
    fit = refit(model_of(lm), Linear(4, 2), x, loss=objective, simulated=2, num_epochs=2)
    assert fit.num_updates == len(seen) == 12
    simulated = torch.cat([batch for number, batch in enumerate(seen) if number % 3])
    assert len({float(value) for value in simulated[:, 0]}) == len(simulated)  # never the same twice
    assert not (torch.cdist(simulated, x).min(1).values < 1e-9).any()


def test_what_cannot_be_simulated_is_refused_before_anything_is_trained():
    _, guide, _, of_guide = Pairs.pyro_modules()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x / 10)

    before = everything(of_guide)
    with pytest.raises(ArgumentError, match="rescales"):
        refit(model, guide, simulated=1)
    assert same(before, of_guide)


# Refusals


def test_bad_input_is_refused_before_anything_runs():
    lm, x = linear_gaussian(num_data=20)
    model, guide = model_of(lm), Linear(4, 2)
    good = {"test": [x], "num_epochs": 1, "progress": False}
    for loader, match in ((x, "tensor"), (iter([x]), "not an iterator"), (TensorDataset(x), "DataLoader")):
        with pytest.raises(ArgumentError, match=match):
            pv.refit_guide(model, guide, loader, adam(), **good)
        with pytest.raises(ArgumentError, match=match):
            pv.refit_guide(model, guide, [x], adam(), **{**good, "held_out": loader})
    with pytest.raises(OptionError, match="FusedOptim"):
        pv.refit_guide(model, guide, [x], torch.optim.Adam(guide.parameters()), **good)
    with pytest.raises(OptionError, match="loss must be an objective"):
        pv.refit_guide(model, guide, [x], adam(), loss="elbo", **good)
    for option in ({"num_epochs": 0}, {"num_data": 0}, {"simulated": -1}, {"seed": -1}, {"num_particles": 1}):
        with pytest.raises(OptionError, match=next(iter(option))):
            pv.refit_guide(model, guide, [x], adam(), **{**good, **option})
    for option in ({"every": 0}, {"patience": 0}):
        with pytest.raises(OptionError, match=next(iter(option))):
            pv.refit_guide(model, guide, [x], adam(), held_out=[x], **{**good, **option})
    with pytest.raises(EmptyBatchError):
        pv.refit_guide(model, guide, [], adam(), **good)
    with pytest.raises(DatumPlateError):
        pv.refit_guide(model, guide, [x], adam(), datum_plate="other", **good)
    with pytest.raises(StructureError):  # the other guide draws other latents
        pv.refit_guide(model, guide, [x], adam(), other=lambda x: None, **good)


def test_the_bar_says_what_is_being_done(capsys):
    lm, x = linear_gaussian(num_data=40)
    refit(model_of(lm), Linear(4, 2), x, progress=True)
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("gaps before", "refit", "gaps after"))


def test_a_loader_with_labels():
    lm, x = linear_gaussian(num_data=40)
    loader = DataLoader(TensorDataset(x, torch.arange(40)), 10)
    fit = pv.refit_guide(model_of(lm), Linear(4, 2), loader, adam(), test=loader, num_epochs=1, **FEW)
    assert fit.num_updates == 4
