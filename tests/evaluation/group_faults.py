"""What a rank of a group does for `test_processes.py` where another one is killed, or makes no call. Prints what was raised.

`group_faults.py killed|whole|absent|alone SECONDS FOLDER`; a checkpoint, and the numbers of a whole run, are in the folder.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pair_helpers import diagonal_family, guide_of, linear_gaussian, model_of, quiet

import pyro_vae as pv
from pyro_vae.errors import ProcessesError

BATCHES = 8


def wait_for(path, seconds):
    """Make no call until the other rank has left this file, or long enough for it to give up its wait."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)


def main(fault, seconds, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(seconds)))
    lm, x = linear_gaussian(num_data=2 * BATCHES)
    model, guide = model_of(lm), guide_of(diagonal_family(lm, 0.1, 1.2))
    estimator = pv.ImportanceSampling(model, guide, num_particles=150)
    done = Path(folder, "done")
    estimate, computed = pv.ImportanceSampling.estimate, []

    def counting(self, call):
        computed.append(len(computed))
        if fault == "killed" and dist.get_rank() == 1 and len(computed) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return estimate(self, call)

    pv.ImportanceSampling.estimate = counting

    dist.barrier()
    start = time.monotonic()
    try:
        if dist.get_rank() == 1 and fault in ("absent", "alone"):
            wait_for(done, float(seconds) + 3)
        elif fault == "alone":
            with pv.single_process(), quiet():
                print("result of", len(pv.evaluate(estimator, x.split(2), seed=0, progress=False)))
            done.touch()
        else:
            with quiet():
                checkpoint = None if fault == "absent" else Path(folder, "checkpoint")
                found = pv.evaluate(estimator, x.split(2), seed=0, progress=False, checkpoint=checkpoint)
            torch.save([len(computed), found.to_dict()], Path(folder, f"{dist.get_rank()}.pt"))
    except ProcessesError as error:
        done.touch()
        print(f"after {time.monotonic() - start:.1f} s: {error}", flush=True)
        os._exit(3)  # without a word to the group, which waits for the others
    if fault == "whole":
        dist.barrier()
    dist.destroy_process_group()  # else its threads may end the interpreter by an abort


if __name__ == "__main__":
    main(*sys.argv[1:])
