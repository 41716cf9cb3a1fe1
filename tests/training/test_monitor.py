"""The monitor keeps the numbers of every call, asks the device for none of them, and spoils no loop."""

import copy
import functools
import io
import itertools
import math
import pickle
import warnings
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import one_line
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import DatumPlateError, OptionError, ScheduleWarning
from pyro_vae.objectives import BetaTrace_ELBO, BetaTraceMeanField_ELBO
from pyro_vae.training import CyclicalAnnealing, LinearAnnealing, Monitor
from pyro_vae.training import monitor as monitor_module
from pyro_vae.training.monitor import FLUSH_STEPS, PATIENCE

F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True, eq=False)
class Terms:
    reconstruction: torch.Tensor
    kl: dict
    kl_sum: torch.Tensor
    elbo: torch.Tensor
    loss: torch.Tensor
    beta: object
    num_data: int | None = None

    def per_datum(self):
        if self.num_data is None:
            raise DatumPlateError("no plate")
        numbers = {n: getattr(self, n) / self.num_data for n in ("reconstruction", "kl_sum", "elbo", "loss")}
        return replace(self, **numbers, kl={n: kl / self.num_data for n, kl in self.kl.items()})


class Objective:
    """An objective that is told its terms."""

    def __init__(self, beta=1.0):
        self.beta = beta
        self.terms = None
        self.schedule = lambda step: 1.0  # cannot be pickled: neither can many objectives

    def call(self, reconstruction=-10.0, kl=2.0, beta=1.0, num_data=1, dtype=F64, device=None):
        kl = kl if isinstance(kl, dict) else {"z": kl}
        tensor = functools.partial(torch.tensor, dtype=dtype, device=device)
        rate = sum(kl.values())
        self.terms = Terms(
            reconstruction=tensor(reconstruction),
            kl={name: tensor(value) for name, value in kl.items()},
            kl_sum=tensor(rate),
            elbo=tensor(reconstruction - rate),
            loss=tensor(rate - reconstruction + 0.125),
            beta=beta,
            num_data=num_data,
        )


@pytest.fixture
def objective():
    return Objective()


@pytest.fixture
def monitor(objective):
    return Monitor(objective, progress=False)


def columns(history):
    return {n: getattr(history, n).tolist() for n in ("step", "loss", "elbo", "distortion", "rate")}


# What is recorded


def test_the_numbers_of_every_step_per_datum(objective, monitor):
    objective.call(reconstruction=-20.0, kl={"z": 3.0, "w": 1.0}, beta=0.25, num_data=4)
    monitor.record()
    objective.call(reconstruction=-9.0, kl={"z": 1.5, "w": 0.0}, beta=0.5, num_data=3)
    monitor.record()
    history = monitor.history()
    assert columns(history) == {
        "step": [0, 1],
        "loss": [24.125 / 4, 10.625 / 3],
        "elbo": [-6.0, -3.5],
        "distortion": [5.0, 3.0],
        "rate": [1.0, 0.5],
    }
    assert {site: kl.tolist() for site, kl in history.kl.items()} == {"z": [0.75, 0.5], "w": [0.25, 0.0]}
    assert history.beta.tolist() == [0.25, 0.5]
    assert history.per_datum and len(history) == 2


@pytest.mark.parametrize("num_steps", [0, 1, FLUSH_STEPS - 1, FLUSH_STEPS, 2 * FLUSH_STEPS + 7])
def test_all_steps_stay_in_order_however_many(objective, monitor, num_steps):
    for step in range(num_steps):
        objective.call(reconstruction=-float(step))
        monitor.record()
    history = monitor.history()
    assert history.distortion.tolist() == history.step.tolist() == list(range(num_steps))


def test_looking_does_not_change_what_comes_after(objective, monitor):
    lengths = []
    for step in range(5):
        objective.call(reconstruction=-float(step))
        monitor.record()
        lengths.append(len(monitor.history()))
    assert lengths == [1, 2, 3, 4, 5]
    assert monitor.history().distortion.tolist() == [0, 1, 2, 3, 4]


def test_a_history_is_not_changed_by_later_steps(objective, monitor):
    objective.call()
    monitor.record()
    before = monitor.history()
    objective.call(reconstruction=-1.0)
    monitor.record()
    assert before.distortion.tolist() == [10.0] and len(before) == 1


def test_a_call_is_recorded_once(objective, monitor):
    objective.call()
    for _ in range(3):
        monitor.record()
    assert len(monitor.history()) == 1


def test_calls_before_the_monitor_was_built_are_not_its_own(objective):
    objective.call()
    monitor = Monitor(objective)
    monitor.record()
    assert len(monitor.history()) == 0


def test_an_objective_that_was_never_called(monitor):
    with pytest.raises(OptionError, match="this Objective was not called yet: .* same object that SVI"):
        monitor.record()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_numbers_keep_all_their_digits(objective, monitor, dtype):
    objective.call(reconstruction=-math.pi * 1e7, dtype=dtype)
    monitor.record()
    assert monitor.history().distortion.dtype == F64
    assert monitor.history().distortion.item() == -objective.terms.reconstruction.item()


def test_mixed_dtypes_lose_nothing(objective, monitor):
    objective.call(dtype=F32, beta=torch.tensor(0.1, dtype=F64))
    objective.terms.kl["z"] = torch.tensor(1 / 3, dtype=F64)
    objective.terms.kl["n"] = 2.0  # a plain number
    monitor.record()
    history = monitor.history()
    assert history.beta.item() == 0.1
    assert history.kl["z"].item() == 1 / 3
    assert history.kl["n"].item() == 2.0


def test_the_default_device_and_dtype_of_torch_do_not_matter(objective, monitor):
    objective.call()
    monitor.record()
    with torch.device("meta"):
        history = monitor.history()
    assert history.elbo.tolist() == [-12.0] and history.step.tolist() == [0]


def test_nan_and_infinite_values_are_kept(objective, monitor):
    for value in (-1.0, math.nan, -math.inf):
        objective.call(reconstruction=value)
        monitor.record()
    history = monitor.history()
    assert history.not_finite.tolist() == [False, True, True]
    assert math.isnan(history.elbo[1]) and history.elbo[2] == -math.inf


# Totals, where no plate defines a datum


def test_totals_where_a_datum_is_not_defined(objective, monitor):
    for _ in range(2):
        objective.call(reconstruction=-20.0, kl=4.0, num_data=None)
        monitor.record()
    history = monitor.history()
    assert not history.per_datum
    assert history.distortion.tolist() == [20.0, 20.0] and history.rate.tolist() == [4.0, 4.0]
    assert "nats, totals" in one_line(history)


def test_units_are_never_mixed(objective, monitor):
    """The first step decides; totals go on as totals, and values per datum do not turn into totals."""
    objective.call(num_data=None)
    monitor.record()
    objective.call(reconstruction=-20.0, num_data=10)
    monitor.record()
    assert monitor.history().distortion.tolist() == [10.0, 20.0]
    other = Monitor(objective)
    objective.call(num_data=10)
    other.record()
    objective.call(num_data=None)
    with pytest.raises(DatumPlateError):
        other.record()


# beta and sites


def test_beta_per_site(objective, monitor):
    for step in range(3):
        objective.call(kl={"z": 1.0, "w": 1.0}, beta={"z": step / 2, "w": torch.tensor(4.0)})
        monitor.record()
    beta = monitor.history().beta
    assert {site: values.tolist() for site, values in beta.items()} == {"z": [0.0, 0.5, 1.0], "w": [4.0, 4.0, 4.0]}


def test_one_beta_followed_by_betas_per_site_holds_for_all_of_them(objective, monitor):
    objective.call(beta=0.5)
    monitor.record()
    objective.call(beta={"z": 1.0, "w": 2.0})
    monitor.record()
    beta = monitor.history().beta
    assert {site: values.tolist() for site, values in beta.items()} == {"z": [0.5, 1.0], "w": [0.5, 2.0]}


def test_no_beta_for_any_site(objective, monitor):
    objective.call(beta={})
    monitor.record()
    assert monitor.history().beta == {}


def test_sites_that_come_and_go_are_nan_where_they_are_not(objective, monitor):
    for kl in ({"z": 1.0}, {"z": 2.0, "y": 0.5}, {"y": 0.25}):
        objective.call(kl=kl)
        monitor.record()
        monitor.history()  # with a transfer after every step, too
    history = monitor.history()
    assert torch.equal(history.kl["z"].nan_to_num(-1), torch.tensor([1.0, 2.0, -1.0], dtype=F64))
    assert torch.equal(history.kl["y"].nan_to_num(-1), torch.tensor([-1.0, 0.5, 0.25], dtype=F64))
    assert not history.not_finite.any()


# The hot path


def test_recording_reads_no_value():
    """Tensors on the meta device have none: any read, any copy to the host would raise."""
    objective = Objective()
    monitor = Monitor(objective, progress=False)
    for step in range(FLUSH_STEPS - 1):
        objective.call(beta=torch.tensor(0.5), device="meta")  # beta on another device
        if step % 2:
            monitor.record()
        else:
            for _ in monitor.watch([0]):
                objective.call(device="meta", num_data=10)
    with pytest.raises((NotImplementedError, RuntimeError)):
        objective.terms.elbo.item()


def test_one_transfer_for_a_thousand_steps(objective, monitor, monkeypatch):
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "to"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            reads.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for step in range(3 * FLUSH_STEPS - 1):
        objective.call(beta=torch.tensor(0.5))
        monitor.record()
        assert len(reads) == (step + 1) // FLUSH_STEPS
    assert reads == ["tolist", "tolist"]
    monitor.history()
    assert reads == ["tolist"] * 3


def test_memory_is_flat_and_no_graph_is_kept(objective, monitor):
    for _ in range(2 * FLUSH_STEPS + 5):
        objective.call()
        monitor.record()
        assert len(monitor._pending) < FLUSH_STEPS
    weight = torch.ones(1000, requires_grad=True)
    objective.call()
    objective.terms = replace(objective.terms, elbo=weight.exp().sum())
    monitor.record()
    assert not any(packed.requires_grad for row in monitor._pending for _, packed in row.tensors.values())


def test_tensors_that_change_in_place_afterwards_change_no_record(objective, monitor):
    beta = torch.zeros(())
    for _ in range(3):
        objective.call(beta=beta, num_data=None)
        monitor.record()
        objective.terms.elbo.zero_()
        beta += 0.5
    assert monitor.history().beta.tolist() == [0.0, 0.5, 1.0]
    assert monitor.history().elbo.tolist() == [-12.0] * 3


# watch


def bars(monkeypatch):
    """The progress bars that are made from here on."""
    made = []

    class Bar(monitor_module.tqdm):
        closed = False

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def close(self):
            self.closed = True
            super().close()

    monkeypatch.setattr(monitor_module, "tqdm", Bar)
    return made


def test_watch_yields_the_batches_and_records_after_each_body(objective, monitor):
    seen = []
    for batch in monitor.watch("abc"):
        seen.append(batch)
        objective.call(reconstruction=-float(len(seen)))
    assert seen == ["a", "b", "c"]
    assert monitor.history().distortion.tolist() == [1.0, 2.0, 3.0]


def test_break_records_the_last_body_and_closes_the_bar(objective, monkeypatch):
    made = bars(monkeypatch)
    monitor = Monitor(objective)
    for number in monitor.watch(itertools.count(1)):
        objective.call(reconstruction=-float(number))
        if number == 3:
            break
    assert monitor.history().distortion.tolist() == [1.0, 2.0, 3.0]
    assert [bar.closed for bar in made] == [True]


def test_an_error_in_the_body_passes_and_closes_the_bar(objective, monkeypatch):
    made = bars(monkeypatch)
    monitor = Monitor(objective)
    with pytest.raises(ZeroDivisionError):  # the traceback keeps the frame alive
        for number in monitor.watch(range(5)):
            objective.call(reconstruction=-float(number))
            1 / (2 - number)
    assert [bar.closed for bar in made] == [True]
    assert monitor.history().distortion.tolist() == [0.0, 1.0, 2.0]


def test_an_error_of_the_loader_passes_and_closes_the_bar(objective, monkeypatch):
    made = bars(monkeypatch)
    monitor = Monitor(objective)

    def loader():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        for _ in monitor.watch(loader()):
            objective.call()
    assert [bar.closed for bar in made] == [True]
    assert len(monitor.history()) == 1


def test_an_error_before_the_first_call_is_not_hidden_by_another_one(monitor):
    with pytest.raises(KeyError):
        for _ in monitor.watch(range(5)):
            raise KeyError("body")


def test_bodies_without_a_call_are_passed_over(objective, monitor):
    for number in monitor.watch(range(6)):
        if number % 3 == 0:
            continue
        objective.call(reconstruction=-float(number))
    assert monitor.history().distortion.tolist() == [1.0, 2.0, 4.0, 5.0]


def test_an_evaluation_between_two_epochs_is_not_recorded(objective, monitor):
    for _ in range(2):
        for number in monitor.watch(range(3)):
            if number:
                objective.call(reconstruction=-float(number))
        objective.call(reconstruction=-99.0)
    assert monitor.history().distortion.tolist() == [1.0, 2.0, 1.0, 2.0]


def test_gradient_accumulation_by_record_in_the_body(objective, monitor):
    """The last call is not recorded a second time by watch."""
    for number in monitor.watch(range(2)):
        for micro in range(3):
            objective.call(reconstruction=-float(10 * number + micro))
            monitor.record()
    assert monitor.history().distortion.tolist() == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]


def test_of_several_calls_in_a_body_the_last_counts(objective, monitor):
    for _ in monitor.watch(range(2)):
        for closure in range(3):
            objective.call(reconstruction=-float(closure))
    assert monitor.history().distortion.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("called_before", [False, True])
def test_the_wrong_objective_is_found_at_the_end_of_a_short_loop(objective, called_before):
    monitor = Monitor(objective, progress=False)
    if called_before:
        objective.call()
    trained = Objective()
    with pytest.raises(OptionError, match="any of 3 bodies.*the same object that SVI"):
        for _ in monitor.watch(range(3)):
            trained.call()


def test_and_early_in_a_long_one(objective, monkeypatch):
    made = bars(monkeypatch)
    monitor, trained, bodies = Monitor(objective), Objective(), 0
    with pytest.raises(OptionError, match=f"any of {PATIENCE} bodies"):
        for _ in monitor.watch(itertools.count()):
            bodies += 1
            trained.call()
    assert bodies == PATIENCE and made[0].closed


def test_an_empty_loader_is_no_error(monitor):
    assert list(monitor.watch([])) == []


# The line


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("batches", "num_updates", "total"),
    [
        (range(4), None, 4),
        (range(4), 100, 100),
        (DataLoader(TensorDataset(torch.zeros(4, 1))), None, 4),
        (DataLoader(Stream()), 100, 100),
        (DataLoader(Stream()), None, None),
        (iter(range(4)), 100, 100),
    ],
)
def test_how_long_the_bar_is(objective, monkeypatch, capsys, batches, num_updates, total):
    made = bars(monkeypatch)
    for _ in Monitor(objective, num_updates=num_updates).watch(batches):
        objective.call()
    assert made[0].total == total and made[0].n == 4
    assert "distortion 10 rate 2 ELBO -12 beta 1" in capsys.readouterr().err


def test_with_a_plan_one_line_goes_on_through_all_loops(objective, monkeypatch, capsys):
    made = bars(monkeypatch)
    monitor = Monitor(objective, num_updates=12)
    for _ in range(3):
        for _ in monitor.watch(range(4)):
            objective.call()
    assert [(bar.n, bar.total, bar.leave, bar.closed) for bar in made] == [
        (4, 12, False, True),
        (8, 12, False, True),
        (12, 12, True, True),
    ]
    assert len({(bar.initial, bar.start_t) for bar in made}) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "| 12/12 [" in printed.splitlines()[-1]


def test_without_a_plan_every_loop_leaves_its_line(objective, capsys):
    monitor = Monitor(objective)
    for _ in range(3):
        for _ in monitor.watch(range(4)):
            objective.call()
    lines = capsys.readouterr().err.split("\n")
    assert [line.split("| ")[-1][:5] for line in lines] == ["4/4 ["] * 3 + [""]


def test_a_planned_training_that_breaks_leaves_its_line(objective, capsys):
    for _ in Monitor(objective, num_updates=100).watch(range(10)):
        objective.call()
        break
    assert capsys.readouterr().err.endswith("\n")


def test_a_reloaded_plan_counts_on(objective, monkeypatch):
    made = bars(monkeypatch)
    monitor = Monitor(objective, num_updates=8)
    for _ in monitor.watch(range(4)):
        objective.call()
    other = reloaded(monitor, "pickle")
    other.objective = objective
    for _ in other.watch(range(4)):
        objective.call()
    assert (made[1].initial, made[1].n, made[1].leave) == (4, 8, True)
    assert made[1].start_t > made[0].start_t


def test_the_line_shows_means_of_the_last_hundred_steps_and_the_present_beta(objective, capsys):
    for number in Monitor(objective).watch(range(150)):
        objective.call(reconstruction=-float(number), kl=0.5, beta=number / 149)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "distortion 99.5 rate 0.5 ELBO -100 beta 1" in last
    assert "150/150" in last


def test_the_line_shows_the_range_of_betas_of_sites(objective, capsys):
    for _ in Monitor(objective).watch(range(2)):
        objective.call(beta={"a": 0.25, "b": torch.tensor(4.0), "c": 1.0})
    assert "beta 0.25..4" in capsys.readouterr().err
    for _ in Monitor(objective).watch(range(2)):
        objective.call(beta={})
    assert "ELBO -12\n" in capsys.readouterr().err


def test_a_broken_step_is_seen_in_the_line(objective, capsys):
    for number in Monitor(objective).watch(range(3)):
        objective.call(reconstruction=math.nan if number == 1 else -1.0)
    assert "ELBO nan" in capsys.readouterr().err


def test_the_line_fits_into_80_columns(objective, capsys, monkeypatch):
    monkeypatch.setattr(monitor_module, "tqdm", functools.partial(monitor_module.tqdm, ncols=79))
    for _ in Monitor(objective).watch(range(3000)):
        objective.call(reconstruction=-1117.0512, kl=221.0333, beta=0.9267)
    last = capsys.readouterr().err.split("\r")[-1].strip()
    assert last.endswith("distortion 1117 rate 221 ELBO -1338 beta 0.927") and len(last) <= 79


def test_the_line_is_refreshed_twice_a_second_at_most(objective, monkeypatch):
    """Twenty epochs of half a second, ten batches each, with one plan; the last line is shown in any case."""
    clock, lines = [0.0], []
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(monitor_module, "_line", lambda columns: lines.append(clock[0]) or "")
    monitor = Monitor(objective, num_updates=200)
    for _ in range(20):
        for _ in monitor.watch(range(10)):
            clock[0] += 0.05
            objective.call()
    assert len(lines) == pytest.approx(10 / 0.5 + 1, abs=2)
    assert min(b - a for a, b in itertools.pairwise(lines[:-1])) >= 0.5 - 1e-9
    assert lines[-1] == clock[0]


def test_without_progress_nothing_is_printed_or_read(objective, capsys, monkeypatch):
    monkeypatch.setattr(monitor_module, "_line", lambda columns: pytest.fail("looked"))
    for _ in Monitor(objective, progress=False).watch(range(3)):
        objective.call()
    assert capsys.readouterr() == ("", "")


# The plan


def test_an_unfinished_schedule_is_reported_once_when_the_monitor_is_built():
    with pytest.warns(ScheduleWarning, match="^beta is not finished within the 500 planned updates") as caught:
        Monitor(pv.BetaTrace_ELBO(beta=LinearAnnealing(1000)), num_updates=500)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(ScheduleWarning, match="^beta of 'w' is not finished .*CyclicalAnnealing") as caught:
        Monitor(
            pv.BetaTrace_ELBO(
                beta={"z": LinearAnnealing(100), "w": CyclicalAnnealing(100, 8), "y": torch.tensor(2.0), "v": 1.0}
            ),
            num_updates=500,
        )
    assert len(caught) == 1
    with pytest.warns(ScheduleWarning, match="^capacity is not finished"):
        Monitor(pv.BetaTraceMeanField_ELBO(capacity=LinearAnnealing(1000, end=25.0)), num_updates=500)


@pytest.mark.parametrize("beta", [1.0, torch.tensor(2.0), {}, LinearAnnealing(100), lambda step: 4.0])
def test_a_plan_that_is_kept_gives_no_warning(beta):
    Monitor(pv.BetaTrace_ELBO(beta=beta), num_updates=500)
    Monitor(Objective(beta=beta), num_updates=500)  # anything with terms


def test_without_a_plan_nothing_is_said_about_short_epochs():
    objective = Objective(beta=LinearAnnealing(1000))
    monitor = Monitor(objective, progress=False)
    for _ in range(2):
        for _ in monitor.watch(range(3)):
            objective.call()


@pytest.mark.parametrize("num_updates", [0, -1, 2.5, "many"])
def test_a_plan_is_a_number_of_updates(objective, num_updates):
    with pytest.raises(OptionError, match="num_updates must be a whole number"):
        Monitor(objective, num_updates=num_updates)


def test_what_has_no_terms_is_refused():
    with pytest.raises(OptionError, match="Trace_ELBO has none$"):
        Monitor(Trace_ELBO())
    module = Trace_ELBO()(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(OptionError, match="pass the objective, not the module"):
        Monitor(module)


# Checkpoints


def reloaded(monitor, how):
    if how == "deepcopy":
        return copy.deepcopy(monitor)
    if how == "pickle":
        return pickle.loads(pickle.dumps(monitor))
    file = io.BytesIO()
    torch.save(monitor, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_reloaded_monitor_goes_on_where_it_stopped(objective, monitor, how):
    for number in range(3):
        objective.call(reconstruction=-float(number), num_data=None)
        monitor.record()
    other = reloaded(monitor, how)
    assert other.objective is None and not other._pending  # no tensor of a device in the file
    assert columns(other.history()) == columns(monitor.history())
    other.objective = objective
    other.record()  # the call before the checkpoint is in the record already
    objective.call(reconstruction=-3.0, num_data=10)
    other.record()
    history = other.history()
    assert history.distortion.tolist() == [0.0, 1.0, 2.0, 3.0] and history.step.tolist() == [0, 1, 2, 3]
    assert not history.per_datum and not other.progress
    assert len(monitor.history()) == 3


@pytest.mark.parametrize("use", [lambda m: m.record(), lambda m: list(m.watch([1]))])
def test_a_reloaded_monitor_asks_for_its_objective(monitor, use):
    with pytest.raises(OptionError, match="set monitor.objective first"):
        use(reloaded(monitor, "pickle"))


# With the objectives of the package


class Model(nn.Module):
    def __init__(self, dtype=F32, size=None):
        super().__init__()
        self.decoder = nn.Linear(3, 4).to(dtype)
        self.size = size

    def forward(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", self.size or len(x), subsample=x if self.size else None):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(torch.cat([z, w], -1)), 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, dtype=F32, size=None):
        super().__init__()
        self.encoder = nn.Linear(4, 3).to(dtype)
        self.size = size

    def forward(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", self.size or len(x), subsample=x if self.size else None):
            loc = self.encoder(x)
            pyro.sample("z", dist.Normal(loc[:, :2], 0.5).to_event(1))
            pyro.sample("w", dist.Normal(loc[:, 2:], 0.5).to_event(1))


def data(dtype=F32, num_data=24):
    return torch.randn(num_data, 4, dtype=dtype)


def loader_of(x):
    return DataLoader(TensorDataset(x), batch_size=10)  # 10, 10 and 4


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", [BetaTrace_ELBO, BetaTraceMeanField_ELBO])
def test_under_svi(dtype, kind):
    warmup = LinearAnnealing(5)
    objective = kind(beta=warmup)
    svi = SVI(Model(dtype), Guide(dtype), Adam({"lr": 0.01}), objective)
    monitor, losses = Monitor(objective, num_updates=9, progress=False), []
    for _ in range(3):
        for (x,) in monitor.watch(loader_of(data(dtype))):
            losses.append(svi.step(x) / len(x))
    history = monitor.history()
    tolerance = {F32: 1e-5, F64: 1e-12}[dtype]
    assert history.per_datum
    assert history.loss.tolist() == pytest.approx(losses, rel=tolerance)
    assert history.beta.tolist() == [warmup(step) for step in range(9)]
    assert torch.allclose(history.elbo, -history.distortion - history.rate, rtol=tolerance)
    assert torch.allclose(history.loss, history.distortion + history.beta * history.rate, rtol=tolerance)
    assert torch.allclose(history.rate, history.kl["z"] + history.kl["w"], rtol=tolerance)


def test_under_torch_optim_with_a_beta_per_site():
    objective = BetaTrace_ELBO(beta={"z": LinearAnnealing(4), "w": 2.0})
    loss_of = objective(Model(), Guide())
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=0.01)
    monitor, losses = Monitor(objective, num_updates=6, progress=False), []
    for step, (x,) in enumerate(monitor.watch([(data(num_data=8),)] * 6)):
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        objective.num_updates = step + 1
        losses.append(loss.item() / 8)
    history = monitor.history()
    assert history.loss.tolist() == pytest.approx(losses, rel=1e-5)
    assert history.beta["z"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0] and history.beta["w"].tolist() == [2.0] * 6
    weighed = sum(history.beta[site] * history.kl[site] for site in ("z", "w"))
    assert torch.allclose(history.loss, history.distortion + weighed, rtol=1e-5)


def test_a_subsampled_plate_counts_all_its_data():
    """The N/B of the plate is divided out: the same number per datum as without subsampling."""
    objective, x = BetaTrace_ELBO(), data(F64)
    monitor = Monitor(objective)
    for size in (None, 240):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = Model(F64, size), Guide(F64, size)
        torch.manual_seed(1)
        SVI(model, guide, Adam({"lr": 0.01}), objective).step(x)
        monitor.record()
    history = monitor.history()
    assert history.elbo[0].item() == pytest.approx(history.elbo[1].item(), rel=1e-12)


def test_a_model_without_a_plate_is_recorded_in_totals():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.7))

    objective = BetaTrace_ELBO()
    monitor = Monitor(objective)
    loss = SVI(model, guide, Adam({"lr": 0.01}), objective).step()
    monitor.record()
    assert monitor.history().loss.item() == pytest.approx(loss)
    assert not monitor.history().per_datum


def test_watching_changes_nothing_of_the_training():
    """Same parameters to the last bit with and without a monitor; nothing is drawn, nothing warned of."""
    results = []
    for watched in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, objective = Model(), Guide(), BetaTrace_ELBO(beta=LinearAnnealing(5))
        svi, batches = SVI(model, guide, Adam({"lr": 0.01}), objective), loader_of(data())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for (x,) in Monitor(objective).watch(batches) if watched else batches:
                svi.step(x)
        results.append(model.decoder.weight.detach().clone())
    assert torch.equal(*results)
