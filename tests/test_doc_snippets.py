"""Every python snippet of README.md and docs/, and the examples of the docstrings, run as they are printed.

In order within a page, in one namespace, which holds what the prose takes for granted: a small pair and few data. Counts are
cut by `FEW` and `shorter`, and the library's warnings about so few are ignored.
"""

import ast
import doctest
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from test_docs import block
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.evidence import Estimator

ROOT = Path(__file__).parents[1]
IN_TEST_DOCS = [block("python"), block("python", "Train")]  # of the README
ELSEWHERE = {  # the test that runs a page, or a folder of the package
    "docs/api/models.md": "tests/models/test_examples.py",
    "pyro_vae/models": "tests/models/test_examples.py",
}
SMALL = {"num_particles": 10, "num_gradients": 5, "num_steps": 3, "num_chains": 2}  # for every estimator that has them
ESTIMATORS = {
    name: made for name in pv.__all__ if inspect.isclass(made := getattr(pv, name)) and issubclass(made, Estimator)
}
FEW = {  # options that stand in the place of those printed, or of the defaults
    name: {option: few for option, few in SMALL.items() if option in inspect.signature(made).parameters}
    for name, made in ESTIMATORS.items()
} | {
    "AdaptiveImportanceSampling": {"num_particles": 20, "num_gradients": 5},
    "ImportanceSampling": {"num_particles": 100},
    "InferenceGaps": {"num_particles": 10},
    "LeaveOneOut": {"num_draws": 50},
    "RateDistortion": {"num_steps": 20, "num_chains": 2},
    "SelfCheck": {"num_steps": 3, "num_chains": 2},
    "beta_sweep": {"num_epochs": 1},
    "diagnose": {"num_data": 10, "num_particles": 10},
    "impute": {"num_particles": 20},
    "refit_guide": {"num_data": 10, "num_epochs": 1, "num_particles": 10},
}


def shorter(code):
    return re.sub(r"range\(\d{3,}\)", "range(2)", code)


def snippets(path):
    found = re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S)
    return [code for code in found if code not in IN_TEST_DOCS]


def relative(paths):
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(paths) if "_build" not in path.parts}


def docstring_examples():
    """The blocks below `Example::`, by module and name."""
    found = {}
    for file, path in relative((ROOT / "pyro_vae").rglob("*.py")).items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                blocks = re.findall(r"^Example::\n\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.M)
                found |= {f"{file}::{node.name}": textwrap.dedent(code) for code in blocks}
    return found


MARKDOWN = relative([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGES = {name: path for name, path in MARKDOWN.items() if snippets(path)}
EXAMPLES = docstring_examples()


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Few particles, steps and data; files go to a folder of the test's own."""

    def with_few(function, options):
        return lambda *args, **kwargs: function(*args, **kwargs | options)

    for name, options in FEW.items():
        monkeypatch.setattr(pv, name, with_few(getattr(pv, name), options))
    monkeypatch.setattr(sys.modules["pyro_vae.report.diagnose"], "SelfCheck", pv.SelfCheck)  # that of a page too
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        for category in (value for value in vars(pv.errors).values() if isinstance(value, type)):
            if issubclass(category, Warning):
                warnings.simplefilter("ignore", category)
        yield
    plt.close("all")


def small_vae(latent_dim=3):
    return pv.mlp_vae(64, latent_dim, likelihood=pv.nn.Binomial(16), hidden=(8,))


def taken_for_granted():
    """What every page and docstring may use without saying where it comes from."""
    vae, x, y = small_vae(), torch.randint(17, (20, 64)).float(), torch.arange(20) % 2
    objective = pv.BetaTraceMeanField_ELBO()
    names = {
        "vae": vae,
        "model": vae.model,
        "guide": vae.guide,
        "objective": objective,
        "make_pair": lambda beta: small_pair(),
        "models": {"small": vae, "large": small_vae(4)},
    }
    names |= {"x": x, "y": y, "labels": y, "data": x, "digits": x, "x_test": x}
    names |= {loader: DataLoader(TensorDataset(x), 10) for loader in ("loader", "train_loader", "test_loader", "held_out")}
    names |= {"svi": SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective), "num_epochs": 2}
    names |= {"pv": pv, "pyro_vae": pv, "pyro": pyro, "dist": dist, "torch": torch, "nn": nn, "functools": functools}
    names |= {"SVI": SVI, "Trace_ELBO": Trace_ELBO, "config_enumerate": config_enumerate, "warnings": warnings}
    return names | {"DataLoader": DataLoader, "TensorDataset": TensorDataset, "optimizer": pyro.optim.Adam({"lr": 1e-3})}


def small_pair():
    vae = small_vae()
    return vae.model, vae.guide


def networks():
    return {"encoder": nn.Linear(64, 16), "decoder": nn.Linear(8, 64)}


def of_extending():
    """The page shows these files in front of its snippets."""
    names = {}
    for path in sorted((ROOT / "docs" / "examples").glob("extending_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names |= vars(module)
    return {name: value for name, value in names.items() if not name.startswith("_")}


def of_readme():
    vae, x = small_vae(), torch.randint(17, (20, 64)).float()
    return {"train": x, "test": x, "gaps": pv.InferenceGaps(vae.model, vae.guide)(x)}


def labelled():
    x, y = torch.randint(17, (20, 64)).float(), torch.arange(20) % 2
    return {"loader": DataLoader(TensorDataset(x, y), 10)}


def looked_at():
    vae, loader = small_vae(), list(torch.randint(17, (20, 64)).float().split(10))
    evidence = pv.evaluate(pv.AdaptiveImportanceSampling(vae.model, vae.guide), loader)
    return {"looks": pv.SampleCheck(vae.model, vae.guide)(loader, train=loader, evidence=evidence)}


def watched():
    names = taken_for_granted()
    names["monitor"] = pv.Monitor(names["objective"])
    for (x,) in names["monitor"].watch(names["loader"]):
        names["svi"].step(x)
    return names


def refitted():
    vae, loader = small_vae(), list(torch.randint(17, (20, 64)).float().split(10))
    optim = pyro.optim.Adam({"lr": 1e-3})
    return {"refit": pv.refit_guide(vae.model, vae.guide, loader, optim, test=loader, num_epochs=1)}


def stopped():
    vae, loader = small_vae(), list(torch.randint(17, (20, 64)).float().split(10))
    stopping = pv.EarlyStopping(vae.model, vae.guide, loader)
    stopping(0)
    return {"stopping": stopping}


def two_latents():
    vae = small_vae(2)
    return {"vae": vae, "model": vae.model, "guide": vae.guide}


def gaussian():
    vae = pv.LinearVAE(64, 2)
    return {"model": vae.model, "guide": vae.guide}


# What a page or a docstring needs beside `taken_for_granted`.
NAMES = {
    "README.md": of_readme,
    "docs/api/nn.md": lambda: {"z": torch.zeros(20, 8)},
    "docs/api/training.md": lambda: {"path": "checkpoint.pt"},
    "docs/extending.md": of_extending,
    "docs/quickstart.md": networks,
    "BetaTrace_ELBO": lambda: {"loader": DataLoader(torch.randint(17, (20, 64)).float(), 10)},
    "BetaTraceGraph_ELBO": lambda: {"h": torch.zeros(())},
    "ExactEvidence": gaussian,
    "plot_copies": looked_at,
    "plot_factors": labelled,
    "plot_gaps_side_by_side": refitted,
    "plot_held_out": stopped,
    "plot_latents": labelled,
    "plot_likelihood_and_looks": looked_at,
    "plot_manifold": two_latents,
    "plot_nearest_neighbours": looked_at,
    "plot_training": watched,
}


def run(blocks, name):
    names = {**taken_for_granted(), **NAMES.get(name, dict)()}
    for number, code in enumerate(blocks, start=1):
        exec(compile(shorter(code), f"{name}, snippet {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [name for name in PAGES if name not in ELSEWHERE])
def test_snippets_of_a_page_run(page, few):
    if page == "docs/flows.md" and importlib.util.find_spec("zuko") is None:
        pytest.skip("zuko is not installed")
    run(snippets(PAGES[page]), page)


@pytest.mark.parametrize("example", [name for name in EXAMPLES if name.split("::")[0].rpartition("/")[0] not in ELSEWHERE])
def test_example_of_a_docstring_runs(example, few):
    run([EXAMPLES[example]], example.split("::")[1])


@pytest.mark.parametrize("module", ["ops", "exact.linear_gaussian", "exact.gaussians", "exact.principal_axes", "exact.sums"])
def test_interactive_examples_print_what_they_say(module):
    names = {"torch": torch, "Normal": torch.distributions.Normal}
    failed, tried = doctest.testmod(importlib.import_module(f"pyro_vae.{module}"), extraglobs=names)
    assert failed == 0 and tried > 0


def test_nothing_is_left_out():
    """Python is fenced as python, no example is passed by, and what is left to other tests is there."""
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())
    for name, path in MARKDOWN.items():
        fences = set(re.findall(r"^ *```(\w+)$", path.read_text(), re.M))
        assert fences <= {"python", "text", "sh", "bibtex"}, f"{name} has fences {sorted(fences)}"
    for file, path in relative((ROOT / "pyro_vae").rglob("*.py")).items():
        found = [name for name in EXAMPLES if name.startswith(f"{file}::")]
        assert path.read_text().count("Example::") == len(found), f"an example of {file} is not found"
    unused = set(NAMES) - set(MARKDOWN) - {name.split("::")[1] for name in EXAMPLES}
    assert not unused, f"no page or example needs {sorted(unused)}"
