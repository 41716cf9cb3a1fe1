"""Draw a random program, by a function `choose` that picks one of several options: Hypothesis or a seeded generator."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from .description import DISCRETE, GuidePlan, Latent, Observed, Program

Choose = Callable[[Sequence[Any]], Any]

CONTINUOUS = ("normal", "normal", "normal", "lognormal", "gamma", "student", "mixture", "beta", "exponential", "funnel")
FAMILIES = (*CONTINUOUS, "bernoulli", "categorical")
OBSERVED = ("normal", "normal", "poisson", "bernoulli", "lognormal", "gamma", "student", "binomial", "categorical")
SHIFTS, SLOPES, SPREADS = (0.0, 0.5, -0.7, 1.0), (1.0, -0.6, 1.5, 0.3), (1.0, 0.6, 0.4, 1.4)
BENDS = ("linear", "linear", "tanh", "square")
NUM_BYTES = 160  # more than any program has choices
RARE = -3.5  # logit of a rare value
# Programs that read something they must not, or write in a way that only some executions understand.
QUIRKS = {
    "masked read": "an observation reads a masked latent: no number is right",
    "coupled": "an observation reads the latents of all data: no number is right",
    "moved axis": "a reader moves the axes left of the plates: the number of a plain run is right",
    "reshaped": "a reader counts on the shape of a plain run: the number of a plain run is right",
}
WITHOUT_NUMBER = ("masked read", "coupled")


def random_program(choose: Choose, seed: int) -> Program:
    """One program. The first option of each choice is the simplest, so that Hypothesis shrinks towards it."""
    quirk = choose(("none",) * 9 + ("masked read", "coupled", "moved axis", "reshaped"))
    latents: list[Latent] = []
    for number in range(choose((1, 2, 2, 3, 3, 4))):
        latents.append(random_latent(choose, f"z{number}", latents, plain=quirk == "coupled"))
    observed = [random_observed(choose, f"x{number}", latents) for number in range(choose((1, 1, 2, 2, 3)))]
    observed = [*observed, *seen(choose, latents, observed)]
    latents = with_enumeration(choose, latents, observed)
    if quirk == "masked read":
        latents, observed = with_masked_read(latents, observed)
    return Program(
        latents=tuple(latents),
        observed=tuple(observed),
        guide=random_guide(choose, latents),
        num_data=choose((2, 3, 3, 1, 4)),
        data_dim=choose((-1, -2)),
        dtype=choose((torch.float64, torch.float32)),
        outlier=choose((0.0,) * 12 + (6.0, -15.0)),
        quirk=quirk,
        seed=seed,
    )


def random_latent(choose: Choose, name: str, before: Sequence[Latent], plain: bool) -> Latent:
    parent = choose((*reversed(before), None)) if before else None
    places = ("datum",) if plain else places_below(parent)
    family = choose(FAMILIES)
    return Latent(
        name=name,
        family=family,
        parent=None if parent is None else parent.name,
        place=choose(places),
        shift=choose((RARE, *SHIFTS)) if family == "bernoulli" else choose(SHIFTS),
        slope=choose(SLOPES),
        spread=choose(SPREADS),
        bend=choose(BENDS),
        varies=choose((False, True)),
        mask=choose(("none",) * 16 + ("both", "model", "guide", "elements")),
        scale=choose((1.0,) * 8 + (0.5, 3.0)),
    )


def places_below(parent: Latent | None) -> tuple[str, ...]:
    """An element of a plate is read by the same element of that plate; an event has no plate below it."""
    if parent is None or parent.place == "datum":
        return ("datum",) * 4 + ("plate", "event")
    return ("plate",) if parent.place == "plate" else ("datum", "event")


def random_observed(choose: Choose, name: str, latents: Sequence[Latent]) -> Observed:
    parent = choose(tuple(reversed(latents)))
    return observed_of(choose, name, parent)


def observed_of(choose: Choose, name: str, parent: Latent) -> Observed:
    family = choose(OBSERVED)
    place = choose(places_below(parent))
    mask = choose(("none",) * 6 + ("plate", "fn.mask", "elements", "obs_mask"))
    if (mask == "elements") != (place == "event") and mask in ("elements", "obs_mask"):
        mask = "plate"
    bad = [math.nan, math.inf, -1.0] + ([0.0] if family in ("lognormal", "gamma") else [])
    return Observed(
        name=name,
        family=family,
        parent=parent.name,
        place=place,
        shift=choose(SHIFTS),
        slope=choose(SLOPES),
        spread=choose(SPREADS),
        bend=choose(BENDS[:3] if family in ("poisson", "gamma") else BENDS),
        varies=choose((False, True)),
        mask=mask,
        scale=choose((1.0,) * 8 + (0.5, 3.0)),
        hole=choose(bad),
    )


def seen(choose: Choose, latents: Sequence[Latent], observed: Sequence[Observed]) -> list[Observed]:
    """Observations of most latents that nothing reads: what nobody sees has the prior for its posterior."""
    read = {site.parent for site in (*latents, *observed)}
    unread = [latent for latent in latents if latent.name not in read]
    return [observed_of(choose, f"y{n}", latent) for n, latent in enumerate(unread) if choose((True, True, True, False))]


def with_enumeration(choose: Choose, latents: Sequence[Latent], observed: Sequence[Observed]) -> list[Latent]:
    """Mark some discrete latents. At most one is summed out by the model, and no more than two nodes stand beside it."""
    result: list[Latent] = []
    model_side = False
    for latent in latents:
        options = ["guide", "no"]
        children = [child for child in latents if child.parent == latent.name]
        beside = (latent.parent is not None) + sum(child.width for child in children)
        if not model_side and beside <= 2 and latent.mask == "none":
            options.append("model")
        where = "no"
        if latent.family in DISCRETE:
            where = choose(options) if latent.place == "datum" else choose(("no", "no", "no", "guide"))
        model_side |= where == "model"
        result.append(replace(latent, enumerated=where))
    return result


def with_masked_read(latents: list[Latent], observed: list[Observed]) -> tuple[list[Latent], list[Observed]]:
    """The parent of the first observation is masked, on either side, and the observation is not."""
    name = observed[0].parent
    latents = [replace(latent, mask="both" if latent.name == name else latent.mask) for latent in latents]
    return latents, [replace(observed[0], mask="none"), *observed[1:]]


def random_guide(choose: Choose, latents: Sequence[Latent]) -> GuidePlan:
    drawn = [latent for latent in latents if latent.enumerated != "model"]
    # AutoNormal knows no discrete latents, and no mixtures: Pyro cannot transform their support.
    able = all(latent.family not in (*DISCRETE, "mixture") for latent in drawn)
    auto = bool(drawn) and able and choose((False,) * 4 + (True,))
    return GuidePlan(
        order=choose(("own", "reversed")),
        reads="nothing" if auto else choose(("parent", "any", "nothing")),
        family="unconstrained" if auto else choose(("unconstrained", "matched")),
        widen=choose((1.0, 1.2, 1.5, 2.0, 0.8, 0.6)),
        miss=choose((0.0, 0.3, 1.0)),
        auto=auto,
        element=choose(("narrow", "select")),
    )


def program_of_seed(seed: int) -> Program:
    """The program number `seed` of the command line."""
    return random_program(random.Random(seed).choice, seed)


def program_of_bytes(data: bytes) -> Program:
    """One byte for each choice; zeros, and what is missing, choose the first option."""
    left = iter(data)
    return random_program(lambda options: options[next(left, 0) % len(options)], seed=int.from_bytes(data[-2:]))


def programs() -> st.SearchStrategy[Program]:
    """Random programs as a Hypothesis strategy, which shrinks towards the first options.

    The choices are one string of bytes: of many choices Hypothesis would repeat some, and most programs would be variants.
    """
    return st.binary(min_size=NUM_BYTES, max_size=NUM_BYTES).map(program_of_bytes)
