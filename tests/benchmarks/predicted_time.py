"""How right the remaining time on the bar of `diagnose` is: predicted total over true total, at 10%, 25% and 50% of the run.

`diagnose` runs on the digits of scikit-learn with VAEs of two sizes and batches of two. The prediction is that of the last
step of the bar before the moment: time so far, by the share of the work that the bar counts as done. Time is that of the
process (one thread), so that other work on the machine does not count; the true total is that of the whole call.

    python tests/benchmarks/predicted_time.py
"""

import io
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pyro  # noqa: E402

import pyro_vae as pv  # noqa: E402
from pyro_vae.report import batches as report_batches  # noqa: E402

MOMENTS = (0.1, 0.25, 0.5)
STEPS: list[tuple[float, float]] = []  # of the bar: seconds, and the share of the work


class Watched(tqdm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, file=io.StringIO(), **kwargs)

    def update(self, n: float = 1) -> bool | None:
        shown = super().update(n)
        STEPS.append((time.process_time(), self.n / self.total))
        return shown


def trained(digits: torch.Tensor, hidden: tuple[int, ...]) -> pv.VAE:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=hidden)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
    for _ in range(1000):
        svi.step(digits[torch.randint(len(digits), (100,))])
    return vae.eval()


def ratios(vae: pv.VAE, digits: torch.Tensor, batch: int) -> tuple[float, list[float | None]]:
    """Seconds of the call, and the predicted over the true total at each moment; `None` before the first step."""
    STEPS.clear()
    begin = time.process_time()
    pv.diagnose(vae.model, vae.guide, train=digits[:1500].split(batch), test=digits[1500:].split(batch))
    total = time.process_time() - begin
    found: list[float | None] = []
    for moment in MOMENTS:
        before = [(now - begin) / share / total for now, share in STEPS if now - begin <= moment * total]
        found.append(before[-1] if before else None)
    return total, found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report_batches.tqdm = Watched  # type: ignore[misc]
    digits = torch.tensor(load_digits().data, dtype=torch.float)
    print(f"{'hidden':>10} {'batch':>5} {'seconds':>8}", *(f"{f'at {moment:.0%}':>8}" for moment in MOMENTS))
    all_found = []
    for hidden in ((100,), (400, 400)):
        vae = trained(digits[:1500], hidden)
        for batch in (20, 100):
            seconds, found = ratios(vae, digits, batch)
            all_found.append(found)
            shown = ("none" if one is None else f"{one:.2f}" for one in found)
            print(f"{hidden!s:>10} {batch:>5} {seconds:>8.1f}", *(f"{one:>8}" for one in shown), flush=True)
    medians = (statistics.median(one for one in column if one is not None) for column in zip(*all_found, strict=True))
    print(f"{'median':>25}", *(f"{one:>8.2f}" for one in medians))


if __name__ == "__main__":
    main()
