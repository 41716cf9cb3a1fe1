"""`on_error`, `tolerance`, `loader_index` and what the bar says."""

import math

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from checkpoint_helpers import Guide, Model, batches_of, data, estimator, same
from pair_helpers import quiet
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import EmptyBatchError, InvalidDataError, OptionError, SkippedBatchWarning
from pyro_vae.evaluation import progress as module


def run(found, loader, **options):
    with quiet():
        return pv.evaluate(found, loader, **{"progress": False, "seed": 0, **options})


def with_nan(*places, size=5, num_data=23):
    x = data(num_data)
    x[list(places), 1] = math.nan
    return batches_of(x, size)


def test_an_error_says_its_batch_and_data_and_how_to_leave_it_out(tmp_path):
    with pytest.raises(
        InvalidDataError,
        match=r"^batch 2 \(data 10 to 14, counted from 0\): .*NaN.*To leave such batches out, pass on",
    ):
        run(estimator(), with_nan(12))
    with pytest.raises(InvalidDataError, match=r"^batch 4 \(data 20 to 22.*which holds 4 batches"):
        run(estimator(), with_nan(21), checkpoint=tmp_path)


class Odd(Exception):
    """Whose words are not its arguments."""

    def __init__(self, number, words):
        super().__init__(number, words)


@pytest.mark.parametrize("error", [Odd(3, "x"), KeyError("image"), OSError(2, "gone"), ValueError(), RuntimeError("no")])
def test_an_error_of_any_kind_stays_what_it_is(error):
    def failing(x):
        raise error

    with pytest.raises(type(error)) as caught:
        run(failing, batches_of(data()))
    said = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert caught.value is error
    assert "batch 0 (data 0 to 4" in said or not hasattr(error, "add_note")


def test_an_error_of_the_loader_says_where_it_stopped():
    def loader():
        yield data(4)
        yield data(4)
        raise OSError("image 8 is gone")

    with pytest.raises(OSError, match="the loader failed at batch 2 .from datum 8 on, counted from 0.: image 8 is gone"):
        run(estimator(), loader())


def test_batches_that_raise_are_left_out_on_request_and_rows_say_which_data_they_are():
    whole = run(estimator(), batches_of(data()))
    with pytest.warns(SkippedBatchWarning) as caught:
        found = run(estimator(), with_nan(6, 22), on_error="skip")
    words = str(caught[0].message)
    assert "2 batches were skipped, with 8 data" in words
    assert "batch 1 (data 5 to 9, counted from 0): InvalidDataError: " in words and "batch 4 (data 20 to 22" in words
    assert found.loader_index.tolist() == [*range(5), *range(10, 20)]
    assert torch.equal(found.log_evidence, whole.log_evidence[found.loader_index])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_all_batches_skipped_is_an_error(tmp_path, checkpoint):
    options = {"checkpoint": tmp_path} if checkpoint else {}
    for _ in range(1 + checkpoint):
        with pytest.raises(EmptyBatchError, match="all 5 batches were skipped.*batch 4.*NaN"):
            run(estimator(), with_nan(0, 5, 10, 15, 20), on_error="skip", **options)


def test_a_skipped_batch_is_known_to_a_checkpoint_and_runs_again_where_it_may_not_be_skipped(tmp_path):
    batches = with_nan(6)
    with pytest.warns(SkippedBatchWarning):
        first = run(estimator(), batches, on_error="skip", checkpoint=tmp_path)
    with pytest.warns(SkippedBatchWarning, match="batch 1 .*NaN"):
        assert same(run(estimator(), batches, on_error="skip", checkpoint=tmp_path), first)
    with pytest.raises(InvalidDataError, match="batch 1 "):
        run(estimator(), batches, checkpoint=tmp_path)


def test_on_error_raise_then_skip(tmp_path):
    with pytest.raises(InvalidDataError):
        run(estimator(), with_nan(6), checkpoint=tmp_path)
    with pytest.warns(SkippedBatchWarning):
        found = run(estimator(), with_nan(6), checkpoint=tmp_path, on_error="skip")
    assert len(found) == 18


def test_options_are_checked():
    for options, words in (({"on_error": "ignore"}, "on_error must be one of"), ({"tolerance": 0}, "tolerance must be")):
        with pytest.raises(OptionError, match=words):
            run(estimator(), batches_of(data()), **options)


def test_units_surgery_and_samples_may_skip_too():
    batches = with_nan(6, num_data=15)
    for made in (pv.ActiveUnits, pv.ELBOSurgery):
        with pytest.warns(SkippedBatchWarning, match="batch 1 ") as caught, quiet():
            assert made(Model(), Guide(), seed=0)(batches, progress=False, on_error="skip").num_data == 10
        assert caught[0].filename == __file__
    with pytest.warns(SkippedBatchWarning, match="batch 1 "), quiet():
        looks = pv.SampleCheck(Model(), Guide(), seed=0)
        assert looks(batches, train=batches_of(data()), progress=False, on_error="skip").num_train == 23


def test_the_place_in_the_loader_survives_selection_joining_files_and_tables(tmp_path):
    found = run(pv.InferenceGaps(Model(), Guide(), num_particles=10, evidence=few), batches_of(data(7), 3))
    assert found.loader_index.tolist() == list(range(7))
    some = found.select(torch.tensor([False, True] * 3 + [False]))
    assert some.loader_index.tolist() == [1, 3, 5]
    assert pv.Gaps.cat([some, some]).loader_index.tolist() == [1, 3, 5] * 2
    some.save(tmp_path / "gaps.npz")
    assert pv.Gaps.load(tmp_path / "gaps.npz").loader_index.tolist() == [1, 3, 5]
    assert isinstance(frame := some.to_dataframe(), pandas.DataFrame) and frame["loader_index"].tolist() == [1, 3, 5]
    with quiet():
        assert estimator()(data(3)).loader_index is None


def few(model, guide):
    return pv.ImportanceSampling(model, guide, num_particles=10)


def test_where_a_batch_is_one_datum_it_has_the_number_of_the_batch():
    found = run(estimator(datum_plate=None), batches_of(data(), 5))
    assert len(found) == 5 and found.loader_index.tolist() == [0, 1, 2, 3, 4]
    with pytest.warns(SkippedBatchWarning):
        found = run(estimator(datum_plate=None), with_nan(6), on_error="skip")
    assert len(found) == 4 and found.loader_index.tolist() == [0, 2, 3, 4]


class Stream(IterableDataset):
    """No length; dicts."""

    def __iter__(self):
        for row in data():
            yield {"x": row}


@pytest.mark.parametrize("kind", ["iterable", "tuples", "generator", "sorted by length"])
def test_every_kind_of_loader(kind):
    x = data()
    loader = {
        "iterable": DataLoader(Stream(), batch_size=5),
        "tuples": DataLoader(TensorDataset(x, torch.arange(23)), batch_size=5),
        "generator": (batch for batch in batches_of(x)),
        "sorted by length": [x[:1], x[1:3], x[3:]],
    }[kind]
    found = run(estimator(), loader)
    assert len(found) == 23 and found.loader_index.tolist() == list(range(23))
    if kind != "sorted by length":
        assert same(found, run(estimator(), batches_of(x)))


def normal_pair(scale):
    """x ~ N(z, 1) with z ~ N(0, 1) and the posterior as guide: log p(x) is known, and varies as x does."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    return model, guide


def test_it_stops_at_the_first_batch_with_the_error_asked_for():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 2**0.5
    found = pv.ImportanceSampling(*normal_pair(0.5**0.5), num_particles=10)
    whole = run(found, x.split(20))
    stopped = run(found, x.split(20), tolerance=0.05)
    errors = [float(whole.log_evidence[:n].std()) / math.sqrt(n) for n in range(100, 2001, 20)]
    assert len(stopped) == 100 + 20 * next(i for i, error in enumerate(errors) if error <= 0.05)
    assert torch.equal(stopped.log_evidence, whole.log_evidence[: len(stopped)])
    assert len(run(found, x.split(20), tolerance=10.0)) == 100  # not before a hundred data
    assert len(run(found, x.split(40), tolerance=10.0)) == 200  # nor before five batches
    assert len(run(found, x.split(20), tolerance=1e-6)) == 2000


def test_it_does_not_stop_by_an_error_that_is_not_to_be_trusted():
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    found = pv.ImportanceSampling(*normal_pair(0.2), num_particles=100)
    whole = run(found, x.split(20))
    assert float((~whole.reliable).double().mean()) > 0.05
    assert len(run(found, x.split(20), tolerance=10.0)) == 300


def test_a_stop_and_a_checkpoint(tmp_path):
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = pv.ImportanceSampling(*normal_pair(0.5**0.5), num_particles=10)
    first = run(found, x.split(20), tolerance=0.1, checkpoint=tmp_path)
    assert len(first) < 400 and same(run(found, x.split(20), tolerance=0.1, checkpoint=tmp_path), first)
    assert len(run(found, x.split(20), checkpoint=tmp_path)) == 400  # more of the same may be asked for


def test_a_record_without_a_number_per_datum_has_no_tolerance():
    with pytest.raises(OptionError, match="a Calibration has no number per datum"):
        run(pv.GuideCalibration(Model(), Guide(), num_particles=20), batches_of(data()), tolerance=0.1)


def test_the_running_mean_is_that_of_all_data(monkeypatch):
    found = run(estimator(), batches_of(data()))
    mean = module.RunningMean()
    for kept in (slice(0, 4), slice(4, 5), slice(5, 23)):
        mean.add(found.select(torch.arange(23)[kept]))
    values = found.log_evidence.double()
    assert str(mean).startswith(f"log evidence {float(values.mean()):.3f} +- {float(values.std()) / math.sqrt(23):.3f}, ")
    assert mean.share_doubted == float((~found.reliable).double().mean())


def test_the_bar_says_the_mean_its_error_and_the_doubts(capsys):
    run(estimator(), DataLoader(TensorDataset(data()), 5), progress=True)
    said = capsys.readouterr().err
    assert "5/5" in said and "ImportanceSampling" in said
    assert "log evidence -" in said and " +- " in said and "% in doubt" in said


def test_the_bar_of_a_loader_without_length_and_of_a_resumed_run(capsys, tmp_path):
    run(estimator(), DataLoader(Stream(), batch_size=5), progress=True)
    assert "5batch" in capsys.readouterr().err.replace(" ", "")
    with pytest.raises(InvalidDataError):
        run(estimator(), with_nan(22), checkpoint=tmp_path)
    with pytest.warns(SkippedBatchWarning):
        run(estimator(), with_nan(22), checkpoint=tmp_path, progress=True, on_error="skip")
    said = capsys.readouterr().err
    assert "80%" in said.split("\r")[1] and "5/5" in said and "1 skipped" in said
