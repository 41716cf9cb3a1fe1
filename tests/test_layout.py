"""The layers of the package: who may import whom, how long a module may be, what is public."""

import ast
import importlib
import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest

import pyro_vae

ROOT = Path(pyro_vae.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
AIM, LIMIT = 200, 400  # lines

DESIGN = ROOT.parent / "docs" / "design.md"
EVERYWHERE = {"errors", "options", "ops", "noise", "tolerance"}  # may be imported by everyone else


def arrows() -> dict[str, set[str]]:
    """The parts of the package and which of the others each imports, from the table in docs/design.md."""
    rows = re.findall(r"^\| `pyro_vae\.(\w+)` \| .* \| ([\w, ]+) \|$", DESIGN.read_text(), re.MULTILINE)
    return {part: set() if imports == "nothing" else set(imports.split(", ")) for part, imports in rows}


ARROWS = arrows()
# These import nothing of ours but the arrows above, errors and ops included: the oracle must not lean on what it judges.
ALONE = {"errors", "options", "ops", "noise", "tolerance", "exact"}
# Distributions are data and may be built anywhere else; the rest of Pyro runs programs.
KNOW_PYRO = {"arguments", "isolation", "kernel", "densities", "objectives", "models", "guides"}
TRAINS = {
    Path("latent/beta_sweep.py"),
    Path("refit/frozen_model.py"),
    Path("refit/guide_training.py"),
    Path("refit/refit_guide.py"),
    Path("training/aggressive_training.py"),
    Path("training/fused_optim.py"),
    Path("training/kept_state.py"),
}  # by SVI, as users do
NO_PYRO_AT_ALL = {
    "errors",
    "options",
    "ops",
    "noise",
    "tolerance",
    "float64",
    "batches",
    "exact",
    "records",
    "plots",
    "evaluation",
    "simulate",
}
# What may be imported from outside, beside the standard library, torch, and Pyro as above.
OUTSIDE = {
    "noise": {"numpy"},
    "options": {"numpy"},
    "arguments": {"numpy"},
    "exact": {"numpy"},
    "batches": {"numpy"},
    "comparison": {"matplotlib"},
    "calibration": {"matplotlib"},
    "evaluation": {"numpy", "tqdm"},
    "evidence": {"tqdm"},
    "latent": {"tqdm"},
    "records": {"numpy", "pandas"},
    "leave_one_out": {"arviz"},
    "samples": {"tqdm"},
    "plots": {"numpy", "matplotlib"},
    "training": {"numpy", "matplotlib", "tqdm"},
    "refit": {"matplotlib", "tqdm"},
    "report": {"jinja2", "matplotlib", "tqdm"},
}


def part_of(module: Path) -> str:
    """The part of the package that a file belongs to: its folder, or its own name."""
    return module.parts[0] if len(module.parts) > 1 else module.stem


def imports_of(module: Path) -> list[str]:
    """Absolute dotted names of everything a file imports, wherever in the file."""
    package = ["pyro_vae", *module.parts[:-1]]
    names = []
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


def ours(module: Path) -> set[str]:
    """The other parts of the package that a file imports."""
    parts = {name.split(".")[1] for name in imports_of(module) if name.startswith("pyro_vae.")}
    return parts - {part_of(module)}


def test_there_is_something_to_look_at():
    assert len(MODULES) > 15
    assert ours(Path("gaps/inference_gaps.py")) >= {"evidence", "kernel", "options"}
    assert ours(Path("proposals/space.py")) >= {"kernel"}
    assert set(ARROWS) == {part_of(module) for module in MODULES} - {"__init__"}


@pytest.mark.parametrize("part", sorted(ARROWS))
def test_a_part_imports_what_its_row_in_the_design_says(part):
    """No more and no less; `__init__` imports whatever is public."""
    found = {module: ours(module) for module in MODULES if part_of(module) == part}
    allowed = ARROWS[part] | (set() if part in ALONE else EVERYWHERE)
    more = {str(module): sorted(names - allowed) for module, names in found.items() if names - allowed}
    assert not more, f"'{part}' imports more than docs/design.md says: {more}"
    unused = ARROWS[part] - set().union(*found.values())
    assert not unused, f"docs/design.md allows '{part}' to import {sorted(unused)}, which it does not"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_who_knows_pyro(module):
    part = part_of(module)
    pyro = {name for name in imports_of(module) if name.split(".")[0] == "pyro"}
    if part in NO_PYRO_AT_ALL:
        assert not pyro, f"{module} must do without Pyro, but imports {sorted(pyro)}"
    elif part not in KNOW_PYRO and module not in TRAINS:
        others = {name for name in pyro if not name.startswith("pyro.distributions")}
        assert not others, f"{module} imports {sorted(others)}: only {sorted(KNOW_PYRO)} may run Pyro programs"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_what_comes_from_outside(module):
    outside = {name.split(".")[0] for name in imports_of(module)} - set(sys.stdlib_module_names)
    allowed = {"pyro", "pyro_vae", "torch"} | OUTSIDE.get(part_of(module), set())
    assert outside <= allowed, f"{module} imports {sorted(outside - allowed)}"


def test_the_public_objectives_estimators_and_models_meet_only_in_a_pair():
    for part in ("objectives", "evidence", "models"):
        assert not (ARROWS[part] & {"objectives", "evidence", "models"})


def test_module_lengths():
    lengths = {str(module): len((ROOT / module).read_text().splitlines()) for module in MODULES}
    long = {name: length for name, length in lengths.items() if length > LIMIT}
    assert not long, f"modules over {LIMIT} lines: {long}. Split them by what they know"
    above_aim = {name: length for name, length in lengths.items() if length > AIM}
    print(f"modules over {AIM} lines, the aim: {above_aim}")  # shown by pytest -s; no failure


def test_no_module_of_odds_and_ends():
    names = {part for module in MODULES for part in (*module.parts[:-1], module.stem)}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_public_names():
    assert pyro_vae.__all__ == sorted(pyro_vae.__all__)
    for name in pyro_vae.__all__:
        assert inspect.getdoc(getattr(pyro_vae, name)), f"pyro_vae.{name} has no docstring"
    visible = {name: value for name, value in vars(pyro_vae).items() if not name.startswith("_")}
    public = {name for name, value in visible.items() if not inspect.ismodule(value)}
    assert public <= set(pyro_vae.__all__), "the package imports names that it does not make public"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_can_be_imported_and_says_what_it_is(module):
    dotted = ".".join(["pyro_vae", *(part for part in module.with_suffix("").parts if part != "__init__")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imported = importlib.import_module(dotted)
    assert imported.__doc__
    for name in getattr(imported, "__all__", ()):
        assert hasattr(imported, name), f"{dotted}.__all__ names '{name}', which does not exist"


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()
