"""The second estimate without gradients: its proposal is normalised, drawn as it is scored, and reaches what is near."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, quiet

import pyro_vae as pv
from pyro_vae.errors import LocalFitError
from pyro_vae.kernel import Pair
from pyro_vae.proposals import GaussianProposal, LatentSpace
from pyro_vae.proposals.bijections import listed
from pyro_vae.proposals.defensive import NUM_PRIOR
from pyro_vae.proposals.population import PULL, ROUNDS, Kernels, population_log_weights
from pyro_vae.proposals.resampling import Resampled

NUM = 64  # particles of the guide
COUNTS = (3, 1, 2, 0, 0)  # values of each latent, zero for continuous ones


class StandInSpace:
    dim, num_values = len(COUNTS), torch.tensor(COUNTS)


def particles(num=4, num_data=2, seed=0):
    """Five latents, of which the last two are continuous and correlated."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack(
        [torch.randint(n, (num, num_data), generator=generator).to(F64) for n in COUNTS if n],
        -1,
    )
    continuous = torch.randn(num, num_data, 2, generator=generator, dtype=F64)
    continuous[..., 1] = 3 + continuous[..., 0] + 0.5 * continuous[..., 1]
    u = torch.cat([codes, continuous], -1)
    kept = Resampled(u, 12)
    kept.add(u, torch.zeros(num, num_data, dtype=F64))
    return kept, u


def test_the_kernels_are_normalised():
    """Summed over the six values of the discrete latents, and over a grid in the continuous ones."""
    kernels = Kernels.around(particles()[0], StandInSpace(), 1.0)
    axis = torch.arange(-12, 12, 0.1, dtype=F64)
    grid = torch.cartesian_prod(torch.arange(3.0), torch.zeros(1), torch.arange(2.0))
    plane = torch.cartesian_prod(axis, axis + 3)
    total = 0
    for codes in grid.to(F64):
        u = torch.cat([codes.expand(len(plane), -1), plane], -1).unsqueeze(1).expand(-1, 2, -1)
        total = total + kernels.log_prob(u).exp().sum(0) * 0.01
    torch.testing.assert_close(total, torch.ones(2, dtype=F64), rtol=1e-6, atol=0.0)


def test_draws_follow_the_density():
    """Counts of the six values of the discrete latents, and moments of the continuous ones, within five errors: a false
    alarm once in 100,000 runs."""
    kernels = Kernels.around(particles()[0], StandInSpace(), 1.0)
    torch.manual_seed(1)
    num = 24_000
    u = kernels.draw(num)
    grid = torch.cartesian_prod(torch.arange(3.0), torch.zeros(1), torch.arange(2.0)).to(F64)
    stays, each = 1 - kernels.change, kernels.change / (kernels.num_values - 1).clamp(min=1)
    for codes in grid:
        expected = torch.where(kernels.codes == codes, stays, each).prod(-1).mean(0)
        found = (u[..., :3] == codes).all(-1).to(F64).mean(0)
        assert float(((found - expected) / (expected / num).sqrt()).abs().max()) < 5
    parts = kernels.components
    loc = torch.stack([part.loc for part in parts]).mean(0)
    assert float((u[..., 3:].mean(0) - loc).abs().max()) < 5 * 2 / num**0.5
    # An importance estimate of one with these draws: any error of scale or weight shows.
    target = GaussianProposal(loc, 0.9 * parts[0].tril)
    ratio = (target.log_prob(u[..., 3:]) - math.log(6) - kernels.log_prob(u)).exp()
    assert float(((ratio.mean(0) - 1) / (ratio.std(0) / num**0.5)).abs().max()) < 5
    assert float((ratio.std(0) / num**0.5).max()) < 0.1


def test_centres_and_kernels_together_have_the_covariance_of_the_particles():
    kept, u = particles(num=400)
    kept.chosen = u  # all of them, so that no choice adds noise
    kernels = Kernels.around(kept, StandInSpace(), 1.0)
    centres = torch.stack([part.loc for part in kernels.components])
    expected = torch.einsum("cbi,cbj->bij", *(2 * [u[..., 3:] - u[..., 3:].mean(0)])) / len(u)
    between = torch.einsum("cbi,cbj->bij", *(2 * [centres - centres.mean(0)])) / len(u)
    within = kernels.components[0].tril @ kernels.components[0].tril.mT
    torch.testing.assert_close(between, PULL**2 * expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(between + within, expected, rtol=1e-6, atol=1e-9)


def bits(num_latents, num_data):
    """Every bit is seen in a number of its own, so that log p(x) is a sum of logarithms."""
    prior = torch.tensor(0.3, dtype=F64)
    x = torch.randn(num_data, num_latents, generator=torch.Generator().manual_seed(2), dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(prior.expand(num_latents)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_full((num_latents,), 0.5)).to_event(1))

    normal = dist.Normal(0.0, 1.0)
    each = torch.logaddexp((1 - prior).log() + normal.log_prob(x), prior.log() + normal.log_prob(x - 1))
    return model, guide, x, each.sum(-1)


@pytest.mark.parametrize(("num_latents", "largest"), [(1, 0.01), (2, 0.01), (8, 0.03), (15, 0.15)])
def test_the_estimate_of_discrete_latents_is_log_evidence(num_latents, largest):
    """From 64 particles drawn by the guide. The mean of p(x) / truth over 400 data within five errors of one."""
    model, guide, x, truth = bits(num_latents, 400)
    with torch.no_grad(), Pair(model, guide).open((x,), {}, 0) as call:
        call.set_noise(0, 5)
        drawn = call.draw(NUM)
        values = call.latent_values(drawn)
        scored = call.score(values, NUM)
        space = LatentSpace(call, drawn, scored, discrete=True)
        assert space.dim == num_latents
        kept = Resampled(space.pack(values)[0], 12)
        kept.add(space.pack(values)[0], call.weigh(drawn, scored, NUM).log_weight)
        before = call.cost
        log_weight = population_log_weights(space, kept, NUM)
        assert call.cost - before == sum(size + NUM_PRIOR for size, _ in ROUNDS)
    ratio = (log_weight - truth).exp().mean(0)
    error = float(ratio.std()) / 20
    assert error < largest
    assert abs(float(ratio.mean()) - 1) < 5 * error


def test_too_many_latents():
    model, guide, x, _ = bits(16, 3)
    with torch.no_grad(), Pair(model, guide).open((x,), {}, 0) as call:
        drawn = call.draw(2)
        space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 2), discrete=True)
        with pytest.raises(LocalFitError, match="more than 15 latents"):
            population_log_weights(space, Resampled(torch.zeros(2, 3, 16), 12), 2)


def test_masked_discrete_latents_leave_the_estimate_alone():
    """Five bits that a mask takes out, under a prior of .05: the mean of p(x) / truth over 200 data, five errors."""
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    prior = torch.tensor(0.3, dtype=F64)

    def latents():
        z = pyro.sample("z", dist.Bernoulli(prior.expand(2)).to_event(1))
        with pyro.poutine.mask(mask=torch.tensor(False)):
            pyro.sample("unused", dist.Bernoulli(torch.full((5,), 0.05, dtype=F64)).to_event(1))
        return z

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latents(), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            latents()

    normal = dist.Normal(0.0, 1.0)
    truth = torch.logaddexp((1 - prior).log() + normal.log_prob(x), prior.log() + normal.log_prob(x - 1)).sum(-1)
    evidence = pv.ImportanceSampling(model, guide, num_particles=1000, seed=0)(x)
    ratio = (evidence.second - truth).exp()
    error = float(ratio.std()) / 200**0.5
    assert error < 0.02 and abs(float(ratio.mean()) - 1) < 5 * error


def test_a_number_of_trials_that_is_drawn_is_refused():
    def latents():
        n = pyro.sample("n", dist.Categorical(torch.tensor([0.5, 0.5])))
        return pyro.sample("c", dist.Binomial(1.0 + 9.0 * n, 0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latents().float(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            latents()

    for seed in range(6):
        evidence = pv.ImportanceSampling(model, guide, num_particles=1000, seed=seed)(torch.tensor([5.0]))
        assert "posterior side" in evidence.unchecked


@pytest.mark.parametrize("of_model", [torch.float32, F64])
@pytest.mark.parametrize("of_guide", [torch.float32, F64])
def test_sides_in_different_precision(of_model, of_guide):
    """Bits of the guide in another dtype than those of the model: the mean of p(x) / truth over 400 data, five errors."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=of_model)))
            pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.4, dtype=of_guide)))

    x = torch.randn(400, generator=torch.Generator().manual_seed(5))
    normal = dist.Normal(0.0, 1.0)
    truth = torch.logaddexp(math.log(0.7) + normal.log_prob(x), math.log(0.3) + normal.log_prob(x - 1))
    with quiet():  # a few of 400 are flagged by chance
        evidence = pv.ImportanceSampling(model, guide, num_particles=1000, seed=0)(x)
    ratio = (evidence.second - truth).exp()
    error = float(ratio.std()) / 20
    assert error < 0.005 and abs(float(ratio.mean()) - 1) < 5 * error


def test_values_that_are_listed_in_another_order():
    class Shuffled(dist.Categorical):
        def enumerate_support(self, expand=True):
            return super().enumerate_support(expand)[[2, 0, 1]]

    values = torch.tensor([0, 2, 1, 1, 0])
    transform = listed("z", Shuffled(torch.ones(3)), Shuffled(torch.ones(3)).support, wanted=True)
    assert torch.equal(transform(transform.inv(values)), values)
