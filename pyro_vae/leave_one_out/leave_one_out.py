"""Leave-one-out cross-validation for models with latents outside the plate of the data."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import noise
from ..errors import LocalFitError, NonFiniteError, OptionError, quoted
from ..evidence import (
    AdaptiveImportanceSampling,
    Estimator,
    Evidence,
    ImportanceSampling,
    OfPair,
    check_builder,
    guide_draws,
)
from ..kernel import Call, Outside, Pair, movement
from ..noise import Noise, batch_noise, checked_seed, noise_seed
from ..options import amount, one_of
from ..records import warn_about
from .draws import OutsideSample, fitted, from_guide, from_proposal, misses_mode, narrowed, values_inside
from .leave_one_out_result import LeaveOneOutResult
from .marginal_space import MarginalSpace, fit_outside

MOST_FITTED = 200  # most latents outside the plate for which a full covariance is fitted
MOST_PAIRS = 20_000  # pairs of a draw and a datum that are computed at once
FITTED_TO_DATA = functools.partial(AdaptiveImportanceSampling, num_particles=100)
DRAWN_BY_GUIDE = functools.partial(ImportanceSampling, num_particles=300, check=False)
LOOKED_AT = 20  # draws with which rounding is tested
Proposal = Literal["auto", "fitted", "guide"]


def no_guide(*args: Any, **kwargs: Any) -> None:
    """A guide without latents, for data that have none."""


@dataclass(repr=False, eq=False, kw_only=True)
class LeaveOneOut(OfPair):
    r"""Leave-one-out scores, log p(x_n) of each datum given all others, for models in which data share latents theta::

        log p(x_n | x_-n) ~ log sum_s w_sn p(x_n | theta_s) / sum_s w_sn
        w_sn = p(theta_s) / q(theta_s)  prod over m != n of p(x_m | theta_s),   theta_s ~ q

    theta are the latents outside the plate of the data: the weights of a Bayesian regression or network, the parameters of a
    hierarchy. The weights w correct for any proposal q, the guide or a fitted one. Their tails are Pareto-smoothed, and the
    tail index k of each datum says whether its score is reliable.

    Where a datum also has latents z_n inside the plate, log p(x_n | theta_s) is estimated by `evidence`. The estimate is
    unbiased for p(x_n | theta_s), so the sums above remain right, and its noise is part of the stated errors.

    Data must be independent given their latents. A time series whose next value depends on the one before is not possible.

    :param model: a Pyro model with latents outside the plate of the data.
    :param guide: its guide, an autoguide or your own. It must draw theta first, then latents of the data, which may depend
        on theta.
    :param num_draws: S, draws of theta.
    :param proposal: the distribution from which theta is drawn. "fitted": a Gaussian or mixture fitted to p(theta | x) in
        unconstrained space, with wider tails and a share of 1/50 of the prior. "guide": the guide. "auto": "fitted" where
        theta is continuous and has no more than 200 numbers, otherwise "guide"; the result's `unchecked` says why.
    :param evidence: function from (model, guide) to an estimator of log p(x) that is unbiased for p(x), used for p(x_n |
        theta_s) where data have latents. `None`: proposals fitted to each datum and draw, with 100 weights; if these latents
        cannot be fitted, 300 draws of the guide.

    Call it with the model's arguments, which hold all data. It returns a `LeaveOneOutResult`, in nats, with numbers (B,) for
    the B data. It costs S decoder evaluations, times those of `evidence` where data have latents, and some for the fit. For
    data in batches use `pv.evaluate` with ``proposal="guide"`` and a seed, so that all batches use the same draws.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) if no latent is outside the plate; if the guide draws
        theta given latents of the data, or both in one draw.
    :raises LocalFitError: for ``proposal="fitted"`` with discrete theta, or latents without a fit.
    :raises OptionError: for `num_draws` below 1, another `proposal`, or a fitted proposal for data in batches.

    References:
    Vehtari, Gelman and Gabry (2017), "Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC",
    https://doi.org/10.1007/s11222-016-9696-4.
    Magnusson, Andersen, Jonasson and Vehtari (2019), "Bayesian leave-one-out cross-validation for large data",
    https://arxiv.org/abs/1904.10679.

    Example::

        def model(x, y):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(64), 0.1).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

        guide = pyro.infer.autoguide.AutoMultivariateNormal(model)
        guide(x, y)     # then train it
        loo = pv.LeaveOneOut(model, guide)(x, y)
        print(loo)
        loo.elpd, loo.std_error, loo.pareto_k       # (B,) each
        loo.sum()                                   # elpd of all data with its two errors
        batches = DataLoader(TensorDataset(x, y), batch_size=1000)
        guide_only = pv.LeaveOneOut(model, guide, proposal="guide", seed=0)
        pv.evaluate(guide_only, batches, args=lambda batch: batch)  # all of a batch is passed on, not x alone
    """

    num_draws: int = 1000
    proposal: Proposal = "auto"
    evidence: Callable[[Callable, Callable], Estimator] | None = None

    def check_options(self) -> None:
        self.num_draws = amount("num_draws", self.num_draws)
        one_of("proposal", self.proposal, Proposal)
        if self.evidence is not None:
            check_builder(self.evidence)
        if self.datum_plate is None:
            raise OptionError("datum_plate must name the plate of the data to leave out, got None")
        of_all: Any = {"prior_sites": self.prior_sites, "check_support": self.check_support, "takes_subsamples": True}
        self._joint = Pair(self.model, self.guide, datum_plate=None, **of_all)
        self._given: dict[tuple[str, bool], Pair] = {}
        makers = (FITTED_TO_DATA, DRAWN_BY_GUIDE) if self.evidence is None else (self.evidence,)
        self._estimators = [make(self.model, self.guide) for make in makers]
        if not all(isinstance(made, Estimator) for made in self._estimators):
            raise OptionError(
                "evidence must be a class of estimators or a function that builds one, as "
                f"functools.partial(pv.ImportanceSampling, num_particles=100), got {self.evidence!r}"
            )

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> LeaveOneOutResult:
        seed = checked_seed(self.seed)
        with self._joint.open(args, kwargs, seed) as joint:
            outside = Outside.of(joint, self.datum_plate)
            joint.set_noise(Noise.LEAVE_ONE_OUT, 0)
            first = joint.draw(1)
            known = outside.plain_values(joint, outside.values(first), 0)
            pair = self._pair_given(outside)
            with pair.open(args, kwargs, seed, known=known) as given:
                self._refuse_part(given, outside)
                with batch_noise(0):  # the same draws for all batches
                    sample, why_not = self._draws(joint, given, outside, sum(known[n].numel() for n in outside.latents))
                record = self._record(given, outside, sample, why_not, joint.cost)
        # stack level beyond the wrapper of torch.no_grad, so that the warning points at the caller
        warn_about(record, stacklevel=3)
        return record

    def _pair_given(self, outside: Outside) -> Pair:
        """The pair of model and guide of the data given theta; without a guide where the data have no latents."""
        lacking = [name for name in self.prior_sites if name in outside.latents]
        if lacking:
            raise OptionError(
                f"prior_sites= has {quoted(lacking)}, which are outside the plate '{outside.plate}': the guide must "
                "draw them"
            )
        key = outside.plate, bool(outside.inside)
        if key not in self._given:
            self._given[key] = Pair(
                self.model,
                self.guide if outside.inside else no_guide,
                datum_plate=outside.plate,
                prior_sites=self.prior_sites,
                check_support=self.check_support,
            )
        return self._given[key]

    def _refuse_part(self, given: Call, outside: Outside) -> None:
        """Raise for a part of the data: proposals are fitted to the posterior given all data."""
        part = given.structure.subsampled or noise.batch_number > 0
        if self.proposal != "guide" and part:
            raise OptionError(
                f"proposal='{self.proposal}' fits to all data, but this call has only a part of them, a subsampled "
                "plate or one batch of several: use proposal='guide', or call it with all data"
            )

    def _draws(self, joint: Call, given: Call, outside: Outside, dim: int) -> tuple[OutsideSample, str]:
        """Draws of theta, and why they are from the guide with "auto"."""
        if self.proposal == "guide":
            return from_guide(joint, outside, self.num_draws), ""
        if self.proposal == "auto" and dim > MOST_FITTED:
            why_not = f"{dim} numbers are more than the {MOST_FITTED} up to which 'auto' fits a covariance"
            return from_guide(joint, outside, self.num_draws), why_not
        try:
            return self._fitted(joint, given, outside), ""
        except (LocalFitError, NonFiniteError) as error:
            if self.proposal == "fitted":
                raise
            return from_guide(joint, outside, self.num_draws), str(error)

    def _fitted(self, joint: Call, given: Call, outside: Outside) -> OutsideSample:
        """Draws of theta from a proposal fitted to p(theta given all data)."""
        if not outside.inside:
            return fitted(joint, outside, self.num_draws)
        guide, model, _ = guide_draws(joint)
        inside = values_inside(joint.first_particle(model), outside)
        space = MarginalSpace(joint, outside, guide, model, inside, given.at_draws)
        sample = from_proposal(joint, outside, space, fit_outside(space, space.call), inside, self.num_draws)
        joint.cost += space.spent
        return sample

    def _record(self, given: Call, outside: Outside, sample: OutsideSample, why_not: str, cost: float) -> LeaveOneOutResult:
        rows, doubted, unchecked = [], [], {}
        estimators = list(self._estimators)
        for number, (first, length) in enumerate(pieces(given, len(sample), bool(outside.inside))):
            values = narrowed(sample.values, first, length)
            call = given.at_draws(values, length, noise_seed(given.seed, Noise.LEAVE_ONE_OUT, number))
            if outside.inside:
                try:
                    evidence = estimators[0].estimate(call)
                except LocalFitError as error:  # at the first draws, because it depends only on the kind of latents
                    if len(estimators) == 1:
                        raise
                    del estimators[0]
                    unchecked["fits of the latents of the data"] = str(error)
                    evidence = estimators[0].estimate(call)
                check_unbiased(evidence)
                row, bad = evidence.log_evidence, ~evidence.reliable
            else:
                drawn = call.draw(1)
                row = call.weigh(drawn, call.score({}, 1), 1).log_weight
                bad = torch.zeros_like(row, dtype=torch.bool)
            rows.append(row.reshape(length, -1))
            doubted.append(bad.reshape(length, -1))
            cost += call.cost * length
        rounding = None
        if not outside.inside:
            rounding, why_not_known = self._rounding(given, sample)
            unchecked |= why_not_known
        if why_not:
            unchecked["fitted proposal"] = why_not
        log_likelihood = torch.cat(rows)
        missed, why_not_searched = misses_mode(sample, log_likelihood)
        if why_not_searched:
            unchecked["search"] = why_not_searched
        return LeaveOneOutResult(
            log_likelihood=log_likelihood,
            log_prior=sample.log_prior,
            log_proposal=sample.log_proposal,
            draws={n: plain(sample.values[n], given.layout.event_dims[n]) for n in outside.latents},
            doubted=torch.cat(doubted),
            log_others=torch.zeros(len(sample), dtype=torch.float64, device=log_likelihood.device),
            method=sample.method,
            plate=outside.plate,
            full_size=outside.full_size,
            cost=cost,
            rounding=rounding,
            misses_mode=missed,
            index=given.index,
            seen=given.index,
            stripped_scales=given.structure.stripped_scales,
            local=type(estimators[0]).__name__ if outside.inside else "",
            unchecked=unchecked,
        )

    def _rounding(self, given: Call, sample: OutsideSample) -> tuple[Tensor | None, dict[str, str]]:
        """The change of a few exact log-likelihoods in float64, (P, N)."""
        few = min(len(sample), LOOKED_AT)
        call = given.at_draws(narrowed(sample.values, 0, few), few, given.seed)
        call.weigh(call.draw(1), call.score({}, 1), 1)
        shift, why = movement(call)
        return (None, {"precision": why}) if shift is None else (shift.reshape(few, -1), {})


def check_unbiased(evidence: Any) -> None:
    """Raise for a biased estimator: sums over draws average out the noise of p(x_n given theta), but not its bias."""
    bound = getattr(evidence, "bound", None)
    if not isinstance(evidence, Evidence) or bound not in ("lower", "exact"):
        raise OptionError(
            f"evidence must give an unbiased estimate of p(x), bound 'lower' or 'exact', got {type(evidence).__name__} with "
            f"bound {bound!r}: use AdaptiveImportanceSampling, ImportanceSampling without jackknife, or ExactEvidence"
        )


def pieces(call: Call, num_draws: int, has_latents: bool) -> Iterator[tuple[int, int]]:
    """Pieces of the draws: the index of the first and their number."""
    if not has_latents:
        yield from call.chunks(num_draws)
        return
    size = max(1, MOST_PAIRS // call.batch_size)
    for first in range(0, num_draws, size):
        yield first, min(size, num_draws - first)


def plain(value: Tensor, event_dim: int) -> Tensor:
    """(S, *plates, *event) without leading plates of size one."""
    while value.ndim - 1 > event_dim and value.shape[1] == 1:
        value = value.squeeze(1)
    return value
