"""Which latents have a prior that depends on their own draw: by the order of draws, then by following them."""

import itertools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from chain_helpers import Chain
from pair_helpers import F64
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoNormal

from pyro_vae.objectives import depends_on_own_draw, out_of_order

X = torch.linspace(-1.0, 1.0, 4, dtype=F64)


def test_the_order_of_draws():
    assert out_of_order("abc", "abc") == []
    assert out_of_order("acb", "abc") == ["c"]
    assert out_of_order("cab", "abc") == ["c"]
    assert out_of_order("cba", "abc") == ["b", "c"]
    assert out_of_order(["u", "c", "v", "a"], ["a", "b", "c", "x"]) == ["c"]  # what one side lacks does not matter
    assert out_of_order(["a_unconstrained", "a", "b_unconstrained", "b"], "ab") == []
    assert out_of_order(["b_unconstrained", "a", "b"], "ab") == ["b"]  # b is drawn where its other name stands


@pytest.mark.parametrize("order", list(itertools.permutations(("z1", "z2", "z3"))))
@pytest.mark.parametrize("reads", (True, False))
def test_a_chain_in_every_order(order, reads):
    chain = Chain(order, reads)
    found = depends_on_own_draw(out_of_order(chain.order, ("z1", "z2", "z3")), chain.guide, chain.model, (X,), {})
    assert found == chain.sampled()


def constant_head():
    head = torch.nn.Linear(1, 1, dtype=F64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return 2 * value

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def doubled(value):
    return value * 2


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a deprecation, of another class in newer releases
    scripted = torch.jit.script(doubled)


def written(value):
    out = torch.zeros(len(value), dtype=F64)
    out[:] = value
    return out


HEAD = constant_head()
WAYS = {
    "plain": lambda z: z,
    "detached": lambda z: z.detach(),
    "item": lambda z: torch.zeros(4, dtype=F64) + z.sum().item(),
    "a branch that both draws take": lambda z: torch.full((4,), float(z.sum() > 1e9), dtype=F64),
    "numpy": lambda z: torch.as_tensor(np.asarray(z.detach().numpy())),
    "a list": lambda z: torch.tensor(z.tolist(), dtype=F64),
    "written in place": written,
    "added in place": lambda z: torch.zeros(4, dtype=F64).add_(z),
    "vmap": lambda z: torch.vmap(lambda row: 2 * row)(z),
    "scripted": scripted,
    "own gradient": Doubled.apply,
    "a head of zeros": lambda z: HEAD(z[:, None])[:, 0],
    "a head of zeros behind a write": lambda z: HEAD(written(z)[:, None])[:, 0],
    "a head of zeros behind a script": lambda z: HEAD(scripted(z)[:, None])[:, 0],
    "a mask": None,
}


def two(way, side):
    """p: h2, then h1 given h2; q: h1, then h2 given h1. One of them depends on the other in some way, one plainly."""
    through = {other: (lambda z: z) for other in ("guide", "model")} | {side: way}

    def model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Normal(torch.zeros_like(x), 1.0))
            if way is None:
                with poutine.mask(mask=h2 > 0):
                    pyro.sample("h1", dist.Normal(torch.zeros_like(x), 1.0))
            else:
                pyro.sample("h1", dist.Normal(through["model"](h2), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Normal(x, 1.0))
            pyro.sample("h2", dist.Normal(h1 if way is None else through["guide"](h1), 1.0))

    return model, guide


@pytest.mark.parametrize("side", ("guide", "model"))
@pytest.mark.parametrize("way", WAYS)
def test_no_way_through_a_program_is_missed(way, side):
    model, guide = two(WAYS[way], side)
    weight, state = HEAD.weight.clone(), torch.get_rng_state()
    assert depends_on_own_draw(["h1"], guide, model, (X,), {}) == {"h1"}
    assert torch.equal(HEAD.weight, weight) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("side", ("guide", "model"))
@pytest.mark.parametrize("way", (lambda z: torch.zeros(len(z), dtype=F64), lambda z: X))
def test_independence_is_seen(way, side):
    model, guide = two(way, side)
    assert depends_on_own_draw(["h1"], guide, model, (X,), {}) == frozenset()


def test_by_way_of_a_site_that_is_drawn_from_the_prior():
    """h2 reaches the prior of h1 through w, which the guide lacks."""

    def model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Normal(torch.zeros_like(x), 1.0))
            w = pyro.sample("w", dist.Normal(h2, 1.0))
            pyro.sample("h1", dist.Normal(w, 1.0))

    def guide(x, reads=True):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Normal(x, 1.0))
            pyro.sample("h2", dist.Normal(h1 if reads else x, 1.0))

    assert depends_on_own_draw(["h1"], guide, model, (X,), {}) == {"h1"}
    assert depends_on_own_draw(["h1"], lambda x: guide(x, False), model, (X,), {}) == frozenset()


def test_a_discrete_draw():
    def model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(torch.full_like(x, 0.5)))
            pyro.sample("h1", dist.Bernoulli(0.1 + 0.8 * h2))

    def guide(x):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Bernoulli(torch.full_like(x, 1e-9)))  # all draws alike
            pyro.sample("h2", dist.Bernoulli(0.1 + 0.8 * h1))

    assert depends_on_own_draw(["h1"], guide, model, (X,), {}) == {"h1"}


@pytest.mark.parametrize("kinds", ((AutoNormal, AutoNormal), (AutoDiagonalNormal, AutoNormal)))
def test_autoguides_one_after_the_other(kinds):
    """They are independent of each other, whatever their order."""
    model = two(lambda z: z, "model")[0]
    guide = AutoGuideList(model)
    for kind, name in zip(kinds, ("h1", "h2"), strict=True):
        guide.append(kind(poutine.block(model, expose=[name])))
    guide(X)
    sites = poutine.trace(guide).get_trace(X).nodes
    assert out_of_order(sites, ("h2", "h1")) == ["h1"]
    assert depends_on_own_draw(["h1"], guide, model, (X,), {}) == frozenset()


def test_a_program_that_cannot_be_followed_counts_as_dependent():
    def refuses(x):
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Normal(x, 1.0))
            assert type(h1) is torch.Tensor
            pyro.sample("h2", dist.Normal(x, 1.0))

    model = two(lambda z: z, "model")[0]
    assert depends_on_own_draw(["h1"], refuses, model, (X,), {}) == {"h1"}
