"""`diagnose` from a checkpoint, with a bad batch, and the remaining time that its bar predicts."""

import math
import re

import pytest
import torch
from pair_helpers import exact_pair, linear_gaussian, quiet

import pyro_vae as pv
from pyro_vae.errors import CheckpointError, SkippedBatchWarning
from pyro_vae.report import batches as module

OPTIONS = {"num_data": 10, "num_particles": 20, "progress": False}


def few(model, guide):
    return pv.ImportanceSampling(model, guide, num_particles=20)


def diagnosed(train, test, **options):
    lm, _ = linear_gaussian(num_data=20)
    with quiet():
        return pv.diagnose(*exact_pair(lm), train=train, test=test, evidence=few, **{**OPTIONS, **options})


class Stopping:
    """Batches that can be gone through a number of times, and stop a later pass in its middle."""

    def __init__(self, batches, passes):
        self.batches, self.passes = batches, passes

    def __iter__(self):
        self.passes -= 1
        for number, batch in enumerate(self.batches):
            if self.passes < 0 and number == 1:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_and_skips_bad_batches(tmp_path):
    _, x = linear_gaussian(num_data=20)
    x[7, 0] = math.nan
    train, test = list(x.split(5)), list(x.flip(0).split(5))
    with (
        pytest.warns(SkippedBatchWarning),
        pytest.raises(KeyboardInterrupt, match=f"continue from the checkpoint '{tmp_path}/latent units'"),
    ):
        diagnosed(Stopping(train, 1), test, checkpoint=tmp_path, on_error="skip")
    with pytest.warns(SkippedBatchWarning):
        resumed = diagnosed(train, test, checkpoint=tmp_path, on_error="skip")
    with pytest.warns(SkippedBatchWarning):
        whole = diagnosed(train, test, on_error="skip")
    assert not resumed.left_out and resumed.units.num_data == 15
    assert str(resumed).replace(f"{resumed.seconds:.0f} s", "") == str(whole).replace(f"{whole.seconds:.0f} s", "")
    assert torch.equal(resumed.test.log_evidence, whole.test.log_evidence) and resumed.test.loader_index is not None
    with pytest.raises(CheckpointError, match="num_data was 10 and is 15"):
        diagnosed(train, test, checkpoint=tmp_path, on_error="skip", num_data=15)


def test_the_remaining_time_weighs_passes_by_their_cost(capsys, monkeypatch):
    """Two batches of half a minute, then 598 of a tenth of a second: at first 90 seconds are left, not hours."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    said = []
    with module.Stages({"long": 300.0, "short": 1.0}, {"long": 2, "short": 598}, True) as stage:
        for name, number, seconds in (("long", 2, 30.0), ("short", 598, 0.1)):
            for _ in stage(name, range(number)):
                clock[0] += seconds
                said.append(capsys.readouterr().err)
    text = "".join(said)
    remaining = re.findall(r"\d+:\d+<(\d+):(\d+)", text)
    minutes, seconds = map(int, remaining[0])
    assert 80 <= 60 * minutes + seconds <= 100
