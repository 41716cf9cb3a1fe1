"""What a full disk does to a run with a checkpoint, and to a record that is saved in the place of another.

The disk is a tmpfs of 1 MB, which root may mount on Linux; it is unmounted at the end. The run ends with `CheckpointError`,
what was written before is whole, and once there is room the same call goes on from it, to the numbers of an unbroken run.

    sudo python tests/benchmarks/full_disk.py
"""

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records_at_scale import Stream, first, guide, model  # noqa: E402

import pyro_vae as pv  # noqa: E402
from pyro_vae.errors import CheckpointError, RecordFileError  # noqa: E402
from pyro_vae.evaluation import checkpoint as checkpoints  # noqa: E402

NUM_DATA, SIZE = 20_000, 2**20  # of the disk, in bytes; the record takes 1.4 MB


@contextmanager
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def evaluated(checkpoint: Path | None) -> pv.Evidence:
    loader = DataLoader(Stream(NUM_DATA), batch_size=None)
    estimator = pv.ImportanceSampling(model, guide, num_particles=5)
    return pv.evaluate(estimator, loader, args=first, seed=0, progress=False, checkpoint=checkpoint)


def main() -> None:
    warnings.simplefilter("ignore")
    checkpoints.PAUSE = 0.0  # a file after every batch
    whole = evaluated(None)
    with small_disk() as disk:
        folder = disk / "run"
        try:
            evaluated(folder)
        except CheckpointError as error:
            print(f"CheckpointError: {error}\n")
        else:
            raise SystemExit("the disk took everything")
        files = sorted(folder.glob("batches-*.npz"))
        left = list(folder.glob(".*.tmp"))
        print(f"{len(files)} of {NUM_DATA // 1000} batches are on the disk, half-written files: {len(left)}")
        subprocess.run(["mount", "-o", f"remount,size={16 * SIZE}", str(disk)], check=True)
        found = evaluated(folder)
        same = torch.equal(found.log_evidence, whole.log_evidence) and torch.equal(found.ess, whole.ess)
        print(f"with room, the same call goes on; numbers of an unbroken run: {same}")
    with small_disk() as disk:
        some = whole.select(torch.arange(5000))
        some.save(disk / "record.npz")
        before = (disk / "record.npz").read_bytes()
        try:
            whole.save(disk / "record.npz")
        except RecordFileError as error:
            print(f"\nRecordFileError: {error}\n")
        after = (disk / "record.npz").read_bytes()
        print(f"the record before is whole: {before == after}, files beside it: {len(list(disk.iterdir())) - 1}")


if __name__ == "__main__":
    main()
