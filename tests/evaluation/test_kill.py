"""kill -9 at any moment, in the middle of a write too: what goes on from the checkpoint has the numbers of an unbroken run."""

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
PROGRAM = HERE / "killed_program.py"


def start(folder, output, pause):
    paths = [str(HERE), str(HERE.parent), str(Path(pv.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(folder), str(output), str(pause)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def whole():
    with quiet():
        return pv.evaluate(estimator(), batches_of(data(400)), seed=0, progress=False)


def check_resumed(folder, whole):
    """Every file under its own name is whole, and the rest of the run gives the numbers of an unbroken one."""
    for path in folder.glob("*.npz"):
        load_value(path)
    with quiet():
        assert same(pv.evaluate(estimator(), batches_of(data(400)), seed=0, progress=False, checkpoint=folder), whole)


# Points in time are drawn over all of the run: 80 batches at .01 s, each with a write of some milliseconds.
POINTS = [pytest.param(n, marks=[pytest.mark.slow] * (n >= 3)) for n in range(20)]


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_a_random_moment(tmp_path, whole, point):
    process = start(tmp_path / "run", tmp_path / "out.npz", 0.01)
    time.sleep(random.Random(point).uniform(0.0, 2.0))
    process.kill()
    process.wait()
    check_resumed(tmp_path / "run", whole)


def test_terminated(tmp_path, whole):
    """SIGTERM, by which a preemptible machine ends a job: the process ends as ever, and the checkpoint is whole."""
    process = start(tmp_path / "run", tmp_path / "out.npz", 0.01)
    while len(list((tmp_path / "run").glob("batches-*"))) < 5:
        time.sleep(0.005)
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    assert not (tmp_path / "out.npz").exists()
    check_resumed(tmp_path / "run", whole)
