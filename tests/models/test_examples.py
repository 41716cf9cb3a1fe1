"""The examples of the docstrings and of the docs page run as they are printed, with fewer steps."""

import inspect
import re
import textwrap
from pathlib import Path

import pyro
import pytest
import torch
from pair_helpers import quiet
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import models

PAGE = Path(__file__).parents[2] / "docs" / "api" / "models.md"
DIGITS = torch.arange(64.0).repeat(20, 1) % 17
ONE_HOT = nn.functional.one_hot(torch.arange(20) % 10, 10)
DATA = {  # by example, what stands for the user's data
    "VAE": {"x": DIGITS},
    "ConditionalVAE": {"x": DIGITS, "y": ONE_HOT, "loader": DataLoader(TensorDataset(DIGITS, ONE_HOT), batch_size=10)},
    "HierarchicalVAE": {"x": DIGITS},
    "MarkovVAE": {},
    "LinearVAE": {"x": torch.randn(20, 64)},
    "MissingDataVAE": {},
    "mlp_vae": {"digits": DIGITS},
    "mlp_missing_vae": {"digits": DIGITS},
    "mlp_conditional_vae": {"digits": DIGITS, "labels": torch.arange(20) % 10},
    "conv_vae": {"images": (torch.rand(5, 1, 28, 28) > 0.5).float()},
    "SemiSupervisedVAE": {"x": DIGITS, "labels": torch.arange(20) % 10},
    "Concatenated": {},
    "WithSizeFactor": {},
}


def run(code, **names):
    code = re.sub(r"range\(\d+\)", "range(2)", code)
    code = code.replace("seed=0)", "seed=0, num_particles=10)")
    names |= {"pv": pv, "nn": nn, "torch": torch, "pyro": pyro, "SVI": SVI, "Trace_ELBO": Trace_ELBO}
    with quiet():
        exec(code, {**names, "TraceMeanField_ELBO": TraceMeanField_ELBO})


@pytest.mark.parametrize("name", DATA)
def test_docstrings(name):
    doc = inspect.getdoc(getattr(models, name))
    example = re.search(r"^Example::\n\n((?:    .*\n?|\n)+)", doc, re.M)
    run(textwrap.dedent(example[1]), **DATA[name])


def test_every_public_name_has_an_example():
    assert set(DATA) == {name for name in models.__all__ if not name.endswith("Warning")}


def test_the_page():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    run("\n".join(blocks), digits=DIGITS, x=DIGITS, z=torch.zeros(3, 8))
