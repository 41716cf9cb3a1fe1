"""The picture in README.md: the gaps of the VAE of its example, as means and for each datum.

    python tutorials/experiments/readme_figure.py

Runs the first Python block of README.md, so that picture and example are of one model, and writes docs/figures/readme.png.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import pyro_vae as pv

ROOT = Path(__file__).parents[2]

example: dict = {}
exec(re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1], example)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
pv.plots.plot_gaps(example["gaps"], left)
pv.plots.plot_gaps_per_datum(example["gaps"], right)
figure.savefig(ROOT / "docs" / "figures" / "readme.png", dpi=110)
