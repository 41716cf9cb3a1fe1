"""NumPy numbers are options like those of Python and are kept as plain numbers; True and 100.0 are no counts."""

import functools
import json
import pickle
from typing import Literal

import numpy as np
import pytest
import torch
from pair_helpers import exact_pair, linear_gaussian, quiet

import pyro_vae as pv
from pyro_vae.errors import OptionError
from pyro_vae.options import one_of, real_number, seed_or_none, whole_number

LM, X = linear_gaussian()
PAIR = exact_pair(LM)
VAE = pv.mlp_vae(4, 2, likelihood=pv.nn.Normal(1.0))
WHOLE = [7, np.int64(7), np.int32(7), np.uint8(7), np.int16(7)]
REAL = [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5)]
NO_NUMBERS = [True, np.True_, "7", None, float("nan"), np.float64("inf"), 7j]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_become_plain(value):
    assert whole_number("n", value) == 7 and type(whole_number("n", value)) is int
    assert type(seed_or_none(value)) is int
    assert type(real_number("r", value)) is float


@pytest.mark.parametrize("value", [*NO_NUMBERS, 7.0, np.float32(7.0), 0, np.int64(-7)], ids=repr)
def test_what_is_no_whole_number(value):
    with pytest.raises(OptionError, match="n must be a whole number of at least 1, got"):
        whole_number("n", value)


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_real_numbers_become_plain(value):
    assert real_number("r", value) == 0.5 and type(real_number("r", value)) is float


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, np.float32(-1)], ids=repr)
def test_what_is_no_real_number(value):
    with pytest.raises(OptionError, match="r must be a finite number of at least 0, got"):
        real_number("r", value)


@pytest.mark.parametrize(
    "ends, low, high", [("[]", True, True), ("(]", False, True), ("[)", True, False), ("()", False, False)]
)
def test_the_ends_of_an_interval(ends, low, high):
    for value, inside in ((0, low), (1, high), (0.5, True), (1.5, False), (-0.5, False)):
        if inside:
            assert real_number("r", value, highest=1.0, ends=ends) == value
        else:
            with pytest.raises(OptionError, match=r"r must be a finite number in .0, 1., got"):
                real_number("r", value, highest=1.0, ends=ends)
    with pytest.raises(OptionError, match="r must be a finite number above 0, got -1: as ever"):
        real_number("r", -1, ends="()", why="as ever")


def test_choices_and_seeds():
    one_of("kind", "a", Literal["a", "b"])
    assert seed_or_none(None) is None
    for value in ("c", 1, None):
        with pytest.raises(OptionError, match="kind must be one of 'a', 'b', got"):
            one_of("kind", value, Literal["a", "b"])
    for seed in (True, np.True_, -1, 1.0, "1"):
        with pytest.raises(OptionError, match="seed must be a whole number of at least 0, or None"):
            seed_or_none(seed)


def estimator(kind, **options):
    return functools.partial(kind, *PAIR, **options)


# What is built by one option, and where it is kept; each is a whole number of at least 3 at most.
COUNTS = {
    "ImportanceSampling": (estimator(pv.ImportanceSampling), "num_particles"),
    "AdaptiveImportanceSampling": (estimator(pv.AdaptiveImportanceSampling), "num_particles"),
    "gradients": (estimator(pv.AdaptiveImportanceSampling), "num_gradients"),
    "AnnealedImportanceSampling": (estimator(pv.AnnealedImportanceSampling), "num_steps"),
    "chains": (estimator(pv.AnnealedImportanceSampling), "num_chains"),
    "leapfrog": (estimator(pv.AnnealedImportanceSampling), "num_leapfrog"),
    "InferenceGaps": (estimator(pv.InferenceGaps), "num_particles"),
    "ActiveUnits": (estimator(pv.ActiveUnits), "num_particles"),
    "ELBOSurgery": (estimator(pv.ELBOSurgery), "num_particles"),
    "draws": (estimator(pv.ELBOSurgery), "num_draws"),
    "CollapseMonitor": (estimator(pv.CollapseMonitor), "num_particles"),
    "every": (estimator(pv.CollapseMonitor), "every"),
    "patience": (estimator(pv.CollapseMonitor), "patience"),
    "BetaTrace_ELBO": (pv.BetaTrace_ELBO, "num_particles"),
    "BetaTraceMeanField_ELBO": (pv.BetaTraceMeanField_ELBO, "num_particles"),
    "ImportanceWeightedELBO": (pv.ImportanceWeightedELBO, "num_particles"),
    "InclusiveKL": (pv.InclusiveKL, "num_particles"),
    "TotalCorrelationELBO": (pv.TotalCorrelationELBO, "dataset_size"),
    "LinearAnnealing": (pv.LinearAnnealing, "num_steps"),
    "delay": (functools.partial(pv.LinearAnnealing, 5), "delay"),
    "CyclicalAnnealing": (functools.partial(pv.CyclicalAnnealing, num_cycles=2), "period"),
    "Monitor": (functools.partial(pv.Monitor, pv.BetaTrace_ELBO()), "num_updates"),
    "Binomial": (pv.nn.Binomial, "total_count"),
    "Categorical": (lambda num_classes: pv.nn.Categorical(num_classes), "num_classes"),
}
SEEDS = {
    name: (functools.partial(getattr(pv, name), *PAIR), "seed")
    for name in (
        "ImportanceSampling",
        "AdaptiveImportanceSampling",
        "AnnealedImportanceSampling",
        "InferenceGaps",
        "ActiveUnits",
        "ELBOSurgery",
        "CollapseMonitor",
        "RateDistortion",
        "AggregatedPosterior",
        "SampleCheck",
        "MutualInformationGap",
        "SelfCheck",
    )
    if hasattr(pv, name)
}
REALS = {
    "beta": (pv.BetaTrace_ELBO, "beta"),
    "mean field": (pv.BetaTraceMeanField_ELBO, "beta"),
    "iwae": (pv.ImportanceWeightedELBO, "beta"),
    "information": (functools.partial(pv.TotalCorrelationELBO, dataset_size=10), "mutual_information"),
    "sleep": (pv.InclusiveKL, "sleep"),
    "threshold": (estimator(pv.ActiveUnits), "threshold"),
    "delta": (estimator(pv.ActiveUnits), "delta"),
    "share": (estimator(pv.CollapseMonitor), "share"),
    "end": (functools.partial(pv.LinearAnnealing, 10), "end"),
    "steepness": (functools.partial(pv.SigmoidAnnealing, 10), "steepness"),
    "ramp": (functools.partial(pv.CyclicalAnnealing, 10, 2), "ramp"),
    "scale": (pv.nn.Normal, "scale"),
}


@pytest.mark.parametrize("value", WHOLE, ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_numpy(name, value):
    make, option = COUNTS[name]
    built = make(**{option: value})
    kept = getattr(built, option, None)
    assert kept is None or (kept == 7 and type(kept) is int)


@pytest.mark.parametrize("value", [True, np.True_, 7.0, np.float64(7.0), "7", 0.5], ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_count_is_refused(name, value):
    make, option = COUNTS[name]
    with pytest.raises(OptionError, match=f"{option} must be a whole number of at least"):
        make(**{option: value})


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_of_numpy(name):
    make, option = SEEDS[name]
    kept = getattr(make(seed=np.int64(7)), "seed", 7)
    assert kept == 7 and type(kept) is int
    for seed in (True, np.True_, 1.0, -1, np.int64(-1)):
        with pytest.raises(OptionError, match="seed must be a whole number of at least 0"):
            make(seed=seed)


@pytest.mark.parametrize("value", REAL, ids=repr)
@pytest.mark.parametrize("name", REALS)
def test_numbers_of_numpy(name, value):
    make, option = REALS[name]
    kept = getattr(make(**{option: value}), {"scale": "option"}.get(option, option))
    assert kept == 0.5 and type(kept) is float
    assert json.dumps(kept)


@pytest.mark.parametrize(
    "value", [True, np.True_, "a half", float("nan"), np.float32("inf"), -0.5, np.float32(-0.5)], ids=repr
)
@pytest.mark.parametrize("name", REALS)
def test_what_is_no_number_is_refused(name, value):
    make, option = REALS[name]
    with pytest.raises(OptionError, match=f"{option} must be"):
        make(**{option: value})


@pytest.mark.parametrize("name", ["beta", "mean field", "iwae"])
def test_tensors_and_dicts_stay_legal_as_weights(name):
    make, _ = REALS[name]
    assert make(beta=torch.tensor(0.5)).beta == 0.5
    by_site = make(beta={"z": np.float32(0.5)}).beta["z"]
    assert by_site == 0.5 and type(by_site) is float
    for wrong in (torch.ones(2), torch.tensor(True), torch.tensor(-1.0)):
        with pytest.raises(OptionError, match="beta must be"):
            make(beta=wrong)


def test_free_bits_and_capacity_of_numpy():
    objective = pv.BetaTraceMeanField_ELBO(free_bits={"z": np.float32(0.5)})
    assert objective.schedules == {} and type(objective._target.nats["z"]) is float
    assert pv.BetaTraceMeanField_ELBO(free_bits=np.float32(0.0))._target is None
    pv.BetaTraceMeanField_ELBO(np.float32(1.0), capacity=np.int64(3))
    with pytest.raises(OptionError, match="free_bits of 'z' must be"):
        pv.BetaTraceMeanField_ELBO(free_bits={"z": True})


def test_schedules_that_return_numbers_of_numpy():
    objective = pv.BetaTrace_ELBO(lambda step: np.float32(0.5))
    objective.loss(VAE.model, VAE.guide, X.float())
    assert objective.terms.beta == 0.5
    objective.num_updates = np.int64(3)
    assert type(objective.num_updates) is int
    assert pickle.loads(pickle.dumps(pv.LinearAnnealing(np.int64(10)))) == pv.LinearAnnealing(10)


def test_runs_are_those_of_plain_numbers():
    with quiet():
        plain = pv.ImportanceSampling(*PAIR, num_particles=100, seed=3)(X)
        numpy = pv.ImportanceSampling(*PAIR, num_particles=np.int64(100), seed=np.int64(3))(X)
    assert torch.equal(plain.log_evidence, numpy.log_evidence)
    assert torch.equal(pv.simulate(PAIR[0], X, seed=np.int64(4)).latents["z"], pv.simulate(PAIR[0], X, seed=4).latents["z"])
    curve = pv.RateDistortion(*PAIR, betas=np.array([3.0, 1.0]), num_steps=np.int64(20), num_chains=np.int32(4), seed=0)
    assert curve.betas[1:] == [3.0, 1.0] and all(type(beta) is float for beta in curve.betas)
    with pytest.raises(OptionError, match="betas must be positive numbers"):
        pv.RateDistortion(*PAIR, betas=(3.0, True))


def test_units_and_models_of_numpy():
    walk = pv.traverse(VAE.model, VAE.guide, X.float(), datum=np.int64(1), units=np.int64(0), num_steps=np.int64(5))
    assert walk.means.shape[:2] == (1, 5)
    assert pv.manifold(VAE.model, VAE.guide, X.float(), units=(np.int64(0), np.int64(1)), num_steps=np.int64(3)).means.shape[
        :2
    ] == (3, 3)
    vae = pv.mlp_vae(np.int64(4), np.int64(2), likelihood=pv.nn.Normal(np.float32(1.0)), hidden=(np.int64(8),))
    assert torch.isfinite(torch.tensor(pv.BetaTrace_ELBO().loss(vae.model, vae.guide, X.float())))
