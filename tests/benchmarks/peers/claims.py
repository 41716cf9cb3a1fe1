"""Claims of docs/coming_from.md about another library, each with what measures it.

A check is a function with the claim as its docstring; it returns whether the claim holds and a line of what was found.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version

Check = Callable[[], tuple[bool, str]]


def run(package: str, checked_with: str, checks: list[Check]) -> None:
    """Print each claim and what was found, and leave with the number of claims that do not hold."""
    found = version(package)
    print(f"{package} {found}, torch {version('torch')} (the claims were made with {package} {checked_with})\n")
    failed = 0
    for check in checks:
        holds, line = check()
        failed += not holds
        print(f"{'holds' if holds else 'NO LONGER':<9} {check.__doc__}\n{'':<9} {line}\n")
    print(f"{len(checks) - failed} of {len(checks)} claims hold")
    sys.exit(failed)
