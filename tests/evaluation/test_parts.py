"""Results are joined by the hundred, and that changes nothing."""

import dataclasses

import pytest
import torch
from pair_helpers import F64, diagonal_family, guide_of, linear_gaussian, model_of, quiet
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import pyro_vae as pv
from pyro_vae.errors import ArgumentError
from pyro_vae.evaluation import parts as parts_module
from pyro_vae.evaluation.parts import STEP, Parts, with_changed
from pyro_vae.records import Result, with_loader_index


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

    @classmethod
    def cat(cls, records):
        return cls(len(records))


class OwnCat(InSteps):
    """A subclass of a class that says so, with a `cat` of its own."""

    @classmethod
    def cat(cls, records):
        return cls(len(records))


class AsItIs(InSteps):
    """A subclass that joins as its base does."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Numbers(Result):
    _joins_in_steps = True

    numbers: torch.Tensor
    more: torch.Tensor | None = None

    @classmethod
    def cat(cls, records):
        more = None if records[0].more is None else torch.cat([r.more for r in records], 1)
        return cls(torch.cat([r.numbers for r in records]), more)


@pytest.mark.parametrize("kind", [Counting, OwnCat, InSteps, AsItIs], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("number", [1, STEP - 1, STEP, STEP + 1, 3 * STEP, 3 * STEP + 5])
def test_a_hundred_at_a_time_and_only_where_the_class_says_so(kind, number):
    parts = Parts()
    for _ in range(number):
        parts.add(kind())
    in_steps = number // STEP + number % STEP
    assert parts.joined().value == (number if kind in (Counting, OwnCat) else in_steps)


def test_what_was_joined_is_joined_by_the_hundred_again(monkeypatch):
    monkeypatch.setattr(parts_module, "STEP", 3)
    numbers = torch.arange(100)
    parts = Parts()
    for one in numbers.split(1):
        parts.add(Numbers(one))
        assert sum(map(len, parts._levels)) <= 2 * len(parts._levels)
    assert parts.joined().numbers.tolist() == numbers.tolist()


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


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors of all operations so far took at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.held, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, found)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held += storage.nbytes() - self.storages.get(storage._cdata, (None, 0))[1]
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.held > self.peak:  # unless some of them are gone
            self.storages = {key: one for key, one in self.storages.items() if not one[0].expired()}
            self.held = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.held)
        return found


def sizes_in(value):
    """Bytes of all tensors of a record."""
    if isinstance(value, torch.Tensor):
        return [value.nbytes]
    if isinstance(value, dict):
        return [size for part in value.values() for size in sizes_in(part)]
    if isinstance(value, Result):
        return [size for field in dataclasses.fields(value) for size in sizes_in(getattr(value, field.name))]
    return []


@pytest.mark.parametrize("kind", ["annealed", "auto", "expectation", "gaps", "importance", "sandwich"])
def test_evaluate_holds_one_record_and_no_more(monkeypatch, kind):
    """At any moment there is one record, two tensors at work, and a tenth: what is not yet joined."""
    monkeypatch.setattr(parts_module, "STEP", 10)
    with quiet():
        record, *_ = records_of(kind)
    record = type(record).cat([record] * 10)
    batches = (torch.zeros(len(record), 1) for _ in range(297))
    with LiveBytes() as live, quiet():
        whole = pv.evaluate(lambda x: with_changed(record, torch.Tensor, torch.clone), batches, progress=False)
    once = with_loader_index(type(record).cat([record] * 297), torch.arange(297 * len(record)))
    same(whole, once)
    sizes = sizes_in(whole)
    assert sum(sizes) <= live.peak <= 1.1 * sum(sizes) + 2 * max(sizes)


def test_what_is_joined_stays_usable_for_those_who_hold_it():
    with quiet():
        records = records_of("gaps")
    copies = [with_changed(record, torch.Tensor, torch.clone) for record in records]
    parts = Parts()
    for record in records:
        parts.add(record)
    same(parts.joined(), pv.Gaps.cat(copies))
    for record, copied in zip(records, copies, strict=True):
        same(record, copied)


def test_tensors_that_differ_are_joined_as_torch_does(monkeypatch):
    monkeypatch.setattr(parts_module, "STEP", 2)
    given = [torch.ones(2), torch.ones(1, dtype=F64), torch.ones(3, requires_grad=True), torch.ones(1)]
    others = [torch.full((2, len(one)), 2.0).T.contiguous().T for one in given]
    parts = Parts()
    for one, other in zip(given, others, strict=True):
        parts.add(Numbers(one, other))
    whole = parts.joined()
    assert whole.numbers.dtype == F64 and whole.numbers.requires_grad and whole.numbers.shape == (7,)
    whole.numbers.sum().backward()
    assert given[2].grad.tolist() == [1.0] * 3
    assert torch.equal(whole.more, torch.cat(others, 1))


def test_joining_by_other_means_than_torch_cat_is_told():
    part = parts_module.Part(torch.ones(2), torch.empty)
    with pytest.raises(TypeError, match="stack"):
        torch.stack([part, part])
