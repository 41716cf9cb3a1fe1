"""Early stopping: the held-out ELBO against closed forms, how often it errs, and that a look leaves no trace."""

import io
import math
import random

import matplotlib.pyplot as plt
import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_helpers import F64, numbers
from pair_helpers import diagonal_family, exact_pair, guide_of, linear_gaussian, model_of, one_line
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    DatumPlateError,
    NonFiniteError,
    OptionError,
    PrecisionWarning,
    ScheduleWarning,
    UnreliableEvidenceWarning,
)
from pyro_vae.training.schedules import still_moves

# What is measured


def test_the_held_out_elbo_is_log_evidence_for_an_exact_guide():
    """The weights are constant: exact for any number of particles, in any batches."""
    lm, x = linear_gaussian(num_data=7)
    stopping = pv.EarlyStopping(*exact_pair(lm), x.split(3), num_particles=2)
    stopping(0)
    history = stopping.history()
    assert float(history.elbo) == pytest.approx(float(lm.log_evidence(x).mean()), abs=1e-10)
    assert float(history.sampling_error) == pytest.approx(float(lm.log_evidence(x).std()) / math.sqrt(7), abs=1e-10)
    assert history.num_data == 7 and history.best == 0 and bool(history.improved[0])


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_the_kl_is_weighted_as_the_objective_weighs_it(beta):
    """Against -(D + beta R) in closed form; 2,000 draws of 40 data, an error below .02: one false alarm in 150,000."""
    lm, x = linear_gaussian(num_data=40)
    guide = guide_of(family := diagonal_family(lm, mean_shift=0.3))
    stopping = pv.EarlyStopping(model_of(lm), guide, [x], num_particles=2000, beta=beta)
    stopping(0)
    q = family(x)
    wanted = float(-(lm.distortion(x, q) + beta * lm.rate(q)).mean())
    noise = 5.0 * 3 / math.sqrt(2000 * 40)  # terms have a standard deviation below 5 for beta up to 4
    assert float(stopping.history().elbo) == pytest.approx(wanted, abs=noise)
    assert noise < 0.06


def test_one_datum_alone_goes_by_its_particles():
    """The whole call as one datum: no spread over data, so the error is the Monte Carlo error."""
    lm, x = linear_gaussian(num_data=5)
    guide = guide_of(diagonal_family(lm, mean_shift=0.3))
    stopping = pv.EarlyStopping(model_of(lm), guide, [x[:1]], num_particles=50)
    stopping(0)
    assert float(stopping.history().sampling_error) > 0
    exact = pv.EarlyStopping(*exact_pair(lm), [x], num_particles=3, datum_plate=None)
    exact(0)
    assert float(exact.history().elbo) == pytest.approx(float(lm.log_evidence(x).sum()), abs=1e-9)


# When it stops


def scripted(terms, **options):
    """A stopping whose looks are these tensors (N,), one per update."""
    lm, x = linear_gaussian(num_data=3)
    stopping = pv.EarlyStopping(*exact_pair(lm), [x], every=1, **options)
    script = iter(terms)
    stopping._look = lambda beta: next(script)
    return stopping


def stops_at(terms, **options):
    """The number of the look that says stop, or None."""
    stopping = scripted(terms, **options)
    return next((step for step in range(len(terms)) if stopping(step)), None)


@pytest.mark.parametrize(
    ("gains", "patience", "wanted"),
    [
        ([0, 0, 0, 0], 3, 3),  # the same numbers are no improvement
        ([0, -1, -1, -1], 3, 3),
        ([0, 1, 1, 1, 1], 3, 4),  # the reference moves up, and patience starts anew
        ([0, 1, 0.5, 2, 1, 1, 1], 3, 6),
        ([0, 1, 2, 3, 4, 5], 1, None),
        ([0, -5, 1, -5, -5, 0.9], 3, 5),  # against the reference, not the look before
        ([0, float("nan"), float("nan"), 1], 2, 2),
        ([0, 1e-12, 2e-12, 3e-12], 1, None),  # without noise, whatever is more is more
    ],
)
def test_patience(gains, patience, wanted):
    """A shift of all data has no error at all."""
    base = numbers(20)
    assert stops_at([base + gain for gain in gains], patience=patience) == wanted


def test_a_rise_counts_where_its_interval_is_above_zero():
    """Paired differences of mean 1 and standard deviation 1 over 100 data are 10 errors; of standard deviation 6, 1.7."""
    base = 100 * numbers(100)  # the spread over data is no part of it
    noise = numbers(100, seed=1)
    noise = (noise - noise.mean()) / noise.std()
    assert stops_at([base, base + 1 + noise], patience=1) is None
    assert stops_at([base, base + 1 + 6 * noise], patience=1) == 1
    stopping = scripted([base, base + 1 + 6 * noise])
    stopping(0), stopping(1)
    history = stopping.history()
    assert float(history.gain[1]) == pytest.approx(1.0) and float(history.gain_error[1]) == pytest.approx(0.6)
    assert float(history.sampling_error[1]) > 5


NUM_RUNS, NUM_DATA, PATIENCE = 1000, 100, 5


def stopping_times(rise, generator, num_looks):
    """When 1,000 runs stop whose looks are independent noise around a mean that rises by so many errors per look."""
    times = []
    for _ in range(NUM_RUNS):
        noise = torch.randn(num_looks, NUM_DATA, generator=generator, dtype=F64)
        # the error of a difference of two looks is sqrt(2 / N)
        mean = rise * math.sqrt(2 / NUM_DATA) * torch.arange(num_looks).unsqueeze(1)
        times.append(stops_at(list(noise + mean), patience=PATIENCE))
    return times


@pytest.mark.slow
def test_how_often_it_errs(monkeypatch):
    """1,000 runs each; patience 5; a rate has a standard error of at most 1%, the bounds are 3 of them or more away.

    Without any rise 91% stop as soon as patience allows (each of five looks passes by chance with 2.5%, against one
    reference), and all within three times patience. While the mean rises by so many errors within patience, the first
    window ends it in .1% (five errors), 1% (four) and 8% (three). The reference was a lucky look more often than not, so
    that a long run is at more risk than its first window: 1% of the runs that rise by five errors stop within 30 looks.
    """
    # It follows a schedule of beta to its end once for each run; here beta is constant.
    monkeypatch.setattr("pyro_vae.training.early_stopping.still_moves", lambda schedule, step: False)
    generator = torch.Generator().manual_seed(0)
    still = stopping_times(0.0, generator, 1 + 8 * PATIENCE)
    at_once = share(still, lambda time: time == PATIENCE)
    soon = share(still, lambda time: time is not None and time <= 3 * PATIENCE)
    print(f"no rise: {at_once:.3f} as soon as patience allows, {soon:.3f} within three times patience")
    assert at_once > 0.88 and soon > 0.99
    for errors, first_most, most in ((5.0, 0.006, 0.025), (4.0, 0.02, None), (3.0, 0.11, None)):
        num_looks = 31 if most is not None else PATIENCE + 1  # the first window, where no more is held
        rising = stopping_times(errors / PATIENCE, generator, num_looks)
        first, stopped = share(rising, lambda time: time == PATIENCE), share(rising, lambda time: time is not None)
        print(
            f"a rise of {errors:g} errors within patience: {first:.3f} stop in the first window, {stopped:.3f} in "
            f"{num_looks - 1} looks"
        )
        assert first <= first_most and (most is None or stopped <= most)


def share(times, which):
    return sum(map(which, times)) / NUM_RUNS


# Beta


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (pv.LinearAnnealing(10), 10),
        (pv.LinearAnnealing(10, delay=5, start=1.0, end=0.2), 15),
        (pv.SigmoidAnnealing(10), 10),
        (pv.CosineAnnealing(10), 10),
        (pv.CyclicalAnnealing(10, 3), 25),  # on the last plateau, which goes on for good
        (lambda step: 0.0 if step < 7 else 1.0, 7),
        (lambda step: 2 * pv.LinearAnnealing(10)(max(step - 5, 0)), 15),
        (lambda step: [0.0, 0.5, 1.0, 1.0, 1.0][step], 2),  # a table that ends
        (1.0, 0),
    ],
)
def test_beta_moves_until_its_last_update(schedule, end):
    callable_ = schedule if callable(schedule) else (lambda step: schedule)
    last = next(step for step in range(100) if not still_moves(callable_, step))
    assert last == end


def test_nothing_counts_before_beta_has_reached_its_end():
    """The ELBO falls all along the warm-up, and then stands still: patience starts at the end, and so does the best."""
    base, num_steps, patience = numbers(20), 10, 3
    terms = [base - step for step in range(num_steps)] + [base - num_steps] * 10
    for warmup in (pv.LinearAnnealing(num_steps), pv.CosineAnnealing(num_steps), pv.CyclicalAnnealing(4, 2)):
        stopping = scripted(terms, patience=patience, beta=warmup)
        end = next(step for step in range(99) if not still_moves(warmup, step))
        told = [step for step in range(len(terms)) if stopping(step)]
        assert told[0] == stopping.stopped_at >= end + patience
        history = stopping.history()
        assert history.at_rest.tolist() == [step >= end for step in range(len(terms))]
        assert int(history.step[history.best]) == end


def test_there_is_nothing_to_restore_before_the_end():
    stopping = scripted([numbers(20)] * 5, beta=pv.LinearAnnealing(10))
    stopping(0)
    with pytest.raises(OptionError, match="beta has its final value"):
        stopping.restore_best()
    assert stopping.history().best is None and "not yet at its end" in one_line(stopping)


def test_a_beta_that_never_rests_is_said_to_never_stop():
    lm, x = linear_gaussian()
    with pytest.warns(ScheduleWarning, match="never becomes constant"):
        pv.EarlyStopping(*exact_pair(lm), [x], beta=lambda step: (step % 10) / 10)


def test_looks_are_taken_when_they_are_due():
    lm, x = linear_gaussian()
    stopping = pv.EarlyStopping(*exact_pair(lm), [x], every=10)
    for step in range(0, 31, 3):
        assert stopping(step) is False
    assert stopping.history().step.tolist() == [0, 12, 24]


def test_a_last_look_is_taken_on_request_and_once():
    base = numbers(20)
    stopping = scripted([base, base + 1], patience=3)
    stopping.every, stopping._due = 100, 0
    for step in range(30):
        stopping(step)
    assert stopping.history().step.tolist() == [0] and stopping.history().best == 0
    stopping.look(29), stopping.look(29)
    assert stopping.history().step.tolist() == [0, 29] and stopping.history().best == 1


# In the middle of a training


class Layers(nn.Module):
    """A model or guide with batch norm and dropout in train mode."""

    def __init__(self, side):
        super().__init__()
        self.side = side
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.side == "guide":
                scale = pyro.param("guide_scale", x.new_ones(3), constraint=dist.constraints.positive)
                pyro.sample("z", dist.Normal(self.net(x), scale).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


def in_closures():
    decoder, encoder = Layers("model"), Layers("guide")

    def model(x):
        pyro.module("decoder", decoder)
        decoder(x)

    def guide(x):
        pyro.module("encoder", encoder)
        encoder(x)

    return model, guide, (decoder, encoder)


def state_of(modules):
    """Everything that a look could change."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "modes": [m.training for top in modules for m in top.modules()],
        "tensors": tensors_of(modules),
        "grads": [None if p.grad is None else p.grad.tolist() for top in modules for p in top.parameters()],
        "store": {name: (id(value), value.tolist()) for name, value in pyro.get_param_store()._params.items()},
        "hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }


def tensors_of(modules):
    return [v.tolist() for top in modules for v in top.state_dict().values()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_training_with_looks_is_the_same_training(shuffle):
    """Bit by bit, from before it is built; with a loader that shuffles by the caller's random state, too."""

    def train(watch):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, modules = in_closures()
        data, held_out = torch.randn(20, 3), torch.randn(20, 3)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        stopping = None
        if watch:
            stopping = pv.EarlyStopping(model, guide, DataLoader(TensorDataset(held_out), 7, shuffle=shuffle), every=2)
        losses = []
        for step in range(8):
            losses.append(svi.step(data))
            if stopping is not None:
                before = state_of(modules)
                stopping(step)
                assert state_of(modules) == before
        if stopping is not None:
            assert len(stopping.history()) == 4 and bool(stopping.history().elbo.isfinite().all())
        return losses, tensors_of(modules), random.random(), float(torch.rand(()))

    assert train(True) == train(False)


def test_the_best_state_is_restored_in_place():
    """Parameters of modules in closures, constrained ones of the store, and running statistics."""
    model, guide, modules = in_closures()
    data = torch.randn(20, 3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(data)
    stopping = pv.EarlyStopping(model, guide, [data], every=1)
    stopping(0)
    kept, places = state_of(modules)["store"], [id(p) for top in modules for p in top.parameters()]
    wanted = tensors_of(modules)
    with torch.no_grad():  # worse
        for param in pyro.get_param_store()._params.values():
            param += 1.0
    modules[1].net[1].running_mean += 3
    stopping(1)
    assert stopping.history().elbo[1] < stopping.history().elbo[0]
    stopping.restore_best()
    assert tensors_of(modules) == wanted and state_of(modules)["store"] == kept
    assert [id(p) for top in modules for p in top.parameters()] == places
    svi.step(data)  # the optimiser still holds them
    assert tensors_of(modules) != wanted


def test_a_checkpoint_goes_on_as_if_nothing_had_happened():
    """Saved in the middle as tensors and numbers alone, loaded into new objects."""

    def run(interrupt):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, modules = in_closures()
        data, held_out = torch.randn(20, 3), torch.randn(30, 3)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        stopping = pv.EarlyStopping(model, guide, [held_out], every=2, patience=3)
        for step in range(12):
            svi.step(data)
            stopping(step)
            if interrupt and step == 6:
                file = io.BytesIO()
                torch.save(stopping.state_dict(), file)
                file.seek(0)
                stopping = pv.EarlyStopping(model, guide, [held_out], every=2, patience=3)
                stopping.load_state_dict(torch.load(file, weights_only=True))
        stopping.restore_best()
        rows = {name: value for name, value in stopping.history().to_dict().items() if name not in ("gain", "gain_error")}
        return rows, stopping.history().gain.nan_to_num(-1).tolist(), tensors_of(modules), stopping.num_without

    assert run(True) == run(False)


def test_another_pair_does_not_take_the_state():
    lm, x = linear_gaussian()
    model, guide, _ = in_closures()
    stopping = pv.EarlyStopping(model, guide, [torch.randn(20, 3)])
    stopping(0)
    other = pv.EarlyStopping(*exact_pair(lm), [x])
    other.load_state_dict(stopping.state_dict())
    pyro.clear_param_store()
    with pytest.raises(OptionError, match="no tensor of their shape"):
        other.restore_best()
    with pytest.raises(OptionError, match="not a state of an EarlyStopping"):
        other.load_state_dict({"best": {}})


@pytest.mark.slow
def test_a_vae_that_overfits_is_stopped_and_its_best_state_is_better():
    """200 data of a model that 200 hidden units learn by heart."""
    lm, x = linear_gaussian(latent_dim=2, data_dim=20, num_data=1200, variance=0.5, dtype=torch.float32)
    train, held_out, test = x[:100], x[100:400], x[400:]
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(20, latent_dim=2, likelihood=pv.nn.Normal(scale=0.7), hidden=(200,))
    warmup = pv.LinearAnnealing(200)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), pv.BetaTraceMeanField_ELBO(beta=warmup))
    stopping = pv.EarlyStopping(vae.model, vae.guide, [held_out], every=50, patience=5, beta=warmup)
    stopped = None
    for step in range(1500):
        svi.step(train)
        if stopping(step) and stopped is None:
            stopped = step
    assert stopped is not None and 200 <= stopped < 1300

    def elbo(x):
        return float(pv.ImportanceSampling(vae.model, vae.guide, num_particles=20, seed=0)(x).elbo.mean())

    at_the_end = elbo(test)
    stopping.restore_best()
    assert elbo(test) > at_the_end + 0.5
    pv.plots.plot_held_out(stopping.history())
    plt.close("all")


# Refusals


def test_held_out_data_that_change_are_refused():
    """A loader with a generator of its own shuffles differently each time; one that follows torch's state does not."""
    lm, x = linear_gaussian(num_data=20)
    loader = DataLoader(TensorDataset(x), 5, shuffle=True, generator=torch.Generator().manual_seed(0))
    stopping = pv.EarlyStopping(*exact_pair(lm), loader, every=1)
    stopping(0)
    with pytest.raises(OptionError, match="another order"):
        stopping(1)
    fine = pv.EarlyStopping(*exact_pair(lm), DataLoader(TensorDataset(x), 5, shuffle=False), every=1)
    fine(0), fine(1)


def test_bad_input_is_refused():
    lm, x = linear_gaussian()
    pair = exact_pair(lm)
    with pytest.raises(ArgumentError, match="tensor"):
        pv.EarlyStopping(*pair, x)
    with pytest.raises(ArgumentError, match="not an iterator"):
        pv.EarlyStopping(*pair, iter([x]))
    with pytest.raises(ArgumentError, match="callable"):
        pv.EarlyStopping(None, pair[1], [x])
    for option in ({"every": 0}, {"patience": 0}, {"num_particles": 1}, {"seed": -1}, {"seed": None}, {"beta": -1.0}):
        with pytest.raises(OptionError, match=next(iter(option))):
            pv.EarlyStopping(*pair, [x], **option)
    with pytest.raises(OptionError, match="after the warm-up"):
        pv.EarlyStopping(*pair, [x], beta={"z": 1.0})
    with pytest.raises(OptionError, match="step"):
        pv.EarlyStopping(*pair, [x])(-1)
    with pytest.raises(DatumPlateError):
        pv.EarlyStopping(*pair, [x], datum_plate="other")(0)


def test_parameters_that_are_not_numbers_are_said():
    lm, x = linear_gaussian()
    bad = guide_of(lambda x: dist.Normal(x.new_full((len(x), 2), math.nan), 1.0, validate_args=False).to_event(1))
    with pytest.raises((NonFiniteError, ValueError), match="NaN|nan"):
        pv.EarlyStopping(model_of(lm), bad, [x])(0)


def test_what_is_printed_and_kept():
    base = numbers(50)
    stopping = scripted([base, base + 1, base + 0.5], patience=2)
    assert "no look yet" in one_line(stopping) and str(stopping.history()) == "Held-out history without a look"
    for step in range(3):
        stopping(step)
    text = str(stopping)
    assert "running; 1 of 2 looks" in text and "improved, best" in text
    kept = stopping.history().to_dict()
    assert kept["best"] == 1 and kept["improved"] == [True, True, False] and len(stopping.history()) == 3
    ax = pv.plots.plot_held_out(stopping.history())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["improved", "no more than its error", "kept"]
    plt.close("all")
    with pytest.raises(ValueError, match="no look to draw"):
        pv.plots.plot_held_out(scripted([]).history())


# ELBOs of minus infinity

INF = math.inf
ONE_LOST = torch.tensor([-INF, -2.0, -3.0], dtype=F64)
TWO_LOST = torch.tensor([-INF, -INF, -3.0], dtype=F64)
NONE_LOST = torch.tensor([-50.0, -2.0, -3.0], dtype=F64)


@pytest.mark.filterwarnings("ignore:the held-out ELBO of data")
@pytest.mark.parametrize(
    "before, after, improves",
    [
        (TWO_LOST, ONE_LOST, True),
        (ONE_LOST, NONE_LOST, True),
        (NONE_LOST, ONE_LOST, False),
        (ONE_LOST, TWO_LOST, False),
        (ONE_LOST, ONE_LOST + 1.0, True),  # the others have risen by one nat each
        (ONE_LOST, ONE_LOST - 1.0, False),
        (TWO_LOST - INF, TWO_LOST - INF, False),  # nothing is finite at either look
    ],
    ids=["fewer", "none any more", "one came", "one more came", "the others rose", "the others fell", "all"],
)
def test_minus_infinity_is_below_every_other_elbo(before, after, improves):
    """A difference of infinities is NaN, above which nothing is: training would be stopped while it gets better."""
    stopping = scripted([before, after])
    stopping(0)
    stopping(1)
    history = stopping.history()
    assert history.improved.tolist() == [True, improves]
    assert history.reliable.tolist() == [bool(before.isfinite().all()), bool(after.isfinite().all())]
    assert history.best == (1 if bool(after.isfinite().all()) else 0 if bool(before.isfinite().all()) else None)


@pytest.mark.filterwarnings("ignore:the held-out ELBO of data")
def test_training_that_gets_out_of_minus_infinity_is_not_stopped():
    looks = [TWO_LOST, ONE_LOST, NONE_LOST, *(NONE_LOST + 0.1 * k for k in range(1, 6))]
    assert stops_at(looks, patience=1) is None


@pytest.mark.filterwarnings("ignore:the held-out ELBO of data")
def test_a_state_is_kept_where_a_datum_is_lost_throughout():
    stopping, kept = scripted([ONE_LOST, ONE_LOST + 1.0, ONE_LOST]), []
    stopping._best.keep = lambda: kept.append(len(stopping.history()))
    for step in range(3):
        stopping(step)
    assert kept == [0, 1]


def test_data_of_minus_infinity_are_named_once():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    stopping = pv.EarlyStopping(model, guide, [torch.tensor([0.1, 1e30, 0.3])], every=1, num_particles=2)
    coarse = pytest.warns(PrecisionWarning, match="for 1 of 3 held-out data, floats are too coarse")  # 1e60 is no float32
    with coarse, pytest.warns(UnreliableEvidenceWarning, match=r"ELBO of data \[1\] is minus infinity at update 0: draws"):
        stopping(0)
    stopping(1)  # says it no more: warnings are errors here
    history = stopping.history()
    assert history.elbo.tolist() == [-INF, -INF] and not bool(history.reliable.any())
    assert "in doubt" in one_line(history)
