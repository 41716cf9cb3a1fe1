"""Refuse guides without units, and results that are not finite."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import NonFiniteError, StructureError, quoted
from ..kernel import Call


def refuse_without_draws(call: Call) -> None:
    if not call.structure.latents:
        raise StructureError("the guide draws no latent site of the model, so there is no unit to look at")


def check_finite(site_kl: Tensor, names: Sequence[str]) -> None:
    bad = (~site_kl.isfinite()).any(0).tolist()
    if any(bad):
        raise NonFiniteError(
            f"the KL of {quoted(name for name, is_bad in zip(names, bad, strict=True) if is_bad)} to the prior is NaN or "
            "infinite: look for NaN in the arguments or parameters, for a scale that underflows to 0, or for draws of the "
            "guide outside the support of the prior"
        )
