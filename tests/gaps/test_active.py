"""Data that have not converged go on without the others, where the arguments can be cut."""

import pytest
import torch
from test_natural_gradients import COUNTS, DIAGONAL, best_elbo, diagonal, elbo_of_counts, opened, started, whole

from pyro_vae.errors import NonFiniteError
from pyro_vae.gaps import active
from pyro_vae.gaps.controls import Quadratic
from pyro_vae.gaps.natural_gradients import best_gaussian
from pyro_vae.gaps.optimum import member
from pyro_vae.kernel import Call
from pyro_vae.proposals import GaussianProposal, LatentSpace, gaussian

MANY = COUNTS.repeat(3, 1)
HARD = [2, 11, 20]  # start far from their optimum


@pytest.fixture
def parts(monkeypatch):
    """Indices of the data of each part that is opened, in batches however small."""
    monkeypatch.setattr(active, "SMALL", 0)
    found, for_part = [], LatentSpace.for_part

    def seen(space, part, kept):
        found.append(kept.tolist())
        return for_part(space, part, kept)

    monkeypatch.setattr(LatentSpace, "for_part", seen)
    return found


def fit(model, guide, *args, tolerance=0.02, before_rounds=lambda: None):
    """q, what is left, and the cost of the rounds, from a start that is several nats short for the hard data."""
    with torch.no_grad(), opened(model, guide, *args) as call:
        space, family, component = started(call)
        near = member(component, family.blocks)
        loc = near.loc.clone()
        loc[HARD] += 4 * near.tril.diagonal(dim1=-2, dim2=-1)[HARD]
        before_rounds()
        before = call.cost
        q, left = best_gaussian(space, GaussianProposal(loc, near.tril), Quadratic(component), family.blocks, tolerance, 2.0)
        return q, left, call.cost - before


def test_the_rest_go_on_alone_and_reach_their_optimum(parts, monkeypatch):
    q, left, cost = fit(whole, diagonal, MANY)
    assert parts and set(parts[0]) >= set(HARD) and all(len(part) <= len(MANY) // 2 for part in parts)
    short = best_elbo(COUNTS, DIAGONAL).repeat(3) - elbo_of_counts(MANY, q.loc, q.tril)
    assert float(short.max()) < 0.1 and bool(((short < 0.05) | (left > 0.05)).all())
    monkeypatch.setattr(active, "SMALL", float("inf"))
    together = fit(whole, diagonal, MANY)
    assert cost < 0.8 * together[2]
    done = torch.ones(len(MANY), dtype=torch.bool)
    done[parts[0]] = False
    others = elbo_of_counts(MANY, q.loc, q.tril) - elbo_of_counts(MANY, together[0].loc, together[0].tril)
    assert float(others[done].abs().max()) < 0.04


def test_the_cost_counts_the_parts_by_their_size(parts, monkeypatch):
    spent, score, draw_prior = [], Call.score, Call.draw_prior

    def counted(run):
        def counting(call, *args):
            before = call.cost
            result = run(call, *args)
            spent.append((call.cost - before) * call.batch_size)
            return result

        return counting

    def count():
        monkeypatch.setattr(Call, "score", counted(score))
        monkeypatch.setattr(Call, "draw_prior", counted(draw_prior))

    _, _, cost = fit(whole, diagonal, MANY, before_rounds=count)
    assert parts and abs(cost - sum(spent) / len(MANY)) <= 1


def test_data_that_cannot_be_cut_stay_together(parts, monkeypatch):
    """The program holds its data itself: the numbers are those of a fit without parts, bit for bit."""
    own = (lambda: whole(MANY)), (lambda: diagonal(MANY))
    q, left, _ = fit(*own)
    assert not parts
    monkeypatch.setattr(active, "SMALL", float("inf"))
    other, other_left, _ = fit(*own)
    assert torch.equal(q.loc, other.loc) and torch.equal(q.tril, other.tril) and torch.equal(left, other_left)


def test_an_error_names_data_by_their_place_in_the_whole_call(parts, monkeypatch):
    def break_gradients(space, u):
        log_joint, log_prior, gradient = unchecked(space, u)
        if parts:
            gradient[:, 1] = torch.nan
        return log_joint, log_prior, gradient

    unchecked = gaussian.unchecked_gradient
    monkeypatch.setattr(gaussian, "unchecked_gradient", break_gradients)
    with pytest.raises(NonFiniteError) as error:
        fit(whole, diagonal, MANY)
    assert f"data [{parts[0][1]}]" in str(error.value)
