"""Errors for guides without units and for results that are not finite; a warning where draws are too coarse."""

import warnings
from collections.abc import Sequence

from torch import Tensor

from ..errors import NonFiniteError, PrecisionWarning, StructureError, listed, quoted
from ..kernel import Call
from ..noise import Noise

FEW = 4  # draws whose spread is tested
LOOKED_AT = 2**20  # a noise block that no measurement uses


def refuse_without_draws(call: Call) -> None:
    if not call.structure.latents:
        raise StructureError("the guide draws no latent site of the model, so there is no unit to measure")


def warn_if_coarse(call: Call) -> None:
    """Warn where floats are too coarse to distinguish draws of the guide; it takes a few draws.

    The KL by a formula does not show this: a mean of 1e9 + 0.3 is 1e9 in float32, and the KL computed from it looks right.
    """
    call.set_noise(Noise.GUIDE, LOOKED_AT)
    coarse = call.coarse(call.draw_latents(FEW), FEW).any(0)
    if bool(coarse.any()):
        warnings.warn(
            PrecisionWarning(
                f"for data {listed(coarse)} of a batch, floats are too coarse to distinguish draws of the guide from one "
                "another, or from an end of their support, so the numbers of the latents are mostly rounding: convert "
                "model, guide and data to float64 (.double())"
            ),
            stacklevel=3,
        )


def check_finite(site_kl: Tensor, names: Sequence[str]) -> None:
    bad = (~site_kl.isfinite()).any(0).tolist()
    if any(bad):
        raise NonFiniteError(
            f"the KL of {quoted(name for name, is_bad in zip(names, bad, strict=True) if is_bad)} to the prior is NaN or "
            "infinite: look for NaN in the arguments or parameters, for a scale that underflows to 0, or for draws of the "
            "guide outside the support of the prior"
        )
