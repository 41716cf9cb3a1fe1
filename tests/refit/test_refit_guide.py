"""A refit against closed forms: the parts of the amortization gap where all of them are known."""

import math

import matplotlib.pyplot as plt
import pyro
import pytest
import torch
from pair_helpers import F64, SIGMAS, linear_gaussian, make_gaps, model_of, one_line
from refit_helpers import FEW, Linear, Network, adam, batches_of
from torch import nn

import pyro_vae as pv
from pyro_vae.refit.refit import change


def deterministic(num_particles=20):
    """Little noise in the gradients."""
    return pv.BetaTraceMeanField_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


def refitted(lm, guide, train, test, num_epochs, optim=None, **options):
    options = {**FEW, "loss": deterministic(), **options}
    optim = optim or adam(3e-2, 0.02 ** (1 / num_epochs))
    return pv.refit_guide(
        model_of(lm), guide, batches_of(train), optim, test=batches_of(test), num_epochs=num_epochs, **options
    )


def near(estimate, truth, largest_error, extra=0.0):
    """Within 4.5 Monte Carlo errors (one false alarm in 150,000), which are small."""
    error = float(estimate.std_error)
    assert error < largest_error, f"blunt: {error}"
    assert abs(float(estimate.value) - truth) < SIGMAS * error + extra, (estimate, truth)


@pytest.mark.slow
def test_the_best_encoder_is_reached_where_it_is_linear():
    """Amortization gap 0 on training and test data; log p(x) is the closed form both times, and the rest the family's."""
    lm, x = linear_gaussian(latent_dim=2, data_dim=4, num_data=500)
    guide = Linear(4, 2)
    refit = refitted(lm, guide, x[:400], x[400:], 150)
    before, after = (side.summary() for side in (refit.test_before, refit.test_after))
    assert float(before["amortization"].value) > 1.0
    for side in (refit.test_after, refit.train_after):
        near(side.summary()["amortization"], 0.0, 0.005, extra=0.003)  # the last steps of Adam
    near(after["approximation"], float(lm.approximation_gap()), 0.005, extra=0.003)
    truth = float(lm.log_evidence(x[400:]).mean())
    for side in (before, after):
        near(side["log_evidence"], truth, 0.005)
    q = pyro.poutine.trace(guide).get_trace(x[400:]).nodes["z"]["fn"]
    near(after["elbo"], float(lm.elbo(x[400:], q).mean().detach()), 0.01)
    parts = refit.parts
    assert abs(float(parts["capacity"].value)) < 0.01 and abs(float(parts["generalisation after"].value)) < 0.01
    assert "below 0.1 nats" in refit.verdict() or "family" in refit.verdict()


def rank_one(lm, x):
    """The best mean of rank one for these data, an affine function of x, and the precision P of the posterior.

    The ELBO of a diagonal Gaussian of mean m is a constant minus (m - mu)'P(m - mu) / 2, with mu = G (x - b) the mean of the
    posterior. The best affine m of rank one is the first singular direction of P^1/2 (mu - its mean), by Eckart and Young.
    """
    mu = lm.posterior(x).mean
    precision = torch.linalg.inv(lm.posterior(x[:1]).covariance_matrix[0])
    values, vectors = torch.linalg.eigh(precision)
    root = vectors @ values.sqrt().diag() @ vectors.T
    centre = mu.mean(0)
    _, _, directions = torch.linalg.svd((mu - centre) @ root, full_matrices=False)
    first = directions[0]
    project = root @ first.outer(first) @ torch.linalg.inv(root)
    return lambda y: centre + (lm.posterior(y).mean - centre) @ project, precision


@pytest.mark.slow
def test_an_encoder_of_rank_one_keeps_its_known_gap():
    """What an encoder through one number leaves, by a singular value decomposition, on training and on test data."""
    lm, x = linear_gaussian(latent_dim=2, data_dim=4, num_data=300)
    train, test = x[:100], x[100:]
    mean_of, precision = rank_one(lm, train)

    def known(y):
        off = mean_of(y) - lm.posterior(y).mean
        return float((0.5 * (off @ precision * off).sum(-1)).mean())

    refit = refitted(lm, Linear(4, 2, rank=1), train, test, 300, adam(0.1, 0.02 ** (1 / 300)), num_data=200)
    assert known(train) > 0.2
    near(refit.parts["capacity"], known(train), 0.01, extra=0.01)
    near(refit.test_after.summary()["amortization"], known(test), 0.01, extra=0.02)
    assert "larger_guide" in refit.verdict() or "richer_guide" in refit.verdict()


def test_a_scale_that_cannot_move_keeps_its_known_gap():
    """Twice the best scale: (c^2 - 1) / 2 - log c nats per latent, for every datum, from an encoder that is right else."""
    lm, x = linear_gaussian(latent_dim=2, data_dim=4, num_data=200)
    scale = 2 * lm.optimal_diagonal(x[:1]).base_dist.scale[0]
    guide = Linear(4, 2, scale=scale)
    refit = refitted(lm, guide, x[:100], x[100:], 200, adam(0.1, 0.02 ** (1 / 200)))
    known = 2 * (1.5 - math.log(2))
    near(refit.parts["capacity"], known, 0.03, extra=0.01)
    near(refit.test_after.summary()["amortization"], known, 0.03, extra=0.02)
    assert (
        abs(float(refit.parts["generalisation after"].value))
        < SIGMAS * float(refit.parts["generalisation after"].sampling_error) + 0.02
    )


@pytest.mark.slow
def test_an_encoder_that_learns_thirty_data_by_heart_does_not_carry_over():
    """200 hidden units: little is left on training data, and most of the gap is on new data. Simulated data help."""
    lm, x = linear_gaussian(latent_dim=2, data_dim=8, num_data=230, variance=0.1)
    train, test = x[:30], x[30:]

    def run(**options):
        pyro.clear_param_store()
        torch.manual_seed(0)
        return refitted(lm, Network(8, 2, 200), train, test, 300, adam(6e-3, 0.99), **options)

    alone, simulated = run(), run(simulated=2)
    gap = alone.parts["generalisation after"]
    assert float(gap.value) > 3 * float(gap.sampling_error) and float(gap.value) > 0.3
    assert float(alone.parts["capacity"].value) < 0.5 * float(gap.value)
    assert "simulated=1" in alone.verdict()
    after, better = (r.test_after.summary()["amortization"] for r in (alone, simulated))
    assert float(better.value) < 0.5 * float(after.value)


@pytest.mark.slow
def test_held_out_data_stop_it_and_the_best_guide_is_kept():
    lm, x = linear_gaussian(latent_dim=2, data_dim=8, num_data=630, variance=0.1)
    model, train, held_out, test = model_of(lm), x[:30], x[30:330], x[330:]

    def run(**options):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = Network(8, 2, 200)
        options = {**FEW, **options}
        return guide, pv.refit_guide(
            model, guide, batches_of(train), adam(6e-3), test=batches_of(test), num_epochs=1000, **options
        )

    guide, stopped = run(held_out=batches_of(held_out), every=20, patience=10)
    assert stopped.stopped == "held-out" and stopped.num_updates < 1000 and stopped.history is not None
    best = int(stopped.history.step[stopped.history.best])
    assert best < stopped.num_updates and f"kept: update {best}" in one_line(stopped)
    again = pv.EarlyStopping(model, guide, batches_of(held_out), seed=0)
    again(0)
    assert float(again.history().elbo) == pytest.approx(float(stopped.history.elbo.max()), abs=1e-9)
    _, to_the_end = run()
    assert to_the_end.stopped == "epochs" and to_the_end.history is None and to_the_end.num_updates == 1000
    assert float(stopped.test_after.elbo.mean()) > float(to_the_end.test_after.elbo.mean())


def test_a_training_that_ends_between_two_looks_is_not_thrown_away():
    """Fewer updates than `every`: the end is looked at too, and it is better than the start."""
    lm, x = linear_gaussian(latent_dim=2, data_dim=4, num_data=200)
    refit = refitted(lm, Linear(4, 2), x[:100], x[100:], 30, held_out=[x[100:]], every=1000)
    assert refit.history.step.tolist() == [0, 30] and refit.history.best == 1
    assert float(refit.changes["elbo"].value) > 1


@pytest.mark.slow
def test_another_guide_takes_over_and_the_first_stays_as_it_is():
    lm, x = linear_gaussian(latent_dim=2, data_dim=4, num_data=200)
    small, large = Linear(4, 2, rank=1), Network(4, 2, 30, name="large")
    kept = [p.detach().clone() for p in small.parameters()]
    refit = refitted(lm, small, x[:100], x[100:], 200, other=large)
    assert all(torch.equal(a, b) for a, b in zip(kept, small.parameters(), strict=True))
    assert refit.took_over and all(name.startswith("large$$$") for name in refit.trained)
    assert float(refit.test_after.summary()["amortization"].value) < 0.3
    assert "another guide took over" in one_line(refit) and "capacity of the old guide" in one_line(refit)
    gaps = pv.InferenceGaps(model_of(lm), large, num_particles=100)
    again = pv.evaluate(gaps, batches_of(x[100:]), seed=0, progress=False)
    assert torch.equal(again.elbo, refit.test_after.elbo)


# The arithmetic of the parts


def record(test, train, **options):
    """A refit whose amortization gaps are these, (before, after) each."""
    sides = {}
    for data, gaps, size in (("test", test, 50), ("train", train, 80)):
        sides |= {f"{data}_before": make_gaps(gaps[0], 0.5, num_data=size)}
        sides |= {f"{data}_after": make_gaps(gaps[1], 0.5, num_data=size)}
    fields = {"history": None, "stopped": "epochs", "num_updates": 10, "num_epochs": 2, "trained": ("a",), "shared": ()}
    return pv.Refit(**sides, **{**fields, "took_over": False, "seconds": 1.0, **options})


def test_the_parts_add_up_to_the_gaps():
    refit = record(test=(7.0, 3.5), train=(4.5, 2.0))
    parts = {name: float(part.value) for name, part in refit.parts.items()}
    wanted = {"optimisation": 2.5, "capacity": 2.0, "generalisation before": 2.5, "generalisation after": 1.5}
    assert parts == pytest.approx(wanted)
    assert parts["optimisation"] + parts["capacity"] + parts["generalisation before"] == pytest.approx(7.0)
    assert parts["capacity"] + parts["generalisation after"] == pytest.approx(3.5)
    errors = {name: float(part.std_error) for name, part in refit.parts.items()}
    one = 0.01 / math.sqrt(80)  # of a mean over 80 data of error .01 each
    assert errors["optimisation"] == pytest.approx(math.sqrt(2) * one) and errors["capacity"] == pytest.approx(one)
    assert errors["generalisation after"] == pytest.approx(math.hypot(one, 0.01 / math.sqrt(50)))
    assert float(refit.changes["log_evidence"].value) == pytest.approx(-3.5 + 0)  # as make_gaps builds it


def test_changes_are_paired_by_datum():
    before, after = make_gaps(3.0, 0.5), make_gaps(1.0, 0.5)
    assert float(change(before, after, "amortization").sampling_error) == 0
    assert float(change(before, after, "amortization").value) == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("test", "train", "said"),
    [
        ((7.0, 3.5), (4.5, 3.4), "larger_guide"),
        ((7.0, 3.5), (4.5, 0.4), "simulated=1"),
        ((7.0, 0.1), (4.5, 0.1), "richer_guide"),
    ],
)
def test_the_next_call_fits_what_is_left(test, train, said):
    refit = record(test, train)
    if said == "simulated=1":  # the spread over data is zero here, so that any rise is certain
        assert float(refit.parts["generalisation after"].sampling_error) == 0
    assert said in refit.verdict()


def test_what_is_printed_and_kept():
    refit = record(test=(7.0, 3.5), train=(4.5, 2.0), shared=("decoder$$$weight",))
    text = str(refit)
    for part in ("50 test data", "80 training data", "optimisation", "capacity, or training", "generalisation after",
                 "frozen, because the model depends on them too: decoder$$$weight", "10 updates in 2 epochs"):  # fmt: skip
        assert part in text, part
    kept = refit.to_dict()
    assert kept["parts"]["capacity"]["value"] == pytest.approx(2.0) and kept["history"] is None
    assert kept["test_after"]["amortization"] == pytest.approx([3.5] * 50)
    ax = refit.plot()
    assert len(ax.patches) == 8 and [t.get_text() for t in ax.get_legend().get_texts()][0].startswith("amortization")
    plt.close("all")
    assert refit.warnings() == []


def test_discrete_latents_have_no_parts():
    """Their gap is not split; the ELBO and the whole gap are still told."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=F64)
    net = nn.Linear(4, 3, dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", pyro.distributions.Categorical(logits=x.new_zeros(3)))
            pyro.sample("x", pyro.distributions.Normal(logits[k], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("k", pyro.distributions.Categorical(logits=net(x)))

    x = logits[torch.randint(3, (60,))] + torch.randn(60, 4, dtype=F64)
    refit = pv.refit_guide(model, guide, [x[:40]], adam(3e-2), test=[x[40:]], num_epochs=100, **FEW)
    assert refit.parts == {} and "not split" in refit.verdict()
    gained = refit.changes["elbo"]
    assert float(gained.value) > 3 * float(gained.std_error) > 0
    assert "discrete" in one_line(refit) or "not reparameterised" in one_line(refit)
    refit.plot()
    plt.close("all")
