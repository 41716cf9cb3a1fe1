"""Random models of enumerated sites in nested and sibling plates and chains, against Pyro's `TraceEnum_ELBO`."""

import functools
import random
from contextlib import ExitStack
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, quiet
from pyro import poutine
from pyro.infer import TraceEnum_ELBO

import pyro_vae as pv

PARALLEL = {"enumerate": "parallel"}
DIMS, SIZES = {"p": -2, "q": -3, "r": -2}, {"p": 3, "q": 2, "r": 4}
NUM_DATA = 3


@dataclass
class Statement:
    kind: str  # "class", "observation" or "chain"
    name: str
    context: tuple[str, ...]  # plates inside the datum
    num_values: int = 1
    read: list["Statement"] = field(default_factory=list)  # classes
    length: int = 0
    history: int = 1


def random_statements(draw):
    nested, sibling = ("p", "q"), ("r",)
    contexts = [(), *draw.choice([[], [("p",)], [("p",), nested], [("p",), sibling], [("p",), nested, sibling]])]
    with_chain = draw.choice(contexts)
    classes, statements = [], []
    for context in contexts:
        seen = lambda: [c for c in classes if set(c.context) <= set(context) and draw.random() < 0.5]  # noqa: B023, E731
        for _ in range(draw.choice([0, 1, 2])):
            classes.append(Statement("class", f"k{len(statements)}", context, draw.choice([2, 3]), seen()))
            statements.append(classes[-1])
        if draw.random() < 0.6:
            statements.append(Statement("observation", f"x{len(statements)}", context, read=seen()))
        if context == with_chain and draw.random() < 0.6:
            name, length, history = f"s{len(statements)}", draw.choice([2, 4, 6]), draw.choice([1, 1, 2])
            statements.append(Statement("chain", name, context, draw.choice([2, 3]), seen(), length, history))
    return [*statements, Statement("observation", "last", ())]


@functools.cache
def random_model(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    statements, known, masked = random_statements(draw), {}, draw.random() < 0.4

    def once(name, make):
        if name not in known:
            known[name] = make()
        return known[name]

    def table(name, *shape):
        return once(name, lambda: torch.rand(*shape, generator=generator, dtype=F64) + 0.05)

    def observe(name, mean, context):
        shape = [1, 1, NUM_DATA]
        for plate in context:
            shape[DIMS[plate]] = SIZES[plate]
        while shape[0] == 1 and len(shape) > 1:
            shape = shape[1:]
        x = once(name, lambda: torch.randn(shape, generator=generator, dtype=F64))
        kept = once(name + " mask", lambda: torch.rand(shape, generator=generator) < 0.8)
        with poutine.mask(mask=kept if masked else True):
            pyro.sample(name, dist.Normal(mean, 0.5), obs=x)

    def model():
        plates = {name: pyro.plate(name, SIZES[name], dim=DIMS[name]) for name in DIMS}
        values = {}
        with pyro.plate("data", NUM_DATA, dim=-1):
            for s in statements:
                read, sizes = tuple(values[c.name] for c in s.read), [c.num_values for c in s.read]
                with ExitStack() as stack:
                    for plate in s.context:
                        stack.enter_context(plates[plate])
                    if s.kind == "class":
                        probs = table(s.name, *sizes, s.num_values)
                        values[s.name] = pyro.sample(s.name, dist.Categorical(probs[read]), infer=PARALLEL)
                    elif s.kind == "observation":
                        observe(s.name, table(s.name + " means", *sizes, 1)[read][..., 0], s.context)
                    else:
                        before = (torch.tensor(0),) * s.history
                        for t in pyro.markov(range(s.length), history=s.history):
                            probs = table(s.name, *sizes, *[s.num_values] * (s.history + 1))[(*read, *before)]
                            now = pyro.sample(f"{s.name}_{t}", dist.Categorical(probs), infer=PARALLEL)
                            observe(f"{s.name}_x{t}", 2 * table(s.name + " means", s.num_values)[now], s.context)
                            before = (*before[1:], now)

    return model


def elbo_of_pyro(model, guide):
    return -TraceEnum_ELBO(max_plate_nesting=3, strict_enumeration_warning=False).loss(model, guide)


@functools.cache
def truth_of(seed):
    """log p(x), which is the ELBO of a guide without latents."""
    return elbo_of_pyro(random_model(seed), lambda: None)


@pytest.mark.parametrize("seed", range(40))
def test_the_sum_is_that_of_pyro(seed):
    model = random_model(seed)
    with quiet():
        found = pv.ImportanceSampling(model, lambda: None, num_particles=2, datum_plate="data", check=False, seed=0)()
        truth = truth_of(seed)
    assert len(found) == NUM_DATA
    assert found.log_evidence.sum().item() == pytest.approx(truth, abs=1e-8)


def guide_of(seed):
    """Enumerates some of the classes of the datum, each given those before it."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    classes = [s for s in random_statements(draw) if s.kind == "class" and not s.context]
    chosen = [s for s in classes if draw.random() < 0.7]
    tables = [
        torch.rand(*[c.num_values for c in chosen[:i]], s.num_values, generator=generator, dtype=F64) + 0.05
        for i, s in enumerate(chosen)
    ]

    def guide():
        values = ()
        with pyro.plate("data", NUM_DATA, dim=-1):
            for s, table in zip(chosen, tables, strict=True):
                probs = table[values].expand(NUM_DATA, s.num_values) if not values else table[values]
                values = (*values, pyro.sample(s.name, dist.Categorical(probs), infer=PARALLEL))

    return guide, len(chosen)


@pytest.mark.parametrize("seed", range(40))
def test_a_guide_that_enumerates_beside_them(seed):
    """log p(x) is that without a guide, and L[q] that of Pyro."""
    model, (guide, number) = random_model(seed), guide_of(seed)
    if not number:
        pytest.skip("no class of the datum")
    with quiet():
        found = pv.ImportanceSampling(model, guide, num_particles=2, datum_plate="data", check=False, seed=0)()
        truth, elbo = truth_of(seed), elbo_of_pyro(model, guide)
    assert found.log_evidence.sum().item() == pytest.approx(truth, abs=1e-8)
    assert found.elbo.sum().item() == pytest.approx(elbo, abs=1e-8)
