"""log p(x) to a requested error, with work only where a datum needs it."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernel import Call
from ..options import real_number, whole_number
from .estimator import Estimator
from .evidence import Evidence
from .to_tolerance import Plan


@dataclass(repr=False, eq=False, kw_only=True)
class AutoEvidence(Estimator):
    r"""log p(x) to a requested Monte Carlo error, each datum at the cost that it needs.

    Proposals are fitted as in `AdaptiveImportanceSampling`, and a pilot run of 400 weights shows how good they are. It tells
    how many weights each datum needs::

        K_n = 400 (s_n / (0.65 tolerance))^2,   s_n the error of the pilot

    Data that need many, and those in doubt, get a longer pilot. Where more weights would not help (a Pareto k above one, a
    mode that was missed), chains are annealed: up to ten latents from the prior, which covers every mode, beyond that from
    proposals fitted anew. The number of their steps and chains follows from a pilot too. A mode that the search knows and
    the proposals lack stays a doubt: chains that have all missed a narrow one agree with each other.

    The estimate is made of fresh draws alone. Pilots have decided by which method they are drawn, and how many. So stopping
    early does not bias it: p(x) is estimated without bias, log p(x) from below.

    This pays where few data are much harder than the others. Where all need about the same number of weights,
    `AdaptiveImportanceSampling` with that number is cheaper, because it needs no pilots.

    Data of one batch that need about the same are weighed together. For that the arguments of the model are cut along their
    first axis that is as long as the batch, and log p(x, z) is compared with that of the whole batch. Where they cannot be
    cut, as in a model that holds its data itself, the whole batch gets what its hardest datum needs.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites; the start of the fits, and what `elbo` is about.
    :param tolerance: nats, the largest Monte Carlo error of log p(x) of a datum.
    :param max_cost: decoder evaluations per datum for the final draws, a gradient counting as three; fits and pilots come on
        top, and where chains are annealed at least 100 of 20 or 30 steps run. The record and a warning say for how many data
        the error is above the tolerance all the same: pilots underrate the errors of weights with heavy tails.

    Latents that cannot be fitted (discrete ones, masks that depend on draws) are weighed by draws of the guide, as in
    `ImportanceSampling`; nothing is annealed then.

    Called with the model's own arguments; returns `Evidence` for the B data of the call. `particles` (B,) says how many
    weights each datum got.

    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.
    :raises OptionError: for a tolerance that is not positive, and for too small a `max_cost`.

    References: a pilot that decides the number of fresh draws, Ghurye and Robbins, 1954,
    https://doi.org/10.2307/2333016; Pareto k, Vehtari et al., 2024, https://jmlr.org/papers/v25/19-556.html.

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
