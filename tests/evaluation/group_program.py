"""What every rank of a group does for `test_processes.py`: each function `check_...` in turn; outcomes to a folder.

A check holds on every rank, so that all make the same calls. A failed one is reported, and the next is tried.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import group_checkpoints
import group_estimators
import pyro
import torch
import torch.distributed as dist
from group_estimators import raises

from pyro_vae.errors import ArgumentError, ProcessesError
from pyro_vae.evaluation.processes import (
    check_agreed,
    exchanged,
    of_rank_0,
    rank_and_size,
    single_process,
)
from pyro_vae.evaluation.sharing import shared_out

TIMEOUT = timedelta(seconds=30)


class Odd(Exception):
    """One that cannot be sent as it is."""

    def __init__(self, first, second):
        super().__init__(first)
        self.second = second


def say(batch):
    return str(batch)


def check_who_computes_what():
    rank, size = rank_and_size()
    assert (rank, size) == (dist.get_rank(), dist.get_world_size())
    for num_batches in (0, 1, size - 1, size, size + 1, 7):
        mine = []

        def compute(batch, mine=mine):
            number = batch // 10
            mine.append(number)
            return number, rank, torch.full((number,), float(rank))

        found = list(shared_out((10 * n for n in range(num_batches)), compute, say))
        assert mine == list(range(rank, num_batches, size)), mine
        assert [n for n, *_ in found] == list(range(num_batches))
        assert [r for _, r, _ in found] == [n % size for n in range(num_batches)]
        assert all(torch.equal(t, torch.full((n,), float(r))) for n, r, t in found)


def check_all_may_stop_in_the_middle_of_a_round():
    for stop in (1, 2, 3):
        found = []
        for result in shared_out(iter(range(10)), lambda n: n, say):
            found.append(result)
            if len(found) == stop:
                break
        assert found == list(range(stop))


def check_single_process():
    with single_process():
        assert rank_and_size() == (0, 1)
        computed = list(shared_out(range(5), lambda n: (n, dist.get_rank()), say))
        assert exchanged("here", dist.get_rank()) == [dist.get_rank()]
    assert computed == [(n, dist.get_rank()) for n in range(5)]
    assert rank_and_size() == (dist.get_rank(), dist.get_world_size())


def check_loops_inside_of_a_batch_are_whole():
    def compute(number):
        return sum(shared_out(range(3), lambda n: n, say))

    assert list(shared_out(range(3), compute, say)) == [3, 3, 3]
    assert rank_and_size()[1] == dist.get_world_size()


def check_of_rank_0():
    assert of_rank_0("here", dist.get_rank() + 5) == 5


def check_ranks_agree():
    check_agreed({"parameters": "abc", "seed": 3})
    with raises(ProcessesError, "'guide.weight' of rank 1 is another", "broadcast", "single_process"):
        check_agreed({"guide.weight": ("b" if dist.get_rank() else "a") * 64})
    with raises(ProcessesError, "'seed' is 1 on rank 0 and None on rank 1"):
        check_agreed({"seed": None if dist.get_rank() else 1})
    with raises(ProcessesError, "'seed' is 1 on rank 0"):
        check_agreed({"seed": 1} if dist.get_rank() == 0 else {})


def check_ranks_at_other_calls():
    with raises(ProcessesError, "the same calls"):
        exchanged("one thing" if dist.get_rank() else "another", 1)


def check_other_data():
    rank = dist.get_rank()
    with raises(ProcessesError, "batch 3 of rank 1", "DistributedSampler", "single_process"):
        list(shared_out([0, 1, 2, 3 + rank, 4], lambda n: n, say))
    with raises(ProcessesError, "batch 0 of rank 1"):
        list(shared_out(range(rank, 10, 2), lambda n: n, say))


def check_other_lengths():
    rank, size = rank_and_size()
    for num_batches in (3, 2 * size, 2 * size + 1):
        with raises(ProcessesError, f"rank {size - 1} has {num_batches - 1} batches", "more"):
            list(shared_out(range(num_batches - (rank == size - 1)), lambda n: n, say))


def check_an_exception_on_one_rank():
    def compute(number):
        if number == 5:
            raise ArgumentError("broken")
        return number

    found = []
    with raises(ArgumentError, f"broken (on rank {5 % dist.get_world_size()} of {dist.get_world_size()})"):
        for result in shared_out(range(8), compute, say):
            found.append(result)
    assert found == list(range(5))


def check_the_first_of_several_exceptions():
    def compute(number):
        raise (ValueError if number % 2 else KeyError)(f"broken {number}")

    with raises(KeyError, "broken 0", "rank 0"):
        list(shared_out(range(8), compute, say))


def check_exceptions_that_cannot_be_sent():
    class Local(Exception):
        pass

    for error in (Odd("odd", 2), Local("local"), OSError(28, "No space left on device")):

        def compute(number, error=error):
            if number == 1:
                raise error
            return number

        with raises(ProcessesError, type(error).__name__, str(error), "rank 1"):
            list(shared_out(range(3), compute, say))


def check_results_that_cannot_be_sent():
    with raises(ProcessesError, "rank 0"):
        list(shared_out(range(3), lambda n: lambda: n, say))


def check_a_loader_that_fails_on_all_ranks():
    def loader():
        yield from range(3)
        raise ValueError("no more")

    found = []
    with raises(ValueError, "no more"):
        for result in shared_out(loader(), lambda n: n, say):
            found.append(result)
    assert found == [0, 1, 2]


def check_a_loader_that_fails_on_one_rank():
    def loader():
        yield from range(3)
        if dist.get_rank() == 1:
            raise ValueError("no more")
        yield from range(3, 9)

    with raises(ValueError, "no more (on rank 1"):
        list(shared_out(loader(), lambda n: n, say))


def check_a_failed_batch_behind_the_stop_does_not_count():
    def compute(number):
        if number == 1:
            raise ValueError("never looked at by one process")
        return number

    for result in shared_out(range(4), compute, say):
        assert result == 0
        break


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    outcomes = {}
    for name, check in {**globals(), **vars(group_estimators), **vars(group_checkpoints)}.items():
        if name.startswith("check_") and check.__module__ in ("__main__", "group_estimators", "group_checkpoints"):
            pyro.clear_param_store()
            pyro.set_rng_seed(dist.get_rank())  # the ranks share no random state
            try:
                check()
                outcomes[name] = ""
            except BaseException:
                outcomes[name] = traceback.format_exc()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
