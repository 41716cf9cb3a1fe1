"""Prose for readers: short sentences, and no line in a tutorial over 88 columns.

Formulas, code, tables and headings are left out; a link counts as its text.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST, COLUMNS = 30, 88
LONGEST_WITH_FORMULAS = 40  # in docstrings, where the words of formulas and papers count
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tutorials/README.md")]
PAGES += sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9q]*.py"))
MODULES = sorted((ROOT / "pyro_vae").rglob("*.py"))


def prose_of_markdown(text: str) -> str:
    text = re.sub(r"^(```+|:::+).*?^\1\s*$", "\n\n", text, flags=re.S | re.M)  # code
    text = re.sub(r"\$\$.*?\$\$", "\n\n", text, flags=re.S)
    text = re.sub(r"^(    |#|\||!|<|---).*$", "", text, flags=re.M)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def prose_of_restructured_text(text: str) -> str:
    text = re.sub(r"^\.\. \w+::.*?(?=^\S|\Z)", "\n\n", text, flags=re.S | re.M)  # directives with what is indented below
    text = re.sub(r"`([^`<]*?)\s*<[^>]*>`__?", r"\1", text)
    text = re.sub(r":\w+:`[^`]*`", "X", text)
    return re.sub(r"^(    |[=\-~^]{3,}|\.\. ).*$", "", text, flags=re.M)


def prose_of_tutorial(text: str) -> str:
    blocks = [ast.get_docstring(ast.parse(text)) or ""]
    for cell in re.split(r"^# %%.*$", text, flags=re.M)[1:]:
        comment = re.match(r"\n*((?:#.*\n)*)", cell)
        assert comment is not None
        blocks.append(re.sub(r"^# ?", "", comment[1], flags=re.M))
    return prose_of_restructured_text("\n\n".join(blocks))


def prose_of_module(text: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    docs = [re.sub(r"^References?: .*?(?=\n\n|\Z)", "", doc, flags=re.S | re.M) for doc in docs]
    prose = re.sub(r"^ *(>>>|\.\.\.) .*$", "", prose_of_restructured_text("\n\n".join(docs)), flags=re.M)
    prose = re.sub(r"\([^()]*\b\d{4}\b[^()]*\)|``[^`]*``|`[^`]*`", "X", prose)  # papers and code
    return re.sub(r'(?<=\w\.) (?=[a-z"]\b|")', "\n\n", " ".join(prose.split(" ")))  # a sentence may begin with a symbol


def sentences(prose: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |:))", prose):
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z`*(\[])", " ".join(paragraph.split()))


def long_sentences(prose: str, longest: int = LONGEST) -> list[str]:
    return [sentence for sentence in sentences(prose) if len(sentence.split()) > longest]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_sentences_of_a_page_are_short(page):
    assert not long_sentences(prose_of_markdown(page.read_text()))


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=named)
def test_sentences_of_a_tutorial_are_short(tutorial):
    assert not long_sentences(prose_of_tutorial(tutorial.read_text()))


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_sentences_of_docstrings_are_short(module):
    assert not long_sentences(prose_of_module(module.read_text()), LONGEST_WITH_FORMULAS)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=named)
def test_lines_of_a_tutorial_fit_the_page(tutorial):
    assert not [line for line in tutorial.read_text().splitlines() if len(line) > COLUMNS]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/quickstart.md"], ids=named)
def test_code_and_output_of_the_first_pages_fit(page):
    blocks = re.findall(r"^```(?:python|text)\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert blocks and not [line for block in blocks for line in block.splitlines() if len(line) > COLUMNS]


def test_what_is_counted():
    words = " ".join(["word"] * (LONGEST + 1))
    assert long_sentences(prose_of_markdown(f"Short. {words}.\n\n- {words}"))
    hidden = f"```python\n{words}\n```\n| {words} |\n\n    {words}\n# {words}\n$${words}$$"
    assert not long_sentences(prose_of_markdown(hidden))
    assert long_sentences(prose_of_tutorial(f'"""Head"""\n# %%\n# {words}\nx = 1  # {words}\n'))
    assert not long_sentences(prose_of_tutorial(f'"""Head"""\n# %%\n# .. math::\n#\n#    {words}\nx = 1\n# {words}\n'))
    assert long_sentences(prose_of_module(f'def f():\n    """{words} {words}"""\n'), LONGEST_WITH_FORMULAS)
    assert not long_sentences(prose_of_module(f'def f():\n    """Head.\n\n    Example::\n\n        {words}\n    """\n'))
