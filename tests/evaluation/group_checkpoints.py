"""Checks of `group_program.py` about checkpoints, batches that are skipped, and early stops."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as group
from group_estimators import differences, pair, raises, same_as_one_process
from pair_helpers import quiet

import pyro_vae as pv
from pyro_vae.errors import (
    CheckpointError,
    EmptyBatchError,
    OutOfMemoryError,
    ProcessesError,
    RecordFileError,
    SkippedBatchWarning,
)
from pyro_vae.evaluation import checkpoint as checkpoints


def setting(num_data=12):
    model, guide, x = pair(num_data)
    return pv.ImportanceSampling(model, guide, num_particles=150), x


def folder(name):
    return Path(sys.argv[1]) / name


def run(estimator, x, size=2, **options):
    with quiet():
        return pv.evaluate(estimator, x.split(size), seed=3, progress=False, **options)


def alone(rank, *args, **options):
    """The call on one rank, while the others wait."""
    with pv.single_process():
        found = run(*args, **options) if group.get_rank() == rank else None
    group.barrier()
    return found


def stop_at(estimator, x, where, path):
    """A run whose model fails for a while, as that of a machine that goes down."""
    forward = pv.ImportanceSampling.estimate

    def stumbling(self, call):
        if torch.equal(call.model.args[0][0], x[where]):
            raise MemoryError("stumbled")
        return forward(self, call)

    pv.ImportanceSampling.estimate = stumbling
    try:
        with raises(OutOfMemoryError, "batch", "stumbled", "ake the same call again to continue"):
            run(estimator, x, checkpoint=path)
    finally:
        pv.ImportanceSampling.estimate = forward


def check_a_checkpoint_changes_no_number():
    estimator, x = setting()
    path = folder("whole")
    found = run(estimator, x, checkpoint=path)
    again = run(estimator, x, checkpoint=path)
    with pv.single_process():
        truth = run(estimator, x)
    assert not differences(found, truth), differences(found, truth)
    assert not differences(again, truth), differences(again, truth)


def check_going_on_with_another_number_of_processes():
    estimator, x = setting()
    with pv.single_process():
        truth = run(estimator, x)
    stop_at(estimator, x, 8, folder("several first"))
    group.barrier()
    found = alone(0, estimator, x, checkpoint=folder("several first"))
    assert found is None or not differences(found, truth), differences(found, truth)

    with pv.single_process():
        if group.get_rank() == 0:
            stop_at(estimator, x, 8, folder("one first"))
    group.barrier()
    found = run(estimator, x, checkpoint=folder("one first"))
    assert not differences(found, truth), differences(found, truth)


def check_each_batch_is_written_once():
    estimator, x = setting()
    before, checkpoints.PAUSE = checkpoints.PAUSE, 0.0
    try:
        run(estimator, x, checkpoint=folder("shards"))
    finally:
        checkpoints.PAUSE = before
    group.barrier()
    numbers = sorted(int(path.name.split("-")[1]) for path in folder("shards").glob("batches-*"))
    assert numbers == list(range(6)), numbers


def check_checkpoint_without_a_seed():
    estimator, x = setting()
    with quiet():
        first, again = (pv.evaluate(estimator, x.split(2), progress=False, checkpoint=folder("no seed")) for _ in range(2))
    assert not differences(first, again)
    everywhere = [None] * group.get_world_size()
    group.all_gather_object(everywhere, first.log_evidence)
    assert all(torch.equal(one, everywhere[0]) for one in everywhere)


def check_folders_that_cannot_be_used():
    estimator, x = setting()
    rank = group.get_rank()
    with raises(ProcessesError, "'checkpoint' is", "on rank 0"):
        run(estimator, x, checkpoint=folder(f"of rank {rank}"))
    if rank == 0:
        folder("file").write_text("")
    group.barrier()
    with raises(CheckpointError, "cannot make the folder", "rank 0"):
        run(estimator, x, checkpoint=folder("file"))
    run(estimator, x, checkpoint=folder("other call"))
    with raises(CheckpointError, "num_particles was 150 and is 160"):
        changed = pv.ImportanceSampling(estimator.model, estimator.guide, num_particles=160)
        run(changed, x, checkpoint=folder("other call"))


def check_a_folder_that_one_rank_does_not_see():
    """As on a machine of its own: there its folder is empty."""
    estimator, x = setting()
    opened = checkpoints.Path
    if group.get_rank() == 1:
        checkpoints.Path = lambda path: opened(path) / "of this machine"
    try:
        with raises(CheckpointError, "must see the same folder", "rank 1"):
            run(estimator, x, checkpoint=folder("not shared"))
    finally:
        checkpoints.Path = opened


def check_a_file_that_cannot_be_written_on_one_rank():
    estimator, x = setting()
    write = checkpoints.save_value

    def full(path, value):
        raise RecordFileError("no space left")

    if group.get_rank() == 1:
        checkpoints.save_value = full
    try:
        with raises(CheckpointError, "no space left", "rank 1"):
            run(estimator, x, checkpoint=folder("full"))
    finally:
        checkpoints.save_value = write
    with pv.single_process():
        truth = run(estimator, x)
    group.barrier()
    found = run(estimator, x, checkpoint=folder("full"))
    assert not differences(found, truth)


def check_the_same_batches_are_skipped():
    estimator, x = setting()
    bad = x.clone()
    bad[[3, 6]] = torch.nan
    found = same_as_one_process(lambda: run_skipping(estimator, bad))
    assert found.loader_index.tolist() == [0, 1, 4, 5, 8, 9, 10, 11]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run_skipping(estimator, bad)
    skipped = [w for w in said if issubclass(w.category, SkippedBatchWarning)]
    assert len(skipped) == (group.get_rank() == 0), said
    with raises(EmptyBatchError, "all 6 batches were skipped"):
        run(estimator, x * torch.nan, on_error="skip")


def check_looks_that_skip_batches():
    model, guide, x = pair(12)
    bad = x.clone()
    bad[[3, 6]] = torch.nan
    options = {"progress": False, "on_error": "skip"}
    same_as_one_process(lambda: pv.ELBOSurgery(model, guide, seed=1)(bad.split(2), **options))
    same_as_one_process(lambda: pv.ActiveUnits(model, guide, seed=1)(bad.split(2), **options))
    found = same_as_one_process(lambda: pv.SampleCheck(model, guide, seed=1)([x], train=bad.split(2), **options))
    kept = pv.SampleCheck(model, guide, seed=1)([x], train=[x[:2], x[4:6], x[8:]], progress=False)
    assert torch.equal(found.nearest, kept.nearest)

    def failing_on_rank_1(batch):
        if group.get_rank() == 1 and torch.equal(batch, x[4:6]):
            raise MemoryError("only here")
        return (batch,)

    with raises(ProcessesError, "rank 0 left out the batches none", "2", "only here"), quiet():
        pv.ELBOSurgery(model, guide, seed=1)(x.split(2), args=failing_on_rank_1, **options)


def run_skipping(estimator, x):
    return run(estimator, x, on_error="skip")


def check_a_loader_that_fails():
    estimator, x = setting()

    def broken():
        yield from x.split(2)[:3]
        raise OSError(5, "Input/output error")

    with raises(ProcessesError, "OSError", "Input/output error", "rank 0"):
        pv.evaluate(estimator, broken(), progress=False)


def check_an_early_stop_is_at_the_same_batch():
    estimator, x = setting(600)
    lengths = []
    for tolerance in (0.3, 0.2, 0.12, 0.1, 1e-9):
        found = same_as_one_process(lambda tolerance=tolerance: run(estimator, x, size=25, tolerance=tolerance))
        lengths.append(len(found))
    assert len(set(lengths)) > 2, lengths
    assert lengths[-1] == 600
