"""What all public names have in common: how they are built, documented, copied and pickled."""

import copy
import inspect
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import quiet
from torch import nn

import pyro_vae as pv
from pyro_vae.evidence import Estimator, OfPair
from pyro_vae.objectives.datum_elbo import DatumELBO
from pyro_vae.objectives.traces.beta_elbo import BetaELBO

# Whatever is public is held by the tests below: a new class needs no entry here.
CLASSES = [value for name in pv.__all__ if inspect.isclass(value := getattr(pv, name))]
OF_PAIRS = [made for made in CLASSES if issubclass(made, OfPair)]
OF_LOADERS = [made for made in OF_PAIRS if "loader" in inspect.signature(made.__call__).parameters]
ESTIMATORS = [m for m in OF_PAIRS if issubclass(m, Estimator) and "num_particles" in inspect.signature(m).parameters]
CHAINS = [made for made in OF_PAIRS if made not in (*ESTIMATORS, *OF_LOADERS)]
OBJECTIVES = [made for made in CLASSES if issubclass(made, BetaELBO)]
WEIGHTED = [made for made in CLASSES if issubclass(made, DatumELBO)]
SHARED = {"seed": None, "prior_sites": (), "check_support": True}


def second_moment(latents):
    return latents["z"].square()


FURTHER = {pv.PosteriorExpectation: {"f": second_moment}}  # what an estimator needs beside model and guide


def built(estimator, **options):
    return estimator(Model(), Guide(), **FURTHER.get(estimator, {}), **options)


def number_of(record):
    return record.value if isinstance(record, pv.Expectation) else record.log_evidence


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)

    def forward(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 2)

    def forward(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))


def test_there_is_something_to_hold():
    assert {pv.ImportanceSampling, pv.InferenceGaps} <= set(ESTIMATORS) and pv.SelfCheck in CHAINS
    assert {pv.ActiveUnits, pv.RateDistortion, pv.SampleCheck} <= set(OF_LOADERS)
    assert {pv.BetaTrace_ELBO} <= set(OBJECTIVES) and {pv.ImportanceWeightedELBO} <= set(WEIGHTED)
    objectives = {made for made in CLASSES if issubclass(made, pyro.infer.ELBO)}
    assert objectives == {*OBJECTIVES, *WEIGHTED}


@pytest.mark.parametrize("name", [n for n in pv.__all__ if not inspect.ismodule(getattr(pv, n))])
def test_every_public_name_says_what_it_is(name):
    doc = inspect.getdoc(getattr(pv, name))
    assert doc and len(doc.splitlines()) > 3, name


@pytest.mark.parametrize("name", pv.plots.__all__)
def test_every_plot_takes_a_result_and_an_ax_and_returns_the_ax(name):
    parameters = list(inspect.signature(getattr(pv.plots, name)).parameters.values())
    assert parameters[1].name == "ax" and parameters[1].default is None
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters[2:])


@pytest.mark.parametrize("estimator", ESTIMATORS + CHAINS)
def test_estimators_are_built_alike_and_documented_in_full(estimator):
    parameters = inspect.signature(estimator).parameters
    assert list(parameters)[:2] == ["model", "guide"]
    options = {n: p for n, p in parameters.items() if n not in ("model", "guide", *FURTHER.get(estimator, {}))}
    assert all(p.kind is p.KEYWORD_ONLY for p in options.values())
    assert {n: options[n].default for n in SHARED} == SHARED
    doc = inspect.getdoc(estimator)
    for name in parameters:
        assert f":param {name}:" in doc, name
    size = ["K", "(B,)"] if estimator in ESTIMATORS else ["B"]
    for part in ("log p(x)", *size, ":raises", "https://", "Example::"):
        assert part in doc, part


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_documented_and_are_objectives_of_pyro(objective):
    assert issubclass(objective, pyro.infer.ELBO)
    doc = inspect.getdoc(objective)
    for part in (
        "beta",
        "B data",
        "nats",
        "Example::",
        "BetaTrace_ELBO" if objective is not pv.BetaTrace_ELBO else ":raises",
    ):
        assert part in doc, part


@pytest.mark.parametrize("objective", WEIGHTED)
def test_objectives_with_weights_per_datum_are_built_alike_and_documented(objective):
    assert issubclass(objective, pyro.infer.ELBO)
    parameters = inspect.signature(objective).parameters
    assert all(p.kind is p.KEYWORD_ONLY for n, p in parameters.items() if n != "beta")
    assert parameters["datum_plate"].default == inspect.signature(pv.ImportanceSampling).parameters["datum_plate"].default
    doc = inspect.getdoc(objective)
    for part in (*(f":param {n}:" for n in parameters), "nats", ":raises", ":ivar terms:", "https://", "Example::"):
        assert part in doc, part


@pytest.mark.parametrize("estimator", OF_LOADERS)
def test_estimators_of_a_data_set_are_built_alike_and_documented(estimator):
    parameters = inspect.signature(estimator).parameters
    assert list(parameters)[:2] == ["model", "guide"]
    options = {n: p for n, p in parameters.items() if n not in ("model", "guide")}
    assert all(p.kind is p.KEYWORD_ONLY for p in options.values())
    assert {n: options[n].default for n in SHARED} == SHARED
    of_call = list(inspect.signature(estimator.__call__).parameters)
    assert [name for name in of_call if name in ("loader", "args", "progress")] == ["loader", "args", "progress"]
    doc = inspect.getdoc(estimator)
    for part in (*(f":param {n}:" for n in parameters), "nats", ":raises", "https://", "Example::"):
        assert part in doc, part


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_give_the_same_numbers_and_share_nothing(estimator, copied):
    original = built(estimator, num_particles=20, seed=0)
    x = torch.randn(3, 4)
    with quiet():
        before = original(x)
        if copied == "deepcopy":
            other = copy.deepcopy(original)
        elif copied == "pickle":
            other = pickle.loads(pickle.dumps(original))
        else:
            file = io.BytesIO()
            torch.save(original, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert torch.equal(number_of(other(x)), number_of(before))
        with torch.no_grad():
            other._pair.model.decoder.bias += 1.0
        assert torch.equal(number_of(original(x)), number_of(before))
        assert not torch.equal(number_of(other(x)), number_of(before))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_results_are_pickled_and_join(estimator):
    with quiet():
        record = built(estimator, num_particles=20, seed=0)(torch.randn(3, 4))
    again = pickle.loads(pickle.dumps(record))
    assert again.to_dict() == record.to_dict() or str(again) == str(record)  # NaN is not equal to itself
    assert len(type(record).cat([record, again])) == 6


@pytest.mark.parametrize("estimator", [made for made in OF_PAIRS if made is not pv.BidirectionalMonteCarlo])
def test_an_estimator_prints_as_one_line_with_what_was_chosen(estimator):
    made = built(estimator, seed=3)
    assert repr(made) == f"{estimator.__name__}(Model, Guide, seed=3)"
    again = pickle.loads(pickle.dumps(made))
    assert repr(again) == repr(made)
    assert "\n" not in repr(made)


def test_latents_are_not_printed():
    latents = {"z": torch.zeros(1000, 2)}
    assert (
        repr(pv.BidirectionalMonteCarlo(Model(), Guide(), latents=latents))
        == "BidirectionalMonteCarlo(Model, Guide, latents=dict)"
    )


def test_an_estimator_of_ones_own_may_say_as_much_as_it_likes():
    """The docstring may be indented or not, as Python 3.13 leaves it, or missing."""
    with_text = pv.ImportanceSampling.__bases__[0]
    for doc in (
        None,
        "One line.",
        ":param guide: in one line",
        "Text.\n\n:param model: a\n:param guide: b\n    and more\n\nEnd.",
    ):
        made = type("Own", (with_text,), {"__doc__": doc, "estimate": lambda self, call: None})
        if doc and "model" in doc:
            assert "and more\n:param seed: fixes" in made.__doc__ and made.__doc__.endswith("End.")
        assert repr(made(Model(), Guide())) == "Own(Model, Guide)"


@pytest.mark.parametrize("value", ["z", 3])
def test_prior_sites_are_a_list(value):
    for make in (lambda **o: pv.ImportanceSampling(Model(), Guide(), **o), pv.ImportanceWeightedELBO):
        with pytest.raises(pv.errors.OptionError, match="prior_sites must be a list of names of sites"):
            make(prior_sites=value)
        with pytest.raises(pv.errors.OptionError, match="datum_plate must be the name of a plate"):
            make(datum_plate=3)
    with pytest.raises(pv.errors.OptionError, match="evidence must be a class of estimators"):
        pv.InferenceGaps(Model(), Guide(), evidence=3)


@pytest.mark.parametrize(
    "call",
    [
        lambda built: pv.InferenceGaps(Model(), Guide(), evidence=built),
        lambda built: pv.SelfCheck(Model(), Guide(), evidence=built),
        lambda built: pv.LeaveOneOut(Model(), Guide(), evidence=built),
        lambda built: pv.beta_sweep(
            lambda beta: (Model(), Guide()), [torch.zeros(2)], betas=[1.0], num_epochs=1, evidence=built
        ),
        lambda built: pv.diagnose(Model(), Guide(), train=[torch.zeros(2)], test=[torch.zeros(2)], evidence=built),
    ],
    ids=["InferenceGaps", "SelfCheck", "LeaveOneOut", "beta_sweep", "diagnose"],
)
def test_an_estimator_that_is_built_cannot_build_others(call):
    built = pv.ImportanceSampling(Model(), Guide())
    with pytest.raises(pv.errors.OptionError, match=r"got one that is built: pass pv.ImportanceSampling, or"):
        call(built)
