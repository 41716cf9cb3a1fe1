"""Guides made from random models: log p(x) by importance sampling from them is that of the oracle."""

import warnings

import pyro
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ProgramError, StructureError

from .generator import program_of_seed
from .judge import compared_evidence, know, options
from .pyro_pair import build

SEEDS = range(91_000_003, 91_000_023)
FAMILIES = ["diagonal", "full", "flow"]


class Network(nn.Module):
    """Features that differ between data, whatever the arguments of the model are."""

    def __init__(self, num_data, dtype):
        super().__init__()
        self.rows, self.layer = torch.linspace(-1, 1, num_data, dtype=dtype).unsqueeze(-1), nn.Linear(1, 4, dtype=dtype)

    def forward(self, *args):
        return self.layer(self.rows)


def outcome(seed):
    program = program_of_seed(seed)
    known = know(program)
    if known is None:
        return "not known"
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model, _, args = build(known.case)
    given = options(known)
    plate = {name: value for name, value in given.items() if name == "datum_plate"}
    made = {"family": FAMILIES[seed % 3], "conditioned": seed % 2 == 0, **plate}
    try:
        guide = pv.AmortizedGuide(model, Network(known.case.num_data, program.dtype), args, **made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these guides are not trained
            found = pv.AdaptiveImportanceSampling(model, guide, num_particles=300, **given)(*args)
    except (StructureError, ProgramError):  # discrete latents; what no guide could mend
        return "refused"
    return compared_evidence("AdaptiveImportanceSampling", found, known.log_evidence).outcome


@pytest.mark.parametrize("block", range(4))
def test_log_p_of_random_models(block):
    """No number is off by more than five errors and what is not known of the right one."""
    outcomes = [outcome(seed) for seed in SEEDS[5 * block : 5 * block + 5]]
    assert set(outcomes) <= {"right", "refused", "not known", "doubted"}, outcomes
    assert "right" in outcomes, outcomes
