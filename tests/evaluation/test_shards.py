"""The batches of a checkpoint are read when they are asked for, from few files at a time."""

from pathlib import Path

import pytest

from pyro_vae.evaluation.found import Found
from pyro_vae.evaluation.shards import Shards


def found(number, error=""):
    return Found(number, 5 * number, 5, None if error else f"result {number}", error)


def shards_of(files):
    """Of files that are lists of batches, and a list of the files that were read."""
    read = []

    def reading(path):
        read.append(path.name)
        return files[path.name]

    return Shards(map(Path, files), reading), read


def test_one_file_at_a_time():
    files = {f"file {first}": [found(number) for number in range(first, first + 4)] for first in (0, 4, 8)}
    shards, read = shards_of(files)
    assert read == list(files) and not shards._open and shards.last == 11
    for number in range(12):
        assert shards.take(number) == found(number)
        assert len(shards._open) == (number % 4 < 3)
        assert shards.take(number) is None
    assert read == [*files, *files] and shards.last is None


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_file_of_each_rank_that_wrote(rank):
    """Rank r of two has written the batches r, r + 2, ...; they are taken by one process, or by one of three."""
    files = {f"{r} {first}": [found(n) for n in range(first + r, first + 10, 2)] for first in (0, 10, 20) for r in (0, 1)}
    for num_ranks in (1, 3):
        shards, _ = shards_of(files)
        for number in range(30):
            if number % num_ranks == rank % num_ranks:
                assert shards.take(number) == found(number)
            else:
                shards.drop(number)
            assert len(shards._open) <= 2
        assert not shards._open and shards.last is None


def test_a_result_counts_more_than_why_there_was_none():
    bad = found(1, "ValueError: no")
    for files in ({"a": [found(0), bad], "b": [found(1)]}, {"a": [found(1)], "b": [found(0), bad]}):
        shards, _ = shards_of(files)
        assert shards.errors == {0: "", 1: ""}
        assert [shards.take(0), shards.take(1)] == [found(0), found(1)]
        assert not shards._open and shards.last is None
    shards, _ = shards_of({"a": [bad]})
    assert shards.errors == {1: "ValueError: no"} and shards.take(1) == bad
