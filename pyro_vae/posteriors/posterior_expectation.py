"""E[f(z) given x] for any function of the latents, with the value under the guide."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from ..errors import OptionError
from ..evidence import Estimator
from ..kernel import Call
from ..noise import NOISE_BLOCK, Noise
from ..ops import pareto_k_threshold
from ..options import amount
from ..records import FEW
from .expectation import JUDGED, Expectation
from .function import Function, check_results, drawn_values
from .weighted_draws import WeightedDraws, weighted_draws
from .weighted_mean import WeightedMean

GUIDE_BLOCKS = 100  # the first noise block of draws of the guide
FEWEST_BEHIND = 5.0  # draws that must determine an error


@dataclass(repr=False, eq=False)
class PosteriorExpectation(Estimator):
    r"""E[f(z) given x], the posterior expectation of any function of the latents, with its Monte Carlo error::

        E[f(z) given x] ~ sum_k w_k f(z_k) / sum_k w_k,    w_k = p(x, z_k) / r(z_k),  z_k ~ r

    r are the proposals that `AdaptiveImportanceSampling` fits to each datum, after a search for modes. For latents that
    cannot be fitted (discrete latents, masks that depend on draws) r is the guide. The weights are those of log p(x),
    Pareto-smoothed (Vehtari et al. 2024). The ratio is consistent: its bias falls as 1/K and is a small part of the error.
    The record also has E_q[f(z)] under the guide, the bias of the guide, and their errors.

    The error is that of the delta method for a ratio of means. It takes into account that the components of a proposal have
    fixed shares of the draws. It is right if weight times f has a finite variance, which no sample can prove: `doubts` names
    the data for which tails or too few draws are evidence against it. A missed mode changes the value by its share of p(x)
    times the difference of f there. For a precise f this may be many errors, even where log p(x) changes by less than one.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites. The fits start at it.
    :param f: function from a dict of latents by site to a tensor. Each value has its shape in the program with an axis of K
        particles in front: (K, B, D) for a vector in the plate of the data, (K, P, B) for a number in a plate of P inside a
        datum. The result has the shape (K, B, F); with `datum_plate=None`, (K, F). Truth values, as of `lambda z: z["z"] >
        0`, give a probability; whole numbers are converted. f runs without gradients and may call networks in eval mode:
        `lambda z: vae.decode(z["latent"]).mean` gives reconstructions under the posterior. Sites that the guide enumerates
        are among the latents, and are summed out exactly. Masked values are NaN.
    :param num_particles: K, weighted draws per datum, and as many of the guide; at least 1,000 where latents cannot be
        fitted.

    Call it with the model's arguments. It returns `Expectation` for the B data of the call, with values (B, F). Memory does
    not grow with K, apart from (K, B) weights: these are computed first, then the draws are made again from the same noise,
    and f is called on pieces of them. `.evidence` has log p(x), (B,), and its doubts.

    :raises OptionError: for an f that does not return a tensor (K, B, F), or mixes particles.
    :raises BatchCouplingError: for an f that mixes data.
    :raises HiddenRandomnessError: for an f that draws random numbers.
    :raises NonFiniteError: for an f that is NaN or infinite at a draw of positive weight.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.

    Reference: Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto Smoothed Importance Sampling",
    https://jmlr.org/papers/v25/19-556.html.

    Example::

        result = pv.PosteriorExpectation(model, guide, lambda z: z["latent"] > 0)(x)
        print(result)
        result.value, result.std_error     # (B, D) each, P(z > 0 given x)
        result.bias                        # (B, D), the guide's own value minus that
    """

    f: Callable[[dict[str, Tensor]], Tensor] = field(kw_only=False)
    _: KW_ONLY
    num_particles: int = 1000

    def check_options(self) -> None:
        if not callable(self.f):
            raise OptionError(f"f must be a function of the latents, such as lambda z: z['z'], got {type(self.f).__name__}")
        self.num_particles = amount("num_particles", self.num_particles)

    def estimate(self, call: Call) -> Expectation:
        function = Function(call, self.f)
        draws = weighted_draws(call, self.num_particles)
        function.kept = draws.kept
        centre = centre_of(function, draws)
        posterior = WeightedMean(centre, len(draws), draws.num_origins)
        guide = WeightedMean(centre, len(draws) if draws.of_guide else self.num_particles)
        average(function, draws, posterior, guide if draws.of_guide else None)
        shared = posterior.variance_of_f / len(draws)  # of the mean under the guide and the weighted mean, on the same draws
        if not draws.of_guide:
            shared = torch.zeros_like(shared)
            average_of_guide(call, function, guide)
        exact = not call.structure.latents
        variance = torch.zeros_like(posterior.variance) if exact else posterior.variance
        bias_variance = (guide.variance + variance - 2 * shared).clamp(min=0.0)
        return record_of(call, function, draws, posterior, guide, variance, bias_variance)


def centre_of(function: Function, draws: WeightedDraws) -> Tensor:
    """(B, F), the weighted mean over the first block, independent of its pieces; equal to f where f is constant."""
    block = next(draws.blocks())
    some = moved = total = torch.zeros((), dtype=torch.float64)
    for first, length in function.chunks(len(block)):
        result = function(narrowed(block.values, first, length), length)
        weight = draws.weights[first : first + length].unsqueeze(-1)
        if first == 0:
            some = result[0].nan_to_num()
            moved = total = torch.zeros_like(some)
        share = torch.where(result.isfinite(), weight, 0.0)
        moved = moved + (share * torch.where(share > 0, result - some, 0.0)).sum(0)
        total = total + share.sum(0)
    return some + (moved / total).nan_to_num()


def average(
    function: Function,
    draws: WeightedDraws,
    posterior: WeightedMean,
    guide: WeightedMean | None = None,
    *,
    may_be_nan: bool = False,
) -> None:
    """Add all draws to the weighted mean, and also to the mean under the guide if they are draws of the guide.

    :param may_be_nan: whether f may have numbers that are NaN at all draws.
    """
    may_hide = may_be_nan or bool(function.kept)
    for block in draws.blocks():
        for first, length in function.chunks(len(block)):
            result = function(narrowed(block.values, first, length), length)
            weight = draws.weights[block.first + first : block.first + first + length]
            check_results(result, weight, "from the posterior", may_hide=may_hide)
            origin = block.origin[first : first + length]
            posterior.add(result, weight, origin, new_block=first == 0)
            if guide is not None:
                equal = torch.full_like(weight, 1 / len(draws))
                check_results(result, equal, "of the guide", may_hide=may_hide)
                guide.add(result, equal, torch.zeros_like(origin))


def average_of_guide(call: Call, function: Function, guide: WeightedMean) -> None:
    """Add draws of the guide to the mean under the guide. Sites that it enumerates are drawn."""
    for block, start in enumerate(range(0, guide.num_particles, NOISE_BLOCK)):
        size = min(NOISE_BLOCK, guide.num_particles - start)
        call.set_noise(Noise.POSTERIOR, GUIDE_BLOCKS + block)
        values = drawn_values(call, size)
        for first, length in function.chunks(size):
            result = function.plain(function.program_values(narrowed(values, first, length)), length)
            weight = result.new_full(result.shape[:2], 1 / guide.num_particles)
            check_results(result, weight, "of the guide", may_hide=bool(function.kept))
            guide.add(result, weight, torch.zeros_like(weight, dtype=torch.long))


def narrowed(values: Mapping[str, Tensor], first: int, length: int) -> dict[str, Tensor]:
    return {name: value[first : first + length] for name, value in values.items()}


def record_of(
    call: Call,
    function: Function,
    draws: WeightedDraws,
    posterior: WeightedMean,
    guide: WeightedMean,
    variance: Tensor,
    bias_variance: Tensor,
) -> Expectation:
    weights_ess = draws.weights.sum(0).square() / draws.weights.square().sum(0)
    known = (variance > 0) & (posterior.num_behind_error >= FEWEST_BEHIND)
    ess = torch.where(known, posterior.variance_of_f / variance, weights_ess.unsqueeze(-1))
    std_error, guide_std_error = variance.sqrt(), guide.variance.sqrt()
    if function.is_event:
        std_error = torch.fmax(std_error, (1 / weights_ess).unsqueeze(-1))
        guide_std_error = torch.fmax(guide_std_error, guide_std_error.new_tensor(1 / guide.num_particles))
        bias_variance = torch.fmax(bias_variance, std_error.square())
    pareto_k = posterior.pareto_k(draws.evidence.pareto_k)
    exact = not call.structure.latents

    doubts = {} if exact else doubts_of(posterior, draws, pareto_k, function.is_event)
    shape = (call.batch_size, *function.shape)

    def shaped(numbers: Tensor) -> Tensor:
        dtype = draws.evidence.log_evidence.dtype if function.dtype is None else function.dtype
        return numbers.reshape(shape).to(dtype)

    return Expectation(
        value=shaped(posterior.mean),
        std_error=shaped(std_error),
        ess=shaped(ess),
        pareto_k=shaped(pareto_k),
        guide_value=shaped(guide.mean),
        guide_std_error=shaped(guide_std_error),
        bias_std_error=shaped(bias_variance.sqrt()),
        evidence=draws.evidence,
        is_probability=function.is_event,
        num_particles=len(draws),
        cost=call.cost,
        in_doubt=torch.stack([*doubts.values(), torch.zeros_like(pareto_k, dtype=torch.bool)]).any(0).reshape(shape),
        checks={reason: flags.double().mean(-1) > FEW for reason, flags in doubts.items()},
    )


def doubts_of(posterior: WeightedMean, draws: WeightedDraws, pareto_k: Tensor, is_event: bool) -> dict[str, Tensor]:
    """(B, F) by reason."""
    enough = posterior.is_constant | (posterior.num_behind_error >= FEWEST_BEHIND) | posterior.mean.isnan()
    few = ~enough | (posterior.is_constant & posterior.varies) | (len(draws) == 1)
    doubts = {"few draws": few & (not is_event)}
    if len(draws) < JUDGED:
        return doubts
    threshold = pareto_k_threshold(len(draws))
    of_weights = draws.evidence.pareto_k > threshold
    return {"function tails": (pareto_k > threshold) & ~of_weights.unsqueeze(-1), **doubts}
