"""Several processes under a process group: the batches are shared out, and every number is that of one process."""

import json

import pytest
from launch import torchrun


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


@pytest.mark.slow
def test_four_processes(tmp_path):
    found, _ = outcomes(4, tmp_path)
    assert not failures(found), "\n".join(failures(found))
