"""What every rank does for `test_ddp.py`: its share of the data under DistributedDataParallel. Gradients go to a folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ddp_helpers import CASES, data, made
from torch.nn.parallel import DistributedDataParallel

import pyro_vae as pv


def gradients(loss):
    return [param.grad for param in loss.parameters()]


def share(x):
    rank, size = dist.get_rank(), dist.get_world_size()
    return x[rank * len(x) // size : (rank + 1) * len(x) // size]


def trained(name):
    """Two updates, so that gradients are averaged after the first call too."""
    loss = DistributedDataParallel(made(name))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-4)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        with CASES[name].context():
            value = loss(share(data()))
        value.backward()
        found.append([gradient.clone() for gradient in gradients(loss)])
        optimizer.step()
        loss.module.elbo.num_updates += 1
    return found


def accumulated():
    """Two micro-batches, and one exchange for both."""
    loss = DistributedDataParallel(made("mean-field"))
    first, second = share(data()).chunk(2)
    with loss.no_sync():
        loss(first).backward()
    loss(second).backward()
    return gradients(loss)


def looked_at():
    """Early stopping on all ranks says the same, while training goes on."""
    loss = DistributedDataParallel(made("mean-field"))
    pair = loss.module.model, loss.module.guide
    stopping = pv.EarlyStopping(*pair, [data()], every=1, patience=1, num_particles=2)
    return [stopping(step) for step in range(3)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: trained(name) for name in CASES}
    found["accumulated"], found["stops"] = accumulated(), looked_at()
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
