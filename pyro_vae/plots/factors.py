"""A picture of what the dimensions of the latents say about factors of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import OptionError, described
from ..latent import FactorInformation
from .axes import axes_or_new, check_record
from .style import filled, height_of, letters_of, name_ticks, size_for, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DARK = 0.6  # black on grey has the better contrast up to here


def plot_factors(found: FactorInformation, ax: Axes | None = None, *, names: Sequence[str] | None = None) -> Axes:
    """How much each dimension of the latents (row) says about each factor of the data (column).

    :param found: what `MutualInformationGap` returned.
    :param ax: where to draw; a new figure by default.
    :param names: of the factors, in their order; by default their numbers.
    :raises OptionError: if `names` are not one for each factor.

    A cell has the mutual information as a share of the factor's entropy, I(z_d; v_f) / H(v_f). White is nothing and black is
    all. Estimates outside of [0, 1] have the shade of the nearer end. Below each factor is its gap, the difference between
    the two largest numbers of its column. MIG is the mean of the gaps.

    Example::

        found = pv.MutualInformationGap(vae.model, vae.guide)(loader)
        pv.plots.plot_factors(found, names=["digit"])
    """
    check_record(found, FactorInformation, made_by="what MutualInformationGap returned")
    shares = (found.information / found.entropy).double().cpu().numpy()
    num_dimensions, num_factors = shares.shape
    names = check_names(names, num_factors)
    ax = axes_or_new(ax, size_for(letters=20 + 5 * num_factors, lines=6 + 1.3 * num_dimensions))
    ax.imshow(shares, cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto")
    crowded = letters_of(ax, 1 / num_factors) < 5 or height_of(ax, num_dimensions) > 1
    for d, row in enumerate(shares.round(2) + 0.0):  # no -0.00
        for f, share in enumerate(row):
            color = "white" if share > DARK else "black"
            ax.text(f, d, f"{share:.2f}", ha="center", va="center", color=color, fontsize=5 if crowded else "small")
    name_ticks(ax, [f"{name}\ngap {gap:.2f}" for name, gap in zip(names, found.gap.tolist(), strict=True)])
    ax.set_yticks(range(num_dimensions), [filled(name, 20) for name in found.names])
    if crowded:
        ax.tick_params(labelsize=6)
    ax.set(
        xlabel="factor of the data",
        ylabel="dimension of the latents",
        title=f"Share of a factor's entropy that is known; MIG {float(found.mig.value):.2f}",
    )
    return wrap_labels(ax)


def check_names(names: Sequence[str] | None, num_factors: int) -> list[str]:
    if names is None:
        return [f"factor {f}" for f in range(num_factors)]
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != num_factors:
        raise OptionError(f"names must be a list of {num_factors} names, one for each factor, got {described(names)}")
    return [str(name) for name in names]
