"""A run with a checkpoint, to be killed: `python killed_program.py FOLDER OUTPUT [SECONDS per batch]`."""

import sys
import time

from checkpoint_helpers import batches_of, data, estimator

import pyro_vae as pv
from pyro_vae.evaluation import checkpoint


def slowly(batches, seconds):
    for batch in batches:
        time.sleep(seconds)
        yield batch


if __name__ == "__main__":
    folder, output, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    checkpoint.PAUSE = 0.0  # a write after every batch, so that half of the time is spent writing
    print("ready", flush=True)
    found = pv.evaluate(
        estimator(), slowly(batches_of(data(400)), seconds), seed=0, progress=False, checkpoint=folder, on_error="raise"
    )
    found.save(output)
    print("done", flush=True)
