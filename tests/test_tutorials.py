"""The tutorials are complete, as text: the build of the docs runs them (SMOKE_TEST=1 in CI), this runs the shortest."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "tutorials"
FILES = {path.stem: path.read_text() for path in sorted(TUTORIALS.glob("*.py")) if path.name != "record.py"}
README = (TUTORIALS / "README.md").read_text()
each = pytest.mark.parametrize("name", FILES)


def head(name: str) -> list[str]:
    return (ast.get_docstring(ast.parse(FILES[name])) or "").splitlines()


@each
def test_the_docstring_has_a_title_and_says_what_the_reader_will_know(name):
    title, underline, blank, *text = head(name)
    assert underline == "=" * len(title) and not blank and text


@each
def test_there_is_a_smoke_mode(name):
    assert 'SMOKE_TEST = "SMOKE_TEST" in os.environ' in FILES[name]
    assert FILES[name].count("SMOKE_TEST") > 2, "it is never asked for"


@each
def test_the_end_says_what_to_try(name):
    assert re.search(r"^# What to try\n# -----------\n", FILES[name], re.M)


@each
def test_cells_are_restructured_text_and_figures_are_shown(name):
    assert "[markdown]" not in FILES[name]
    assert "plt.show()" in FILES[name] and "matplotlib.use" not in FILES[name]
    assert name == "quickstart" or "savefig" not in FILES[name]


@each
def test_the_gallery_runs_it(name, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    gallery = runpy.run_path(str(ROOT / "docs/conf.py"))["sphinx_gallery_conf"]
    assert (ROOT / "docs" / gallery["examples_dirs"]).resolve() == TUTORIALS
    assert re.search(gallery["filename_pattern"], str(TUTORIALS / f"{name}.py"))
    assert not re.search(gallery["ignore_pattern"], f"{name}.py")
    assert re.search(gallery["ignore_pattern"], "record.py")


@each
def test_it_has_a_row_in_the_readme_with_the_figure_and_the_output_of_a_full_run(name):
    rows = [line for line in README.splitlines() if line.startswith("|") and f"({name}.py)" in line]
    assert len(rows) == 1 and f'src="recorded/{name}.png"' in rows[0]
    picture, output = (TUTORIALS / "recorded" / f"{name}.{kind}" for kind in ("png", "txt"))
    assert 0 < picture.stat().st_size < 80_000
    seconds = re.search(r"\n\[torch \S+, pyro \S+; (\d+) s, threads: \d+\]\n$", output.read_text())
    minutes = float(rows[0].split("|")[-2])
    assert minutes == pytest.approx(int(seconds[1]) / 60, abs=0.051)


def test_a_record_sets_the_minutes_of_its_row_alone():
    with_minutes = runpy.run_path(str(TUTORIALS / "record.py"))["with_minutes"]
    before, after = (README.splitlines(), with_minutes(README, "16_sequences", "\n[torch 2, pyro 1; 5999 s, threads: 1]\n"))
    changed = [(old, new) for old, new in zip(before, after.splitlines(), strict=True) if old != new]
    assert len(changed) == 1 and "(16_sequences.py)" in changed[0][0] and changed[0][1].endswith("| 100.0 |")


def test_a_full_run_prints_what_is_recorded():
    """The others by hand, `python tutorials/record.py --compare`."""
    command = [sys.executable, str(TUTORIALS / "record.py"), "--compare", "01_the_bound"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ("ELBO -93.9 +- 0.3 nats, 12 of 1,000", True),
        ("ELBO -94.9 +- 0.3 nats, 12 of 1,000", True),  # by the stated error
        ("ELBO -99.9 +- 0.3 nats, 12 of 1,000", False),
        ("ELBO -93.9 +- 0.3 nats, 12 of 1,100", False),
        ("log p(x) -93.9 +- 0.3 nats, 12 of 1,000", False),
        ("ELBO  -93.9 +- 0.3  nats, 12 of 1,000", True),
    ],
)
def test_records_are_compared_by_words_and_numbers(now, same):
    record = runpy.run_path(str(TUTORIALS / "record.py"))
    assert record["same_line"]("ELBO -93.9 +- 0.3 nats, 12 of 1,000", now) is same
    assert bool(record["differences"]("ELBO -93.9 +- 0.3 nats, 12 of 1,000", now)) is not same
    assert record["differences"](f"{now}\nmore", now) and not record["differences"]("took 3 s", "")


def test_the_readme_shows_nothing_else():
    named = re.findall(r'src="recorded/(\w+)\.png"', README)
    assert sorted(named) == sorted(FILES)
    assert named == sorted(named, key=lambda name: (name != "quickstart", name))
    recorded = {path.stem for path in (TUTORIALS / "recorded").iterdir()}
    assert recorded == set(FILES), "a record without its tutorial"


@each
def test_links_of_a_tutorial_lead_somewhere(name):
    """By :doc: to another tutorial or, with a leading slash, a page of the docs; by :ref: or an address to a tutorial."""
    text = re.sub(r"\n# ?", " ", FILES[name])
    for target in re.findall(r":doc:`(?:[^`<]*<)?([^`<>]+)>?`", text):
        place = f"docs{target}.md" if target.startswith("/") else f"tutorials/{target}.py"
        assert (ROOT / place).exists(), f"there is no {place}"
    for target in re.findall(r":ref:`(?:[^`<]*<)?sphx_glr_tutorials_([^`<>]+)\.py>?`", text):
        assert target in FILES
    for target in re.findall(r"<([^`<>\s]+)>`_", text):
        if "://" not in target:
            assert target.removesuffix(".html") in FILES


def test_links_to_tutorials_lead_somewhere():
    pages = [path.read_text() for path in (ROOT / "docs").rglob("*.md")]
    for target in re.findall(r"#sphx_glr_tutorials_(\w+)\.py", "\n".join(pages)):
        assert target in FILES
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'(?:href|src)="([^"]+)"', README)
    for target in targets:
        assert (TUTORIALS / target).exists(), target
