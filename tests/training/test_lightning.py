"""A Lightning module of ten lines trains an objective, and its checkpoint brings back the schedule of beta."""

import importlib.util
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "train_lightning.py"
if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning itself

OPTIONS = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def example():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(EXAMPLE), run_name="example")


def trained(example, folder, max_epochs, checkpoint=None):
    import lightning

    class SeededSteps(lightning.Callback):
        """The random state is no part of a Lightning checkpoint."""

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.manual_seed(trainer.global_step)

    torch.manual_seed(0)
    module = example["LitVAE"]()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    trainer = lightning.Trainer(
        max_epochs=max_epochs, default_root_dir=folder, callbacks=[SeededSteps()], enable_checkpointing=False, **OPTIONS
    )
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=4), ckpt_path=checkpoint)
    return module, trainer


def test_a_resumed_run_is_an_unbroken_one(example, tmp_path):
    whole, _ = trained(example, tmp_path, 6)
    half, trainer = trained(example, tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert 0 < float(half.objective.terms.beta) < 1
    resumed, _ = trained(example, tmp_path, 6, tmp_path / "half.ckpt")
    assert resumed.objective.num_updates == whole.objective.num_updates == 59
    assert whole.objective.terms.beta == resumed.objective.terms.beta
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(half.parameters(), whole.parameters(), strict=True):
        assert not torch.equal(one, other)


def test_the_checkpoint_holds_the_number_of_updates(example, tmp_path):
    module, trainer = trained(example, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt")["state_dict"]
    assert state["loss._extra_state"] == {"num_updates": 9}


def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "nats (Monte Carlo error" in capsys.readouterr().out
    assert (tmp_path / "lightning" / "half.ckpt").exists()
