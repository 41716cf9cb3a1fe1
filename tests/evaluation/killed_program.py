"""Runs with a checkpoint, to be killed. Reads lines `FOLDER WHERE NUMBER`, starts a process for each and prints its id.

A process kills itself at the call NUMBER of `os.WHERE`, of those that write a checkpoint; with `-` it runs to its end.
"""

import os
import signal
import sys
import time

from checkpoint_helpers import batches_of, data, estimator

import pyro_vae as pv
from pyro_vae.evaluation import checkpoint


def slowly(batches):
    for batch in batches:
        time.sleep(0.01)
        yield batch


def kill_at(where, number):
    real, calls = getattr(os, where), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, where, counted)


if __name__ == "__main__":
    checkpoint.PAUSE = 0.0  # a write after every batch, so that much of the time is spent writing
    for line in sys.stdin:
        folder, where, number = line.split()
        child = os.fork()
        if not child:
            if where != "-":
                kill_at(where, int(number))
            pv.evaluate(estimator(), slowly(batches_of(data(150))), seed=0, progress=False, checkpoint=folder)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
