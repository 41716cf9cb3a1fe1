"""Run programs as several processes without the seconds in which each of them imports torch and Pyro.

`ForkServer` starts this file as a process of its own. It imports them once, and forks for every rank of a group. The ranks
of one group therefore share the seed of Python's string hashes; where that may matter, use `launch.torchrun`.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from launch import HERE, environment, of_group

TIMEOUT = 240.0
PRELOADED = ("pyro_vae", "pair_helpers", "torch._dynamo")


class Ended(NamedTuple):
    """What a rank printed, and its exit status: the negative number of the signal that ended it."""

    output: str
    status: int


class ForkServer:
    """Its process ends with the `with` block."""

    def __enter__(self):
        command, pipes = [sys.executable, __file__], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment(), text=True, bufsize=1, **pipes)
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def run(self, num_processes, program, *args, cwd):
        """Run a program as the ranks of one group until all have ended. They write their output to files in `cwd`."""
        outputs = [Path(cwd, f"output of rank {rank}") for rank in range(num_processes)]
        shared = {"program": str(HERE / program), "args": [*map(str, args)], "cwd": str(cwd)}
        pairs = zip(of_group(num_processes), outputs, strict=True)
        ranks = [{**shared, "environment": variables, "output": str(output)} for variables, output in pairs]
        print(json.dumps(ranks), file=self._process.stdin, flush=True)
        statuses = json.loads(self._process.stdout.readline())
        return [Ended(output.read_text(), status) for output, status in zip(outputs, statuses, strict=True)]


def become(program, args, environment, cwd, output):
    """Make this process, which was just forked, that of a program."""
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), written, written)):
        os.dup2(file, number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [program, *args]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")
    sys.exit()


def status_of(process, deadline):
    """Wait for a process, and kill it at the deadline."""
    while not (found := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def main():
    for name in PRELOADED:
        __import__(name)
    for line in sys.stdin:
        processes = []
        for rank in json.loads(line):
            processes.append(os.fork())
            if not processes[-1]:
                become(**rank)
        deadline = time.monotonic() + TIMEOUT
        print(json.dumps([status_of(process, deadline) for process in processes]), flush=True)


if __name__ == "__main__":
    main()
