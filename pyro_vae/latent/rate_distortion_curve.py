"""Records of points in the rate-distortion plane: of one model, and of models trained at several betas."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConvergenceWarning
from ..records import FEW, Estimate, Result, page, to_plain

# errors and nats by which a point may be above the guide; strict, because all P points are compared
SIGMAS, TOLERANCE = 4.0, 0.05


@dataclass(frozen=True, eq=False, repr=False)
class RateDistortionCurve(Result):
    """The rate-distortion curve of one model, as returned by `RateDistortion`. P betas; nats; means over N data.

    :ivar beta: (P,) falling, from infinity (the prior) on; 1 is among them.
    :ivar rate: (P,) **upper bound** on the rate of the encoder at that beta, in expectation.
    :ivar distortion: (P,) its distortion. The point (rate, distortion) is on or above the true curve, in expectation.
    :ivar bound: (P,) -(rate + distortion / beta): **lower bound** on log of the integral of p(z) p(x given z)^(1 / beta); at
        beta 1 on log p(x). The point is above the tangent of the curve, along the rate, by as much as the bound is too low.
    :ivar excess: (P,) rate + distortion / beta of the point minus that of the guide. No encoder, and so no guide, is below
        the curve. Where it is above 0, the chains are too short, and the point is at least this much too high.
    :ivar std_errors: **Monte Carlo** errors (P,) of `rate`, `distortion`, `bound` and `excess`, by name. That of `bound` is
        smaller than those of `rate` and `distortion`, whose errors partly cancel in the sum.
    :ivar sampling_errors: their sampling errors, over data drawn from a population, (P,) by name; NaN for one datum.
    :ivar guide_rate: E KL(q to p(z)) of the guide.
    :ivar guide_distortion: -E log p(x given z) of the guide.
    :ivar elbo: -(guide_rate + guide_distortion).
    :ivar log_evidence: lower bound on the mean log p(x): log-means of the weights over the chains, at beta 1. It is above
        `bound`.
    :ivar acceptance: mean acceptance of the transitions.
    :ivar num_data: N.
    :ivar num_steps: T, temperatures of the chains.
    :ivar num_chains: C, per datum.
    :ivar cost: decoder evaluations per datum; a gradient counts as three.
    :ivar support_checked: `False` when values outside the likelihood's support were allowed: then this is not log p(x).

    Example::

        curve = pv.RateDistortion(vae.model, vae.guide)(loader)
        pv.plots.plot_rate_distortion(curve)
    """

    _rows_are = "betas"
    _derived = ("above_guide",)

    beta: Tensor
    rate: Tensor
    distortion: Tensor
    bound: Tensor
    excess: Tensor
    std_errors: Mapping[str, Tensor]
    sampling_errors: Mapping[str, Tensor]
    guide_rate: Estimate
    guide_distortion: Estimate
    elbo: Estimate
    log_evidence: Estimate
    acceptance: float
    num_data: int
    num_steps: int
    num_chains: int
    cost: float
    support_checked: bool = True

    @property
    def slope(self) -> Tensor:
        """(P - 1,) dD/dR between neighbouring points. On the true curve it is between minus their two betas."""
        return self.distortion.diff() / self.rate.diff()

    @property
    def above_guide(self) -> Tensor:
        """(P,), where the point of the guide is below the tangent of the curve, by more than 4 errors and .05 nats."""
        return self.excess > SIGMAS * self.std_errors["excess"] + TOLERANCE

    def warnings(self) -> list[Warning]:
        """A warning where points of the chains are above that of the guide; the estimator issues it."""
        if not bool(self.above_guide.any()):
            return []
        worst = int(self.excess.where(self.above_guide, self.excess.new_full((), -math.inf)).argmax())
        return [
            ConvergenceWarning(
                f"{int(self.above_guide.sum())} of {len(self)} points of the curve of best encoders lie above the point of "
                f"the guide, most at beta = {float(self.beta[worst]):.4g}: by {float(self.excess[worst]):.3g} +- "
                f"{float(self.std_errors['excess'][worst]):.2g} nats of rate + distortion / beta. The chains are too short: "
                f"raise num_steps (now {self.num_steps})"
            )
        ]

    def __len__(self) -> int:
        return len(self.beta)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON; the first beta, infinity, as `None`."""
        return {
            **to_plain(self),
            "beta": [beta if math.isfinite(beta) else None for beta in self.beta.tolist()],
            "slope": self.slope.tolist(),
            "above_guide": self.above_guide.tolist(),
        }

    def __str__(self) -> str:
        name = "log p(x)" if self.support_checked else "score (not log p(x): values outside the support)"
        return page(
            [
                f"Rate-distortion curve of {self.num_data} data, {self.num_chains} chains of {self.num_steps} steps, "
                f"acceptance {self.acceptance:.2f}, cost {self.cost:g} decoder evaluations per datum",
                "nats per datum; rates are upper bounds, so the points lie on or above the curve (+-: Monte Carlo error)",
                *table(self, ("rate", "distortion", "bound")),
                f"guide's rate       {self.guide_rate}",
                f"guide's distortion {self.guide_distortion}",
                f"ELBO               {self.elbo}",
                f"{name:<18} {self.log_evidence}, bound: lower",
                *(f"WARNING: {warning}" for warning in self.warnings()),
            ]
        )


@dataclass(frozen=True, eq=False, repr=False)
class BetaSweep(Result):
    """The pairs trained by `beta_sweep` and their measured numbers. P betas in the given order; nats; means over the data.

    :ivar beta: (P,) weights of the KL in training.
    :ivar rate: (P,) E KL(q to p(z)) of the trained guide.
    :ivar distortion: (P,) -E log p(x given z).
    :ivar elbo: (P,) -(rate + distortion): the ELBO without beta.
    :ivar log_evidence: (P,) log p(x) of the trained model.
    :ivar std_errors: **Monte Carlo** errors (P,) of these four by name. They do not include the variation of training.
    :ivar sampling_errors: their sampling errors, over data drawn from a population, (P,) by name.
    :ivar bound: the kind of estimate of `log_evidence`: "lower", "exact" or "consistent".
    :ivar doubts: how many of the N data have a `log_evidence` in doubt, (P,) by reason. Its errors are not reliable where
        these are more than 5%.
    :ivar pairs: the P trained (model, guide).
    :ivar stores: the P states of Pyro's parameter store that belong to the pairs. Use a pair with parameters in the store
        inside `with pyro.get_param_store().scope(sweep.stores[i]):`. A pair of modules needs no store. `save` does not write
        pairs and stores, and after `load` they are empty.
    :ivar num_data: N.
    :ivar num_updates: steps of the optimiser for each beta.

    Example::

        sweep = pv.beta_sweep(make_pair, loader, (0.5, 1, 2), num_epochs=50, seed=0)
        pv.plots.plot_rate_distortion(sweep)
    """

    _rows_are = "betas"
    _hidden = ("pairs", "stores")
    _not_stored = {"pairs": (), "stores": ()}  # programs

    beta: Tensor
    rate: Tensor
    distortion: Tensor
    elbo: Tensor
    log_evidence: Tensor
    std_errors: Mapping[str, Tensor]
    sampling_errors: Mapping[str, Tensor]
    bound: str
    doubts: Mapping[str, Tensor]
    pairs: tuple[tuple[Callable, Callable], ...]
    stores: tuple[Any, ...]
    num_data: int
    num_updates: int

    def __len__(self) -> int:
        return len(self.beta)

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain Python, for JSON, without the pairs and their stores."""
        return {name: value for name, value in to_plain(self).items() if name not in ("pairs", "stores")}

    def __str__(self) -> str:
        return page(
            [
                f"{len(self)} pairs of {self.num_updates} updates each, measured on {self.num_data} data",
                f"nats per datum (+-: Monte Carlo error); log p(x) is a bound of kind: {self.bound}",
                *table(self, ("rate", "distortion", "elbo", "log_evidence")),
                *(
                    f"beta {self.beta[i]:.4g}: error of log p(x) not to be trusted: {reason} {int(n)} of {self.num_data}"
                    for reason, counts in self.doubts.items()
                    for i, n in enumerate(counts)
                    if n > FEW * self.num_data
                ),
            ]
        )


def table(record: Any, names: tuple[str, ...]) -> list[str]:
    """One line per beta: the named values with their Monte Carlo errors."""
    lines = [f"{'beta':>10}" + "".join(f"{name:>22}" for name in names)]
    for i, beta in enumerate(record.beta.tolist()):
        cells = [f"{float(getattr(record, name)[i]):.3f} +- {float(record.std_errors[name][i]):.3f}" for name in names]
        doubts = record.doubts.values() if isinstance(record, BetaSweep) else ()
        if any(counts[i] > FEW * record.num_data for counts in doubts):
            cells[-1] = f"{float(record.log_evidence[i]):.3f} (in doubt)"
        lines.append(f"{beta:>10.4g}" + "".join(f"{cell:>22}" for cell in cells))
    return lines
