"""`refit_guide`: train the guide of a frozen model further, with the gaps before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from tqdm import tqdm

from ..batches import NO_BATCH, ToArguments, arguments_of, check_loader, first_element, picked
from ..errors import ArgumentError, EmptyBatchError
from ..evaluation import evaluate, single_process
from ..evidence import Evidence, simulate_arguments
from ..gaps import Gaps, InferenceGaps
from ..isolation import eval_mode
from ..kernel import INFER, Pair
from ..noise import checked_seed, kept_random_state
from ..options import amount, flag, seed_or_none, whole_number
from ..records import warn_about, without_warnings
from ..training import EarlyStopping, KeptState
from .frozen_model import FrozenModel, check_trainable
from .guide_training import GuideTraining, check_loss, check_optim, default_loss
from .refit import Refit, Stopped


def refit_guide(
    model: Callable,
    guide: Callable,
    loader: Iterable[Any],
    optim: Any,
    *,
    test: Iterable[Any],
    num_epochs: int,
    other: Callable | None = None,
    held_out: Iterable[Any] | None = None,
    every: int = 100,
    patience: int = 10,
    simulated: int = 0,
    loss: Any = None,
    args: ToArguments = first_element,
    evidence: Callable[[Callable, Callable], Callable[..., Evidence]] | None = None,
    num_data: int = 300,
    num_particles: int = 500,
    seed: int | None = None,
    datum_plate: str | None = INFER,
    prior_sites: Collection[str] = (),
    check_support: bool = True,
    progress: bool = True,
) -> Refit:
    r"""Train a guide further with a frozen model, and measure how much of its amortization gap that closes::

        A_test = optimisation + capacity + generalisation        A = L[q*] - L[q], the amortization gap

    The gaps of training and test data are measured before and after, by `InferenceGaps` with the same data and seed. `Refit`
    has the three parts: what further training closes on training data, what the encoder loses there nevertheless, and what
    it loses in addition on new data (Cremer, Li and Duvenaud, 2018, https://arxiv.org/abs/1801.03558; Zhang, Hayes and
    Barber, 2022, https://arxiv.org/abs/2205.11640).

    **The guide is trained in place**, as by `SVI`; its mode is restored afterwards. **The model does not change**:
    parameters on which log p(x, z) depends have no gradient and are not passed to the optimiser, whichever program registers
    them. If the guide depends on such a parameter too, it stays frozen (`Refit.shared` names it). The model runs in eval
    mode, so that batch norm and dropout are off, and the guide in train mode. At the end log p(x, z) is compared with its
    value before, bit by bit.

    A keyboard interrupt ends the training, not the call: the best guide so far is kept and measured. After an error, the
    guide is restored to the best kept state, or to its initial state.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites: a function, a module, an autoguide.
    :param loader: the training data, an iterable of batches that can be iterated repeatedly. Gaps on training data are
        measured on these.
    :param optim: an optimiser of Pyro, as for `SVI`, or `FusedOptim`; learning-rate schedulers step once per epoch. The
        optimiser of an earlier training continues with its momenta; a new one starts without.
    :param test: data for the gaps only, which neither training nor stopping uses.
    :param num_epochs: passes over the loader, at most.
    :param other: another guide of the same latents to train in place of `guide`, such as a larger network or a richer
        family. Training starts from its current parameters. The gaps before are those of `guide`, which is not changed.
    :param held_out: further data for `EarlyStopping`: training ends when their ELBO no longer rises by more than its error,
        and the guide of the best look is kept. Without them, the guide after the last epoch is kept.
    :param every: updates from one look at `held_out` to the next.
    :param patience: looks in a row without improvement after which to stop.
    :param simulated: updates on data simulated from the model after each update on a batch. Simulated data are always new,
        so the encoder cannot overfit them; this reduces the loss on new data.
    :param loss: the objective, of `pyro_vae` or Pyro. By default the ELBO in the form that the pair needs: with an analytic
        KL (`BetaTraceMeanField_ELBO`), sums over enumerated sites (`BetaTraceEnum_ELBO`) or baselines
        (`BetaTraceGraph_ELBO`).
    :param args: function from a batch to the tuple of the model's arguments, or to a dict of keywords; by default it takes
        the batch's first element.
    :param evidence: as in `InferenceGaps`.
    :param num_data: gaps are measured on about this many data, in whole batches spread evenly over a loader.
    :param num_particles: as in `InferenceGaps`.
    :param seed: fixes all noise, including that of loaders that shuffle; the caller's random state is unchanged. `None`
        draws from that state.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes every
        batch one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.
    :param progress: show a progress bar.

    :returns: a `Refit`, nats per datum.
    :raises OptionError: for options out of range, an optimiser that is not one of Pyro's, or a guide without parameters
        registered with Pyro that the model does not use.
    :raises ArgumentError: if a loader is a tensor or can be iterated only once, or if `args` does not return a tuple or a
        dict.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        before it is trained; after training, if the model has changed with the guide.
    :raises NonFiniteError: if the loss becomes NaN or infinite.
    :raises InvalidDataError: for NaN, values outside the support, an empty loader.

    Example::

        optim = pyro.optim.Adam({"lr": 1e-3})
        refit = pv.refit_guide(vae.model, vae.guide, train_loader, optim, test=test_loader, num_epochs=200)
        print(refit)
        refit.plot()
    """
    check_loaders(loader=loader, test=test, **({} if held_out is None else {"held_out": held_out}))
    check_optim(optim)
    flag("progress", progress)
    num_epochs, num_data = whole_number("num_epochs", num_epochs), whole_number("num_data", num_data)
    simulated, seed = amount("simulated", simulated, lowest=0), seed_or_none(seed)
    every, patience = whole_number("every", every), whole_number("patience", patience)
    shared: Any = {"datum_plate": datum_plate, "prior_sites": prior_sites, "check_support": check_support}
    trained = guide if other is None else other
    options: Any = {"num_particles": num_particles, "evidence": evidence, **shared}
    before, after = (InferenceGaps(model, program, **options) for program in (guide, trained))
    looks: Any = {"every": every, "patience": patience, "args": args, "seed": 0 if seed is None else seed, **shared}
    stopping = None if held_out is None else EarlyStopping(model, trained, held_out, **looks)
    with (
        nullcontext() if seed is None else kept_random_state(),
        tqdm(total=num_epochs, unit="epoch", disable=not progress) as bar,
        without_warnings(),
        single_process(),  # each process trains separately
    ):
        if seed is not None:
            pyro.set_rng_seed(seed % 2**32)
        noise = checked_seed(seed)  # the same data of a subsampled plate both times, and the same draws
        measured = {"test": picked(test, num_data, args, datum_plate)[0]}
        measured["train"] = picked(loader, num_data, args, datum_plate)[0]
        bar.set_description("gaps before")
        found = measure(before, guide, measured, args, noise)
        bar.set_description("refit")
        training, kept = prepared(model, trained, loader, optim, loss, stopping, simulated, args, shared)
        start = time.perf_counter()
        stopped = train(training, kept, loader, args, num_epochs, bar)
        seconds = time.perf_counter() - start
        bar.set_description("gaps after")
        again = measure(after, trained, measured, args, noise)
    refit = Refit(
        **{f"{name}_before": record for name, record in found.items()},
        **{f"{name}_after": record for name, record in again.items()},
        history=None if stopping is None else stopping.history(),
        stopped=stopped,
        num_updates=training.num_updates,
        num_epochs=training.num_epochs,
        trained=tuple(training.trained),
        shared=tuple(sorted(training.frozen.shared)),
        took_over=other is not None,
        seconds=seconds,
    )
    warn_about(refit, stacklevel=2)
    return refit


def measure(
    estimator: InferenceGaps, guide: Callable, batches: dict[str, list[Any]], args: ToArguments, seed: int
) -> dict[str, Gaps]:
    """The gaps of each list of batches, in eval mode."""
    with eval_mode(estimator.model, guide):
        return {n: evaluate(estimator, part, args=args, progress=False, seed=seed) for n, part in batches.items()}


def prepared(
    model: Callable,
    guide: Callable,
    loader: Iterable[Any],
    optim: Any,
    loss: Any,
    stopping: EarlyStopping | None,
    simulated: int,
    args: ToArguments,
    shared: dict[str, Any],
) -> tuple[GuideTraining, KeptState]:
    """The training, checked on the first batch, and its initial state."""
    with kept_random_state():
        batch = next(iter(loader), None)
    if batch is None:
        raise EmptyBatchError(NO_BATCH)
    positional, named = arguments_of(batch, args)
    kept = KeptState(model, guide)
    with kept.finding():
        frozen = FrozenModel(model, guide, positional, named)  # also runs an autoguide for the first time
    with eval_mode(model, guide), Pair(model, guide, **shared).open(positional, named, 0) as call:
        loss = default_loss(call, shared["prior_sites"], shared["datum_plate"]) if loss is None else check_loss(loss)
        simulate = partial(simulated_arguments, model, datum_plate=shared["datum_plate"], fixed=call.fixed)
    check_trainable(frozen)
    if simulated:
        simulate(positional, named)  # raises for models that cannot be simulated, before training
    kept.keep()
    return GuideTraining(model, guide, loss, optim, frozen, simulate, simulated, stopping), kept


def simulated_arguments(model: Callable, args: tuple, kwargs: dict[str, Any], **options: Any) -> Any:
    with torch.no_grad():
        return simulate_arguments(model, args, kwargs, seed=None, **options)[1:]


def train(
    training: GuideTraining, kept: KeptState, loader: Iterable[Any], args: ToArguments, num_epochs: int, bar: Any
) -> Stopped:
    """Run the training and keep the best guide, or restore the old one if the model has changed."""
    stopping = training.stopping
    try:
        with training.frozen.held(), poutine.block(), torch.enable_grad():  # whatever the call stands in
            try:
                stopped = training.run(loader, args, num_epochs, bar)
            except KeyboardInterrupt:
                stopped = "interrupted"
            training.last_look()
        restore_best(stopping)
    except BaseException:
        restore_best(stopping, kept)
        raise
    try:
        training.frozen.check_unchanged()
    except BaseException:
        kept.put_back()
        raise
    return stopped


def restore_best(stopping: EarlyStopping | None, start: KeptState | None = None) -> None:
    """The best guide of the looks; without looks the one of the start, where that is given."""
    if stopping is not None and bool(stopping.history().at_rest.any()):  # a state is kept from the first look that counts
        stopping.restore_best()
    elif start is not None:
        start.put_back()


def check_loaders(**loaders: Any) -> None:
    for name, loader in loaders.items():
        check_loader(loader)
        if isinstance(loader, Iterator):
            raise ArgumentError(f"{name} is gone through more than once: pass a DataLoader or a list, not an iterator")
