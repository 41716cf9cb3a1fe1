"""The picture in README.md: the VAE of its example, where its ELBO goes, and the rate-distortion curve of its decoder.

    python tutorials/experiments/readme_figure.py

Runs the first Python block of README.md, so that picture and example are of one model, and writes docs/figures/readme.png.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

ROOT = Path(__file__).parents[2]

example: dict = {}
exec(re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1], example)
vae, test = example["vae"], example["test"]
curve = pv.RateDistortion(vae.model, vae.guide, seed=0)(DataLoader(TensorDataset(test), 100))
print(curve)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
pv.plots.plot_gaps(example["gaps"], left)
pv.plots.plot_rate_distortion(curve, right)
figure.savefig(ROOT / "docs" / "figures" / "readme.png", dpi=110)
