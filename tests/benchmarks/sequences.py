"""What sequences cost: gaps of ten ragged sequences, and a GRU decoder against the same by hand. One thread.

python tests/benchmarks/sequences.py
"""

import statistics
import time
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import nn

import pyro_vae as pv

ROUNDS = 15


class DeepMarkovModel(nn.Module):
    """z_t given z_{t-1}, two numbers each; the guide reads packed sequences, and both read lengths into Python."""

    def __init__(self):
        super().__init__()
        self.rnn, self.combine = nn.RNN(3, 16, batch_first=True), nn.Linear(2, 16)
        self.loc, self.log_scale = nn.Linear(16, 2), nn.Linear(16, 2)
        self.transition = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.emission = nn.Linear(2, 3)

    def model(self, x, kept, lengths):
        pyro.module("markov", self)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x), 2)
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=kept[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(self.transition(z) + 0.9 * z, 0.7).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(self.emission(z), 0.5).to_event(1), obs=x[:, t])

    def guide(self, x, kept, lengths):
        pyro.module("markov", self)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x), 2)
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=kept[:, t]):
                    c = (torch.tanh(self.combine(z)) + h[:, t]) / 2
                    z = pyro.sample(f"z_{t}", dist.Normal(self.loc(c), (0.3 * self.log_scale(c)).exp()).to_event(1))


class Recurrent(nn.Module):
    """One latent of two numbers, and a GRU of `width` that decodes it to seven steps."""

    def __init__(self, width):
        super().__init__()
        self.encoder, self.decoder = nn.GRU(3, width, batch_first=True), nn.GRU(2, width, batch_first=True)
        self.loc, self.log_scale = nn.Linear(width, 2), nn.Linear(width, 2)
        self.start, self.out = nn.Linear(2, width), nn.Linear(width, 3)

    def decode(self, z):
        steps = z.unsqueeze(1).expand(-1, 7, -1).contiguous()
        return self.out(self.decoder(steps, torch.tanh(self.start(z)).unsqueeze(0))[0])

    def encode(self, x):
        h = self.encoder(x)[1][0]
        return self.loc(h), self.log_scale(h).exp()

    def model(self, x):
        pyro.module("recurrent", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 0.5).to_event(2), obs=x)

    def guide(self, x):
        pyro.module("recurrent", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encode(x)).to_event(1))

    @torch.no_grad()
    def by_hand(self, x, num_particles):
        loc, scale = self.encode(x)
        z = loc + scale * torch.randn(num_particles, *loc.shape)
        mean = self.decode(z.flatten(0, 1)).reshape(num_particles, *x.shape)
        log_weight = dist.Normal(mean, 0.5).log_prob(x).sum((-1, -2))
        log_weight = log_weight + (dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(loc, scale).log_prob(z)).sum(-1)
        return log_weight.logsumexp(0)


def seconds(run, *args):
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    markov = DeepMarkovModel()
    lengths = torch.tensor([6, 6, 5, 5, 4, 4, 3, 3, 2, 1])
    kept = torch.arange(6) < lengths.unsqueeze(-1)
    x = torch.randn(10, 6, 3) * kept.unsqueeze(-1)
    gaps = pv.InferenceGaps(markov.model, markov.guide, seed=0)
    print(f"gaps of ten ragged sequences of up to six steps: {seconds(gaps, x, kept, lengths):.1f} s")
    x = torch.randn(6, 7, 3)
    for width in (16, 32, 64, 128):
        vae = Recurrent(width)
        ours = pv.ImportanceSampling(vae.model, vae.guide, num_particles=500, seed=0)
        ours(x)  # finds out how to run the pair
        times = [(seconds(ours, x), seconds(vae.by_hand, x, 500)) for _ in range(ROUNDS)]
        mine, hand = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"GRU decoder of {width} units, B = 6, K = 500: {mine:.1f} ms, by hand {hand:.1f} ms, ratio {mine / hand:.2f}")


if __name__ == "__main__":
    main()
