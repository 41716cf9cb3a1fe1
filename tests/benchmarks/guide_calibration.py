"""How often `GuideCalibration` calls a right guide faulty, and a wrong one, and how often intervals of the gap cover it.

python tests/benchmarks/guide_calibration.py [--replicates 500]

One simulation of many data is cut into replicates, whose data are independent of one another.
"""

import argparse
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "calibration")]
from calibration_helpers import calibrated, symmetric_gap  # noqa: E402

GUIDES = {
    "right": {},
    "sd x 0.7": {"factor": 0.7},
    "sd x 0.8": {"factor": 0.8},
    "sd x 0.9": {"factor": 0.9},
    "sd x 1.1": {"factor": 1.1},
    "sd x 1.2": {"factor": 1.2},
    "sd x 1.4": {"factor": 1.4},
    "mean + 0.1 sd": {"shift": 0.1},
    "mean + 0.3 sd": {"shift": 0.3},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=500)
    number = parser.parse_args().replicates
    print("guide          latents  data  replicates  called faulty  interval of the gap covers it")
    for latent_dim in (2, 10):
        for num_data in (100, 300, 1000):
            for name, fault in GUIDES.items():
                replicates = number if name == "right" else number // 5
                called, covered = 0, 0
                for seed in range(5):  # a fifth of them at a time, for memory
                    record, lm = calibrated(
                        replicates // 5 * num_data, seed, latent_dim, num_particles=20 if name == "right" else 100, **fault
                    )
                    truth = symmetric_gap(lm, fault.get("factor", 1.0), fault.get("shift", 0.0))
                    for part in torch.arange(len(record)).split(num_data):
                        replicate = record.select(part)
                        called += not replicate.passed
                        low, high = replicate.symmetric_gap.confidence_interval()
                        covered += low - 1e-9 <= truth <= high + 1e-9
                shares = f"{called / replicates:>13.1%}  {covered / replicates:>10.1%}"
                print(f"{name:<14} {latent_dim:>7} {num_data:>5} {replicates:>11} {shares}", flush=True)


if __name__ == "__main__":
    main()
