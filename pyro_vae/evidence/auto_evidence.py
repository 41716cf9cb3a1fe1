"""log p(x) to a requested error, with more work for harder data only."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernel import Call
from ..options import real_number, whole_number
from .estimator import Estimator
from .evidence import Evidence
from .to_tolerance import Plan


@dataclass(repr=False, eq=False, kw_only=True)
class AutoEvidence(Estimator):
    r"""log p(x) to a requested Monte Carlo error, with as many weights for each datum as it needs.

    Proposals are fitted as in `AdaptiveImportanceSampling`. A pilot run of 400 weights measures how good they are, and from
    it follows the number of weights that each datum needs::

        K_n = 400 (s_n / (0.65 tolerance))^2,   s_n the error of the pilot

    Data that need many weights, and data in doubt, get a longer pilot. Where more weights would not help (a Pareto k above
    one, a mode that was missed), annealed chains run instead. They start at proposals fitted anew. With at most ten latents
    half of them start at the prior, which covers every mode and heavy tails. The number of their steps and chains follows
    from a pilot too. Where the search has found a mode that the proposals lack, the doubt stays: chains that have all missed
    a narrow mode agree with each other.

    Pilots only decide by which method the final draws are made, and how many. The estimate uses the final draws alone, so it
    is not biased by stopping early: p(x) is estimated without bias, log p(x) from below.

    This pays where few data are much harder than the others. Where all need about the same number of weights,
    `AdaptiveImportanceSampling` with that number is cheaper, because it needs no pilots.

    Data of one batch that need about the same number of weights are computed together. For this the model's arguments are
    cut along their first axis that is as long as the batch, and log p(x, z) is compared with that of the whole batch. Where
    the arguments cannot be cut, as in a model that holds its data itself, the whole batch gets the number that its hardest
    datum needs.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites. The fits start at it, and `elbo` is its ELBO.
    :param tolerance: nats, the largest Monte Carlo error of log p(x) that a datum may have.
    :param max_cost: decoder evaluations per datum for the final draws; a gradient counts as three. Fits and pilots are not
        included. Where chains are annealed, at least 100 chains of 20 steps run. The record and a warning say for how
        many data the error is above the tolerance. This can happen below `max_cost` too, since pilots underrate errors of
        weights with heavy tails.

    Where latents cannot be fitted (discrete latents, masks that depend on draws), the draws come from the guide, as in
    `ImportanceSampling`, and nothing is annealed.

    Call it with the model's arguments. It returns `Evidence` for the B data of the call. Its `particles` (B,) says how many
    weights each datum got.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.
    :raises OptionError: for a tolerance that is not positive, and for too small a `max_cost`.

    References: a pilot that decides the number of final draws, Ghurye and Robbins, 1954, https://doi.org/10.2307/2333016;
    Pareto k, Vehtari et al., 2024, https://jmlr.org/papers/v25/19-556.html.

    Example::

        evidence = pv.AutoEvidence(model, guide, tolerance=0.05)(x)
        print(evidence)
        evidence.std_error, evidence.particles      # (B,) each
    """

    tolerance: float = 0.05
    max_cost: int = 10_000

    def check_options(self) -> None:
        self.tolerance = real_number("tolerance", self.tolerance, ends="(]")
        self.max_cost = whole_number("max_cost", self.max_cost, lowest=1000)

    def estimate(self, call: Call) -> Evidence:
        return Plan(call, self.tolerance, self.max_cost).run()
