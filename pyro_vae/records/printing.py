"""The width of what records print."""

import re
import textwrap
from collections.abc import Iterable

WIDTH = 88  # columns: a page of the docs and half a screen show them without scrolling


def page(lines: Iterable[str]) -> str:
    """Lines of a record as one text. Sentences are wrapped; rows of tables, which have runs of spaces, stay as they are."""
    return "\n".join(short for text in lines for line in text.split("\n") for short in wrapped(line))


def wrapped(line: str) -> list[str]:
    text = line.lstrip()
    if len(line) <= WIDTH or re.search(r"\s{2,}", text):
        return [line]
    indent = " " * (len(line) - len(text))
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False
    )
