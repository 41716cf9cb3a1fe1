"""Evidence to a tolerance: unbiased, as exact as asked for, at a cost per datum, cut batches or not."""

import functools
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, SIGMAS, exact_family, guide_of, linear_gaussian, model_of, one_line, quiet, scaled_family

import pyro_vae as pv
from pyro_vae.errors import ConvergenceWarning, OptionError
from pyro_vae.kernel import Call


def banana(curvature):
    """a ~ N(0, 1), b ~ N(curvature a^2, .3), x ~ N(a, 1): p(x) is N(0, sqrt 2), whatever the curvature."""
    return bent(lambda a: curvature * a**2)


def bent(mean):
    """The same with another mean of b."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("b", dist.Normal(mean(a), 0.3))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x / 2, 0.7))
            pyro.sample("b", dist.Normal(mean(x / 2), 0.5))

    truth = functools.partial(lambda x: dist.Normal(torch.zeros_like(x), math.sqrt(2)).log_prob(x))
    return model, guide, truth


def parted(monkeypatch):
    """The sizes of the parts that are opened, and whether they were cut."""
    opened, part = [], Call.part

    def noted(self, kept):
        opened.append(len(kept))
        return part(self, kept)

    monkeypatch.setattr(Call, "part", noted)
    return opened


@pytest.mark.parametrize("tolerance", [0.02, 0.1])
def test_every_datum_reaches_the_tolerance(tolerance):
    """Errors are those that were asked for, and true: 12 numbers within 4.5 of them (false alarm 8e-5)."""
    model, guide, truth = banana(0.3)
    x = torch.linspace(-2, 2, 12, dtype=F64)
    with quiet():
        record = pv.AutoEvidence(model, guide, tolerance=tolerance, seed=0)(x)
    assert int((record.std_error <= tolerance).sum()) >= 11 and bool((record.std_error > 0).all())
    assert bool(((record.log_evidence - truth(x)).abs() < SIGMAS * record.std_error).all())
    assert record.num_particles == int(record.particles.min()) and int(record.reliable.sum()) >= 10


def test_the_cost_is_per_datum(monkeypatch):
    """Two data lie where b bends and need more weights: the others, where it is flat, do not pay for them."""
    opened = parted(monkeypatch)
    model, guide, _ = bent(torch.exp)
    x = torch.cat([torch.full((30,), -4.0, dtype=F64), torch.tensor([0.5, 1.0], dtype=F64)])

    def cost(x):
        with quiet():
            return pv.AutoEvidence(model, guide, tolerance=0.05, seed=0)(x).cost

    easy, hard, both = cost(x[:30]), cost(x[30:]), cost(x)
    assert hard > 3 * easy and min(opened) < len(x)
    assert both < 1.3 * (30 * easy + 2 * hard) / 32


def test_p_of_x_is_unbiased_on_the_oracle():
    """1,000 replicates in one batch: mean of p_hat / p(x) is one within 4.5 errors (false alarm 7e-6), error below .003."""
    lm, x = linear_gaussian(num_data=1)
    x = x.expand(1000, -1)
    guide = guide_of(scaled_family(lm, 0.6, shift=0.5))
    with quiet():
        record = pv.AutoEvidence(model_of(lm), guide, tolerance=0.1, seed=3)(x)
    ratio = (record.log_evidence - lm.log_evidence(x)).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert float(error) < 0.004
    assert abs(float(ratio.mean()) - 1) < SIGMAS * float(error)


def test_an_exact_guide_needs_the_fewest_weights():
    lm, x = linear_gaussian()
    record = pv.AutoEvidence(model_of(lm), guide_of(exact_family(lm)), seed=0)(x)
    assert torch.allclose(record.log_evidence, lm.log_evidence(x), atol=0.1)
    assert record.cost < 1500


def test_data_that_the_program_holds_are_weighed_together():
    """No argument can be cut: every datum gets what the hardest one needs, and the cost says so."""
    _, _, truth = banana(1.0)
    x = torch.cat([torch.zeros(3, dtype=F64), torch.tensor([4.0], dtype=F64)])

    def model():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("b", dist.Normal(a**2, 0.3))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("a", dist.Normal(x / 2, 0.7))
            pyro.sample("b", dist.Normal(x**2 / 4 + 0.5, 0.5))

    with quiet():
        record = pv.AutoEvidence(model, guide, tolerance=0.03, seed=0)()
    assert bool(((record.log_evidence - truth(x)).abs() < SIGMAS * record.std_error).all())
    assert record.cost > float(record.particles.max())


def test_an_argument_that_is_no_datum_but_as_long_is_not_cut():
    """A table of 4 rows beside 4 data: cut with them, log p(x, z) would change, which is seen."""
    x, labels = torch.tensor([0.0, 0.1, 0.2, 4.0], dtype=F64), torch.tensor([3, 2, 1, 0])
    table = torch.tensor([0.0, 0.3, -0.3, 0.5], dtype=F64)

    def model(x, labels, table):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(table[labels], 1.0))
            pyro.sample("b", dist.Normal(a**2, 0.3))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x, labels, table):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x / 2, 0.7))
            pyro.sample("b", dist.Normal(x**2 / 4 + 0.5, 0.5))

    with quiet():
        record = pv.AutoEvidence(model, guide, tolerance=0.03, seed=0)(x, labels, table)
    truth = dist.Normal(table[labels], math.sqrt(2)).log_prob(x)
    assert bool(((record.log_evidence - truth).abs() < SIGMAS * record.std_error).all())


def test_a_table_that_only_the_posterior_reads_is_not_cut():
    """Knots as many as the data: draws of a guide that is far too narrow read the first one, the same in every part.

    Six numbers within 4.5 errors (false alarm 4e-5), with errors below .06: a cut table moves each of them by 0.3 nats.
    """
    knots = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], dtype=F64)
    x = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 2.5], dtype=F64)

    def place(z, knots):
        return knots[(z.abs() * 3).long().clamp(max=len(knots) - 1)]

    def model(x, knots):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("b", dist.Normal(z**2, 0.3))
            pyro.sample("x", dist.Normal(place(z, knots), 0.5), obs=x)

    def guide(x, knots):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 0.05))
            pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 0.3))

    grid = torch.linspace(-8, 8, 200001, dtype=F64).unsqueeze(-1)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(place(grid, knots), 0.5).log_prob(x)
    truth = joint.logsumexp(0) + math.log(16 / 200000)
    for seed in range(2):
        with quiet():
            record = pv.AutoEvidence(model, guide, tolerance=0.03, seed=seed)(x, knots)
        assert float(record.std_error[:3].max()) < 0.06
        assert bool(((record.log_evidence - truth)[:3].abs() < SIGMAS * record.std_error[:3]).all())


def test_a_nat_that_the_batch_adds_to_a_large_log_density_is_seen():
    """log B beside a log p(x) of -1e5 in float32 is 1e-5 of it: a part must not leave it out.

    Two easy data (false alarm 1.4e-5) with errors below .05, and 3e-7 of log p(x), .04 nats, for the rounding of sums.
    """
    x = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    x[7] += 0.01

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("b", dist.Normal(z**2, 0.3))
            loc = (z.unsqueeze(-1) * 0.003).expand(*z.shape, x.shape[1])
            pyro.sample("x", dist.Normal(loc, 0.1).to_event(1), obs=x)
            pyro.factor("size", torch.full((), math.log(len(x))))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))

    with quiet():
        record = pv.AutoEvidence(model, guide, seed=0)(x)
    grid = torch.linspace(-9, 9, 20001, dtype=F64)
    few = x[[0, 2]].double()
    squares = few.square().sum(-1) - 0.006 * grid.unsqueeze(-1) * few.sum(-1) + 3000 * (0.003 * grid.unsqueeze(-1)).square()
    joint = dist.Normal(0.0, 1.0).log_prob(grid).unsqueeze(-1) - squares / 0.02
    constant = math.log(8 * 18 / 20000) - 3000 * (math.log(0.1) + 0.5 * math.log(2 * math.pi))
    error = (record.log_evidence[[0, 2]].double() - joint.logsumexp(0) - constant).abs()
    assert float(record.std_error[[0, 2]].max()) < 0.05
    assert bool((error < SIGMAS * record.std_error[[0, 2]] + 0.04).all())


def test_the_elbo_is_that_of_the_whole_batch():
    """A guide that sees the mean of its batch is another one in a part: both ELBOs are of the whole (false alarm 6e-5)."""
    x = torch.cat([torch.zeros(6, dtype=F64), torch.tensor([5.0, 5.0, -3.0], dtype=F64)])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=F64)))
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(2.0 * k + z, 1.0), obs=x)

    def guide(x):
        away = x - x.mean()
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=torch.stack([-away, away], -1) / 2))
            pyro.sample("z", dist.Normal(away / 3, 0.7))

    with quiet():
        record = pv.AutoEvidence(model, guide, tolerance=0.03, seed=0)(x)
        whole = pv.ImportanceSampling(model, guide, num_particles=5000, check=False, seed=1)(x)
    error = (record.elbo_std_error.square() + whole.elbo_std_error.square()).sqrt()
    assert float(error.max()) < 0.05  # a part moves the ELBO by 0.2
    assert bool(((record.elbo - whole.elbo).abs() < SIGMAS * error).all())


class Named(dict):
    """A mapping whose entries are read as attributes, as batches of tokenizers are."""

    __getattr__ = dict.__getitem__


class OwnError(Exception):
    pass


def only(condition, error):
    if not condition:
        raise error


@pytest.mark.parametrize(
    "check",
    [
        lambda batch: only(len(batch.x) == 4, AssertionError("four data")),
        lambda batch: only(len(batch.x) == 4, OwnError("four data")),
        lambda batch: only(isinstance(batch, Named), AttributeError("x")),
    ],
)
def test_whatever_a_program_raises_at_some_of_its_data_it_is_not_cut(check):
    _, _, truth = banana(1.0)
    x = torch.tensor([0.0, 0.1, 0.2, 4.0], dtype=F64)

    def model(batch):
        check(batch)
        banana(1.0)[0](batch.x)

    def guide(batch):
        check(batch)
        banana(1.0)[1](batch.x)

    with quiet():
        record = pv.AutoEvidence(model, guide, tolerance=0.05, seed=0)(Named(x=x))
    assert bool(((record.log_evidence - truth(x)).abs() < SIGMAS * record.std_error).all())


def test_scales_are_those_of_the_whole_batch():
    """N / B of a program that scales by the size of its batch, not N / b of a part."""
    model, guide, _ = banana(1.0)
    x = torch.tensor([0.0, 0.1, 0.2, 4.0], dtype=F64)
    scaled = [pyro.poutine.scale(program, scale=25.0) for program in (model, guide)]
    with quiet():
        record = pv.AutoEvidence(*(by_batch(p) for p in (model, guide)), tolerance=0.05, seed=0)(x)
        expected = pv.ImportanceSampling(*scaled, num_particles=10, seed=0)(x)
    assert record.stripped_scales == expected.stripped_scales


def by_batch(program):
    def scaled(x):
        with pyro.poutine.scale(scale=100 / len(x)):
            program(x)

    return scaled


def test_discrete_latents_are_weighed_by_the_guide():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=F64)))
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=F64).expand(len(x), 2)))

    x = torch.linspace(-1, 3, 8, dtype=F64)
    both = torch.stack([math.log(w) + dist.Normal(m, 1.0).log_prob(x) for w, m in ((0.3, 0.0), (0.7, 2.0))])
    record = pv.AutoEvidence(model, guide, tolerance=0.02, seed=0)(x)
    assert bool(((record.log_evidence - both.logsumexp(0)).abs() < SIGMAS * record.std_error + 1e-12).all())
    assert bool((record.std_error <= 0.02).all())


def signs(x):
    """Four latents of either sign: sixteen modes."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.abs(), 0.3).to_event(1), obs=x)


def positive(x):
    """A guide that knows one of them."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.3).to_event(1))


def test_sixteen_modes_stay_in_doubt_and_the_record_says_what_to_do():
    """Four latents of either sign: three components lack most modes. Chains from the prior find them, with a large error."""

    x = torch.tensor([[1.0, 1.3, 0.9, 1.5]], dtype=F64)
    grid = torch.linspace(-8, 8, 20001, dtype=F64).unsqueeze(-1)
    terms = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid.abs(), 0.3).log_prob(x[0])
    truth = float((terms.logsumexp(0) + math.log(16 / 20000)).sum())
    with (
        quiet(),
        pytest.warns(
            pv.errors.UnreliableEvidenceWarning, match="start='prior' and many steps, or give a guide with several"
        ),
    ):
        record = pv.AutoEvidence(signs, positive, seed=0)(x)
    assert not bool(record.reliable.any()) and "above the tolerance" in one_line(record)
    assert abs(float(record.log_evidence) - truth) < SIGMAS * float(record.std_error)
    assert record.cost < 2.5 * 10_000


def test_a_doubt_of_the_first_search_stays(monkeypatch):
    """The chains fit proposals anew, and their search may see nothing: the first one has seen modes."""
    annealed = pv.AnnealedImportanceSampling.annealed

    def without_search(self, call, **options):
        record = annealed(self, call, **options)
        return replace(record, checks={**record.checks, "search": torch.zeros_like(record.checks["search"])})

    monkeypatch.setattr(pv.AnnealedImportanceSampling, "annealed", without_search)
    with quiet():
        record = pv.AutoEvidence(signs, positive, seed=0)(torch.tensor([[1.0, 1.3, 0.9, 1.5]], dtype=F64))
    assert bool(record.acceptance.isfinite().all()) and bool(record.checks["search"].all())


def test_chains_that_agree_do_not_clear_what_the_search_has_seen():
    """Each latent has a wide mode and a narrow one, 16 in all: chains miss the narrow ones that the fits lack, and agree.

    The estimates of some data are off by far more than their errors. None of those that were annealed may pass for reliable.
    """

    def log_likelihood(z):
        wide, narrow = dist.Normal(1.5, 0.6).log_prob(z), dist.Normal(-2.0, 0.03).log_prob(z)
        return torch.logaddexp(wide, narrow) - math.log(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(x, log_density=log_likelihood(z).sum(-1)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.ones(len(x), 4, dtype=F64), 0.6).to_event(1))

    grid = torch.linspace(-9, 9, 400001, dtype=F64)
    truth = 4 * float((dist.Normal(0.0, 1.0).log_prob(grid) + log_likelihood(grid)).logsumexp(0) + math.log(18 / 400000))
    with quiet():
        record = pv.AutoEvidence(model, guide, tolerance=0.1, seed=0)(torch.ones(12, dtype=F64))
    wrong = record.acceptance.isfinite() & ((record.log_evidence - truth).abs() > SIGMAS * record.std_error)
    assert int(wrong.sum()) >= 2 and not bool((record.reliable & wrong).any())


def test_some_of_the_data_print_their_own_numbers():
    """Where other data were annealed, acceptance is not known; K is that of the data that are left."""
    model, guide, _ = banana(1.0)
    x = torch.cat([torch.zeros(4, dtype=F64), torch.full((2,), 4.0, dtype=F64)])
    with quiet():
        record = pv.AutoEvidence(model, guide, tolerance=0.03, seed=0)(x)
    weighed = record.acceptance.isnan()
    assert 0 < int(weighed.sum()) < len(x)
    some = record.select(weighed)
    assert "acceptance" not in one_line(some) and "acceptance" in one_line(record)
    assert some.num_particles == int(some.particles.min()) > record.num_particles


def test_what_was_not_reached_is_said():
    model, guide, _ = banana(1.0)
    x = torch.tensor([0.0, 4.0], dtype=F64)
    with quiet(), pytest.warns(ConvergenceWarning, match="above the tolerance of 0.001. Raise max_cost"):
        record = pv.AutoEvidence(model, guide, tolerance=0.001, max_cost=1000, seed=0)(x)
    assert int(record.particles.max()) <= 1000


def test_batches_of_a_loader_are_joined():
    model, guide, truth = banana(0.3)
    x = torch.linspace(-2, 2, 11, dtype=F64)
    with quiet():
        record = pv.evaluate(pv.AutoEvidence(model, guide), [x[:6], x[6:]], seed=0, progress=False)
    assert len(record) == len(record.particles) == 11 and record.tolerance == 0.05
    assert bool(((record.log_evidence - truth(x)).abs() < SIGMAS * record.std_error).all())
    assert record.select(torch.arange(3)).particles.tolist() == record.particles[:3].tolist()


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_random_state():
    model, guide, _ = banana(0.3)
    x = torch.linspace(-2, 2, 5, dtype=F64)
    before = torch.get_rng_state()
    with quiet():
        first, again = (pv.AutoEvidence(model, guide, seed=4)(x) for _ in range(2))
    assert torch.equal(first.log_evidence, again.log_evidence) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"tolerance": math.nan}, {"max_cost": 10}, {"max_cost": 2000.0}])
def test_options_are_checked(options):
    with pytest.raises(OptionError):
        pv.AutoEvidence(lambda x: None, lambda x: None, **options)


def test_no_pilot_shares_its_noise_with_the_estimate(monkeypatch):
    """A part of the batch has a seed of its own: no random state is set twice, whatever ran before in the same call."""
    model, guide, _ = banana(1.0)
    uses, set_noise = [], Call.set_noise

    def noted(self, stream, block):
        uses.append((self.seed, int(stream), block))
        set_noise(self, stream, block)

    monkeypatch.setattr(Call, "set_noise", noted)
    with quiet():
        pv.AutoEvidence(model, guide, seed=0)(torch.tensor([0.0, 0.5, 4.0], dtype=F64))
    assert len({seed for seed, _, _ in uses}) > 2
    assert len(uses) == len(set(uses))
