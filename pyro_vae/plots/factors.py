"""A picture of what the dimensions of the latents say about factors of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..latent import FactorInformation
from .axes import axes_or_new, check_record, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DARK = 0.6  # black on grey has the better contrast up to here


def plot_factors(found: FactorInformation, ax: Axes | None = None) -> Axes:
    """What each dimension (row) says about each factor (column): I(z_d; v_f) / H(v_f), in grey and as a number.

    :param found: what `MutualInformationGap` returned.
    :param ax: where to draw; a new figure by default.

    White is nothing and black all of the factor's entropy; numbers outside of [0, 1] are estimates and have the colour of
    the nearer end. Each factor stands with its gap, the difference between the two largest numbers of its column.

    Example::

        pv.plots.plot_factors(pv.MutualInformationGap(vae.model, vae.guide)(loader))
    """
    check_record(found, FactorInformation, made_by="what MutualInformationGap returned")
    ax = axes_or_new(ax)
    shares = (found.information / found.entropy).double().cpu().numpy()
    ax.imshow(shares, cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto")
    for d, row in enumerate(shares.round(2) + 0.0):  # no -0.00
        for f, share in enumerate(row):
            ax.text(f, d, f"{share:.2f}", ha="center", va="center", color="white" if share > DARK else "black")
    ax.set_xticks(range(shares.shape[1]), [literal(f"{f}: {gap:.2f}") for f, gap in enumerate(found.gap.tolist())])
    ax.set_yticks(range(len(shares)), [literal(name) for name in found.names])
    ax.set(
        xlabel="factor: its gap",
        ylabel="dimension",
        title=f"Share of each factor's entropy that a dimension knows; MIG {float(found.mig.value):.2f}",
    )
    return ax
