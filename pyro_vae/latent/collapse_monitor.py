"""A monitor of posterior collapse during training."""

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..errors import CollapseWarning, StructureError
from ..isolation import eval_mode
from ..kernel import INFER, Pair
from ..noise import batch_noise
from ..options import names_of_sites, real_number, whole_number
from .active_units import checked_options
from .per_unit import unit_terms
from .sums import UnitSums
from .unit_activity import CollapseHistory, UnitActivity

REMEDIES = (
    "try KL annealing (beta=pv.LinearAnnealing(...)), free bits (pv.BetaTraceMeanField_ELBO(free_bits=0.5)), "
    "pv.AggressiveTraining or a weaker decoder"
)


class CollapseMonitor:
    """Warn when latent dimensions collapse during training, and keep the history.

    Call it with the model's arguments in every training step. Every `every`-th call measures the units on that batch, as
    `ActiveUnits` does; other calls cost nothing. A unit is collapsed in a batch if its KL is below `epsilon` nats for a
    share of at least 1 - `delta` of the data (Lucas, Tucker, Grosse and Norouzi, 2019, https://arxiv.org/abs/1911.02469).
    Where a unit has no separate KL (see `ActiveUnits`), it is collapsed if the variance of its posterior means is not above
    `threshold`.

    The pair counts as collapsed after `patience` measurements in a row with at least a `share` of the units collapsed. It
    counts as recovered at the first measurement with fewer. `patience` is needed because an untrained encoder is often close
    to the prior in every unit. `share` is needed because surplus units at the prior do no harm: a 50-dimensional VAE of
    MNIST with 13 units in use is a good one. The monitor warns once per collapse.

    A measurement changes no parameter, gradient, buffer, mode or random state. Modules run in eval mode during it, so models
    with batch norm and dropout can be monitored during training.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param every: calls from one measurement to the next.
    :param patience: measurements in a row before the pair counts as collapsed.
    :param share: share of the units that must be collapsed, above 0 and at most 1.
    :param threshold: variance of means above which a unit is active.
    :param epsilon: KL in nats below which a unit counts as at the prior for a datum.
    :param delta: share of the batch that may be above `epsilon`.
    :param num_particles: K, at least 2; used where a KL or a mean has no formula, or the guide has several latents.
    :param seed: of the draws of the measurements; the caller's random state is never used.
    :param datum_plate: as in `ActiveUnits`.
    :param prior_sites: as in `ActiveUnits`.

    :ivar collapsed: whether the pair counts as collapsed now. `collapsed_at` is the call at which it was last found to be,
        or None.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) at a measurement, for a program that defines no importance
        weight per datum.
    :raises NonFiniteError: at a measurement, if a KL is NaN or infinite.
    :raises OptionError: for options out of range.

    Example::

        monitor = pv.CollapseMonitor(vae.model, vae.guide, every=100)
        for (x,) in loader:
            svi.step(x)
            monitor(x)
        print(monitor)
        monitor.history().num_active        # (T,)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *,
        every: int = 100,
        patience: int = 5,
        share: float = 0.8,
        threshold: float = 0.01,
        epsilon: float = 0.01,
        delta: float = 0.01,
        num_particles: int = 10,
        seed: int = 0,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
    ) -> None:
        self.num_particles, self.threshold, self.epsilon, self.delta = checked_options(
            num_particles, threshold, epsilon, delta
        )
        self.every, self.patience = whole_number("every", every), whole_number("patience", patience)
        self.share = real_number("share", share, highest=1.0, ends="(]")
        self.seed = whole_number("seed", seed, lowest=0, why="training goes on from the global one")
        self.num_calls = 0
        self.last: UnitActivity | None = None  # units of the last measurement
        self.collapsed = False
        self.collapsed_at: int | None = None  # the call at which the pair was last found collapsed
        self._model, self._guide, self._datum_plate = model, guide, datum_plate
        self._prior_sites = names_of_sites("prior_sites", prior_sites)
        self._new_pair()  # raises for what is not callable
        self._silent_looks = 0  # in a row
        self._rows: list[tuple[int, int, int, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.num_calls += 1
        if self.num_calls % self.every:
            return
        units = self._look(args, kwargs)
        if self.last is not None and units.names != self.last.names:
            raise StructureError(
                f"this batch has {len(units)} units and the last measured one had {len(self.last)}: use one monitor for one "
                "pair, with data that leave the shapes of the latents the same"
            )
        self.last = units
        num_silent = int(silent(units).sum())
        columns = torch.stack([units.kl, units.fraction_at_prior, units.variance_of_means])
        self._rows.append((self.num_calls, units.num_active, num_silent, columns.to("cpu", torch.float64)))
        was_collapsed = self.collapsed
        self._silent_looks = self._silent_looks + 1 if num_silent >= self.share * len(units) else 0
        self.collapsed = self._silent_looks >= self.patience
        if self.collapsed and not was_collapsed:
            self.collapsed_at = self.num_calls
            warnings.warn(CollapseWarning(f"{self._state()}; {REMEDIES}"), stacklevel=2)

    def _new_pair(self) -> Pair:
        # No number here depends on the support of the likelihood.
        return Pair(
            self._model,
            self._guide,
            datum_plate=self._datum_plate,
            prior_sites=self._prior_sites,
            check_support=False,
        )

    @torch.no_grad()
    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitActivity:
        sums = UnitSums(self.epsilon)
        # A new pair each time: parameters have changed, so the structure found last time may no longer hold.
        with (
            eval_mode(self._model, self._guide),
            batch_noise(self.num_calls),
            self._new_pair().open(args, kwargs, self.seed) as call,
        ):
            sums.add(unit_terms(call, self.num_particles))
        return sums.activity(threshold=self.threshold, delta=self.delta, num_particles=self.num_particles)

    def history(self) -> CollapseHistory:
        """All measurements so far."""
        num_units = len(self.last) if self.last is not None else 0
        numbers = torch.tensor([row[:3] for row in self._rows], dtype=torch.long, device="cpu").reshape(-1, 3)
        columns = torch.zeros(0, 3, num_units, dtype=torch.float64, device="cpu")
        if self._rows:
            columns = torch.stack([row[3] for row in self._rows])
        return CollapseHistory(self.last.names if self.last is not None else (), *numbers.unbind(1), *columns.unbind(1))

    def _state(self) -> str:
        step, num_active, num_silent, _ = self._rows[-1]
        assert self.last is not None
        word = "collapsed" if self.collapsed else "not collapsed"
        return (
            f"{word}: {num_silent} of {len(self.last)} units carry less than {self.epsilon:g} nats for at least "
            f"{100 * (1 - self.delta):.4g}% of the data at step {step} ({num_active} active)"
        )

    def __str__(self) -> str:
        if self.last is None:
            return f"CollapseMonitor: no measurement yet, the first is at call {self.every}"
        return f"CollapseMonitor, last measurement\n{self.last}\n{self._state()}."


def silent(units: UnitActivity) -> Tensor:
    """(D,) true where a unit has collapsed: by its KL, or by its means where it has no separate KL."""
    return torch.where(units.fraction_at_prior.isnan(), ~units.active, units.collapsed)
