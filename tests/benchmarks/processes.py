"""How much sooner several processes are done than one, with one thread each, and whether their numbers are the same.

The gaps of 1,000 data in batches of 50, for a 64-32-8 VAE. Every number of processes runs the same call some times, in turn
with the others; starts and imports do not count. Prints the shortest time by the clock, and that of the processor on the
busiest rank, which leaves out what other programs took; the ratios to one process; and whether all numbers are those of one
process bit for bit. `--processes 1 2 4 --rounds 3 --data 1000` are the defaults but for the 4.

    python tests/benchmarks/processes.py
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def as_rank(num_data: int) -> None:
    """One call on this rank; rank 0 prints what it took."""
    sys.path.insert(0, str(ROOT))
    import pyro_vae as pv

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    vae = pv.mlp_vae(64, 8, likelihood=pv.nn.Bernoulli(), hidden=(32,))
    x = (torch.rand(num_data, 64) > 0.5).float()
    estimator = pv.InferenceGaps(vae.model, vae.guide, num_particles=100)
    warnings.simplefilter("ignore")
    pv.evaluate(estimator, x[: 50 * dist.get_world_size()].split(50), seed=1, progress=False)  # the first calls are slower
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    gaps = pv.evaluate(estimator, x.split(50), seed=0, progress=False)
    spent = [time.perf_counter() - wall, time.process_time() - cpu]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, spent)
    if dist.get_rank() == 0:
        digest = hashlib.sha256(json.dumps(gaps.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
        print(json.dumps([*map(max, zip(*everyone, strict=True)), digest]))
    dist.destroy_process_group()


def run(num_processes: int, num_data: int) -> tuple[float, float, str]:
    """Seconds by the clock and of the processor, and a digest of the numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", port, __file__, "--rank", "--data", str(num_data)]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **one_thread}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    wall, cpu, digest = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu, digest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=int, default=1000)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return as_rank(options.data)
    found: dict[int, list[tuple[float, float, str]]] = {size: [] for size in options.processes}
    for _ in range(options.rounds):
        for size, times in found.items():
            times.append(run(size, options.data))
    first = found[options.processes[0]]
    print(f"{'processes':>9}{'seconds':>10}{'ratio':>8}{'of the processor':>18}{'ratio':>8}  numbers")
    for size, times in found.items():
        wall, cpu = (min(t[i] for t in times) for i in range(2))
        ratios = [min(t[i] for t in first) / value for i, value in enumerate((wall, cpu))]
        same = "the same" if {t[2] for t in times} == {first[0][2]} else "others"
        print(f"{size:>9}{wall:>10.2f}{ratios[0]:>8.2f}{cpu:>18.2f}{ratios[1]:>8.2f}  {same}")


if __name__ == "__main__":
    main()
