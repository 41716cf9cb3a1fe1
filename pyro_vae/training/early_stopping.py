"""Early stopping by the held-out ELBO and its error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import tensors_in
from ..batches import ToArguments, check_loader, first_element
from ..errors import ArgumentError, OptionError, PrecisionWarning, ScheduleWarning, UnreliableEvidenceWarning, listed
from ..evaluation import of_rank_0, over_batches, rank_and_size
from ..isolation import eval_mode
from ..kernel import INFER, Call, Pair, is_moved, narrow_record
from ..noise import Noise, kept_random_state, seed_torch
from ..options import amount, is_real, real_number, whole_number
from ..records import LEVEL, normal_quantile
from .held_out_history import HeldOutHistory
from .kept_state import KeptState
from .schedules import FAR, WEIGHS, still_moves

ROW = ("step", "elbo", "sampling_error", "gain", "gain_error", "improved", "at_rest", "beta")
NO_BEST = (
    "there is no best state to restore: none is kept before the first look at which beta has its final value (see history())"
)


class EarlyStopping:
    """Early stopping: stop when the held-out ELBO no longer rises by more than its error.

    A look is one measurement of the held-out ELBO. All looks use the same data and the same noise, so two looks differ only
    by the training between them::

        gain = mean_n (ELBO_n now - ELBO_n of reference)     over the N held-out data, draws shared
        its error = std_n of these differences / sqrt(N)

    A look is an improvement if ``gain > 1.96 error``, so that its 95% interval is above zero. It is then the new reference.
    A rise too slow to show between two successive looks is therefore still found once it has added up. After `patience`
    looks in a row without improvement the call returns True. The state with the highest held-out ELBO is kept;
    `restore_best` writes it back.

    The ELBO of a datum is minus infinity where draws of the guide have no density under the model. A look with fewer such
    data is an improvement, a look with more is not. Data that have it at both looks are left out of the gain. A warning
    names these data.

    Looks before beta has its final value do not count, neither for patience nor for the best state: in a warm-up the bound
    falls because the weight of the KL rises.

    A look changes no parameter, gradient, buffer, mode or random state, so training continues exactly as without it. Modules
    run in eval mode during a look.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param held_out: data that are used neither for training nor for final results, an iterable of batches that can be
        iterated repeatedly, such as a `DataLoader`. Some hundred data are enough.
    :param every: updates from one look to the next; calls in between cost nothing. A look with 300 data takes as long as 15
        updates of a small VAE with batches of 100.
    :param patience: looks in a row without improvement after which to stop.
    :param beta: the beta of the objective: a number, or a schedule such as `LinearAnnealing`. The KL of the held-out ELBO
        has this weight, as in the objective.
    :param num_particles: K, at least 2, draws of the guide per datum at each look; its cost is K decoder evaluations per
        held-out datum.
    :param args: function from a batch to the tuple of the model's arguments, or to a dict of keywords; by default it takes
        the batch's first element.
    :param seed: seed of the draws of the looks, and of a loader that shuffles; the caller's random state is never used.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes every
        batch one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.

    :ivar stopped_at: the update at which the call first returned True, or None.
    :ivar num_without: looks in a row without improvement so far.
    :raises OptionError: for options out of range, or for held-out data that differ from one look to the next.
    :raises ArgumentError: for a tensor in place of the loader, or a loader that can be iterated only once.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) at a look, for a program that defines no importance weight
        per datum.
    :raises NonFiniteError: at a look, if the ELBO of a datum is NaN or plus infinity.

    The rule is that of Prechelt (1998), "Early Stopping - But When?", https://doi.org/10.1007/3-540-49430-8_3, with an error
    in place of a fixed threshold. Its error rates, over 1,000 simulated runs with independent noise and patience 5
    (`tests/training/test_early_stopping.py`):

    - without improvement, 91% stop as soon as patience allows, and all within three times the patience;
    - if the ELBO rises by five errors within the patience, .1% stop in the first such window and 1% within 30 looks;
    - if it rises by three errors, 8% stop in the first window.

    With more held-out data the errors are smaller, so the same rise is more errors large.

    Example::

        stopping = pv.EarlyStopping(vae.model, vae.guide, held_out, every=100, patience=5)
        num_updates = 0
        for epoch in range(1000):
            for (x,) in loader:
                svi.step(x)
                num_updates += 1
            if stopping(num_updates):
                break
        stopping.look(num_updates)  # at the end, too
        stopping.restore_best()
        print(stopping.history())
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        held_out: Iterable[Any],
        *,
        every: int = 100,
        patience: int = 5,
        beta: float | Callable[[int], float] = 1.0,
        num_particles: int = 10,
        args: ToArguments = first_element,
        seed: int = 0,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        check_support: bool = True,
    ) -> None:
        check_loader(held_out)
        # not tested by iter(), because that of a DataLoader draws from the caller's random state
        if isinstance(held_out, Iterator):
            raise ArgumentError("held_out is iterated at every look: pass a DataLoader or a list, not an iterator")
        self.every, self.patience = whole_number("every", every), whole_number("patience", patience)
        self.num_particles = amount("num_particles", num_particles, lowest=2)
        self.seed = whole_number("seed", seed, lowest=0, why="training goes on from the global one")
        self.stopped_at: int | None = None
        self.num_without = 0
        self._beta = checked_beta(beta)
        self._held_out, self._args = held_out, args
        self._options: Any = {"datum_plate": datum_plate, "prior_sites": prior_sites, "check_support": check_support}
        self._model, self._guide = model, guide
        Pair(model, guide, **self._options)  # raises for what is not callable
        self._best = KeptState(model, guide)
        self._warned, self._num_coarse = False, 0
        self._best_mean = -math.inf
        self._reference: Tensor | None = None
        self._fingerprint: list[float] | None = None
        self._due = 0
        self._rows: list[tuple[float, ...]] = []
        self._num_data = 0

    def __call__(self, step: int) -> bool:
        """Look if `every` updates have passed, and return whether to stop.

        :param step: the number of the last update, counted from 0 as in schedules. The first call looks.
        """
        if whole_number("step", step, lowest=0) >= self._due:
            self.look(step)
        return self.num_without >= self.patience

    def look(self, step: int) -> None:
        """Look now. Call it after the last update of a training that was not stopped, since the end may be the best state.

        A second look at the same update is skipped.
        """
        step = whole_number("step", step, lowest=0)
        if self._rows and self._rows[-1][0] == step:
            return
        self._due = step + self.every
        self._judge(step, self._look(self._beta(step)))

    def restore_best(self) -> None:
        """Write the state with the highest held-out ELBO back into the parameters and buffers of both programs.

        The values are changed in place: optimisers keep the same tensors, and their current momenta.

        :raises OptionError: where none is kept yet.
        """
        if not self._best.values:
            raise OptionError(NO_BEST)
        self._best.put_back()

    def history(self) -> HeldOutHistory:
        """All looks so far."""
        columns = torch.tensor(self._rows, dtype=torch.float64, device="cpu").reshape(-1, len(ROW)).unbind(1)
        fields: dict[str, Any] = dict(zip(ROW, columns, strict=True))
        for name, dtype in (("step", torch.long), ("improved", torch.bool), ("at_rest", torch.bool)):
            fields[name] = fields[name].to(dtype)
        return HeldOutHistory(**fields, num_data=self._num_data, num_coarse=self._num_coarse)

    def state_dict(self) -> dict[str, Any]:
        """The history and the best state, in numbers and tensors, for a checkpoint; without the current parameters."""
        return {
            "rows": [list(row) for row in self._rows],
            "best": dict(self._best.values),
            "best_mean": self._best_mean,
            "reference": self._reference,
            "fingerprint": self._fingerprint,
            "due": self._due,
            "num_without": self.num_without,
            "num_data": self._num_data,
            "stopped_at": self.stopped_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, with the same pair, held-out data and options.

        :raises OptionError: for another kind of state.
        """
        missing = self.state_dict().keys() ^ state.keys()
        if missing:
            raise OptionError(
                "this is not a state of an EarlyStopping: its keys differ from those of state_dict() in "
                f"{sorted(missing)}. Pass what state_dict() returned"
            )
        self._rows = [tuple(row) for row in state["rows"]]
        self._best.values = dict(state["best"])
        self._best_mean, self._reference, self._fingerprint = state["best_mean"], state["reference"], state["fingerprint"]
        self._due, self._num_data = state["due"], state["num_data"]
        self.num_without, self.stopped_at = state["num_without"], state["stopped_at"]

    def _judge(self, step: int, terms: Tensor) -> None:
        """Compare the ELBO of each datum, (N,), with that of the reference."""
        rested = bool(self._rows) and bool(self._rows[-1][ROW.index("at_rest")])  # then it stays constant
        at_rest = rested or not still_moves(self._beta, step)
        mean, error = mean_and_error(terms)
        self._warn_of(step, terms == -math.inf)
        gain, gain_error, improved = math.nan, math.nan, False
        if at_rest:
            if self._reference is None:
                improved = True
            else:
                gain, gain_error = rise(self._reference.to(terms), terms)
                improved = gain > max(normal_quantile(LEVEL) * gain_error, 0.0)
            self.num_without = 0 if improved else self.num_without + 1
            if improved:
                self._reference = terms
            if mean > self._best_mean or improved and not math.isfinite(self._best_mean):
                self._best_mean = mean
                self._best.keep()
            if self.num_without >= self.patience and self.stopped_at is None:
                self.stopped_at = step
        self._rows.append((step, mean, error, gain, gain_error, improved, at_rest, self._beta(step)))

    def _warn_of(self, step: int, lost: Tensor) -> None:
        """Warn once that data have an ELBO of minus infinity, and so the mean too."""
        if bool(lost.any()) and not self._warned and rank_and_size()[0] == 0:
            self._warned = True
            warnings.warn(
                f"the held-out ELBO of data {listed(lost)} is minus infinity at update {step}: draws of the guide have "
                "no density under the model, or one that underflows. Looks are compared by the number of such data, "
                "and by the ELBO of the others. Leave these data out, or widen the likelihood",
                UnreliableEvidenceWarning,
                stacklevel=4,
            )

    def _warn_of_coarse(self, number: int) -> None:
        if number and not self._num_coarse and rank_and_size()[0] == 0:
            warnings.warn(
                f"for {number} of {self._num_data} held-out data, floats are too coarse: they do not distinguish draws "
                "of the guide from one another or from an end of their support, or float64 changes the ELBO by more "
                "than a tenth of its error. The ELBO is likely wrong by more than that. Convert model, guide and data "
                "to float64 (.double())",
                PrecisionWarning,
                stacklevel=5,
            )
        self._num_coarse = max(self._num_coarse, number)

    @torch.no_grad()
    def _look(self, beta: float) -> Tensor:
        """The ELBO of each datum, (N,); with one datum, that of each particle."""
        # A new pair each time: parameters have changed, so the structure found last time may no longer hold.
        pair = Pair(self._model, self._guide, **self._options)

        def run(*args: Any, **kwargs: Any) -> tuple[float, Tensor, int]:
            with pair.open(args, kwargs, self.seed) as call:
                elbo, coarse = weighted_elbo(call, self.num_particles, beta)
            total = sum(float(t.detach().to_dense().double().nansum()) for t in tensors_in([args, kwargs]))
            return total, elbo, coarse

        with kept_random_state(), eval_mode(self._model, self._guide), self._best.finding():
            seed_torch(self.seed)  # a loader that shuffles draws from this state
            # Every process of a group must find and keep the best state, so each runs all batches.
            of = self._model, self._guide
            found = over_batches(run, self._held_out, self._args, of=of, seed=self.seed, everywhere=True)
            sums, parts, coarse = map(list, zip(*found, strict=True))
        # so that all processes stop at the same update
        terms = of_rank_0("a look at the held-out data", torch.cat(parts, 1))
        if self._fingerprint is None:
            self._fingerprint = sums
        if sums != self._fingerprint:
            raise OptionError(
                "the held-out data are not those of the first look, or are in another order, so differences are not "
                "paired: pass a DataLoader with shuffle=False, or a list of batches, and no random augmentation"
            )
        self._num_data = terms.shape[1]
        self._warn_of_coarse(sum(coarse))
        return (terms.mean(0) if self._num_data > 1 else terms[:, 0]).to(torch.float64)

    def _state(self) -> str:
        word = "running" if self.stopped_at is None else f"said stop at update {self.stopped_at}"
        return f"{word}; {self.num_without} of {self.patience} looks in a row without improvement"

    def __str__(self) -> str:
        if not self._rows:
            return "EarlyStopping: no look yet, the first call looks"
        return f"EarlyStopping, {self._state()}\n{self.history()}"


def weighted_elbo(call: Call, num_particles: int, beta: float) -> tuple[Tensor, int]:
    """Terms (K, B) of E_q[log p(x given z)] - beta KL(q to p(z)), and the number of data for which floats are too coarse.

    Enumerated sites are summed out.
    """
    call.set_noise(Noise.GUIDE, 0)
    guide = call.draw(num_particles)
    terms = []
    for first, length in call.chunks(num_particles):
        part = narrow_record(guide, call.layout, first, length)
        weights = call.weigh(part, call.score(call.latent_values(part), length), length)
        terms.append(weights.elbo)
        if beta != 1:
            log_likelihood = weights.log_joint - weights.log_marginal_prior
            terms[-1] = log_likelihood + beta * (weights.elbo - log_likelihood)
    joined = torch.cat(terms)
    call.check_finite(joined)
    error = joined.std(0) / math.sqrt(num_particles)
    coarse = call.coarse(guide, num_particles).any(0) | is_moved(call, joined.mean(0), error)
    return joined, int(coarse.sum())


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def rise(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The mean rise of ELBOs (N,), and its error. Minus infinity is below all finite values."""
    lost, known = int((~after.isfinite()).sum()), before.isfinite() & after.isfinite()
    fewer = int((~before.isfinite()).sum()) - lost
    if fewer or not bool(known.any()):
        return (math.copysign(math.inf, fewer), 0.0) if fewer else (math.nan, math.nan)
    return mean_and_error((after - before)[known])


def checked_beta(beta: Any) -> Callable[[int], float]:
    if is_real(beta):
        number = real_number("beta", beta, why=WEIGHS)
        return lambda step: number
    if not callable(beta):
        raise OptionError(
            f"beta must be a number or a schedule of the update such as pv.LinearAnnealing(1000), got {beta!r}: with "
            "weights by site, omit it and make the first call after the warm-up"
        )
    if moves_for_ever(beta):
        warnings.warn(
            ScheduleWarning(
                f"beta never becomes constant, so training would never stop: pass a schedule that ends, got {beta!r}"
            ),
            stacklevel=3,
        )
    return beta


def moves_for_ever(schedule: Callable[[int], float]) -> bool:
    try:
        return still_moves(schedule, FAR)
    except (LookupError, ArithmeticError):  # a table that ends; an overflow as in 1.01**step
        return False
