"""The record of leave-one-out scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import PrecisionWarning, SubsamplingError, UnreliableEvidenceWarning
from ..ops import MIN_PARTICLES_FOR_K, effective_sample_size, pareto_k_threshold
from ..options import flag, whole_number
from ..records import (
    FEW,
    LEVEL,
    Estimate,
    Result,
    are_many,
    check_records,
    check_same,
    concatenated,
    mean_cost,
    normal_quantile,
    page,
    places,
    student_quantile,
    to_plain,
    without_doubt,
)
from .draws import FITTED, GUIDE
from .handing_over import inference_data
from .smoothing import Scores, log_posterior_weights, log_predictive, scores, smoothed

FEWEST_BEHIND = 5.0  # draws that must determine an error
HEAVY, MOST_HEAVY = 0.5, 0.1  # k above which weights have no variance, and the largest share of such data in a sum
UNSEEN, SCATTER = 5e-4, 3.0  # tolerated rounding: nats, and units of the last digit of a log-likelihood

REMEDIES = {
    GUIDE: (
        "Use proposal='fitted', a guide nearer to the posterior (AutoMultivariateNormal has correlations), or raise "
        "num_draws"
    ),
    FITTED: "Raise num_draws, or use proposal='guide' with a guide as wide as the posterior",
}


@dataclass(frozen=True, eq=False, repr=False)
class LeaveOneOutResult(Result):
    """Leave-one-out scores of B data from S draws theta of the latents outside their plate; nats, larger is better.

    The fields have the numbers of the draws. The scores are computed from them when they are read, because those of one
    batch need the other batches, see `cat`.

    :ivar log_likelihood: (S, B) log p(x_n | theta_s).
    :ivar log_prior: (S,) log p(theta_s), including observations outside the plate.
    :ivar log_proposal: (S,) log-density from which theta_s was drawn.
    :ivar draws: theta by site, an axis of S draws in front of each shape.
    :ivar doubted: (S, B) bool, true where the estimate of log p(x_n | theta_s) is in doubt.
    :ivar log_others: (S,) log-likelihood of data that `select` has removed; they still count in the weights.
    :ivar rounding: (P, B) the change of log p(x_n | theta_s) in float64, for the first P draws; `None` if not known.
    :ivar method: "draws of the guide" or "fitted proposals", the source of theta.
    :ivar plate: the plate of the data.
    :ivar full_size: number of data in that plate; a call may have only a part of them.
    :ivar cost: decoder evaluations per datum; a gradient counts as three.
    :ivar misses_mode: whether the search found a mode that the draws lack; `None` without a search.
    :ivar index: (B,) indices into a subsampled plate, or `None`.
    :ivar seen: indices of all data in the weights, where the plate is subsampled.
    :ivar stripped_scales: scales of `poutine.scale` and N/B, by site, that are not applied: each datum counts once.
    :ivar local: the estimator of log p(x_n | theta), or "" where it is exact because data have no latents.
    :ivar unchecked: why something was not done or checked, by its name.
    :ivar loader_index: (B,) the place of each datum in the loader of `evaluate`, from 0; `None` in a record of one call.

    Example::

        def model(x):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(64), 10.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(loc, 5.0).to_event(1), obs=x)

        guide = pyro.infer.autoguide.AutoNormal(model)
        guide(x)     # then train it
        loo = pv.LeaveOneOut(model, guide, num_draws=200)(x)
        loo.elpd, loo.pareto_k, loo.sum()
    """

    _derived = ("elpd", "std_error", "pareto_k", "ess", "doubts", "reliable")
    _hidden = ("log_likelihood", "log_prior", "log_proposal", "draws", "doubted", "log_others", "rounding", "seen")

    log_likelihood: Tensor
    log_prior: Tensor
    log_proposal: Tensor
    draws: Mapping[str, Tensor]
    doubted: Tensor
    log_others: Tensor
    method: str
    plate: str
    full_size: int
    cost: float
    rounding: Tensor | None = None
    misses_mode: bool | None = None
    index: Tensor | None = None
    seen: Tensor | None = None
    stripped_scales: Mapping[str, float | Tensor] = field(default_factory=dict)
    local: str = ""
    unchecked: Mapping[str, str] = field(default_factory=dict)
    loader_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_draws < MIN_PARTICLES_FOR_K:
            object.__setattr__(self, "unchecked", {**self.unchecked, "tails": f"S < {MIN_PARTICLES_FOR_K}"})

    @classmethod
    def cat(cls, records: Sequence[LeaveOneOutResult]) -> LeaveOneOutResult:
        """Join the batches of one data set, which must have the same draws.

        :raises ValueError: for records of different estimators or draws.
        """
        check_records(cls, records)
        check_same(records, ("num_draws", "method", "plate", "local"))
        first = records[0]
        for other in records[1:]:
            same = [torch.allclose(getattr(first, n), getattr(other, n)) for n in ("log_prior", "log_proposal")]
            if not all(same):
                raise ValueError(
                    "the batches have different draws of the latents outside their plate: give LeaveOneOut a seed and "
                    "proposal='guide', and let the guide draw these latents first, or call it with all data at once"
                )
        known = all(r.rounding is not None for r in records)
        parts = [r for r in records if r.index is not None and r.seen is not None]
        partial = len(parts) == len(records)
        return replace(
            first,
            log_likelihood=torch.cat([r.log_likelihood for r in records], 1),
            doubted=torch.cat([r.doubted for r in records], 1),
            log_others=torch.stack([r.log_others for r in records]).sum(0),
            rounding=torch.cat([r.rounding for r in records if r.rounding is not None], 1) if known else None,
            index=torch.cat([r.index for r in parts]) if partial else None,  # type: ignore[misc]
            seen=torch.cat([r.seen for r in parts]) if partial else None,  # type: ignore[misc]
            full_size=first.full_size if partial else sum(r.full_size for r in records),
            cost=mean_cost(records),
            **concatenated(records, ("loader_index",)),
            stripped_scales={k: v for r in records for k, v in r.stripped_scales.items()},
            unchecked={n: why for r in records for n, why in r.unchecked.items()},
        )

    def select(self, kept: Tensor) -> LeaveOneOutResult:
        """The record of some of the data: where `kept`, (B,) bool, is true, or those with these indices.

        The others still count in the weights, so the scores do not change.
        """
        kept = places(kept, len(self))
        chosen = torch.zeros(len(self), dtype=torch.bool, device=self.log_likelihood.device)
        chosen[kept] = True
        return replace(
            self,
            log_likelihood=self.log_likelihood[:, kept],
            doubted=self.doubted[:, kept],
            log_others=self.log_others + self.log_likelihood[:, ~chosen].double().sum(1),
            rounding=None if self.rounding is None else self.rounding[:, kept],
            index=None if self.index is None else self.index[kept],
            loader_index=None if self.loader_index is None else self.loader_index[kept],
        )

    def __len__(self) -> int:
        return self.log_likelihood.shape[1]

    @property
    def num_draws(self) -> int:
        return self.log_likelihood.shape[0]

    @cached_property
    def _log_ratio(self) -> Tensor:
        """(S,), log p(theta) / q(theta), including the log-likelihood of data that `select` has removed."""
        return (self.log_prior - self.log_proposal).double() + self.log_others

    @cached_property
    def _scores(self) -> Scores:
        self._check_complete()
        return scores(self._log_ratio, self.log_likelihood, self.doubted)

    @property
    def _is_complete(self) -> bool:
        return self.seen is None or self.seen.sort().values.tolist() == list(range(self.full_size))

    def _check_complete(self) -> None:
        """Raise where a part of a subsampled plate is missing: the posterior is that given all data."""
        if not self._is_complete and self.seen is not None:
            raise SubsamplingError(
                f"these are {len(self.seen)} of the {self.full_size} data in the plate '{self.plate}' "
                f"({len(self.seen.unique())} different ones), and leave-one-out scores need each of them once: join all "
                "batches with pv.evaluate or cat, or pass all data"
            )

    @property
    def elpd(self) -> Tensor:
        """(B,) log p(x_n given the others), the score of each datum."""
        return self._scores.elpd

    @property
    def std_error(self) -> Tensor:
        """(B,) Monte Carlo error of `elpd`; not reliable where the datum is not `reliable`."""
        return self._scores.std_error

    @property
    def pareto_k(self) -> Tensor:
        """(B,) tail index of the weights without each datum; nan below 100 draws."""
        return self._scores.pareto_k

    @property
    def ess(self) -> Tensor:
        """(B,) effective sample size of the weights without each datum."""
        return self._scores.ess

    @cached_property
    def _log_posterior_weights(self) -> Tensor:
        self._check_complete()
        return log_posterior_weights(self._log_ratio, self.log_likelihood)

    @cached_property
    def posterior_k(self) -> float:
        """Tail index of the weights p(theta | x) / q(theta), with no datum left out: how far q is from the posterior."""
        return float(smoothed(self._log_posterior_weights)[1])

    @property
    def posterior_ess(self) -> float:
        """Effective sample size of these weights."""
        return float(effective_sample_size(self._log_posterior_weights))

    @cached_property
    def p_loo(self) -> float:
        """Effective number of parameters: the sum over data of log p(x_n given all data) - log p(x_n given the others)."""
        return float((log_predictive(self._log_posterior_weights, self.log_likelihood) - self.elpd).sum())

    def sum(self) -> Estimate:
        """The sum of elpd over all data, with its Monte Carlo error and its sampling error sqrt(N) sd.

        The Monte Carlo error takes into account that all data share the draws.

        No error is printed where more than 5% of the data are in doubt, or more than 10% have a Pareto k above 0.5.
        """
        error, number = self._scores.influence.square().sum().sqrt(), len(self)
        sampling = self.elpd.std() * math.sqrt(number) if number > 1 else torch.full_like(error, math.nan)
        return Estimate(self.elpd.sum(), error if self.num_draws > 1 else error * math.nan, sampling, doubt=self._doubt())

    def mean(self) -> Estimate:
        """The mean of elpd over the data, with both errors."""
        total, number = self.sum(), len(self)
        return Estimate(total.value / number, total.std_error / number, total.sampling_error / number, doubt=total.doubt)

    def _doubt(self) -> str:
        """Why errors of the sum are not reliable: errors by heavy tails have one sign, so they add up in a sum."""
        bad, heavy = ~self.reliable, self.pareto_k > HEAVY
        if not are_many(bad) and int(heavy.sum()) > MOST_HEAVY * len(heavy):
            return f"{int(heavy.sum())} of {len(heavy)} data have a Pareto k above {HEAVY}"
        return f"{int(bad.sum())} of {len(bad)} data in doubt" if are_many(bad) else ""

    def confidence_interval(self, level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """Monte Carlo interval of `elpd`, two tensors (B,): its error times 1 / (1 - k) where tails are heavy (k > 0)."""
        few = self.num_draws < MIN_PARTICLES_FOR_K
        quantile = student_quantile(level, max(self.num_draws - 1, 1)) if few else normal_quantile(level)
        half = quantile * self.std_error / (1 - self.pareto_k.nan_to_num(nan=0.0).clamp(0.0, 0.95))
        return self.elpd - half, self.elpd + half

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where the number is in doubt; a reason that was not judged is in `unchecked` instead.

        - "tails": Pareto k of the weights without the datum, or of the posterior, is above min(1 - 1/log10 S, 0.7).
        - "data's own latents": more than 5% of the weight is on draws where the estimate of log p(x_n | theta) is in doubt.
        - "few draws": with fewer than 100 draws, fewer than five determine the error.
        - "search": the search found a mode of p(theta | x) that the draws lack.
        - "precision": float64 changes elpd by more than a tenth of its error.
        """
        found = {}
        if "tails" not in self.unchecked:
            limit = pareto_k_threshold(self.num_draws)
            found["tails"] = (self.pareto_k > limit) | ~self.elpd.isfinite() | (self.posterior_k > limit)
        else:
            found["few draws"] = (self._scores.num_behind_error < FEWEST_BEHIND) | (self.num_draws == 1)
        if self.local:
            found["data's own latents"] = self._scores.share_doubted > FEW
        if self.misses_mode is not None:
            found["search"] = torch.full_like(self.elpd, self.misses_mode, dtype=torch.bool)
        if self.rounding is not None:
            found["precision"] = self._rounded()
        return found

    def _rounded(self) -> Tensor:
        """(B,): by rounding of the datum, or of the sum over all data, whose rounding is noise in the weights."""
        assert self.rounding is not None
        usual = UNSEEN + SCATTER * torch.finfo(self.log_likelihood.dtype).eps * self.elpd.abs()
        own = self.rounding.abs().mean(0) > torch.fmax(0.1 * self.std_error, usual)
        total = self.rounding.sum(1)
        return own | (len(total) > 1 and float(total.std()) > 0.1)

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return without_doubt(self.doubts, like=self.elpd)

    def warnings(self) -> list[Warning]:
        """Warnings about these numbers."""
        if not self._is_complete:
            return [
                UnreliableEvidenceWarning(f"this is a part of the plate '{self.plate}': join all batches to read scores")
            ]
        found: list[Warning] = []
        for reason, flags in self.doubts.items():
            if bool(flags.any()):
                category = PrecisionWarning if reason == "precision" else UnreliableEvidenceWarning
                found.append(category(f"{self._meaning(reason, flags)}. {self._remedy(reason)}"))
        return found

    def _meaning(self, reason: str, flags: Tensor) -> str:
        data, limit = f"{int(flags.sum())} of {len(flags)} data", f"{pareto_k_threshold(self.num_draws):.2f}"
        if reason == "tails" and self.posterior_k > pareto_k_threshold(self.num_draws):
            return (
                f"the weights of the posterior against the {self.method} have a Pareto k of {self.posterior_k:.2f}, above "
                f"{limit}: all scores are likely off by more than the stated error"
            )
        if reason == "tails":
            return (
                f"the weights without {data} have a Pareto k above {limit}: these data are so influential that their elpd "
                "is likely off by more than the stated error"
            )
        if reason == "search":
            return (
                f"the draws of {', '.join(self.draws)} lack a mode of their posterior that the search has found: all "
                "scores are likely off by more than the stated error"
            )
        if reason == "few draws":
            return f"the error of elpd of {data} rests on fewer than five draws, so that it is likely too small"
        if reason == "precision":
            return f"elpd of {data} changes by more than a tenth of its error in float64"
        return f"log p(x_n given theta) of {data}, whose own latents are integrated out, is in doubt"

    def _remedy(self, reason: str) -> str:
        if reason == "precision":
            return "Use float64: model.double(), guide.double(), and the data in double"
        if reason == "few draws":
            return "Raise num_draws"
        return REMEDIES[self.method] if reason in ("tails", "search") else "Give evidence= an estimator with more particles"

    @property
    def log_joint(self) -> Tensor:
        """(S,) log p(theta_s, x), with all data."""
        return self.log_proposal.double() + self._log_posterior_weights

    def to_arviz(self, *, resample: bool = True, seed: int = 0) -> Any:
        """Convert to ArviZ (an optional extra): groups `posterior` (theta) and `log_likelihood`, one chain of S draws.

        ArviZ's `loo` expects draws from the posterior. Where the weights p(theta | x) / q(theta) differ, S draws are
        therefore resampled by weight (systematic resampling). `loo` is then right, with additional noise. Where the weights
        are equal, as with an exact guide, it gives the numbers of this record.

        :param resample: `False` returns the draws of q unchanged, for ``arviz_stats.loo_approximate_posterior(data,
            log_p=record.log_joint.numpy(), log_q=record.log_proposal.numpy())``, which gives the numbers of this record. A
            plain `loo` of them is wrong.
        :param seed: seed of the resampling.
        :raises ImportError: without ArviZ (``pip install arviz``).
        """
        weights = self._log_posterior_weights if flag("resample", resample) else None
        return inference_data(self, weights, whole_number("seed", seed, lowest=0))

    def to_dict(self) -> dict[str, Any]:
        """Every field and number as plain Python, for JSON."""
        names = ("elpd", "std_error", "pareto_k", "ess", "reliable")
        return {
            **to_plain(self),
            **{name: getattr(self, name).tolist() for name in names},
            "posterior_k": self.posterior_k,
            "p_loo": self.p_loo,
            "doubts": {reason: flags.tolist() for reason, flags in self.doubts.items()},
        }

    def __str__(self) -> str:
        if not self._is_complete and self.seen is not None:
            return f"LeaveOneOutResult of {len(self.seen)} of {self.full_size} data: join all batches to read scores"
        how = f", log p(x_n given theta) by {self.local}" if self.local else ""
        own = self.pareto_k
        lines = [
            f"LeaveOneOutResult of {len(self)} data, S = {self.num_draws} draws of {', '.join(self.draws)} "
            f"({self.method}){how}",
            f"  elpd  {self.sum()}",
            f"  per datum {self.mean()}",
            f"  effective number of parameters {self.p_loo:.1f}",
            f"  Pareto k without a datum: median {float(own.median()):.2f}, highest {float(own.max()):.2f}; "
            f"of the posterior {self.posterior_k:.2f} (ESS {self.posterior_ess:.0f})",
        ]
        counts = [f"{reason} {int(flags.sum())} of {len(flags)}" for reason, flags in self.doubts.items()]
        counts += [f"{name} not judged ({why})" for name, why in self.unchecked.items()]
        lines += [f"  doubts: {', '.join(counts)}"] if counts else []
        lines += [f"    {reason}: {self._remedy(reason)}" for reason, flags in self.doubts.items() if bool(flags.any())]
        if self.stripped_scales:
            lines.append(f"  scales left out: {dict(self.stripped_scales)}")
        return page(lines)
