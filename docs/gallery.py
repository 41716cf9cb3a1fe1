"""How the tutorials become pages. conf.py gives these functions by name: Sphinx keeps only plain values of its settings."""

import warnings

import pyro
import torch

FILTERS = warnings.filters[:]


def quickstart_first(filename):
    """Sort key: the quickstart, then by number."""
    return filename != "quickstart.py", filename


def fresh_start(gallery_conf, filename):
    """Every tutorial runs as if alone. All share one process, where `pyro.module` would share their parameters by name."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.set_default_dtype(torch.float32)
    warnings.filters[:] = FILTERS
