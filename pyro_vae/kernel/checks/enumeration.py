"""Which sites are enumerated, where their values lie, and which of them cannot be summed out."""

from collections.abc import Collection, Mapping

from ...errors import EnumerationError, quoted
from ..recorder import Layout, Site


def check_enumeration(by_guide: Mapping[str, Site], by_model: Mapping[str, Site], layout: Layout) -> None:
    for site in (*by_guide.values(), *by_model.values()):
        check_enumerated(site)
        if by_guide:
            check_outside_inner_plates(site, layout)
    if by_guide and len(set(layout.axes.values())) < len(layout.axes):
        raise EnumerationError(
            f"the guide enumerates {quoted(by_guide)} beside a chain (pyro.markov) that the model enumerates: enumerate "
            "all of them in the model alone, or take pyro.markov out"
        )


def check_enumerated(site: Site) -> None:
    try:
        site.fn.enumerate_support(expand=False)
    except NotImplementedError:
        raise EnumerationError(
            f"site '{site.name}' is marked for enumeration but its values cannot be listed: drop infer={{'enumerate': ...}}"
        ) from None


def check_outside_inner_plates(site: Site, layout: Layout) -> None:
    shape = site.fn.batch_shape
    inner = [shape[dim] for dim in range(-len(shape), 0) if dim != layout.datum_dim and shape[dim] != 1]
    if inner:
        raise EnumerationError(
            f"enumerated site '{site.name}' lies in a plate inside the datum (sizes {inner}), where only the model can sum "
            "it out: leave it out of the guide, enumerate it in the model, and enumerate nothing in the guide"
        )


def enumeration_axes(
    guide_enumerated: Collection[str], model_enumerated: Collection[str], model_sites: Mapping[str, Site]
) -> tuple[dict[str, int], dict[str, dict[int, str]]]:
    """(Axis by enumerated site, {axis: enumerated site} by site of the model).

    As in Pyro, a site under `pyro.markov` gets the lowest axis that no site in its scope has, and only those in its scope
    can be read; every other site has an axis of its own.
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
