"""The docs are complete, and the README's example and commands are what the package does. Needs no Sphinx."""

import configparser
import contextlib
import importlib
import inspect
import io
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest

import pyro_vae
from pyro_vae.records.doubts import TABLE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()

sys.path.insert(0, str(DOCS))
import addresses  # noqa: E402
import listing  # noqa: E402

# As Sphinx renders them: with the classes and the papers that pages list by themselves.
PAGES = {
    name: listing.page(name.removesuffix(".md"), path.read_text())
    for path in DOCS.rglob("*.md")
    if "_build" not in (name := path.relative_to(DOCS).as_posix()).split("/")
}
API = "\n".join(text for name, text in PAGES.items() if name.startswith("api/"))
PARTS = sorted(
    {path.relative_to(ROOT / "pyro_vae").parts[0].removesuffix(".py") for path in (ROOT / "pyro_vae").rglob("*.py")}
)


def block(language: str, section: str = "Example") -> str:
    """The one fenced block in this language of a section of the README."""
    text = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[0]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) == 1, f"section {section} of the README has {len(blocks)} blocks of {language}"
    return blocks[0]


def mentions(text: str, name: str) -> bool:
    return re.search(rf"\bpyro_vae\.{name}\b", text) is not None


MODULES = {name for name in pyro_vae.__all__ if inspect.ismodule(getattr(pyro_vae, name))}
DOCUMENTED = [*sorted(set(pyro_vae.__all__) - MODULES), *(f"nn.{name}" for name in pyro_vae.nn.__all__)]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_has_one_entry_on_an_api_page(name):
    entries = re.findall(rf"^\.\. auto(?:class|function):: pyro_vae\.{name}$", API, re.M)
    assert len(entries) == 1, f"a page in docs/api needs one entry of pyro_vae.{name}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_public_module_is_on_an_api_page(name):
    assert mentions(API, name), f"add pyro_vae.{name} to a page in docs/api"


def test_pages_list_classes_by_themselves(monkeypatch):
    """What is public is listed, once; what is not public, or has an entry of its own, is not."""
    page = "Text\n\n.. public:: pyro_vae.objectives\n   :no-members:\n\nMore\n"
    listed = listing.with_entries(page, named={"pyro_vae.Terms"})
    assert ".. autoclass:: pyro_vae.InclusiveKL\n   :no-members:\n" in listed and listed.endswith("\n\nMore\n")
    assert "Terms" not in listed and "out_of_order" not in listed  # an entry of its own; not public

    class NewBound(pyro_vae.objectives.datum_elbo.DatumELBO):
        pass

    for module in (pyro_vae, pyro_vae.objectives):
        monkeypatch.setattr(module, "NewBound", NewBound, raising=False)
    monkeypatch.setattr(pyro_vae.objectives, "__all__", [*pyro_vae.objectives.__all__, "NewBound"])
    assert "NewBound" not in listing.with_entries(page, named=set())
    monkeypatch.setattr(pyro_vae, "__all__", [*pyro_vae.__all__, "NewBound"])
    assert listing.with_entries(page, named=set()).count("pyro_vae.NewBound\n") == 1
    heads = listing.with_entries(".. public:: pyro_vae.nn Head\n", named={"pyro_vae.nn.Head"})
    assert "pyro_vae.nn.Binomial\n" in heads and "MLP" not in heads
    source = [page]
    listing.fill_in(None, "api/anything", source)
    assert ".. autoclass::" in source[0] and "public::" not in source[0]
    assert {"citing", "api/nn", "api/objectives", "api/estimators"} <= set(listing.pages_to_read(None, None))
    for connected in ('"source-read", listing.fill_in', '"env-get-outdated", listing.pages_to_read'):
        assert f"app.connect({connected})" in (DOCS / "conf.py").read_text()


def test_papers_of_docstrings_are_listed_under_citing(monkeypatch):
    rows = "| part | authors, year | title |\n|---|---|---|\n"
    monkeypatch.setattr(
        pyro_vae.VAE, "__doc__", 'A VAE. For more see: Neal et al. (2001),\n    "Annealing: A Title", https://a.b/c_d.'
    )
    assert "| `VAE` | For more see: Neal" not in (page := listing.with_papers(rows))
    assert page.startswith(rows) and "| `VAE` | Neal et al. 2001 | [Annealing: A Title](https://a.b/c_d) |\n" in page
    assert "https://a.b/c_d" not in listing.with_papers(rows + "| x | y | [z](https://a.b/c_d) |\n").splitlines()[-1]


@pytest.mark.parametrize("name", sorted(addresses.OUTSIDE))
def test_a_name_that_links_to_other_documentation_exists(name):
    module, _, last = name.rpartition(".")
    assert hasattr(importlib.import_module(module or "builtins"), last) or importlib.import_module(name)


def test_names_in_the_text_are_links_where_they_are_public():
    shown = {
        "InferenceGaps": "InferenceGaps",
        "pv.evaluate()": "evaluate",
        "nn.MLP": "nn.MLP",
        "plot_gaps": "plots.plot_gaps",
    }
    shown |= {"pyro_vae.nn.MLP": "nn.MLP", "MaskError": "errors.MaskError", "errors.MaskError": "errors.MaskError"}
    for text, name in shown.items():
        assert addresses.public_name(text) == f"pyro_vae.{name}"
    for text in ("MLP", "x", "gaps.elbo", "nn.Module", "torch.nn.MLP"):
        assert addresses.public_name(text) is None
    assert set(addresses.SHORT.values()) <= set(addresses.OUTSIDE)


@pytest.mark.parametrize("part", [part for part in PARTS if not part.startswith("_")])
def test_every_module_is_in_the_docs(part):
    assert any(mentions(text, part) for text in PAGES.values()), f"say in docs/ what pyro_vae.{part} is"


def listed_on(page: str) -> set[str]:
    """The public names that autodoc lists on an API page, without `pyro_vae.`."""
    entries = set(re.findall(r"^\.\. auto(?:class|function):: pyro_vae\.(\S+)$", PAGES[page], re.M))
    for name in re.findall(r"^\.\. automodule:: (\S+)\n(?!   :no-members:)", PAGES[page], re.M):
        members = vars(importlib.import_module(name)).items()
        own = {n for n, value in members if getattr(value, "__module__", "").startswith(name) and not n.startswith("_")}
        exported = getattr(importlib.import_module(name), "__all__", own)
        entries |= {f"{name}.{member}".removeprefix("pyro_vae.") for member in exported}
    return entries


WITHOUT_TABLES = {"api/index.md", "api/plots.md", "api/report.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("api/") and page not in WITHOUT_TABLES])
def test_an_api_page_can_be_read_where_no_site_is_built(page):
    """Plain tables have a row for each public name of the page, and for no other."""
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGES[page], re.M)
    assert sorted(rows) == sorted(listed_on(page)), f"give each name of docs/{page} a row in a table: its name, a sentence"


def test_every_error_has_a_row_under_what_is_refused():
    rows = re.findall(r"^\| `(\w+(?:Error|Warning))`", PAGES["refused.md"], re.M)
    assert sorted(rows) == sorted(pyro_vae.errors.__all__)


def test_api_pages_name_nothing_that_does_not_exist():
    for name in re.findall(r"^\.\. auto\w+:: pyro_vae\.(\S+)", API, re.M):
        obj = pyro_vae
        for part in name.split("."):
            if not hasattr(obj, part):  # a module that the package does not import by itself
                __import__(f"pyro_vae.{name}")
            obj = getattr(obj, part)


def test_links_between_pages_lead_somewhere():
    pages = [(DOCS / name, text) for name, text in PAGES.items()]
    pages += [(ROOT / name, (ROOT / name).read_text()) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for path, text in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_page_is_in_a_table_of_contents():
    for name in PAGES:
        folder, _, page = name.rpartition("/")
        index = PAGES[f"{folder}/index.md" if folder and page != "index.md" else "index.md"]
        entry = name.removesuffix(".md") if page == "index.md" else page.removesuffix(".md")
        assert name == "index.md" or re.search(rf"^{re.escape(entry)}$", index, re.M), f"{name} is in no toctree"


def test_files_that_the_readme_runs_exist_and_its_extras_too():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    commands = re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert words[:5] == ["pip", "install", "-c", "constraints.txt", "-e"]
        assert words[5][2:-1] in setup["options.extras_require"]
        for word in words:
            assert not word.endswith((".py", ".txt")) or (ROOT / word).exists(), f"the README names {word}"


def test_the_example_of_the_readme_runs():
    """Smoke run: a few training steps and data; the table must have the rows that are printed."""
    code = block("python")
    shorter = {"range(2000)": "range(5)", "[1500:]": "[1500:1508]"}
    for full, few in shorter.items():
        assert code.count(full) == 1, f"the example no longer says {full}: change it here as well"
        code = code.replace(full, few)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        for category in (pyro_vae.errors.ConvergenceWarning, pyro_vae.errors.UnreliableEvidenceWarning):
            warnings.simplefilter("ignore", category)  # in two steps nothing converges
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    remedies = r"  [a-z][a-zA-Z ,]*: .*\n"  # of the doubts that a smoke run has
    labels = [re.match(r"\D*", line)[0].split("  ")[0] for line in re.sub(remedies, "", printed.getvalue()).splitlines()]
    expected = [re.match(r"\D*", line)[0].split("  ")[0] for line in block("text").splitlines()]
    assert labels[:-1] == expected[:-1]  # the last line is the verdict, which may be another one


def test_the_training_example_of_the_readme_runs():
    code = block("python", "Train")
    shorter = {"range(100)": "range(1)", "100 * len(loader)": "1000"}
    for full, few in shorter.items():
        assert code.count(full) == 1, f"the example no longer says {full}: change it here as well"
        code = code.replace(full, few)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "Training history of 18 steps, nats per datum" in printed.getvalue()


def test_the_numbers_of_the_readme_add_up():
    """L[q] + amortization + approximation = log p(x), as printed."""
    rows = dict(re.findall(r"^\s*([A-Za-z][A-Za-z() ,]*?)\s{2,}(-?\d+\.\d+)", block("text"), re.M))
    elbo, optimal, top = (float(rows[name]) for name in ("ELBO", "optimal ELBO", "log p(x), lower bound"))
    assert float(rows["amortization gap"]) == pytest.approx(optimal - elbo, abs=2e-3)
    assert float(rows["approximation gap"]) == pytest.approx(top - optimal, abs=2e-3)
    assert float(rows["inference gap"]) == pytest.approx(top - elbo, abs=2e-3)


def test_every_identity_of_the_theory_is_held_by_tests_that_exist():
    for section in re.split(r"^##+ ", PAGES["theory.md"], flags=re.M):
        title = section.splitlines()[0]
        folded = re.findall(r"^<details>\n<summary>Tests</summary>\n\n(.*?)\n\n</details>$", section, re.M | re.S)
        named = re.findall(r"^- `(tests/[\w/]+\.py)::(test_\w+)`$", "\n".join(folded), re.M)
        assert named or "*Proof.*" not in section, f"say which test holds '{title}'"
        assert len(named) == section.count("::test_"), f"a test of '{title}' is not in the folded list"
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), f"'{title}': {file} has no {name}"


def test_the_figures_under_accuracy_are_those_of_their_sources():
    """Each number with a decimal point, and each share, stands in a file that the section names."""
    for section in re.split(r"^## ", PAGES["accuracy.md"], flags=re.M)[1:]:
        sources = re.findall(r"`([\w/]+\.md)`", section)
        known = {number for source in sources for number in figures((ROOT / source).read_text())}
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert sources and rows and set(figures("\n".join(rows))) <= known, section.splitlines()[0]


def test_the_figures_under_the_literatures_numbers_are_those_of_the_recorded_run():
    """Ours, which have an error behind them."""
    found = re.findall(r"-?\d+\.\d+ \+- \d\.\d+", PAGES["published.md"])
    recorded = (ROOT / "tests/benchmarks/recorded.md").read_text()
    assert len(found) >= 9 and not [figure for figure in found if figure not in recorded]


def figures(text: str) -> list[str]:
    return re.findall(r"-?\d[\d,]*\.\d+%?|\d+%", text)


def test_every_doubt_is_in_the_glossary():
    rows = re.findall(r"^\| (`.+?) \|", PAGES["glossary.md"], re.M)
    assert {reason for row in rows for reason in re.findall(r"`([^`]+)`", row)} >= set(TABLE)


def test_every_paper_that_is_referred_to_can_be_cited():
    hosts = ("arxiv.org", "doi.org", "openreview.net", "jmlr.org", "papers.nips.cc", "approximateinference.org", "artowen")
    files = [*(ROOT / "pyro_vae").rglob("*.py"), *(DOCS / "examples").glob("*.py"), ROOT / "README.md"]
    for text in [*(path.read_text() for path in files), *PAGES.values()]:
        for link in re.findall(r"https?://[^\s)>\"',`]*[^\s)>\"',`.;:]", text):
            assert not any(host in link for host in hosts) or link in PAGES["citing.md"], f"{link} is not in docs/citing.md"


def test_the_citation_is_of_this_version():
    assert f"version = {{{pyro_vae.__version__}}}" in PAGES["citing.md"]
