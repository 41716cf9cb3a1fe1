"""torchrun --nproc-per-node 2 several_processes.py"""

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

torch.set_num_threads(1)  # of each process
dist.init_process_group("gloo")  # "nccl" with one GPU per process
torch.manual_seed(0)  # the same pair and data on every rank
vae = pv.mlp_vae(16, latent_dim=2, likelihood=pv.nn.Normal())
loader = DataLoader(TensorDataset(torch.randn(200, 16)), batch_size=20)
estimator = pv.InferenceGaps(vae.model, vae.guide, num_particles=100)
gaps = pv.evaluate(estimator, loader, seed=0, checkpoint="gaps")
if dist.get_rank() == 0:
    print(gaps)
dist.destroy_process_group()
