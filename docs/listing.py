"""What pages list by themselves: public classes on the API pages, papers of docstrings under Citing. Needs no Sphinx.

The landing page, Contributing and Changes show the files of the project's root; their links lead to pages here.

On an API page the line

    .. public:: pyro_vae.objectives

becomes an autodoc entry for each public name of that sub-package that no API page names by itself. A class behind it, as in
`.. public:: pyro_vae.nn Head`, leaves the subclasses of that class. Indented options below it go to every entry.
"""

import importlib
import inspect
import re
from pathlib import Path

import pyro_vae

DOCS = Path(__file__).parent
ROOT = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changes": "CHANGELOG.md"}  # page: the file that it shows
PUBLIC = re.compile(r"^\.\. public:: (?P<module>\S+)(?: (?P<base>\w+))?\n(?P<options>(?: +:.*\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^\.\. auto\w+:: (\S+)", re.MULTILINE)
# Authors (2016), "Title", https://link
PAPER = re.compile(r'((?:[^.;:()"]|et al\.)+) \((\d{4})\), "([^"]+)", (https?://[^\s)>"\',`]*[^\s)>"\',`.;:])')


def public_names(module: str, base: str | None = None) -> list[str]:
    """The names that users see of a sub-package, in full: `pyro_vae.VAE`, but `pyro_vae.nn.MLP`."""
    part = importlib.import_module(module)
    is_public = module.removeprefix("pyro_vae.") in pyro_vae.__all__
    home = part if is_public else pyro_vae
    names = [name for name in part.__all__ if name in home.__all__]
    if base is not None:
        names = [
            name for name in names if inspect.isclass(cls := getattr(part, name)) and issubclass(cls, getattr(part, base))
        ]
    return [f"{home.__name__}.{name}" for name in names]


def value_of(name: str) -> object:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def with_entries(text: str, named: set[str]) -> str:
    """An API page with every `public` line replaced by its entries; `named` are those that pages have already."""

    def entries(line: re.Match) -> str:
        names = [name for name in public_names(line["module"], line["base"]) if name not in named]
        kinds = ["class" if inspect.isclass(value_of(name)) else "function" for name in names]
        return "\n".join(f".. auto{kind}:: {name}\n{line['options']}" for kind, name in zip(kinds, names, strict=True))

    return PUBLIC.sub(entries, text)


def papers() -> list[tuple[str, str, str, str]]:
    """Class, authors with year, title and link of each paper that the docstring of a public name gives in full."""
    names = [name for name in pyro_vae.__all__ if not inspect.ismodule(getattr(pyro_vae, name))]
    names += [f"nn.{name}" for name in pyro_vae.nn.__all__]
    found = []
    for name in names:
        doc = " ".join((inspect.getdoc(value_of(f"pyro_vae.{name}")) or "").split())
        found += [(name, f"{authors.strip()} {year}", title, link) for authors, year, title, link in PAPER.findall(doc)]
    return found


def with_papers(text: str) -> str:
    """The page Citing with a row for each paper of a docstring that it lacks; its table is the end of the page."""
    rows = {
        link: f"| `{name}` | {authors} | [{title}]({link}) |" for name, authors, title, link in papers() if link not in text
    }
    return "\n".join([text.rstrip("\n"), *rows.values(), ""])


def of_root(file: str) -> str:
    """A file of the project's root whose links lead to the pages of the site."""
    text = (DOCS.parent / file).read_text()
    for page, source in ROOT.items():
        text = text.replace(f"]({source})", f"]({page}.md)")
    text = re.sub(r"\]\(tutorials/README\.md\)", "](#tutorials)", text)
    text = re.sub(r"\]\(tutorials/(\w+)\.py\)", r"](#sphx_glr_tutorials_\1.py)", text)
    return text.replace("](docs/", "](")


def page(name: str, text: str) -> str:
    """The text of a page as Sphinx renders it; `name` as in `api/objectives`."""
    if name in ROOT:
        return f"{of_root(ROOT[name])}\n{text}"
    if name == "citing":
        return with_papers(text)
    if name.startswith("api/"):
        named = {entry for path in (DOCS / "api").glob("*.md") for entry in ENTRY.findall(path.read_text())}
        return with_entries(text, named)
    return text


def pages_to_read(app: object, env: object, *_: set[str]) -> list[str]:
    """Handler of Sphinx's event `env-get-outdated`: these pages change when the package does, whatever their own text."""
    return [
        *ROOT,
        "citing",
        *(f"api/{path.stem}" for path in (DOCS / "api").glob("*.md") if PUBLIC.search(path.read_text())),
    ]


def fill_in(app: object, name: str, source: list[str]) -> None:
    """Handler of Sphinx's event `source-read`."""
    source[0] = page(name, source[0])
