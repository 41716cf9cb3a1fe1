"""DistributedDataParallel trains every objective: the gradient on each rank is the mean of those of the shares.

Two processes under gloo, without any randomness: the noise is a function of the datum.
"""

import re
from pathlib import Path

import pytest
import torch
from ddp_helpers import CASES, data, made

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "docs" / "examples" / "train_ddp.py"


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    ended = forks.run(2, HERE / "ddp_program.py", folder, cwd=folder)
    assert not any(status for _, status in ended), ended
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def gradients_alone(name, parts):
    """The sum of the gradients of the parts, at each of two updates, in one process. The parameters follow their mean."""
    loss, found = made(name), []
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        for part in parts:
            with CASES[name].context():
                value = loss(part)
            value.backward()
        found.append([param.grad.clone() for param in loss.parameters()])
        for param in loss.parameters():
            param.grad /= 2
        optimizer.step()
        loss.elbo.num_updates += 1
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_mean_of_those_of_the_shares(found, name):
    wanted = gradients_alone(name, data().chunk(2))
    tolerance = 2e-2 if name == "autocast" else 1e-5
    for rank in range(2):
        for step in range(2):
            for one, other in zip(found[rank][name][step], wanted[step], strict=True):
                assert other.abs().max() > 1e-2
                torch.testing.assert_close(2 * one, other, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(*both) for both in zip(*(found[rank][name][1] for rank in range(2)), strict=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name != "autocast"])
def test_which_losses_are_those_of_the_joined_batch(name):
    """As docs/training_at_scale.md says: sums over data are, what is not linear in the batch is not."""
    loss, case = made(name), CASES[name]
    parts, whole = gradients_alone(name, data().chunk(2))[0], gradients_alone(name, [data()])[0]
    scale = 2 if case.size else 1  # with a size each part stands for all data, as the whole does
    same = all(torch.allclose(one, scale * other, rtol=1e-4, atol=1e-4) for one, other in zip(parts, whole, strict=True))
    assert same == case.adds_up, loss


def test_accumulated_gradients_are_those_of_both_micro_batches(found):
    wanted = gradients_alone("mean-field", data().chunk(2))[0]
    for rank in range(2):
        for one, other in zip(found[rank]["accumulated"], wanted, strict=True):
            torch.testing.assert_close(2 * one, other)


def test_all_ranks_stop_at_the_same_update(found):
    assert found[0]["stops"] == found[1]["stops"]
    assert len(found[0]["stops"]) == 3


def test_the_example_of_the_docs(tmp_path, forks):
    (output, *statuses), (other, *more) = forks.run(2, EXAMPLE, cwd=tmp_path)
    assert statuses + more == [0, 0], output + other
    assert len(re.findall(r"^-\d+\.\d+ nats \(Monte Carlo error", output + other, re.M)) == 1, output + other
    state = torch.load(tmp_path / "vae.pt")
    assert state["objective"] == {"num_updates": 50}
