"""How often models are told apart that are equal, and how often models that are not. Run by hand.

    python tests/benchmarks/comparison.py

Each line: the share of 20,000 comparisons of two models in which they are told apart at level 0.95, by Student's t alone
and by the test of
`compare`, for paired differences of mean zero drawn from one law; then for Gaussian ones whose mean is 2.8 errors.
"""

import math

import torch

from pyro_vae.comparison.told_apart import p_value_of
from pyro_vae.records import student_tail

F64 = torch.float64
REPLICATES = 20_000
LAWS = ("gaussian", "Student t, 3", "exponential", "chi square, 1", "log-normal", "5% rare")


def draws(law: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Mean zero."""
    normal = torch.randn(shape, generator=generator, dtype=F64)
    if law == "gaussian":
        return normal
    if law == "Student t, 3":
        return normal / torch.randn(3, *shape, generator=generator, dtype=F64).square().mean(0).sqrt()
    if law == "exponential":
        return -torch.rand(shape, generator=generator, dtype=F64).log() - 1
    if law == "chi square, 1":
        return normal.square() - 1
    if law == "log-normal":
        return normal.exp() - math.exp(0.5)
    rare = torch.rand(shape, generator=generator, dtype=F64) < 0.05  # 10 nats more for one datum of twenty
    return normal + torch.where(rare, 9.5, -0.5)


def shares(values: torch.Tensor) -> tuple[float, float]:
    by_t = ours = 0
    for row in values:
        row = row if float(row.mean()) > 0 else -row
        t = float(row.mean() / row.std()) * math.sqrt(len(row))
        by_t += student_tail(t, len(row) - 1) <= 0.05
        ours += p_value_of(row, torch.zeros_like(row), 0.0) <= 0.05
    return by_t / len(values), ours / len(values)


def main() -> None:
    print(f"{'differences':<20}{'N':>6}{'Student':>10}{'compare':>10}")
    for law in (*LAWS, "power"):
        for num_data in (10, 20, 100, 1000):
            generator = torch.Generator().manual_seed(num_data)
            replicates = REPLICATES if num_data < 1000 else REPLICATES // 4
            values = draws("gaussian" if law == "power" else law, (replicates, num_data), generator)
            by_t, ours = shares(values + (2.8 / math.sqrt(num_data) if law == "power" else 0.0))
            print(f"{law:<20}{num_data:>6}{by_t:>10.3f}{ours:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
