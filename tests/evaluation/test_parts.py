"""Results are joined by the hundred, and that changes nothing."""

import dataclasses

import pytest
import torch
from pair_helpers import F64, diagonal_family, guide_of, linear_gaussian, model_of, quiet

import pyro_vae as pv
from pyro_vae.errors import ArgumentError
from pyro_vae.evaluation import parts as parts_module
from pyro_vae.evaluation.parts import STEP, Parts
from pyro_vae.records import Result


def pair():
    lm, x = linear_gaussian(num_data=9)
    return x, model_of(lm), guide_of(diagonal_family(lm, 0.1, 1.2))


def records_of(kind):
    x, model, guide = pair()
    chains = {"num_steps": 5, "num_chains": 2, "progress": False}
    if kind == "sandwich":
        sim = pv.simulate(model, x, seed=0)
        data, latents = sim.observed["x"].split(3), sim.latents["z"].split(3)
        return [
            pv.BidirectionalMonteCarlo(model, guide, latents={"z": z}, seed=0, **chains)(part)
            for part, z in zip(data, latents, strict=True)
        ]
    estimator = {
        "annealed": lambda: pv.AnnealedImportanceSampling(model, guide, seed=0, **chains),
        "auto": lambda: pv.AutoEvidence(model, guide, tolerance=0.1, seed=0),
        "importance": lambda: pv.ImportanceSampling(model, guide, num_particles=120, seed=0),
        "expectation": lambda: pv.PosteriorExpectation(model, guide, lambda z: z["z"], num_particles=100, seed=0),
        "gaps": lambda: pv.InferenceGaps(model, guide, num_particles=100, seed=0),
    }[kind]()
    return [estimator(batch) for batch in x.split([2, 3, 1, 3])]


def same(one, other, name=""):
    """Bit for bit, but for the cost, which is a mean of means."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0)), name
    elif isinstance(one, Result):
        assert type(one) is type(other)
        for field in dataclasses.fields(one):
            same(getattr(one, field.name), getattr(other, field.name), field.name)
    elif isinstance(one, dict):
        assert list(one) == list(other), name
        for key in one:
            same(one[key], other[key], f"{name}[{key}]")
    else:
        assert one == (pytest.approx(other, rel=1e-12) if name == "cost" else other), name


@pytest.mark.parametrize("kind", ["annealed", "auto", "expectation", "gaps", "importance", "sandwich"])
def test_joined_in_steps_is_joined_at_once(kind):
    with quiet():
        records = records_of(kind)
    cat = type(records[0]).cat
    whole = cat(records)
    assert whole._joins_in_steps
    same(whole, cat([cat(records[:2]), *records[2:]]))
    same(whole, cat([records[0], cat(records[1:])]))
    same(whole, cat([cat([record]) for record in records]))


def test_fields_that_only_some_batches_have():
    with quiet():
        first, second, third, _ = records_of("importance")
    ends = torch.zeros(len(second), dtype=F64)
    other = dataclasses.replace(second, acceptance=ends, fingerprint=None, curve=None, checks={"search": ends > 0})
    mixed, cat = [first, other, third], pv.Evidence.cat
    same(cat(mixed), cat([cat(mixed[:2]), third]))
    same(cat(mixed), cat([first, cat(mixed[1:])]))


def test_every_class_that_says_so_is_tested():
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(Result) if kind.__module__.startswith("pyro_vae") and kind._joins_in_steps}
    assert ours == {pv.Evidence, pv.Expectation, pv.Gaps, pv.Sandwich}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Counting(Result):
    """How many records were joined: a `cat` that steps would change."""

    value: int = 1

    @classmethod
    def cat(cls, records):
        return cls(len(records))


class InSteps(Counting):
    _joins_in_steps = True


@pytest.mark.parametrize("number", [1, STEP - 1, STEP, STEP + 1, 3 * STEP, 3 * STEP + 5])
def test_a_hundred_at_a_time_and_only_where_the_class_says_so(number):
    parts, in_steps = Parts(), Parts()
    for _ in range(number):
        parts.add(Counting())
        in_steps.add(InSteps())
    assert parts.joined().value == number
    assert in_steps.joined().value == number // STEP + number % STEP


def test_evaluate_joins_in_steps_to_the_same_record(monkeypatch):
    x, model, guide = pair()
    estimator = pv.ImportanceSampling(model, guide, num_particles=20)
    found = []
    for step in (2, 1000):
        monkeypatch.setattr(parts_module, "STEP", step)
        with quiet():
            found.append(pv.evaluate(estimator, x.split(1), seed=0, progress=False))
    assert found[0].loader_index.tolist() == list(range(9))
    same(*found)


def test_a_record_without_a_length_or_warnings_is_joined_all_the_same():
    assert pv.evaluate(lambda x: Counting(), torch.zeros(3, 1).split(1), progress=False).value == 3


@pytest.mark.parametrize("found", [torch.tensor(1.0), torch.ones(3), 1.0, None, [1.0]], ids=str)
def test_a_result_that_cannot_be_joined_is_refused_at_the_first_batch(found):
    calls = []

    def run(x):
        calls.append(x)
        return found

    with pytest.raises(ArgumentError, match=f"batch 0 .*class method cat.*got a {type(found).__name__}: pass"):
        pv.evaluate(run, torch.zeros(3, 1).split(1), progress=False)
    assert len(calls) == 1
