"""Train a pair at several betas, and measure rate and distortion of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor
from tqdm import tqdm

from ..batches import NO_BATCH, ToArguments, arguments_of, check_loader, first_element
from ..errors import ArgumentError, EmptyBatchError, LazyGuideError, NonFiniteError, OptionError
from ..evaluation import over_batches, single_process
from ..evidence import AdaptiveImportanceSampling, Evidence, check_builder, mean_std_error
from ..isolation import eval_mode, isolated_store
from ..kernel import INFER, Pair
from ..noise import kept_random_state
from ..objectives import BetaTraceMeanField_ELBO
from ..options import check_function, flag, seed_or_none, whole_number
from ..records import Estimate, warn_about, without_warnings
from .rate_distortion import guide_terms, numbers_in
from .rate_distortion_curve import BetaSweep

ProgramPair = tuple[Callable, Callable]
NAMES = ("rate", "distortion", "elbo", "log_evidence")


def adam() -> Any:
    return Adam({"lr": 1e-3})


def beta_sweep(
    make_pair: Callable[[float], ProgramPair],
    loader: Iterable[Any],
    betas: Collection[float],
    *,
    num_epochs: int,
    optimizer: Callable[[], Any] = adam,
    objective: Callable[[float], Any] = BetaTraceMeanField_ELBO,
    evidence: Callable[[Callable, Callable], Callable[..., Evidence]] | None = None,
    test_loader: Iterable[Any] | None = None,
    args: ToArguments = first_element,
    progress: bool = True,
    seed: int | None = None,
    datum_plate: str | None = INFER,
    prior_sites: Collection[str] = (),
    check_support: bool = True,
) -> BetaSweep:
    r"""Train a new pair at every beta, and measure its rate, distortion and log p(x).

    Each pair minimises::

        loss = -E_q log p(x|z) + beta KL(q(z|x) to p(z))        at the optimum dD/dR = -beta

    The points show the rates and distortions that model and guide reach when both are trained (Alemi et al., 2018,
    https://arxiv.org/abs/1711.00464). `RateDistortion` computes the curve of one trained model with its best encoders.

    Every pair is trained by `pyro.infer.SVI` in a separate, empty parameter store, so pairs that use the same names do not
    share parameters. **Your parameter store is restored** on exit, also after an error. The stores of the pairs are returned
    in `stores`. Pairs are measured in eval mode and returned in the mode that they had after training.

    :param make_pair: function from beta to a new (model, guide), with new parameters. Called inside the empty store.
    :param loader: the training data, an iterable of batches that can be iterated repeatedly.
    :param betas: weights of the KL, finite and at least 0.
    :param num_epochs: passes over the loader, for every beta.
    :param optimizer: function that returns a new Pyro optimiser; by default Adam with a learning rate of 0.001.
    :param objective: function from beta to the loss, such as `BetaTraceMeanField_ELBO`, `BetaTrace_ELBO` or `lambda beta:
        pv.BetaTrace_ELBO(beta=pv.LinearAnnealing(1000, end=beta))`.
    :param evidence: function from (model, guide) to an estimator of log p(x); by default `AdaptiveImportanceSampling`.
    :param test_loader: the data on which pairs are measured; by default the training data.
    :param args: maps a batch to the tuple of the model's arguments, or to a dict of keywords; by default its first element.
    :param progress: show a progress bar.
    :param seed: fixes the initial values, the order of the data and the noise, the same for every beta, which makes the
        points comparable. The caller's random state is unchanged. `None` draws from that state.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.

    :returns: `BetaSweep`, with the betas in the given order. Rate and distortion are means over 100 draws of the guide per
        datum.
    :raises OptionError: for betas, counts or callables out of range, before anything is trained.
    :raises ArgumentError: if a tensor is passed as a loader, or a loader can be iterated only once; if `make_pair` does not
        return (model, guide), or returns one that shares parameters with another.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        before it is trained.
    :raises InvalidDataError: for NaN, values outside the support, an empty loader.
    :raises NonFiniteError: if the loss becomes NaN or infinite.

    Example::

        sweep = pv.beta_sweep(make_pair, loader, (0.5, 1, 2, 4), num_epochs=50, seed=0)
        print(sweep)
        model, guide = sweep.pairs[1]
    """
    betas = checked_betas(betas)
    flag("progress", progress)
    num_epochs, seed = whole_number("num_epochs", num_epochs), seed_or_none(seed)
    test_loader = loader if test_loader is None else test_loader
    for data in (loader, test_loader):
        check_again_and_again(data)
    for name, value in (("make_pair", make_pair), ("optimizer", optimizer), ("objective", objective)):
        check_function(name, value, "callable, to be used anew for every beta")
    if evidence is not None:
        check_builder(evidence)
    options: Any = {"datum_plate": datum_plate, "prior_sites": prior_sites, "check_support": check_support}
    estimator: Any = partial(AdaptiveImportanceSampling, **options) if evidence is None else evidence
    points: list[Point] = []
    bar = tqdm(total=len(betas) * num_epochs, desc="beta_sweep", unit="epoch", disable=not progress)
    with bar, single_process(), nullcontext() if seed is None else kept_random_state():
        for beta in betas:
            if seed is not None:
                pyro.set_rng_seed(seed % 2**32)
            bar.set_postfix_str(f"beta {beta:g}")
            with fresh_store():
                model, guide = checked_pair(make_pair(beta))
                pair = Pair(model, guide, **options)
                check_first_batch(pair, loader, args)
                svi = SVI(model, guide, optimizer(), objective(beta))
                num_updates = train(svi, loader, args, num_epochs, beta, bar)
                store = pyro.get_param_store().get_state()
                check_own_parameters(store, [point.store for point in points])
                with eval_mode(model, guide):
                    measured = measure(pair, estimator(model, guide), test_loader, args, seed)
            points.append(Point((model, guide), store, num_updates, *measured))
    for point in points:
        warn_about(point.evidence, stacklevel=2)
    return sweep_of(betas, points)


@dataclass
class Point:
    """A pair that was trained at one beta, with its measured numbers.

    :ivar own: rate, distortion and ELBO of the guide.
    """

    pair: ProgramPair
    store: Any
    num_updates: int
    own: list[Estimate]
    evidence: Evidence


def sweep_of(betas: list[float], points: Sequence[Point]) -> BetaSweep:
    columns = [[*point.own, point.evidence.mean()] for point in points]
    like = columns[0][0].value
    records = [point.evidence for point in points]

    def table(field: str) -> dict[str, Tensor]:
        return {name: torch.stack([getattr(row[i], field).to(like) for row in columns]) for i, name in enumerate(NAMES)}

    return BetaSweep(
        beta=like.new_tensor(betas),
        **table("value"),
        std_errors=table("std_error"),
        sampling_errors=table("sampling_error"),
        bound=records[0].bound,
        doubts=doubts_of(records),
        pairs=tuple(point.pair for point in points),
        stores=tuple(point.store for point in points),
        num_data=len(records[0]),
        num_updates=points[-1].num_updates,
    )


def doubts_of(records: list[Evidence]) -> dict[str, Tensor]:
    """By reason, the number of data in doubt of each record."""
    reasons = dict.fromkeys(reason for record in records for reason in record.doubts)
    found = {reason: [r.doubts.get(reason, torch.zeros(1)).sum() for r in records] for reason in reasons}
    return {reason: torch.stack(counts).long() for reason, counts in found.items()}


@contextmanager
def fresh_store() -> Iterator[None]:
    """Empty Pyro's parameter store inside, and restore it on exit."""
    with isolated_store():
        pyro.get_param_store().clear()
        yield


def train(svi: SVI, loader: Iterable[Any], args: ToArguments, num_epochs: int, beta: float, bar: Any) -> int:
    """Train for all epochs, and return the number of updates."""
    num_updates = 0
    for epoch in range(num_epochs):
        for batch in loader:
            positional, named = arguments_of(batch, args)
            loss = svi.step(*positional, **named)
            num_updates += 1
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss at beta = {beta:g} became {loss} in epoch {epoch + 1}: lower the learning rate of "
                    "`optimizer`, or look for scales that underflow to 0 in the pair that make_pair returns"
                )
        bar.update()
    return num_updates


def measure(
    pair: Pair, estimator: Callable[..., Evidence], loader: Iterable[Any], args: ToArguments, seed: int | None
) -> tuple[list[Estimate], Evidence]:
    """Rate, distortion and ELBO of the guide, and the record of log p(x), over the whole loader."""

    def run(*arguments: Any, **named: Any) -> tuple[list[tuple[Tensor, Tensor]], Evidence]:
        with torch.no_grad(), pair.open(arguments, named, seed) as call:
            rate, distortion = guide_terms(call)
            call.check_finite(-rate - distortion)
        with without_warnings():  # the warnings of the joined record cover all batches
            record = estimator(*arguments, **named)
        return [(terms.mean(0), mean_std_error(terms)) for terms in (rate, distortion, -(rate + distortion))], record

    own, records = zip(*over_batches(run, loader, args, of=pair, seed=seed), strict=True)
    columns = zip(*own, strict=True)
    return [Estimate.over_data(*map(torch.cat, zip(*column, strict=True))) for column in columns], Evidence.cat(records)


def check_first_batch(pair: Pair, loader: Iterable[Any], args: ToArguments) -> None:
    """Check data and structure before training. An autoguide has no parameters yet."""
    with kept_random_state():
        batch = next(iter(loader), None)
        if batch is None:
            raise EmptyBatchError(NO_BATCH)
        positional, named = arguments_of(batch, args)
        with suppress(LazyGuideError), eval_mode(pair.model, pair.guide), pair.open(positional, named, None):
            pass


def checked_pair(pair: Any) -> ProgramPair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(callable, pair)):
        raise ArgumentError(f"make_pair must return (model, guide), both callable, got {type(pair).__name__}")
    return pair[0], pair[1]


def check_own_parameters(store: Any, earlier: Iterable[Any]) -> None:
    """Raise for parameters that share memory with an earlier pair: `pyro.param` trains a given initial value in place."""
    if any(addresses(store) & addresses(other) for other in earlier):
        raise ArgumentError(
            "two pairs of make_pair share parameters, so training of the second started where the first had stopped: build "
            "all modules and initial values inside make_pair"
        )


def addresses(store: Any) -> set[int]:
    """The memory addresses of the parameters of a store."""
    return {p.untyped_storage().data_ptr() for p in store["params"].values() if p.numel()}


def check_again_and_again(loader: Iterable[Any]) -> None:
    check_loader(loader)
    if iter(loader) is loader:
        raise ArgumentError("the data are iterated once for every epoch: pass a DataLoader or a list, not an iterator")


def checked_betas(betas: Collection[float]) -> list[float]:
    numbers = numbers_in(betas)
    if not numbers or not all(0 <= beta < math.inf for beta in numbers):
        raise OptionError(f"betas must be finite numbers of at least 0, at least one, got {betas!r}: e.g. (0.5, 1, 2)")
    return numbers
