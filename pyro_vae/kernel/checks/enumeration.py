"""The enumerated sites, the axes of their values, and which of them cannot be summed out."""

import math
from collections.abc import Collection, Mapping

from ...densities import find_masks, innermost, is_discrete, support_values
from ...errors import EnumerationError, MaskError, quoted
from ..recorder import Layout, Site

MOST_COMBINATIONS = 64  # values of sites that only the guide has: one run of the guide each


def check_enumeration(by_guide: Mapping[str, Site], by_model: Mapping[str, Site], layout: Layout) -> None:
    for site in (*by_guide.values(), *by_model.values()):
        check_enumerated(site)
    for site in by_guide.values():
        check_outside_inner_plates(site, layout)


def find_indicators(guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site], layout: Layout) -> tuple[str, ...]:
    """The discrete draws that only the guide has, such as the component of a mixture: log q is a sum over their values."""
    names = tuple(
        name
        for name, site in guide_sites.items()
        if name not in model_sites and not site.is_observed and is_discrete(site.fn) and listed(site) is not None
    )
    if not names:
        return ()
    if enumerated := [n for n, s in guide_sites.items() if n not in names and s.is_enumerated]:
        raise EnumerationError(
            f"the guide enumerates {quoted(enumerated)} besides {quoted(names)}, which only the guide has and which is "
            f"summed out of log q automatically: remove infer={{'enumerate': ...}} from {quoted(enumerated)}, so that "
            "it is drawn"
        )
    if (total := math.prod(listed(guide_sites[name]) or 1 for name in names)) > MOST_COMBINATIONS:
        raise EnumerationError(
            f"{quoted(names)}, which only the guide has, take {total} values together, and log q is a sum over all of them: "
            f"at most {MOST_COMBINATIONS} are summed. Write the guide with fewer, or with a mixture as the distribution of "
            "the latents (MixtureSameFamily)"
        )
    if inner := [name for name in names if inner_sizes(guide_sites[name], layout)]:
        raise EnumerationError(
            f"{quoted(inner)}, which only the guide has, lies in a plate inside the datum: use MixtureSameFamily for what "
            "is drawn given it"
        )
    if masked := [n for side in (guide_sites, model_sites) for n, s in side.items() if not s.is_observed and is_masked(s)]:
        raise MaskError(masked_beside(names, dict.fromkeys(masked)))
    return names


def masked_beside(indicators: Collection[str], masked: Collection[str]) -> str:
    return (
        f"{quoted(indicators)}, which only the guide has, is summed out of log q, and {quoted(masked)} is masked: mask "
        "observations only, or use MixtureSameFamily for what is drawn given it"
    )


def listed(site: Site) -> int | None:
    """The number of values of a discrete site; `None` where they cannot be listed or are inside `to_event`."""
    values = None if site.fn.event_dim > innermost(site.fn).event_dim else support_values(site.fn)
    return None if values is None or values.ndim != 1 + site.fn.event_dim else len(values)


def is_masked(site: Site) -> bool:
    masks = find_masks(site.fn, site.mask, site.value)
    return any(mask is not None and not bool(mask.all()) for mask in masks)


def check_enumerated(site: Site) -> None:
    try:
        site.fn.enumerate_support(expand=False)
    except NotImplementedError:
        raise EnumerationError(
            f"site '{site.name}' is marked for enumeration but its values cannot be listed: drop infer={{'enumerate': ...}}"
        ) from None


def check_outside_inner_plates(site: Site, layout: Layout) -> None:
    if inner := inner_sizes(site, layout):
        raise EnumerationError(
            f"enumerated site '{site.name}' lies in a plate inside the datum (sizes {inner}), where only the model can sum "
            "it out: leave it out of the guide, and enumerate it in the model"
        )


def enumeration_axes(
    guide_enumerated: Collection[str], model_enumerated: Collection[str], model_sites: Mapping[str, Site]
) -> tuple[dict[str, int], dict[str, dict[int, str]]]:
    """(Axis by enumerated site, {axis: enumerated site} by site of the model).

    As in Pyro, a site under `pyro.markov` gets the lowest axis that no site in its scope has, and can depend only on sites
    in its scope. Every other site has a separate axis.
    """
    chained = [n for n in model_enumerated if "_markov_scope" in model_sites[n].infer]
    alone = [n for n in (*guide_enumerated, *model_enumerated) if n not in chained]
    axes = {name: axis for axis, name in enumerate(alone)}
    depths: dict[str, int] = {}
    in_scope: dict[str, dict[int, str]] = {}
    for name, site in model_sites.items():
        scope = site.infer.get("_markov_scope", {})
        read = [n for n in chained if n in axes and n in scope and depths[n] == scope[n]]
        if name in chained:
            taken = {axes[n] for n in read}
            axes[name] = next(axis for axis in range(len(alone), len(axes) + 1) if axis not in taken)
            read.append(name)
        if "_markov_depth" in site.infer:
            depths[name] = site.infer["_markov_depth"]
        in_scope[name] = {axes[n]: n for n in (*alone, *read)}
    return axes, in_scope


def inner_sizes(site: Site, layout: Layout) -> list[int]:
    """The sizes of the plates inside the datum that contain a site."""
    shape = site.fn.batch_shape
    return [shape[dim] for dim in range(-len(shape), 0) if dim != layout.datum_dim and shape[dim] != 1]
