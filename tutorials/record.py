"""Run tutorials in full and keep what they show, for the table in README.md beside this file.

    python tutorials/record.py 01_the_bound [...]     # all of them, when none is named

Each runs in a Python process of its own and leaves two files in tutorials/recorded:

    NN_title.png    the figure that its `# sphinx_gallery_thumbnail_number` names, or the last one; under 80 kB
    NN_title.txt    what it printed, then the versions of torch and Pyro and the seconds of processor time that it took,
                    imports included, which do not depend on what else the machine does
"""

import contextlib
import io
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.name != "record.py")
MAX_BYTES = 80_000


def run(name):
    """Picture and output of one tutorial. `plt.show` does nothing, so that its figures stay open until the end."""
    plt.switch_backend("Agg")
    plt.show = lambda: None
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        os.chdir(folder)  # the quickstart writes into the current one
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        os.chdir(HERE)
    chosen = re.search(r"^# sphinx_gallery_thumbnail_number = (-?\d+)$", (HERE / f"{name}.py").read_text(), re.M)
    numbers = plt.get_fignums()
    number = int(chosen[1]) if chosen else -1
    figure = plt.figure(numbers[number - 1 if number > 0 else number])
    (HERE / "recorded").mkdir(exist_ok=True)
    (HERE / "recorded" / f"{name}.png").write_bytes(small_png(figure))
    versions = f"torch {torch.__version__}, pyro {pyro.__version__}"
    text = f"{printed.getvalue()}\n[{versions}; {time.process_time():.0f} s, threads: {torch.get_num_threads()}]\n"
    (HERE / "recorded" / f"{name}.txt").write_text(text)
    print(text)


def small_png(figure):
    """The figure with 256 colours, at the highest resolution that fits into MAX_BYTES."""
    for dpi in range(120, 20, -10):
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, dpi=dpi)
        Image.open(drawn).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
        if len(small.getvalue()) < MAX_BYTES:
            return small.getvalue()
    raise RuntimeError(f"the figure does not fit into {MAX_BYTES} bytes: draw less in it, or choose another one")


if __name__ == "__main__":
    if "SMOKE_TEST" in os.environ:
        sys.exit("SMOKE_TEST is set, and a smoke run is not worth recording: unset it")
    names = [Path(argument).stem for argument in sys.argv[1:]] or NAMES
    if unknown := set(names) - set(NAMES):
        sys.exit(f"no tutorials: {sorted(unknown)}; there are {NAMES}")
    for name in names:
        print(f"--- {name}", flush=True)
        process = multiprocessing.get_context("spawn").Process(target=run, args=(name,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name} failed")
