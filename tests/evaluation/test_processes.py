"""Several processes under a process group: the batches are shared out, and every number is that of one process."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import torchrun
from pair_helpers import quiet

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "several_processes.py"


def check_outcomes(num_processes, folder):
    """Every check of `group_program.py` held on all ranks."""
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]
    failures = [f"rank {rank}, {name}:\n{said}" for rank, one in enumerate(found) for name, said in one.items() if said]
    assert not failures, "\n".join(failures)
    assert all(len(one) > 35 for one in found)


def test_two_processes(tmp_path):
    """Under torchrun itself: two programs, whose string hashes differ."""
    output, status = torchrun(2, "group_program.py", tmp_path)
    assert status == 0, output
    check_outcomes(2, tmp_path)


def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys, forks):
    """Two processes, and this one alone with the checkpoint that they left, or with none, print the same."""
    (said, *statuses), (_, other) = forks.run(2, EXAMPLE, cwd=tmp_path)
    assert (*statuses, other) == (0, 0), said
    threads = torch.get_num_threads()
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    try:
        for folder in (tmp_path, tmp_path / "other"):
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            with quiet():
                runpy.run_path(str(EXAMPLE))
            alone = capsys.readouterr().out
            assert "200 data" in alone
            assert alone in said, (alone, said)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_four_processes(tmp_path, forks):
    ended = forks.run(4, "group_program.py", tmp_path, cwd=tmp_path)
    assert not any(status for _, status in ended), ended
    check_outcomes(4, tmp_path)


@pytest.fixture(scope="module")
def killed(forks, tmp_path_factory):
    """What rank 0 said after rank 1 was killed, and the folder that they left."""
    folder = tmp_path_factory.mktemp("killed")
    (alive, status), (_, killed) = forks.run(2, "group_faults.py", "killed", 30, folder, cwd=folder)
    assert killed == -9
    assert status == 3, alive
    return alive, folder


def whole_run(forks, num_processes, folder):
    """How many batches each rank computed, and the result of rank 0."""
    ended = forks.run(num_processes, "group_faults.py", "whole", 30, folder, cwd=folder)
    assert not any(status for _, status in ended), ended
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_processes)]
    return [count for count, _ in found], found[0][1]


@pytest.fixture(scope="module")
def unbroken(forks, tmp_path_factory):
    return whole_run(forks, 1, tmp_path_factory.mktemp("unbroken"))


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(killed):
    alive, _ = killed
    assert "rank 0 of 2 waited for the others at batches 4 to 5" in alive
    assert "ake the same call again to continue" in alive
    assert float(re.search(r"after ([\d.]+) s", alive)[1]) < 20


@pytest.mark.slow
@pytest.mark.parametrize("resumed_by", [1, 2, 4])
def test_the_checkpoint_of_a_rank_that_is_killed_is_whole(tmp_path, forks, killed, unbroken, resumed_by):
    shutil.copytree(killed[1] / "checkpoint", tmp_path / "checkpoint")
    counts, found = whole_run(forks, resumed_by, tmp_path)
    whole, truth = unbroken
    assert repr(found) == repr(truth)  # NaN is not equal to itself
    assert whole == [8]
    assert sum(counts) <= 4, counts  # of the eight, four were on the disk


@pytest.mark.slow
def test_a_rank_that_makes_no_call_ends_the_wait_of_the_others(tmp_path, forks):
    (waiting, status), _ = forks.run(2, "group_faults.py", "absent", 3, tmp_path, cwd=tmp_path)
    assert status == 3, waiting
    assert "waited for the others at the start of a pass" in waiting
    assert "single_process" in waiting
    assert 2.4 < float(re.search(r"after ([\d.]+) s", waiting)[1]) < 20


@pytest.mark.slow
def test_one_rank_alone(tmp_path, forks):
    (said, status), (_, other) = forks.run(2, "group_faults.py", "alone", 3, tmp_path, cwd=tmp_path)
    assert (status, other) == (0, 0), said
    assert "result of 16" in said
