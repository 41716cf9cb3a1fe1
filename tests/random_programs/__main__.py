"""Judge many random programs by number: `python -m tests.random_programs --number 10000 --seed 0 --jobs 2`.

Program n is the same on every machine. Progress says where to go on after a stop: `--seed` is the number of the first
program. Ends with exit code 1 where a number was wrong without a doubt, or where a program crashed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from .generator import program_of_seed
from .judge import ORACLE_ERROR, Finding, findings_of, know

EVERY = 50  # programs between two lines of progress
FAULTS = ("wrong", "crashed")


@contextmanager
def results(seeds: Iterable[int], jobs: int, in_turn: bool) -> Iterator[Iterable[tuple[int, list[Finding] | None]]]:
    """In the order of the seeds, so that progress has one number to go on from."""
    found = partial(findings_of, in_turn=in_turn)
    if jobs == 1:
        yield map(found, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield pool.imap(found, seeds, chunksize=4)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_programs", description=__doc__)
    parser.add_argument("--number", type=int, default=500, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--in-turn", action="store_true", help="each program by some estimators, in turn: half the time")
    parser.add_argument("--show", action="store_true", help="print each program, its data and its right values")
    options = parser.parse_args()
    if options.show:
        for seed in range(options.seed, options.seed + options.number):
            show(seed)
    counts: Counter[tuple[str, str]] = Counter()
    faulty: dict[int, None] = {}
    discarded, start = 0, time.monotonic()
    with results(range(options.seed, options.seed + options.number), options.jobs, options.in_turn) as found:
        for done, (seed, findings) in enumerate(found, start=1):
            discarded += findings is None
            for finding in findings or ():
                kind = f"refused, {finding.detail}" if finding.outcome == "refused" else finding.outcome
                counts[finding.judge, kind] += 1
                if finding.outcome in FAULTS:
                    faulty[seed] = None
                    print(f"program {seed}: {finding.judge} {finding.outcome}: {finding.detail}", flush=True)
            if done % EVERY == 0:
                seconds = time.monotonic() - start
                print(f"{done} programs, {seconds:.0f} s, {summary(counts)}; go on with --seed {seed + 1}", flush=True)
    for (name, kind), count in sorted(counts.items()):
        print(f"{name:<28}{kind:<36}{count:>8}")
    print(f"{options.number} programs, {discarded} discarded because the right value is not known to {ORACLE_ERROR} nats")
    print(f"{time.monotonic() - start:.0f} s; programs with a fault: {list(faulty) or 'none'}")
    return 1 if faulty else 0


def show(seed: int) -> None:
    program = program_of_seed(seed)
    print(f"program {seed}: {program.num_data} data, {program.guide}")
    print(f"  quirk: {program.quirk}; dim of the data {program.data_dim}, {program.dtype}")
    for site in (*program.latents, *program.observed):
        print(f"  {site}")
    known = know(program)
    if known is None:
        print("  right values not known")
        return
    print(*(f"  masks of {name}: {mask.tolist()}" for name, mask in known.case.masks.items()), sep="\n")
    print(*(f"  {name} = {x.tolist()}" for name, x in known.case.x.items()), sep="\n")
    print(*(f"  {site}" for site in known.case.guide), sep="\n")
    print(f"  log p(x) {known.log_evidence.value.tolist()}, L[q] {known.elbo[0].value.tolist()}")


def summary(counts: Counter[tuple[str, str]]) -> str:
    totals: Counter[str] = Counter()
    for (_, kind), count in counts.items():
        totals[kind.partition(",")[0]] += count
    return ", ".join(f"{totals[kind]} {kind}" for kind in ("right", "doubted", "unchecked", "unknown", "refused", *FAULTS))


if __name__ == "__main__":
    sys.exit(main())
