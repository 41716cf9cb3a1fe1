"""torchrun --nproc-per-node 2 train_ddp.py"""

import pyro
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv

torch.set_num_threads(1)  # of each process
dist.init_process_group("gloo")  # "nccl" with one GPU per process
torch.manual_seed(0)  # the same start and data on every rank
vae = pv.mlp_vae(16, latent_dim=2, likelihood=pv.nn.Normal("learned"))
data = TensorDataset(torch.randn(400, 2) @ torch.randn(2, 16))
sampler = DistributedSampler(data)  # each rank gets its share of the data
loader = DataLoader(data, batch_size=20, sampler=sampler)

objective = pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(30))
loss = DistributedDataParallel(objective(vae.model, vae.guide))
optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
pyro.set_rng_seed(dist.get_rank())  # other noise on each rank
for epoch in range(5):
    sampler.set_epoch(epoch)
    for (x,) in loader:
        optimizer.zero_grad()
        loss(x).backward()  # gradients are averaged over the ranks
        optimizer.step()
        objective.num_updates += 1  # for the schedule of beta

everything = DataLoader(data, batch_size=100)  # no sampler: evaluate divides them
estimator = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=100)
evidence = pv.evaluate(estimator, everything, seed=0)
if dist.get_rank() == 0:
    torch.save({"vae": vae.state_dict(), "objective": objective.state_dict()}, "vae.pt")
    print(evidence.mean())
dist.destroy_process_group()
