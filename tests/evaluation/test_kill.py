"""kill -9 at any moment, in the middle of a write too: the run that goes on has the numbers of an unbroken one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_helpers import batches_of, data, estimator, same
from pair_helpers import quiet

import pyro_vae as pv
from pyro_vae.records import load_value

HERE = Path(__file__).parent


def evaluated(**options):
    with quiet():
        return pv.evaluate(estimator(), batches_of(data(150)), seed=0, progress=False, **options)


@pytest.fixture(scope="module")
def whole():
    return evaluated()


@pytest.fixture(scope="module")
def program():
    paths = [str(HERE), str(HERE.parent), str(Path(pv.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "killed_program.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes) as process:
        yield process
        process.stdin.close()


def started(program, folder, where="-", number=0):
    program.stdin.write(f"{folder} {where} {number}\n")
    return int(program.stdout.readline())


def wait_for(folder, num_batches):
    while len(list(folder.glob("batches-*"))) < num_batches:
        time.sleep(0.001)


def check_resumed(folder, whole):
    """Every file under its own name is whole, and the rest of the run gives the numbers of an unbroken one."""
    for path in folder.glob("*.npz"):
        load_value(path)
    assert same(evaluated(checkpoint=folder), whole)


@pytest.mark.parametrize("point", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 3)) for n in range(20)])
def test_kill_at_a_random_moment(tmp_path, program, whole, point):
    """30 batches of .01 s, each with a write of some milliseconds."""
    generator = random.Random(point)
    child = started(program, tmp_path)
    wait_for(tmp_path, generator.randrange(30))
    time.sleep(generator.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    assert int(program.stdout.readline()) in (-signal.SIGKILL, 0)
    check_resumed(tmp_path, whole)


@pytest.mark.parametrize(
    "where, number", [("mkdir", 1), ("fsync", 1), ("replace", 1), ("fsync", 5), ("replace", 5), ("fsync", 6)]
)
def test_kill_within_a_write(tmp_path, program, whole, where, number):
    """Of the manifest (calls 1) and of a shard: before its content is on the disk, before and after it is renamed."""
    started(program, tmp_path / "run", where, number)
    assert int(program.stdout.readline()) == -signal.SIGKILL
    check_resumed(tmp_path / "run", whole)


def test_terminated(tmp_path, program, whole):
    """SIGTERM, by which a preemptible machine ends a job: the process ends as ever, and the checkpoint is whole."""
    child = started(program, tmp_path)
    wait_for(tmp_path, 5)
    os.kill(child, signal.SIGTERM)
    assert int(program.stdout.readline()) == -signal.SIGTERM
    assert 5 <= len(list(tmp_path.glob("batches-*"))) < 30
    check_resumed(tmp_path, whole)
