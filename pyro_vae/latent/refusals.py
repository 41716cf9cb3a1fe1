"""Refuse guides without units, and results that are not finite."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import EnumerationError, NonFiniteError, StructureError, quoted
from ..kernel import Call, LogDensities


def refuse_mixed_priors(weights: LogDensities) -> None:
    mixed = [n for n in weights.structure.latents if weights.log_prior_by_site[n].shape[:-2].numel() > 1]
    if mixed:
        raise EnumerationError(
            f"the prior of {quoted(mixed)} depends on {quoted(weights.structure.model_enumerated)}, which the model sums "
            "out, so it is a mixture without a formula: add these sites to the guide, or write the mixture as a "
            "distribution (MixtureSameFamily)"
        )


def refuse_without_draws(call: Call) -> None:
    structure = call.structure
    if structure.guide_enumerated:
        raise EnumerationError(
            f"the guide enumerates {quoted(structure.guide_enumerated)}, and units are looked at one draw at a time: pass "
            "the guide without infer={'enumerate': ...}, or as "
            "pyro.poutine.infer_config(guide, lambda site: {'enumerate': None})"
        )
    if not structure.latents:
        raise StructureError("the guide draws no latent site of the model, so there is no unit to look at")


def check_finite(site_kl: Tensor, names: Sequence[str]) -> None:
    bad = (~site_kl.isfinite()).any(0).tolist()
    if any(bad):
        raise NonFiniteError(
            f"the KL of {quoted(name for name, is_bad in zip(names, bad, strict=True) if is_bad)} to the prior is NaN or "
            "infinite: look for NaN in the arguments or parameters, for a scale that underflows to 0, or for draws of the "
            "guide outside the support of the prior"
        )
