"""What the package never does, and what names with markup in a user's program do to a page and its figures: nothing."""

import ast
import configparser
import functools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

PACKAGE = Path(pv.__file__).parent
# Code from text, data that run code, the network, other programs, temporary names that another process can guess.
CALLS = {"eval", "exec", "compile", "__import__", "mktemp", "system", "popen"}
OF_OTHERS = {"eval", "compile"}  # `module.eval()`, `re.compile()`, `torch.compile()`
MODULES = {"pickle", "marshal", "shelve", "dill", "urllib", "http", "socket", "requests", "subprocess", "ftplib", "ssl"}
# What the ranks of one process group hand one another is pickled, as torch.distributed does: they run the same program.
AMONG_RANKS = "evaluation/processes.py"
MARKUP = "<b>$\\frac{$_&"


@functools.cache
def calls_and_imports():
    paths = {path: ast.walk(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")}
    kept = ((path, node) for path, found in paths.items() for node in found)
    return [(path, node) for path, node in kept if isinstance(node, (ast.Call, ast.Import, ast.ImportFrom))]


def nodes(kind):
    for path, node in calls_and_imports():
        if isinstance(node, kind):
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_nothing_runs_code_from_text():
    calls = [(place, node.func) for place, node in nodes(ast.Call)]
    plain = [place for place, func in calls if isinstance(func, ast.Name) and func.id in CALLS]
    of_modules = [place for place, func in calls if isinstance(func, ast.Attribute) and func.attr in CALLS - OF_OTHERS]
    assert not plain + of_modules


def test_nothing_reads_pickles_or_the_network():
    imported = {place: alias.name.split(".")[0] for place, node in nodes(ast.Import) for alias in node.names}
    imported |= {place: (node.module or "").split(".")[0] for place, node in nodes(ast.ImportFrom) if node.level == 0}
    named = {place: name for place, name in imported.items() if name in MODULES}
    assert {place.partition(":")[0]: name for place, name in named.items()} == {AMONG_RANKS: "pickle"}


def test_files_are_read_without_pickle():
    """`torch.load` only of weights, `numpy.load` only of arrays."""
    for place, node in nodes(ast.Call):
        func = node.func
        if not isinstance(func, ast.Attribute) or func.attr != "load" or not isinstance(func.value, ast.Name):
            continue
        options = {word.arg: ast.literal_eval(word.value) for word in node.keywords if isinstance(word.value, ast.Constant)}
        if func.value.id == "torch" and not place.startswith(AMONG_RANKS):
            assert options.get("weights_only") is True, place
        if func.value.id in ("numpy", "np"):
            assert options.get("allow_pickle") is False, place


def test_dependencies_are_few_enough_to_read():
    setup = configparser.ConfigParser()
    if not setup.read(PACKAGE.parent / "setup.cfg"):
        pytest.skip("not in a checkout")
    assert len(setup["options"]["install_requires"].split()) <= 6


LOADINGS = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.2]])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample(f"z{MARKUP}", dist.Normal(torch.zeros(2), 1).to_event(1))
        w = pyro.sample(f"_w{MARKUP}", dist.Normal(0, 1))
        pyro.sample(f"x{MARKUP}", dist.Normal(z @ LOADINGS.T + w[..., None], 1).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample(f"z{MARKUP}", dist.Normal(0.2 * x @ LOADINGS, 0.6).to_event(1))
        pyro.sample(f"_w{MARKUP}", dist.Normal(0.1 * x.sum(-1), 0.6))


@pytest.fixture
def batches():
    return list(torch.randn(60, 3).split(30))


def drawn(ax):
    """All the text on some axes, once it is drawn."""
    ax.figure.canvas.draw()
    legend = ax.get_legend()
    texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.title, ax.xaxis.label, ax.yaxis.label]
    texts += legend.get_texts() if legend else []
    plt.close(ax.figure)
    return " ".join(text.get_text() for text in texts)


@pytest.mark.filterwarnings("ignore")
def test_a_page_shows_markup_in_names_as_it_is(batches, tmp_path, monkeypatch):
    short = functools.partial(pv.SelfCheck, num_steps=5, num_chains=2)
    monkeypatch.setattr(sys.modules["pyro_vae.report.diagnose"], "SelfCheck", short)
    few = {"num_data": 30, "num_particles": 100}
    page = pv.diagnose(model, guide, train=batches, test=batches, seed=0, progress=False, **few)
    assert page.self_check is not None
    page.to_html(tmp_path / "page.html", title=MARKUP)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;$\\frac{$_&amp;" in text and "<b>$" not in text
    plt.close("all")


@pytest.mark.filterwarnings("ignore")
def test_figures_show_dollars_in_names_as_they_are(batches):
    escaped = MARKUP.replace("$", "\\$")
    gaps = pv.evaluate(pv.InferenceGaps(model, guide), batches, seed=0, progress=False)
    units = pv.ActiveUnits(model, guide)(batches, progress=False)
    sample = pv.AggregatedPosterior(model, guide)(batches, progress=False)
    figures = (
        pv.plots.plot_units(units),
        pv.plots.plot_gaps_side_by_side({MARKUP: gaps, "other": gaps}),
        pv.plots.plot_aggregated_posterior(sample),
        pv.plots.plot_latents(sample),
    )
    for ax in figures:
        assert escaped in drawn(ax)


def test_a_name_with_an_underscore_in_front_keeps_its_line_in_the_legend():
    from pyro_vae.plots.axes import literal

    _, ax = plt.subplots()
    ax.plot([0, 1], label=literal("_z"))
    assert [text.get_text() for text in ax.legend().get_texts()] == [" _z"]
    plt.close(ax.figure)
