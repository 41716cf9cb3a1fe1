"""On digits: a model with a richer guide and a lower log p(x) wins by ELBO and loses by log p(x), and the output says so."""

import importlib.util
from pathlib import Path

import pytest
from pair_helpers import quiet

import pyro_vae as pv

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "compare_digits.py"


@pytest.mark.slow
def test_the_elbo_prefers_the_richer_guide():
    spec = importlib.util.spec_from_file_location("compare_digits", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    with quiet():
        comparison = pv.compare(program.measured())
    assert comparison.ranking == ("plain", "rich") and comparison.elbo_ranking == ("rich", "plain")
    by_evidence, by_elbo = comparison.pairs[0], comparison.elbo_pairs[0]
    assert by_evidence.told_apart and by_elbo.told_apart
    assert float(by_evidence.mean().value) > 1 and float(by_evidence.mean().sampling_error) < 0.3
    assert float(by_elbo.mean().value) > 1 and float(by_elbo.mean().sampling_error) < 0.3
    assert "By ELBO 'rich' is ahead of 'plain' by" in comparison.verdict()
    assert "but by log p(x) behind by" in comparison.verdict()
