"""`refit_guide` on the README's VAE, trained as the README says: the gaps before and after, and the time.

python tests/benchmarks/refit.py [--epochs 300] [--simulated 1] [--lr 6e-3] [--threads 1] [--larger]
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

ROOT = Path(__file__).parents[2]
FALL = 0.05  # of the learning rate over the whole refit


def readme() -> dict:
    """The names of the README's first example, trained, without its gaps."""
    example = re.search(r"^```python\n(import pyro\n.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(example[1].split("gaps = ")[0], names)
    return names


def larger_guide() -> Callable[[Tensor], None]:
    torch.manual_seed(0)
    layers = nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 16)
    network = nn.Sequential(*layers)

    def guide(x: Tensor) -> None:
        pyro.module("larger encoder", network)
        loc, log_scale = network(x / 16).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    return guide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--simulated", type=int, default=1)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--larger", action="store_true", help="hand over to an encoder of two hidden layers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = readme()
    model, guide, train, test = (names[name] for name in ("model", "guide", "train", "test"))
    decoder = {name: value.clone() for name, value in names["decoder"].state_dict().items()}
    loaders = [DataLoader(TensorDataset(x), 100, shuffle=shuffle) for x, shuffle in ((train, True), (test, False))]
    falling = {"optimizer": torch.optim.Adam, "optim_args": {"lr": options.lr}, "gamma": FALL ** (1 / options.epochs)}
    optim = pv.FusedOptim(torch.optim.lr_scheduler.ExponentialLR, falling)
    wall, cpu = time.perf_counter(), time.process_time()
    refit = pv.refit_guide(
        model,
        guide,
        loaders[0],
        optim,
        test=loaders[1],
        other=larger_guide() if options.larger else None,
        num_epochs=options.epochs,
        simulated=options.simulated,
        num_data=1500,
        seed=options.seed,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(refit)
    same = all(torch.equal(decoder[name], value) for name, value in names["decoder"].state_dict().items())
    print(f"decoder the same to the last bit: {same}; {wall:.0f} s in all, {cpu:.0f} s of one core")


if __name__ == "__main__":
    main()
