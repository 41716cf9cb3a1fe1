"""What all public records have: one line, a DataFrame with a row per datum or unit, a table for notebooks."""

import copy
import dataclasses
import inspect
import math
import pickle
import re
import sys
import warnings
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, make_evidence, make_gaps, quiet

import pyro_vae as pv
from pyro_vae.errors import MissingPackageError
from pyro_vae.records import Result, page
from pyro_vae.records.printing import WIDTH

NUM_DATA = 6
CLASSES = [value for name in pv.__all__ if inspect.isclass(value := getattr(pv, name))]


def is_record(made):
    """A frozen dataclass that is not compared by value, as a schedule is."""
    return dataclasses.is_dataclass(made) and made.__dataclass_params__.frozen and not made.__dataclass_params__.eq


RECORDS = [made for made in CLASSES if is_record(made)]


def model(x):
    weight = torch.tensor([[1.0, 0.0, 0.5, 0.2], [0.0, 1.0, 0.3, -0.4]])
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.7 * x[:, :2], 0.5).to_event(1))


def regression(x):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(weight * x[:, 0], 1.0), obs=x[:, 1])


def regression_guide(x):
    pyro.sample("weight", dist.Normal(0.1, 0.5))


def diagnosis():
    gaps = make_gaps(1.0, 0.5, num_data=NUM_DATA)
    parts = dict.fromkeys(("units", "surgery", "self_check", "calibration", "samples", "simulation", "reconstruction"))
    return pv.Diagnosis(test=gaps, train=gaps, **parts, left_out={}, settings={}, versions={}, seconds=1.0)


def sweep(*numbers):
    values = torch.tensor(numbers)
    names = ("rate", "distortion", "elbo", "log_evidence")
    return pv.BetaSweep(
        beta=values,
        **dict.fromkeys(names, -values),
        std_errors=dict.fromkeys(names, 0.1 * values),
        sampling_errors=dict.fromkeys(names, 0.2 * values),
        bound="lower",
        doubts={"tails": torch.zeros(len(numbers), dtype=torch.int64)},
        pairs=((model, guide),) * len(numbers),
        stores=({},) * len(numbers),
        num_data=NUM_DATA,
        num_updates=3,
    )


def history(steps=3):
    values = torch.arange(steps, dtype=F64)
    names = ("step", "loss", "elbo", "distortion", "rate", "beta")
    return pv.TrainingHistory(**dict.fromkeys(names, values), kl={"z": values}, per_datum=True)


def held_out(looks=3):
    values = torch.arange(looks, dtype=F64)
    names = ("step", "elbo", "sampling_error", "gain", "gain_error", "beta")
    flags = dict.fromkeys(("improved", "at_rest"), values > 0)
    return pv.HeldOutHistory(**dict.fromkeys(names, values), **flags, num_data=NUM_DATA)


def terms():
    objective = pv.BetaTrace_ELBO()
    objective.loss(model, guide, torch.randn(NUM_DATA, 4))
    return objective.terms


def made():
    """One of each; as small as they get."""
    x = torch.randn(NUM_DATA, 4, generator=torch.Generator().manual_seed(0))
    batches, labelled = [(x[:4],), (x[4:],)], [(x, torch.tensor([0, 1, 0, 1, 0, 1]))]
    options = {"seed": 0}
    chains = {"num_steps": 10, "num_chains": 2, "progress": False}
    sim = pv.simulate(model, x, seed=0)
    one = torch.tensor(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evidence = pv.ImportanceSampling(model, guide, num_particles=200, **options)(x)
        gaps = pv.InferenceGaps(model, guide, num_particles=100, **options)(x)
        comparison = pv.compare({"a": evidence, "b": gaps})
        sandwich = pv.BidirectionalMonteCarlo(model, guide, latents=sim.latents, **chains, **options)(sim.observed["x"])
        return {
            pv.Barrier: sandwich.lower.barrier,
            pv.BetaSweep: sweep(0.5, 1.0),
            pv.Calibration: pv.GuideCalibration(model, guide, num_particles=20, **options)(x),
            pv.CollapseHistory: pv.CollapseHistory(
                ("z[0]", "z[1]"), torch.arange(3), torch.ones(3), torch.ones(3), *[torch.ones(3, 2)] * 3
            ),
            pv.Comparison: comparison,
            pv.Decomposition: pv.Decomposition(one, one, one),
            pv.Diagnosis: diagnosis(),
            pv.Estimate: evidence.mean(),
            pv.Evidence: evidence,
            pv.Expectation: pv.PosteriorExpectation(model, guide, lambda z: z["z"], num_particles=100, **options)(x),
            pv.FactorInformation: pv.MutualInformationGap(model, guide, **options)(labelled, progress=False),
            pv.Gaps: gaps,
            pv.HeldOutHistory: held_out(),
            pv.Imputation: pv.impute(model, guide, x, num_particles=100, num_draws=2, seed=0),
            pv.KCurve: evidence.curve,
            pv.LatentSample: pv.AggregatedPosterior(model, guide, **options)(batches, progress=False),
            pv.LeaveOneOutResult: pv.LeaveOneOut(regression, regression_guide, num_draws=100, **options)(x),
            pv.Manifold: pv.manifold(model, guide, x, num_steps=3, seed=0),
            pv.PairedDifference: comparison.pairs[0],
            pv.PosteriorSample: pv.posterior(model, guide, x, num_samples=4, seed=0),
            pv.RateDistortionCurve: pv.RateDistortion(model, guide, num_steps=20, num_chains=2, **options)(
                batches, progress=False
            ),
            pv.Refit: pv.Refit(gaps, gaps, gaps, gaps, None, "epochs", 1, 1, ("scale",), (), False, 0.1),
            pv.Reconstruction: pv.reconstruct(model, guide, x, seed=0),
            pv.SampleCheckResult: pv.SampleCheck(model, guide, **options)(batches, train=batches, progress=False),
            pv.Sandwich: sandwich,
            pv.SelfCheckResult: pv.SelfCheckResult(evidence, sandwich),
            pv.Simulation: sim,
            pv.Surgery: pv.ELBOSurgery(model, guide, **options)(batches, progress=False),
            pv.Terms: terms(),
            pv.TrainingHistory: history(),
            pv.Traversal: pv.traverse(model, guide, x, num_steps=3, seed=0),
            pv.UnitActivity: pv.ActiveUnits(model, guide, **options)(batches, progress=False),
        }


@pytest.fixture(scope="module")
def records():
    return made()


ROWS = {
    pv.BetaSweep: 2,
    pv.CollapseHistory: 3,
    pv.Decomposition: 1,
    pv.Estimate: 1,
    pv.FactorInformation: 1,
    pv.HeldOutHistory: 3,
    pv.Manifold: 3,
    pv.Refit: 4 + 5,
    pv.RateDistortionCurve: 21,
    pv.Surgery: 5 + 2,
    pv.Terms: 1,
    pv.TrainingHistory: 3,
    pv.Traversal: 2 * 3,
    pv.UnitActivity: 2,
}  # all others: one per datum
COLUMNS = {
    pv.BetaSweep: {"beta", "rate", "std_errors[rate]", "sampling_errors[elbo]", "doubts[tails]"},
    pv.Barrier: {"length", "variance", "enough", "too_few"},
    pv.Calibration: {"ranks[z[0]]", "shift[0]", "stretch[1]", "at_latents", "elbo"},
    pv.CollapseHistory: {"step", "num_active", "kl[z[0]]", "fraction_at_prior[z[1]]"},
    pv.Comparison: {"log_evidence[a]", "std_error[b]", "reliable[a]", "elbo[b]"},
    pv.Decomposition: {"mutual_information", "total_correlation", "dimension_wise"},
    pv.Diagnosis: {"part", "data", "name", "value", "std_error", "sampling_error"},
    pv.Estimate: {"value", "std_error", "sampling_error", "doubt"},
    pv.Evidence: {"log_evidence", "std_error", "elbo", "ess", "pareto_k", "fingerprint", "doubts[tails]", "reliable"},
    pv.Expectation: {"value[0]", "std_error[1]", "guide_value[0]", "bias[0]", "doubts[tails]", "evidence.ess"},
    pv.FactorInformation: {"gap", "entropy", "information[z[0]]", "information_std_error[z[1]]"},
    pv.Gaps: {"amortization", "std_errors[amortization]", "converged", "doubts[not converged]", "reliable", "evidence.ess"},
    pv.HeldOutHistory: {"step", "elbo", "gain", "improved", "at_rest", "beta"},
    pv.Imputation: {"mean[x][0]", "stddev[x][3]", "missing[x][1]", "num_missing", "doubts[tails]", "evidence.ess"},
    pv.KCurve: {"log_evidence[1]", "log_evidence[200]", "std_error[100]"},
    pv.LatentSample: {"draws[z[0]]", "means[z[1]]", "prior[z[0]]"},
    pv.LeaveOneOutResult: {"elpd", "std_error", "pareto_k", "ess", "doubts[tails]", "reliable"},
    pv.Manifold: {"level", "values[z[0]]", "values[z[1]]"},
    pv.PairedDifference: {"difference", "std_error", "doubted", "influence"},
    pv.PosteriorSample: {"num_distinct", "doubts[tails]", "reliable", "evidence.ess"},
    pv.RateDistortionCurve: {"beta", "rate", "std_errors[bound]", "above_guide"},
    pv.Refit: {"part", "value", "std_error", "sampling_error"},
    pv.Reconstruction: {"observed[x][0]", "means[x][3]"},
    pv.SampleCheckResult: {"reconstruction_error", "sample_distance", "data_distance", "nearest"},
    pv.Sandwich: {"lower.log_evidence", "upper.std_error", "width", "reliable"},
    pv.SelfCheckResult: {"evidence.log_evidence", "sandwich.width", "reliable"},
    pv.Simulation: {"observed[x][0]", "latents[z][1]", "means[x][3]"},
    pv.Surgery: {"part", "value", "std_error", "sampling_error"},
    pv.Terms: {"reconstruction", "kl[z]", "kl_sum", "elbo", "loss", "beta"},
    pv.TrainingHistory: {"step", "loss", "elbo", "kl[z]", "beta"},
    pv.Traversal: {"unit", "level", "value"},
    pv.UnitActivity: {"names", "kl", "std_errors[kl]", "sampling_errors[kl]", "active", "collapsed"},
}


@pytest.mark.parametrize("record", RECORDS)
def test_every_public_record_stands_on_the_one_base(record):
    assert issubclass(record, Result), f"{record.__name__} is a record: let it inherit from records.Result"
    assert record.__repr__ is Result.__repr__, f"{record.__name__}: dataclass(..., repr=False)"
    assert record.to_dataframe is Result.to_dataframe and record._repr_html_ is Result._repr_html_


def test_there_is_one_of_each():
    assert set(made()) == set(COLUMNS)
    assert {pv.Evidence, pv.Gaps, pv.UnitActivity, pv.Diagnosis} <= set(RECORDS)
    assert set(COLUMNS) <= set(RECORDS)


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_dataframe_has_a_row_for_each(records, kind):
    pandas = pytest.importorskip("pandas")
    record = records[kind]
    frame = record.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    rows = len(record.numbers) if kind is pv.Diagnosis else ROWS.get(kind, NUM_DATA)
    assert len(frame) == rows
    assert COLUMNS[kind] <= set(frame.columns), sorted(frame.columns)
    assert not any(frame[column].map(lambda cell: isinstance(cell, (torch.Tensor, list))).any() for column in frame)


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_record_prints_as_one_line(records, kind):
    line = repr(records[kind])
    assert line.startswith(f"{kind.__name__}(") and line.endswith(")")
    assert "\n" not in line and "tensor" not in line and len(line) < 250
    copied = pickle.loads(pickle.dumps(records[kind])) if kind not in (pv.BetaSweep,) else copy.deepcopy(records[kind])
    assert repr(copied) == line


class Tags(HTMLParser):
    """Checks that tags close in order, and notes what a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.rows += tag == "tr"
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", COLUMNS)
def test_sentences_that_a_record_prints_fit_the_page(records, kind):
    """Rows of tables have runs of spaces and may be wider."""
    lines = str(records[kind]).splitlines()
    assert lines and not [line for line in lines if len(line) > WIDTH and "  " not in line.lstrip()]


def test_sentences_are_wrapped_and_rows_are_not():
    sentence, row = " ".join(["word"] * 40), "  ".join(["1.234"] * 40)
    lines = page([f"  {sentence}", row, "", f"first\n{sentence}"]).splitlines()
    assert row in lines and "" in lines and "first" in lines
    assert all(len(line) <= WIDTH for line in lines if line != row)
    assert lines[0].startswith("  word") and lines[1].startswith("    word")
    assert " ".join(" ".join(lines).split()) == f"{sentence} {' '.join(row.split())} first {sentence}"


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_notebook_shows_a_small_table_without_anything_from_outside(records, kind):
    html = records[kind]._repr_html_()
    tags = Tags()
    tags.feed(html)
    assert not tags.open and not tags.loads and "http" not in html
    assert 1 <= tags.rows <= 6
    assert len(html) < 30_000


def test_names_of_the_user_are_escaped():
    evidence = make_evidence([-1.0, -2.0, -1.5])
    html = pv.compare({"<script>": evidence, "a & b": evidence})._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &amp; b" in html


def test_numbers_of_a_frame_are_those_of_the_record():
    pytest.importorskip("pandas")
    evidence = make_evidence([-1.0, -2.0, -3.0], pareto_k=torch.tensor([0.1, 0.9, math.nan], dtype=F64))
    frame = evidence.to_dataframe()
    assert frame["log_evidence"].tolist() == [-1.0, -2.0, -3.0]
    assert frame["doubts[tails]"].tolist() == [False, True, False]
    assert frame["reliable"].tolist() == [True, False, True]
    assert frame["pareto_k"].isna().tolist() == [False, False, True]
    assert "fingerprint" not in frame and "bound" not in frame


def test_a_square_record_keeps_rows_and_columns_apart(records):
    """D dimensions and as many factors: the information (D, F) must not be read the other way round."""
    pytest.importorskip("pandas")
    one = records[pv.FactorInformation]
    square = dataclasses.replace(
        one,
        **{n: torch.tensor([1.0, 2.0]) for n in ("gap", "gap_std_error", "gap_sampling_error", "entropy")},
        **{
            n: torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            for n in ("information", "information_std_error", "information_sampling_error", "leave_one_out")
        },
        num_values=(2, 2),
    )
    assert square.to_dataframe()["information[z[0]]"].tolist() == [1.0, 2.0]


def test_one_datum_is_one_row():
    pytest.importorskip("pandas")
    with quiet():
        record = pv.ImportanceSampling(model, guide, num_particles=20, seed=0)(torch.zeros(1, 4))
    assert len(record.to_dataframe()) == 1 and repr(record).startswith("Evidence(1 data, ")


def test_without_pandas_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas"):
        make_evidence([-1.0]).to_dataframe()
    with pytest.raises(ImportError):
        make_evidence([-1.0]).to_dataframe()


def test_the_package_knows_its_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pv.__version__)
