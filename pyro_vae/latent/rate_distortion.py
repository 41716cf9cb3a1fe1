"""The rate-distortion curve of one trained model, by annealed importance sampling over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batches import ToArguments, first_element
from ..errors import NonFiniteError, OptionError
from ..evaluation import Folder, OnError, over_loader, rank_and_size
from ..evidence import AnnealedChains, Annealing, OfPair, State
from ..kernel import Call, narrow_record
from ..noise import NOISE_BLOCK, Noise
from ..ops import log_mean_exp, log_mean_exp_std_error
from ..options import amount, is_real, plain_float
from ..records import Estimate, Result, warn_about
from .rate_distortion_curve import RateDistortionCurve
from .refusals import warn_if_coarse
from .sums import Moments

NUM_POINTS = 20  # reported points after the prior, where no betas are given
# The log-likelihood varies most near the prior, like 1 / t where t is the power of the likelihood. Steps even in t^(1/4)
# (reported points: in t^(1/3)) keep within a factor two or so of the best schedule from weak to very strong likelihoods.
STEP_POWER, POINT_POWER = 4, 3
OWN_NOISE = 2  # noise block of the draws for the guide's point; earlier blocks belong to the fit


@dataclass(repr=False, eq=False, kw_only=True)
class RateDistortion(OfPair):
    r"""The rate-distortion curve of a trained model: the least distortion of x for each rate of z, in nats.

    The encoder with the least rate + distortion / beta is known, up to its constant, without training::

        q_beta(z|x) = p(z) p(x|z)^(1/beta) / Z_beta(x)      dD/dR = -beta along the curve
        D = -E_q log p(x|z)                                 R = KL(q to p(z))                   nats

    from the prior (beta infinite, R = 0) through the exact posterior (beta = 1) to an autoencoder (beta to 0). Annealed
    chains from the prior (see `AnnealedImportanceSampling`) pass through all of these encoders.

    Let q(z|x) be the distribution of the states at temperature t = 1 / beta, and w = prod_i p(x|z_(i-1))^(t_i - t_(i-1)) the
    weights so far. The density of the whole forward chain, divided by that of a reverse chain from an exact draw, is Z_beta
    / w. For a reverse chain from a draw of p(z) it is p(x|z)^t / w. A KL divergence does not increase when variables are
    marginalised out, so::

        KL(q to p(z)) <= R = E[ t log p(x|z) - log w ]          D = -E log p(x|z), both over chains

    (Huang, Makhzani, Cao and Grosse, 2020, https://arxiv.org/abs/2008.06653). In expectation, each point (R, D) is therefore
    on or above the true curve, and approaches it as steps are added. Likewise, at the tangent of the curve::

        -(R + t D) = E log w <= log Z_beta(x)       at beta = 1 the bound on log p(x)

    The distance from the true curve is not known for real data. Check whether more steps change the points, and whether
    `bound` at beta = 1 is far below `log_evidence`. For data simulated from the model, use `BidirectionalMonteCarlo`. No
    encoder for this decoder and prior is below the curve. The point of the guide, (KL, distortion), is above it by what the
    guide loses. Where a point of the chains is above that of the guide, the chains are too short, and a `ConvergenceWarning`
    says so.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites. Its point is compared with the curve, and the fits that shape the
        transitions of the chains start at it. The curve depends on the model only.
    :param betas: the betas of the reported points, positive; infinity and 1 are added. For beta below 1 the chains continue
        beyond the posterior. By default 1 / beta = (k / 20)^3 for k = 0 to 20.
    :param num_steps: T, temperatures of the chains from the prior to the smallest beta, the same for all data.
    :param num_chains: C, chains per datum, at least 2.
    :param num_leapfrog: gradients per transition.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes every
        batch one datum.
    :param prior_sites: must be empty here, because these sites would be drawn anew at every step.

    Call it with a loader (any iterable of batches). Further arguments are `args`, `progress`, `checkpoint` and `on_error`,
    as in `evaluate`. `args` maps a batch to the tuple of the model's arguments or to a dict of keywords; by default it takes
    the batch's first element. It returns `RateDistortionCurve`. Memory does not grow with the data or with T.

    An enumerated site is summed out of p(x|z) and p(z). The loss of a guide that enumerates it counts as rate.

    :raises LocalFitError: for latents that are not continuous.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch or loader.
    :raises NonFiniteError: where the likelihood of some draw of the prior is zero: the bound is infinite then.
    :raises ArgumentError: if a tensor is passed as the loader.
    :raises OptionError: for options out of range.

    Example::

        curve = pv.RateDistortion(vae.model, vae.guide)(DataLoader(TensorDataset(x), 100))
        print(curve)
        curve.beta, curve.rate, curve.distortion      # (P,) each
    """

    betas: Collection[float] | None = None
    num_steps: int = 500
    num_chains: int = 16
    num_leapfrog: int = 1

    def check_options(self) -> None:
        amount("num_chains", self.num_chains, lowest=2)
        names = ("num_steps", "num_chains", "num_leapfrog", "prior_sites")
        options: Any = {name: getattr(self, name) for name in names}
        self._chains = AnnealedChains(self.model, self.guide, **options, start="prior", progress=False)
        self.num_steps, self.num_chains = self._chains.num_steps, self._chains.num_chains
        self._reported = reported_betas(self.betas)
        self.betas = None if self.betas is None else self._reported
        self._powers = [1 / beta for beta in self._reported]
        self._grid, self._places = annealing_grid(self._powers, self.num_steps)

    @torch.no_grad()
    def __call__(
        self,
        loader: Iterable[Any],
        *,
        args: ToArguments = first_element,
        progress: bool = True,
        checkpoint: Folder | None = None,
        on_error: OnError = "raise",
    ) -> RateDistortionCurve:
        sums = CurveSums()

        def terms(*arguments: Any, **named: Any) -> CurveTerms:
            with self._pair.open(arguments, named, self.seed) as call:
                return self._terms(call)

        kept: Any = {"checkpoint": checkpoint, "on_error": on_error}
        over_loader(terms, loader, args, of=self, seed=self.seed, progress=progress, each=sums.add, **kept)
        columns = sums.estimates()
        num_points = len(self._reported)
        names = ("rate", "distortion", "bound", "excess")
        parts = {name: slice(i * num_points, (i + 1) * num_points) for i, name in enumerate(names)}
        own = [at(columns, 4 * num_points + i) for i in range(4)]
        curve = RateDistortionCurve(
            beta=columns.value.new_tensor(self._reported),
            **{name: columns.value[part] for name, part in parts.items()},
            std_errors={name: columns.std_error[part] for name, part in parts.items()},
            sampling_errors={name: columns.sampling_error[part] for name, part in parts.items()},
            guide_rate=own[0],
            guide_distortion=own[1],
            elbo=own[2],
            log_evidence=own[3],
            acceptance=sums.acceptance / sums.num_data,
            num_data=sums.num_data,
            num_steps=self.num_steps,
            num_chains=self.num_chains,
            cost=sums.cost / sums.num_data,
            support_checked=self._pair.check_support,
        )
        if rank_and_size()[0] == 0:
            # stack level beyond the wrapper of torch.no_grad, so that the warning points at the caller
            warn_about(curve, stacklevel=3)
        return curve

    def _terms(self, call: Call) -> CurveTerms:
        rate, distortion = guide_terms(call)
        call.check_finite(-rate)  # before any chain runs
        run = Annealing(call, self._chains, torch.tensor(self._grid, dtype=rate.dtype, device=rate.device))
        rates, distortions, bounds, excesses = [], [], [], []
        evidence: list[tuple[Tensor, Tensor]] = []

        def visit(step: int, state: State, log_weight: Tensor) -> None:
            if step not in self._places:
                return
            power = self._powers[self._places[step]]
            log_likelihood = state.log_joint - state.log_start
            distortions.append(mean_and_variance(-log_likelihood))
            # At the prior the rate is zero for any likelihood.
            rates.append(mean_and_variance(power * log_likelihood - log_weight if power else log_weight))
            bounds.append(mean_and_variance(log_weight))
            of_chains, of_guide = bounds[-1], mean_and_variance(rate + power * distortion)
            excesses.append((-of_chains[0] - of_guide[0], of_chains[1] + of_guide[1]))
            if power == 1:
                evidence.append((log_mean_exp(log_weight, 0), log_mean_exp_std_error(log_weight).square()))

        _, acceptance, _ = run.forward(visit)
        own = [mean_and_variance(terms) for terms in (rate, distortion, -(rate + distortion))]
        columns = [*rates, *distortions, *bounds, *excesses, *own, *evidence]
        value, variance = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
        check_rates(value)
        return CurveTerms(value, variance, acceptance, call.cost)


@dataclass(frozen=True, eq=False, repr=False)
class CurveTerms(Result):
    """Means over chains or draws and their Monte Carlo variances, (B, columns); acceptance (B,); cost per datum."""

    value: Tensor
    variance: Tensor
    acceptance: Tensor
    cost: float


class CurveSums:
    """Sums over the data of all batches: memory does not grow with the data."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.num_data, self.acceptance, self.cost = 0, 0.0, 0.0
        self._dtype = torch.get_default_dtype()

    def add(self, terms: CurveTerms) -> None:
        self._dtype = terms.value.dtype
        self.moments.add(terms.value, terms.variance, torch.ones_like(terms.value, dtype=torch.bool))
        self.num_data += len(terms.value)
        self.acceptance += float(terms.acceptance.sum())
        self.cost += terms.cost * len(terms.value)

    def estimates(self) -> Estimate:
        """The means of all columns with their errors, in one `Estimate` of tensors."""
        moments = self.moments
        parts = (moments.mean, moments.mean_std_error, moments.mean_sampling_error)
        return Estimate(*(part.to(self._dtype) for part in parts))


def at(columns: Estimate, i: int) -> Estimate:
    return Estimate(columns.value[i], columns.std_error[i], columns.sampling_error[i])


def guide_terms(call: Call) -> tuple[Tensor, Tensor]:
    """Rate and distortion of draws of the guide, (K, B) each, K = 100: log q - log p(z) and -log p(x given z).

    Enumerated sites are summed out of p(x given z). The guide's loss by them counts as rate, so that the two add up to minus
    the ELBO.
    """
    warn_if_coarse(call)
    call.set_noise(Noise.GUIDE, OWN_NOISE)
    guide = call.draw(NOISE_BLOCK)
    rates, distortions = [], []
    for first, length in call.chunks(NOISE_BLOCK):
        part = narrow_record(guide, call.layout, first, length)
        weights = call.weigh(part, call.score(call.latent_values(part), length), length)
        distortions.append(weights.log_marginal_prior - weights.log_joint)
        rates.append(-weights.elbo - distortions[-1])
    return torch.cat(rates), torch.cat(distortions)


def mean_and_variance(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over (C, B) and the Monte Carlo variance of it, (B,) each."""
    return terms.mean(0), terms.var(0) / len(terms)


def check_rates(value: Tensor) -> None:
    bad = ~value.isfinite().all(1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"rate or distortion of {int(bad.sum())} of {len(bad)} data is not finite: some draws of the prior give them a "
            "likelihood of zero, and then the distortion there and every bound on a rate are infinite. Use a likelihood "
            "that is positive everywhere (clamp its probabilities or its scale)"
        )


def reported_betas(betas: Collection[float] | None) -> list[float]:
    """The betas in falling order, each once, with infinity and 1."""
    if betas is None:
        return [math.inf, *((NUM_POINTS / k) ** POINT_POWER for k in range(1, NUM_POINTS + 1))]
    given = numbers_in(betas)
    if not given or not all(beta > 0 and math.isfinite(1 / beta) for beta in given):
        raise OptionError(f"betas must be positive numbers, at least one, got {betas!r}: e.g. (8, 4, 2, 1, 0.5)")
    return sorted({math.inf, 1.0, *given}, reverse=True)


def numbers_in(betas: Any) -> list[float]:
    """The betas as floats; NaN for an entry that is no number, empty where `betas` is no collection."""
    known = betas.tolist() if isinstance(betas, Tensor) and betas.ndim == 1 and not betas.is_meta else betas
    if isinstance(known, Tensor) or not isinstance(known, Iterable):
        return []
    return [plain_float(beta) if is_real(beta) or isinstance(beta, Tensor) else math.nan for beta in known]


def annealing_grid(powers: list[float], num_steps: int) -> tuple[list[float], dict[int, int]]:
    """(Temperatures (T + 1,) that contain all `powers`, which rise from 0; {step: index of the power reached there}).

    Steps are even in the fourth root, as nearly as whole steps between the powers allow.
    """
    last = len(powers) - 1
    if num_steps < last:
        raise OptionError(f"num_steps must be at least the number of reported betas, {last}, got {num_steps}")
    roots = [power ** (1 / STEP_POWER) for power in powers]
    places = [0]
    for i in range(1, last + 1):
        nearest = round(num_steps * roots[i] / roots[-1])
        places.append(min(max(nearest, places[-1] + 1), num_steps - (last - i)))
    grid = [0.0]
    for i in range(1, last + 1):
        count = places[i] - places[i - 1]
        step = (roots[i] - roots[i - 1]) / count
        grid += [(roots[i - 1] + j * step) ** STEP_POWER for j in range(1, count)] + [powers[i]]
    return grid, {place: i for i, place in enumerate(places)}
