"""Checkpoints: a run that goes on gives the numbers of an unbroken one; whatever does not fit is refused by name."""

import os
import shutil
from functools import partial

import pyro
import pytest
import torch
from checkpoint_helpers import Guide, Model, Stop, batches_of, data, estimator, same, until
from pair_helpers import quiet
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import CheckpointError, EmptyBatchError
from pyro_vae.evaluation import checkpoint as module


@pytest.fixture
def runs(monkeypatch):
    """How often the kernel opened a call."""
    from pyro_vae.kernel import Pair

    count, opened = [], Pair.open

    def counted(self, *args, **kwargs):
        count.append(1)
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Pair, "open", counted)
    return count


@pytest.fixture(autouse=True)
def written_at_once(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)


def run(found, loader, path, **options):
    with quiet():
        return pv.evaluate(found, loader, checkpoint=path, **{"progress": False, "seed": 0, **options})


def interrupted(path, at=2, x=None, **options):
    with pytest.raises(Stop):
        run(estimator(), until(at, batches_of(data() if x is None else x)), path, **options)


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_a_run_goes_on_with_the_numbers_of_an_unbroken_one(tmp_path, runs, at):
    whole = run(estimator(), batches_of(data()), None)
    interrupted(tmp_path / "run", at)
    runs.clear()
    resumed = run(estimator(), batches_of(data()), tmp_path / "run")
    assert same(resumed, whole) and len(resumed) == 23
    assert len(runs) == 5 - at


def test_a_finished_one_gives_its_record_without_running_the_model(tmp_path, runs):
    first = run(estimator(), batches_of(data()), tmp_path)
    runs.clear()
    assert same(run(estimator(), batches_of(data()), tmp_path), first)
    assert not runs


CHEAP = {"num_steps": 5, "num_chains": 2, "num_leapfrog": 1}
MAKERS = {
    "exact": pv.ExactEvidence,
    "calibration": lambda m, g: pv.GuideCalibration(m, g, num_particles=20),
}
SLOW = {
    "gaps": lambda m, g: pv.InferenceGaps(m, g, num_particles=10, evidence=partial(pv.ImportanceSampling, num_particles=10)),
    "adaptive": lambda m, g: pv.AdaptiveImportanceSampling(m, g, num_particles=100, num_gradients=10),
    "annealed": lambda m, g: pv.AnnealedImportanceSampling(m, g, **CHEAP),
    "sandwich": lambda m, g: pv.BidirectionalMonteCarlo(m, g, latents={"z": torch.zeros(3, 2)}, **CHEAP),
    "auto": lambda m, g: pv.AutoEvidence(m, g, tolerance=1.0, max_cost=5000),
    "expectation": lambda m, g: pv.PosteriorExpectation(m, g, f=first_latent, num_particles=100),
    "self-check": lambda m, g: pv.SelfCheck(m, g, num_steps=5, num_chains=2),
}


def first_latent(latents):
    return latents["z"][..., 0]


@pytest.mark.parametrize("name", [*MAKERS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_estimator(tmp_path, name):
    x, make = data(6), {**MAKERS, **SLOW}[name]
    whole = run(make(Model(), Guide()), batches_of(x, 3), None)
    with pytest.raises(Stop):
        run(make(Model(), Guide()), until(1, batches_of(x, 3)), tmp_path)
    assert same(run(make(Model(), Guide()), batches_of(x, 3), tmp_path), whole)


def test_without_a_seed_one_is_drawn_once_and_kept(tmp_path):
    torch.manual_seed(11)
    with pytest.raises(Stop):
        run(estimator(), until(3, batches_of(data())), tmp_path, seed=None)
    torch.manual_seed(12)
    first = run(estimator(), batches_of(data()), tmp_path, seed=None)
    shutil.rmtree(tmp_path)
    torch.manual_seed(11)
    assert same(run(estimator(), batches_of(data()), tmp_path, seed=None), first)
    shutil.rmtree(tmp_path)
    assert not same(run(estimator(), batches_of(data()), tmp_path, seed=None), first)


def scaled(model, scale):
    return pyro.poutine.scale(model, scale=scale)


def with_closure(value):
    tensor = torch.tensor(value)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample(
                "x", pyro.distributions.Normal(z.sum(-1, keepdim=True) + tensor, 1.0).expand([len(x), 4]).to_event(1), obs=x
            )

    return model


def moved(module, name):
    with torch.no_grad():
        module.get_parameter(name).add_(1e-6) if "." in name else module.get_buffer(name).add_(1e-6)
    return module


OTHERS = {
    "num_particles was 100 and is 50": (lambda: estimator(), lambda: estimator(num_particles=50), 0),
    "seed was 0 and is 1": (estimator, estimator, 1),
    "model.decoder.weight is another one": (lambda: estimator(), lambda: estimator(Model(seed=5)), 0),
    "model.scale is another one": (estimator, lambda: estimator(moved(Model(), "scale")), 0),
    "guide.encoder.bias is another one": (
        estimator,
        lambda: estimator(guide=moved(Guide(), "encoder.bias")),
        0,
    ),
    "class was .* and is .*Adaptive": (
        estimator,
        lambda: pv.AdaptiveImportanceSampling(Model(), Guide(), num_particles=100),
        0,
    ),
    "tensor is another one": (lambda: estimator(with_closure(0.5)), lambda: estimator(with_closure(0.6)), 0),
    "model.*scale was 1.0 and is 2.0": (lambda: estimator(scaled(Model(), 1.0)), lambda: estimator(scaled(Model(), 2.0)), 0),
}


@pytest.mark.parametrize("words", sorted(OTHERS))
def test_another_call_is_refused_by_name(tmp_path, words):
    first, second, seed = OTHERS[words]
    with pytest.raises(Stop):
        run(first(), until(2, batches_of(data())), tmp_path)
    with pytest.raises(CheckpointError, match=f"{words}.*another path, or delete the folder"):
        run(second(), batches_of(data()), tmp_path, seed=seed)
    assert len(run(first(), batches_of(data()), tmp_path)) == 23  # what was refused has harmed nothing


def test_parameters_in_the_store_count_and_modules_count_once(tmp_path):
    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(loc.expand(len(x), 2), 0.7).to_event(1))

    pyro.clear_param_store()
    pyro.param("loc", torch.zeros(2))
    with pytest.raises(Stop):
        run(estimator(guide=guide), until(2, batches_of(data())), tmp_path)
    pyro.get_param_store()["loc"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"parameter store\[loc\] is another one"):
        run(estimator(guide=guide), batches_of(data()), tmp_path)
    pyro.clear_param_store()
    model = Model()
    shutil.rmtree(tmp_path)
    with pytest.raises(Stop):
        run(estimator(model), until(2, batches_of(data())), tmp_path)
    pyro.module("decoder", model.decoder)  # as training does; another process may load a state instead
    assert len(run(estimator(model), batches_of(data()), tmp_path)) == 23


def test_an_autoguide_may_have_been_set_up_by_another_batch(tmp_path):
    """Its first call leaves a trace with data and draws; what counts are its parameters."""

    def guide_at(x, seed):
        torch.manual_seed(seed)
        guide = AutoNormal(Model())
        guide(x)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.fill_(0.1)
        return guide

    batches = batches_of(data(20))
    with pytest.raises(Stop):
        run(estimator(guide=guide_at(batches[0], 0)), until(2, batches), tmp_path)
    assert len(run(estimator(guide=guide_at(batches[1], 1)), batches, tmp_path)) == 20


def test_another_version_is_refused_by_name(tmp_path, monkeypatch):
    interrupted(tmp_path)
    before = module.versions
    with monkeypatch.context() as patch:
        patch.setattr(module, "versions", lambda: {**before(), "torch": "1.0"})
        with pytest.raises(CheckpointError, match=r"version of torch was .* and is 1\.0"):
            run(estimator(), batches_of(data()), tmp_path)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="has format 1, expected 2"):
        run(estimator(), batches_of(data()), tmp_path)


@pytest.mark.parametrize("kind", ["order", "a datum", "batch size"])
def test_other_data_are_refused_by_name(tmp_path, kind):
    x = data()
    interrupted(tmp_path, 4)
    other = x.clone()
    other[12, 0] += 1e-6
    batches = {"order": batches_of(x.flip(0)), "a datum": batches_of(other), "batch size": batches_of(x, 6)}[kind]
    number, span = {"order": (0, "0 to 4"), "a datum": (2, "10 to 14"), "batch size": (0, "0 to 5")}[kind]
    with pytest.raises(CheckpointError, match=rf"batch {number} \(data {span}, counted from 0\) has other data"):
        run(estimator(), batches, tmp_path)
    assert len(run(estimator(), batches_of(x), tmp_path)) == 23


def test_a_loader_that_ends_before_the_checkpoint_is_refused(tmp_path):
    interrupted(tmp_path, 4)
    with pytest.raises(CheckpointError, match="ended after 2 batches, but the checkpoint .* holds batch 3"):
        run(estimator(), batches_of(data())[:2], tmp_path)
    with pytest.raises(CheckpointError, match="ended after 0 batches"):
        run(estimator(), iter(()), tmp_path)
    with pytest.raises(EmptyBatchError):
        run(estimator(), iter(()), tmp_path / "new")


def test_a_loader_that_shuffles_goes_on_under_a_seed(tmp_path):
    loader = DataLoader(TensorDataset(data()), batch_size=5, shuffle=True)
    whole = run(estimator(), loader, None, seed=4)
    with pytest.raises(Stop):
        run(estimator(), until(3, loader), tmp_path, seed=4)
    torch.randn(10)  # another random state of the caller
    assert same(run(estimator(), loader, tmp_path, seed=4), whole)


def shards(path):
    return sorted(path.glob("batches-*.npz"))


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "end"])
def test_a_damaged_shard_is_named_and_only_its_batches_run_again(tmp_path, runs, damage):
    whole = run(estimator(), batches_of(data()), None)
    interrupted(tmp_path, 4)
    bad = shards(tmp_path)[2]
    content = bytearray(bad.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    elif damage == "end":
        content[-1] ^= 1
    else:
        del content[0 if damage == "empty" else len(content) // 2 :]
    bad.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{bad.name}.*Delete that file; then only its batches"):
        run(estimator(), batches_of(data()), tmp_path)
    bad.unlink()
    runs.clear()
    assert same(run(estimator(), batches_of(data()), tmp_path), whole)
    assert len(runs) == 2


def test_a_damaged_manifest_is_named(tmp_path):
    interrupted(tmp_path, 2)
    path = tmp_path / "manifest.npz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="manifest.npz.*Delete the folder to begin again"):
        run(estimator(), batches_of(data()), tmp_path)


def test_a_shard_of_another_run_is_named(tmp_path):
    interrupted(tmp_path / "one", 2)
    interrupted(tmp_path / "two", 3, seed=5)
    shutil.copy(shards(tmp_path / "two")[2], tmp_path / "one")
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        run(estimator(), batches_of(data()), tmp_path / "one")


def test_what_a_killed_writer_left_is_swept_up(tmp_path):
    interrupted(tmp_path, 2)
    (tmp_path / ".batches-00000002-abc.npz.123.tmp").write_bytes(b"half")
    run(estimator(), batches_of(data()), tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint.*holds notes.txt"):
        run(estimator(), batches_of(data()), tmp_path)
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        run(estimator(), batches_of(data()), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_calls_at_once_are_refused(tmp_path):
    def within():
        for number, batch in enumerate(batches_of(data())):
            if number == 2:
                with pytest.raises(CheckpointError, match="is in use by another call"):
                    run(estimator(), batches_of(data()), tmp_path)
                child = os.fork()
                if not child:  # another process
                    try:
                        run(estimator(), batches_of(data()), tmp_path)
                    except CheckpointError as error:
                        os._exit(7 if "in use" in str(error) else 8)
                    os._exit(9)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            yield batch

    whole = run(estimator(), batches_of(data()), None)
    assert same(run(estimator(), within(), tmp_path), whole)


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="Make the same call again to continue from .*, which holds 3 batches"):
        run(estimator(), until(3, batches_of(data()), KeyboardInterrupt), tmp_path)
    assert len(run(estimator(), batches_of(data()), tmp_path)) == 23


def test_a_write_that_fails_is_named_and_what_was_written_stays(tmp_path, monkeypatch):
    whole = run(estimator(), batches_of(data()), None)
    forced, full = os.fsync, []

    def fsync(file):
        if full:
            raise OSError(28, "No space left on device")
        return forced(file)

    def filling():
        for number, batch in enumerate(batches_of(data())):
            full[:] = [1] * (number == 3)
            yield batch

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="cannot be written.*No space left on device.*the same call continues"):
        run(estimator(), filling(), tmp_path)
    full.clear()
    assert len(shards(tmp_path)) == 3 and not list(tmp_path.glob(".*.tmp"))
    assert same(run(estimator(), batches_of(data()), tmp_path), whole)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    interrupted(tmp_path, 2)
    opened = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)  # the tests may run as root, whom no mode keeps out
    with pytest.raises(CheckpointError, match="cannot write .*Permission denied.*may be written"):
        run(estimator(), batches_of(data()), tmp_path)


def test_a_result_that_no_file_holds_is_refused_at_once(tmp_path):
    class Own:
        cat = print

    calls = []

    def odd(x):
        calls.append(1)
        return Own()

    with pytest.raises(CheckpointError, match="cannot be stored in a checkpoint.*Own"):
        run(odd, batches_of(data()), tmp_path)
    assert len(calls) == 1


def test_short_batches_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 1000.0)
    interrupted(tmp_path, 4)
    assert len(shards(tmp_path)) == 2  # the first batch at once, the others at the end


def test_units_and_the_curve_go_on_too(tmp_path, runs):
    x = data(15)
    for name, made in {
        "units": lambda: pv.ActiveUnits(Model(), Guide(), num_particles=3, seed=0),
        "curve": lambda: pv.RateDistortion(Model(), Guide(), seed=0, betas=(2.0,), num_steps=2, num_chains=2),
    }.items():
        whole = made()(batches_of(x), progress=False)
        with pytest.raises(Stop):
            made()(until(2, batches_of(x)), progress=False, checkpoint=tmp_path / name)
        runs.clear()
        assert same(made()(batches_of(x), progress=False, checkpoint=tmp_path / name), whole)
        assert len(runs) == 1
