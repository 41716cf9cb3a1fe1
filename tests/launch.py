"""Run a program as several processes of one group, one thread each, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
HERE = TESTS / "evaluation"  # where programs are looked for that are given by name
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**more):
    path = os.pathsep.join([str(TESTS.parent), str(HERE), str(TESTS)])
    return {**os.environ, **THREADS, "PYTHONPATH": path, "PYTHONWARNINGS": "default", **more}


def of_group(num_processes):
    """The variables by which each rank finds the others, as torchrun sets them."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def torchrun(num_processes, program, *args, cwd=HERE, timeout=240):
    """Run a program under torchrun; all that it printed, and its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(HERE / program), *map(str, args)]
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, env=environment(), timeout=timeout, cwd=cwd, **options)
    return done.stdout + done.stderr, done.returncode
