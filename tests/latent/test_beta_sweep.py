"""`beta_sweep` against the closed form of linear VAEs, and that it leaves the user's state alone."""

import json
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, SIGMAS, exact_family, guide_of, linear_gaussian, model_of, one_line, quiet
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    EmptyBatchError,
    GlobalLatentError,
    InvalidDataError,
    NonFiniteError,
    OptionError,
    SupportError,
    UnreliableEvidenceWarning,
)
from pyro_vae.exact import LinearGaussian
from pyro_vae.latent import beta_sweep

VARIANCE = 0.16
NAMES = ("rate", "distortion", "elbo", "log_evidence")
fast = partial(pyro.optim.Adam, {"lr": 0.03})


def spectrum_data(num_data=300):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(num_data, 5, generator=generator) * torch.tensor([2.0, 1.5, 1.0, 0.5, 0.3])
    return x - x.mean(0)


def linear_vae(beta):
    vae = pv.LinearVAE(5, 2, scale=VARIANCE**0.5)
    return vae.model, vae.guide


def named_pair(beta):
    """As in Pyro's examples: `pyro.module` under names that every pair uses, and a `pyro.param`."""
    decoder, encoder = nn.Linear(2, 5), nn.Linear(5, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), VARIANCE**0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", lambda: torch.full((2,), 0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return model, guide


def sweep(make_pair=linear_vae, loader=None, betas=(1.0,), **options):
    loader = [spectrum_data(40)] if loader is None else loader
    return beta_sweep(make_pair, loader, betas, **{"num_epochs": 3, "progress": False, "seed": 0, **options})


# --- the closed form ---


@pytest.mark.parametrize("make_pair", [linear_vae, named_pair])
def test_linear_vaes_end_on_the_curve_of_the_best_models(make_pair):
    """beta R + D above its minimum over all models and guides, and within 0.04 nats of it; the slope is -beta between."""
    x, betas = spectrum_data(), (0.5, 1.0, 2.0)
    result = sweep(make_pair, [x], betas, num_epochs=300, optimizer=fast)
    best = [LinearGaussian.fit_beta(x.double(), 2, VARIANCE, beta) for beta in betas]
    points = [lm.rate_distortion(x.double(), torch.tensor([beta], dtype=F64)) for lm, beta in zip(best, betas, strict=True)]
    for i, (beta, point, lm) in enumerate(zip(betas, points, best, strict=True)):
        excess = float(beta * result.rate[i] + result.distortion[i]) - float(beta * point.rate + point.distortion)
        error = beta * float(result.std_errors["rate"][i]) + float(result.std_errors["distortion"][i])
        assert -SIGMAS * error < excess < 0.04 + SIGMAS * error and error < 0.03
        assert abs(float(result.rate[i] - point.rate)) < 0.1
        assert abs(float(result.log_evidence[i]) - float(lm.log_evidence(x.double()).mean())) < 0.05
        assert float(result.elbo[i]) < float(result.log_evidence[i])
    slopes = (result.distortion.diff() / result.rate.diff()).tolist()
    assert -1.0 < slopes[0] < -0.5 and -2.0 < slopes[1] < -1.0
    assert bool((result.rate.diff() < 0).all()) and bool((result.distortion.diff() > 0).all())
    assert torch.allclose(result.elbo, -(result.rate + result.distortion), atol=1e-4)


def test_what_is_measured_is_what_a_user_would_measure():
    """Against the closed forms of the returned pair: its own guide and decoder, on the test data."""
    x, test = spectrum_data(200), spectrum_data(50)
    vaes = []

    def make_pair(beta):
        vaes.append(pv.LinearVAE(5, 2, scale=VARIANCE**0.5).double())
        return vaes[-1].model, vaes[-1].guide

    result = sweep(
        make_pair, [x.double()], (3.0, 0.0), num_epochs=30, optimizer=fast, test_loader=DataLoader(test.double(), 15)
    )
    assert result.beta.tolist() == [3.0, 0.0] and result.num_data == 50 and result.num_updates == 30
    for i, vae in enumerate(vaes):
        with torch.no_grad():
            lm, q = vae.exact(), vae.encode(test.double())
        truths = (lm.rate(q), lm.distortion(test.double(), q), lm.elbo(test.double(), q), lm.log_evidence(test.double()))
        for name, truth in zip(NAMES, truths, strict=True):
            found, error = float(getattr(result, name)[i]), float(result.std_errors[name][i])
            assert abs(found - float(truth.mean())) < SIGMAS * error + 1e-9 and error < 0.2, (name, found, truth.mean())
        sampling = float(truths[3].std()) / 50**0.5
        assert float(result.sampling_errors["log_evidence"][i]) == pytest.approx(sampling, rel=0.05)
    assert result.rate.dtype == F64


# --- the user's state ---


def test_the_user_s_store_and_random_state_stay():
    x = spectrum_data(40)
    mine = torch.tensor([1.0, 2.0])
    with pyro.poutine.block():
        pyro.param("scale", mine, constraint=dist.constraints.positive)
        pyro.param("decoder$$$weight", torch.zeros(1))
    store = pyro.get_param_store()
    before = {name: (value.clone(), id(store._params[name])) for name, value in store.items()}
    state = torch.random.get_rng_state()
    result = sweep(named_pair, [x], (0.5, 2.0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: id(store._params[name]) for name in store} == {name: number for name, (_, number) in before.items()}
    assert all(torch.equal(store[name], value) for name, (value, _) in before.items())
    assert set(result.stores[0]["params"]) == {
        "decoder$$$weight",
        "decoder$$$bias",
        "encoder$$$weight",
        "encoder$$$bias",
        "scale",
    }


def test_users_can_go_on_with_the_pairs():
    """The returned store makes the pair what it was when it was measured, and lets it train on."""
    x = spectrum_data(40)
    result = sweep(named_pair, [x], (0.5, 2.0), num_epochs=40, optimizer=fast)
    scales = []
    for i, (model, guide) in enumerate(result.pairs):
        with pyro.get_param_store().scope(result.stores[i]):
            with quiet():
                elbo = pv.ImportanceSampling(model, guide, num_particles=2000, seed=1)(x).elbo.mean()
            assert float(elbo) == pytest.approx(float(result.elbo[i]), abs=5 * float(result.std_errors["elbo"][i]) + 0.03)
            scales.append(pyro.param("scale").clone())
            svi = SVI(model, guide, fast(), Trace_ELBO())
            svi.step(x)
            assert not torch.equal(pyro.param("scale"), scales[-1])
    assert not torch.allclose(scales[0], scales[1])
    assert not list(pyro.get_param_store().keys())


def test_an_error_inside_puts_the_store_back():
    pyro.param("mine", torch.ones(2))

    def make_pair(beta):
        pyro.param("theirs", torch.ones(1))
        if beta == 2.0:
            raise KeyError("here")
        return linear_vae(beta)

    state = torch.random.get_rng_state()
    with pytest.raises(KeyError, match="here"):
        sweep(make_pair, betas=(1.0, 2.0))
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeds():
    x = spectrum_data(40)
    loader = DataLoader(TensorDataset(x), 16, shuffle=True)
    first, again, other = (sweep(loader=loader, betas=(1.0, 2.0), seed=seed) for seed in (3, 3, 4))
    assert first.num_updates == 9
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    alone = sweep(loader=loader, betas=(2.0,), seed=3)
    assert torch.equal(alone.rate[0], first.rate[1])  # every beta starts alike
    state = torch.random.get_rng_state()
    sweep(loader=loader, seed=None)
    assert not torch.equal(torch.random.get_rng_state(), state)


# --- other pairs, objectives and estimators ---


def test_an_autoguide_and_another_objective_and_estimator():
    lm, x = linear_gaussian(num_data=5)

    def make_pair(beta):
        model = model_of(lm)
        return model, AutoNormal(model)

    asked = []

    def objective(beta):
        asked.append(beta)
        return pv.BetaTrace_ELBO(beta=beta)

    result = sweep(
        make_pair,
        [x],
        (1, 4),
        num_epochs=400,
        optimizer=fast,
        objective=objective,
        evidence=partial(pv.ImportanceSampling, num_particles=2000, jackknife=1),
    )
    assert asked == [1.0, 4.0] and result.bound == "consistent"
    exact = float(lm.log_evidence(x).mean())
    assert torch.allclose(result.log_evidence, torch.full((2,), exact, dtype=F64), atol=0.1)
    best = float(lm.elbo(x, lm.optimal_diagonal(x)).mean())
    assert best - 0.15 < float(result.elbo[0]) < best + 0.02 and float(result.rate[1]) < float(result.rate[0]) - 0.5


def test_networks_with_batch_norm_are_measured_in_eval_mode_and_come_back_as_they_were():
    def make_pair(beta):
        encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        decoder = nn.Linear(2, 6)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.decoder = decoder

            def forward(self, x):
                pyro.module("decoder", self.decoder)
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = encoder

            def forward(self, x):
                pyro.module("encoder", self.encoder)
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))

        return Model(), Guide()

    x = (torch.rand(24, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    result = sweep(make_pair, [x])
    assert bool(result.log_evidence.isfinite().all())
    norm = result.pairs[0][1].encoder[1]
    assert norm.training and int(norm.num_batches_tracked) == 3


def test_unreliable_evidence_warns_once_for_all_batches():
    lm, x = linear_gaussian(latent_dim=4, num_data=8)

    def make_pair(beta):
        offset = torch.zeros(4, dtype=F64)

        def guide(x):
            loc = pyro.param("loc", offset.clone())
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 0.15).expand([4]).to_event(1))

        return model_of(lm), guide

    with pytest.warns(UnreliableEvidenceWarning) as caught:
        loader = DataLoader(TensorDataset(x), 2)
        result = sweep(make_pair, loader, evidence=partial(pv.ImportanceSampling, num_particles=200))
    assert len(caught) == 1 and "of 8 data" in str(caught[0].message)
    count = int(result.doubts["tails"][0])
    assert count > 0 and result.to_dict()["doubts"] == {"tails": [count], "precision": [0]}
    assert "(in doubt)" in one_line(result) and f"error of log p(x) not to be trusted: tails {count} of 8" in one_line(
        result
    )


def test_the_record_prints_and_goes_into_json():
    result = sweep(betas=(0.5, 2.0))
    lines = str(result).splitlines()
    assert (
        len(lines) == 5
        and "in doubt" not in one_line(result)
        and "Monte Carlo error" in lines[1]
        and lines[3].split()[0] == "0.5"
    )
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["beta"] == [0.5, 2.0] and plain["rate"] == result.rate.tolist() and "pairs" not in plain
    assert plain["std_errors"]["elbo"] == result.std_errors["elbo"].tolist()


# --- refusals, before anything is trained where that can be known ---


def untouched(beta):
    raise AssertionError("make_pair was called")


@pytest.mark.parametrize(
    "options",
    [
        {"betas": ()},
        {"betas": (-1.0,)},
        {"betas": (math.inf,)},
        {"betas": (math.nan, 1.0)},
        {"betas": 1.0},
        {"betas": ("b",)},
        {"num_epochs": 0},
        {"num_epochs": 1.5},
        {"seed": -1},
        {"optimizer": pyro.optim.Adam({"lr": 0.1}).optim_objs},
        {"objective": 3},
    ],
)
def test_bad_options(options):
    with pytest.raises(OptionError):
        sweep(untouched, **options)


def test_bad_loaders():
    x = spectrum_data(4)
    with pytest.raises(ArgumentError, match="iterable of batches"):
        sweep(untouched, x)
    with pytest.raises(ArgumentError, match="iterator"):
        sweep(untouched, iter([x]))
    with pytest.raises(ArgumentError, match="iterator"):
        sweep(untouched, [x], test_loader=iter([x]))
    with pytest.raises(EmptyBatchError):
        sweep(linear_vae, [])
    with pytest.raises(ArgumentError, match="tuple"):
        sweep(linear_vae, [x], args=lambda batch: batch)


def test_bad_data_and_pairs_before_any_training():
    def never():
        raise AssertionError("training began")

    x = spectrum_data(4)
    broken = x.clone()
    broken[1, 2] = math.nan
    with pytest.raises(InvalidDataError):
        sweep(linear_vae, [broken], optimizer=never)
    vae = pv.mlp_vae(5, latent_dim=2, likelihood=pv.nn.Bernoulli(), hidden=(4,))
    with pytest.raises(SupportError):
        sweep(lambda beta: (vae.model, vae.guide), [x], optimizer=never)
    with pytest.raises(ArgumentError, match=r"\(model, guide\)"):
        sweep(lambda beta: vae, [x], optimizer=never)

    def global_model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(), 1.0).expand([5]).to_event(1), obs=x)

    def global_guide(x):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    with pytest.raises(GlobalLatentError):
        sweep(lambda beta: (global_model, global_guide), [x], optimizer=never)


def test_pairs_that_share_parameters():
    vae = pv.LinearVAE(5, 2)
    with pytest.raises(ArgumentError, match="share parameters"):
        sweep(lambda beta: (vae.model, vae.guide), betas=(1.0, 2.0))
    lm, x = linear_gaussian(num_data=3)
    start = torch.zeros(2, dtype=F64)

    def guide(x):
        loc = pyro.param("loc", start)  # which Pyro trains in place
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ArgumentError, match="share parameters"):
        sweep(lambda beta: (model_of(lm), guide), [x], betas=(1.0, 2.0))


def test_a_loss_that_is_not_finite():
    """Steps so long that the squared error overflows; the user's store is put back."""

    lm, x = linear_gaussian(num_data=3)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(2, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    far = partial(pyro.optim.SGD, {"lr": 1e160})
    with pytest.raises(NonFiniteError, match="beta = 1 became inf in epoch 2"):
        sweep(lambda beta: (model_of(lm), guide), [x], optimizer=far, num_epochs=5)
    assert not list(pyro.get_param_store().keys())


def test_a_pair_without_parameters_is_measured_as_it_is():
    lm, x = linear_gaussian(num_data=4)
    result = sweep(lambda beta: (model_of(lm), guide_of(exact_family(lm))), [x], (1.0, 2.0), num_epochs=1)
    assert torch.allclose(result.elbo, lm.log_evidence(x).mean().expand(2), atol=1e-9)
