"""Several processes under a process group: the batches are shared out, and every number is that of one process."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import start_ranks, torchrun
from pair_helpers import quiet

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "several_processes.py"


def outcomes(num_processes, folder):
    """What every check of `group_program.py` said, by name and rank."""
    output, status = torchrun(num_processes, "group_program.py", folder)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)] if status == 0 else []
    assert status == 0, output
    return found, output


def failures(found):
    return [f"rank {rank}, {name}:\n{said}" for rank, one in enumerate(found) for name, said in one.items() if said]


def test_two_processes(tmp_path):
    found, output = outcomes(2, tmp_path)
    assert len(found[0]) > 35
    assert not failures(found), "\n".join(failures(found))


def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    """Two processes, and this one alone with the checkpoint that they left, or with none, print the same."""
    said, status = torchrun(2, EXAMPLE, cwd=tmp_path)
    assert status == 0, said
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
def test_four_processes(tmp_path):
    found, _ = outcomes(4, tmp_path)
    assert not failures(found), "\n".join(failures(found))


def ended(ranks, timeout=120):
    """What each rank printed, and its exit status."""
    try:
        return [(rank.communicate(timeout=timeout)[0], rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.parametrize("resumed_by", [1, 2, 4])
def test_a_rank_that_is_killed_ends_the_others_and_the_checkpoint_is_whole(tmp_path, resumed_by):
    (alive, status), (_, killed) = ended(start_ranks(2, "group_faults.py", "killed", 30, tmp_path))
    assert killed == -9
    assert status == 3, alive
    assert "rank 0 of 2 waited for the others at batches 4 to 5" in alive
    assert "ake the same call again to continue" in alive
    assert float(re.search(r"after ([\d.]+) s", alive)[1]) < 20
    folders = [tmp_path, tmp_path / "unbroken"]
    folders[1].mkdir()
    for num_processes, folder in ((resumed_by, folders[0]), (1, folders[1])):
        said = ended(start_ranks(num_processes, "group_faults.py", "whole", 30, folder))
        assert not any(status for _, status in said), said
    (resumed, found), (whole, truth) = (torch.load(folder / "0.pt", weights_only=True) for folder in folders)
    assert repr(found) == repr(truth)  # NaN is not equal to itself
    assert whole == 8
    counts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True)[0] for rank in range(resumed_by)]
    assert sum(counts) <= 4, counts  # of the eight, four were on the disk


@pytest.mark.slow
def test_a_rank_that_makes_no_call_ends_the_wait_of_the_others(tmp_path):
    (waiting, status), _ = ended(start_ranks(2, "group_faults.py", "absent", 5, tmp_path))
    assert status == 3, waiting
    assert "waited for the others at the start of a pass" in waiting
    assert "single_process" in waiting
    assert 4 < float(re.search(r"after ([\d.]+) s", waiting)[1]) < 20


@pytest.mark.slow
def test_one_rank_alone(tmp_path):
    (said, status), (_, other) = ended(start_ranks(2, "group_faults.py", "alone", 5, tmp_path))
    assert (status, other) == (0, 0), said
    assert "result of 16" in said
