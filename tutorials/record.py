"""Run tutorials in full and keep what they show, for the table in README.md beside this file.

    python tutorials/record.py 01_the_bound [...]               # all of them, when none is named
    python tutorials/record.py --compare 01_the_bound [...]     # run and compare with the record, change nothing

Each runs in a Python process of its own and leaves two files in tutorials/recorded:

    NN_title.png    the figure that its `# sphinx_gallery_thumbnail_number` names, or the last one; under 80 kB
    NN_title.txt    what it printed, then the versions of torch and Pyro and the seconds of processor time that it took,
                    imports included, which do not depend on what else the machine does

The last cell of its row in README.md becomes that time in minutes.

A comparison asks for the same sentences, and for the same numbers but for their stated errors or two percent.
"""

import argparse
import contextlib
import io
import math
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
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
CLOSE, ERRORS = 0.02, 4.5  # relative, and in stated errors


def run(name):
    """Text and figure of one tutorial. `plt.show` does nothing, so that its figures stay open until the end."""
    plt.switch_backend("Agg")
    plt.show = lambda: None
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        os.chdir(folder)  # the quickstart writes into the current one
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        os.chdir(HERE)
    chosen = re.search(
        r"^# sphinx_gallery_thumbnail_number = (-?\d+)$",
        (HERE / f"{name}.py").read_text(),
        re.M,
    )
    numbers = plt.get_fignums()
    number = int(chosen[1]) if chosen else -1
    versions = f"torch {torch.__version__}, pyro {pyro.__version__}"
    text = f"{printed.getvalue()}\n[{versions}; {time.process_time():.0f} s, threads: {torch.get_num_threads()}]\n"
    return text, plt.figure(numbers[number - 1 if number > 0 else number])


def record(name):
    text, figure = run(name)
    (HERE / "recorded").mkdir(exist_ok=True)
    (HERE / "recorded" / f"{name}.png").write_bytes(small_png(figure))
    (HERE / "recorded" / f"{name}.txt").write_text(text)
    readme = HERE / "README.md"
    readme.write_text(with_minutes(readme.read_text(), name, text))
    print(text)


def with_minutes(readme, name, text):
    """The README with the minutes of this run in the last cell of the tutorial's row."""
    minutes = int(re.search(r"; (\d+) s, threads: \d+\]\n$", text)[1]) / 60
    row = re.compile(rf"^(\|.*\({name}\.py\).*\| )[\d.]+( \|)$", re.M)
    return row.sub(rf"\g<1>{minutes:.1f}\g<2>", readme)


def compare(name):
    found = differences((HERE / "recorded" / f"{name}.txt").read_text(), run(name)[0])
    sys.exit("\n".join(found) if found else 0)


def differences(recorded, now):
    """Lines of a record that the program no longer prints, with what it prints instead. Lines with seconds are left out."""
    old, new = (
        [line for line in text.splitlines() if not re.search(r"\d s\b", line)]
        for text in (recorded, now)
    )
    found = [
        f"recorded: {a}\nnow:      {b}"
        for a, b in zip(old, new, strict=False)
        if not same_line(a, b)
    ]
    return found + (
        [f"recorded: {len(old)} lines\nnow:      {len(new)}"]
        if len(old) != len(new)
        else []
    )


def same_line(recorded, now):
    """Whether the words are the same, and each number but for `CLOSE` or `ERRORS` of the error behind it, "1.2 +- 0.1"."""
    if " ".join(NUMBER.sub("#", recorded).split()) != " ".join(
        NUMBER.sub("#", now).split()
    ):
        return False
    (first, errors), (second, _) = (numbers_of(line) for line in (recorded, now))
    return all(
        abs(a - b)
        <= max(CLOSE * max(abs(a), abs(b)), ERRORS * math.sqrt(2) * error, last_digit)
        for (a, last_digit), (b, _), error in zip(first, second, errors, strict=True)
    )


def numbers_of(line):
    """Each number with twice its last digit, and the error that the line states for it, or zero."""
    found = list(NUMBER.finditer(line))
    numbers = [
        (
            float(m[0].replace(",", "")),
            2 * 10.0 ** -len(m[0].partition(".")[2].partition("e")[0]),
        )
        for m in found
    ]
    errors = [
        numbers[i + 1][0]
        if i + 1 < len(found) and line[m.end() : found[i + 1].start()].strip() == "+-"
        else 0.0
        for i, m in enumerate(found)
    ]
    return numbers, errors


def small_png(figure):
    """The figure with 256 colours, at the highest resolution that fits into MAX_BYTES."""
    for dpi in range(120, 20, -10):
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, dpi=dpi)
        Image.open(drawn).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
        if len(small.getvalue()) < MAX_BYTES:
            return small.getvalue()
    raise RuntimeError(
        f"the figure does not fit into {MAX_BYTES} bytes: draw less in it, or choose another one"
    )


if __name__ == "__main__":
    if "SMOKE_TEST" in os.environ:
        sys.exit("SMOKE_TEST is set, and a smoke run is not worth recording: unset it")
    parser = argparse.ArgumentParser(
        description="Run tutorials in full and keep, or compare, what they show."
    )
    parser.add_argument("names", nargs="*", help="all of them, when none is named")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="change nothing, and fail where the record differs",
    )
    options = parser.parse_args()
    names = [Path(name).stem for name in options.names] or NAMES
    if unknown := set(names) - set(NAMES):
        sys.exit(f"no tutorials: {sorted(unknown)}; there are {NAMES}")
    failed = []
    for name in names:
        print(f"--- {name}", flush=True)
        process = multiprocessing.get_context("spawn").Process(
            target=compare if options.compare else record, args=(name,)
        )
        process.start()
        process.join()
        if process.exitcode:
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
