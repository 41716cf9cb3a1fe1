"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import pyro_vae.nn as nn

MODULES = [module.name for module in pkgutil.iter_modules(nn.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"pyro_vae.nn.{name}")
    public = {key: getattr(nn, key) for key in nn.__all__ if not hasattr(module, key)}
    failed, _ = doctest.testmod(module, extraglobs={**public, "torch": __import__("torch")})
    assert failed == 0


def test_every_public_class_has_an_example():
    without = [name for name in nn.__all__ if name != "Head" and ">>>" not in (getattr(nn, name).__doc__ or "")]
    assert not without
