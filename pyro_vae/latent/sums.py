"""Streaming sums over the data of any number of batches, with means, variances and their errors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import StructureError
from ..records import Estimate
from .per_unit import UnitTerms
from .unit_activity import UnitActivity


class Moments:
    """Mean and variance over the data, column by column, of values with known Monte Carlo variances.

    Sums of powers of deviations from a point near the data (the mean of the first batch), in double precision.
    """

    def __init__(self, shifted: bool = True) -> None:
        self._shift: Tensor | None = None
        self._sums: Tensor | None = None
        self._shifted = shifted

    def add(self, values: Tensor, noise: Tensor, mask: Tensor) -> None:
        """Add values and Monte Carlo variances (B, D); entries where the mask is false do not count."""
        values, noise, zero = values.double(), noise.double(), torch.zeros((), dtype=torch.double, device=values.device)
        count = mask.double()
        if self._shift is None:
            mean = torch.where(mask, values, zero).sum(0) / count.sum(0).clamp(min=1.0)
            self._shift = mean if self._shifted else torch.zeros_like(mean)
        d = torch.where(mask, values - self._shift, zero)
        c = torch.where(mask, noise, zero)
        sums = torch.stack([t.sum(0) for t in (count, d, d**2, d**3, d**4, c, c * d, c * d**2, c**2)])
        self._sums = sums if self._sums is None else self._sums + sums

    def _mean_of_powers(self) -> tuple[Tensor, ...]:
        assert self._sums is not None
        return tuple(self._sums / self._sums[0])

    @property
    def count(self) -> Tensor:
        assert self._sums is not None
        return self._sums[0]

    @property
    def mean(self) -> Tensor:
        assert self._shift is not None
        return self._shift + self._mean_of_powers()[1]

    @property
    def mean_std_error(self) -> Tensor:
        """Monte Carlo error of the mean."""
        return (self._mean_of_powers()[5] / self.count).sqrt()

    @property
    def mean_sampling_error(self) -> Tensor:
        return (self._raw_variance() / self.count).sqrt()

    def _raw_variance(self) -> Tensor:
        """Variance with n - 1 in the denominator; includes the Monte Carlo noise. NaN for one datum."""
        _, m1, m2, *_ = self._mean_of_powers()
        return ((m2 - m1**2).clamp(min=0.0) * self.count) / (self.count - 1)

    @property
    def variance(self) -> Tensor:
        """The variance over the data minus the variance of the Monte Carlo noise; it can be below zero."""
        return self._raw_variance() - self._mean_of_powers()[5]

    def variance_std_error(self, num_particles: int) -> Tensor:
        """Monte Carlo error of `variance`.

        The values are y + e, with e normal of variance c. `variance` is their sample variance minus the mean of an estimate
        of c. Its variance is::

            (4 sum c (y - mean)^2 + (2 + 2 / (K - 1)) sum c^2) / n^2

        It is computed with y + e for y, minus the bias of that.
        """
        n = self.count
        _, m1, _, _, _, _, cd, cd2, c2 = self._mean_of_powers()
        c = self._mean_of_powers()[5]
        weighed = (cd2 - 2 * m1 * cd + m1**2 * c - c2).clamp(min=0.0)
        return ((4 * weighed + 2 * num_particles / (num_particles - 1) * c2) / n).sqrt()

    @property
    def variance_sampling_error(self) -> Tensor:
        """Sampling error: var(s^2) = (m4 - s^4 (n - 3) / (n - 1)) / n, with the fourth central moment m4."""
        n = self.count
        _, m1, m2, m3, m4, *_ = self._mean_of_powers()
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return ((fourth - self._raw_variance() ** 2 * (n - 3) / (n - 1)).clamp(min=0.0) / n).sqrt()


class UnitSums:
    """Sums over batches for a record of units: memory does not grow with the data.

    :param epsilon: nats below which a unit counts as at the prior for a datum.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.means, self.kl, self.site_kl = Moments(), Moments(), Moments()
        self.at_prior = Moments(shifted=False)  # a share of the data that is compared with a bound, hence without rounding
        self.num_data, self.cost = 0, 0.0
        self._first: UnitTerms | None = None

    def add(self, terms: UnitTerms) -> None:
        if self._first is None:
            self._first = terms
        elif terms.units != self._first.units:
            raise StructureError(
                f"the batches differ in their units: {len(self._first.units)} before and {len(terms.units)} now, from the "
                f"sites {terms.sites}. Pass data whose latents have the same shapes"
            )
        kl, noise = terms.kl.value, terms.kl.variance
        self.means.add(terms.mean.value, terms.mean.variance, terms.mask)
        self.kl.add(kl, noise, terms.mask)
        known = ~kl.isnan() & terms.is_kl
        below = torch.where(known, (kl < self.epsilon).to(kl.dtype), torch.nan)
        # A noisy KL near epsilon may be on the wrong side of it.
        chance = torch.special.ndtr((self.epsilon - kl) / noise.sqrt())
        self.at_prior.add(below, torch.where(noise > 0, chance * (1 - chance), torch.zeros_like(chance)), terms.mask)
        site_kl = terms.site_kl
        self.site_kl.add(site_kl.value, site_kl.variance, torch.ones_like(site_kl.value, dtype=torch.bool))
        self.num_data += len(terms.mask)
        self.cost += terms.cost * len(terms.mask)

    def activity(self, *, threshold: float, delta: float, num_particles: int) -> UnitActivity:
        first = self._first
        assert first is not None
        dtype = first.site_kl.value.dtype
        std_errors = {
            "variance_of_means": self.means.variance_std_error(num_particles),
            "kl": self.kl.mean_std_error,
            "fraction_at_prior": self.at_prior.mean_std_error,
        }
        sampling_errors = {
            "variance_of_means": self.means.variance_sampling_error,
            "kl": self.kl.mean_sampling_error,
            "fraction_at_prior": self.at_prior.mean_sampling_error,
        }
        return UnitActivity(
            names=first.units,
            variance_of_means=self.means.variance.to(dtype),
            kl=self.kl.mean.to(dtype),
            fraction_at_prior=self.at_prior.mean.to(dtype),
            std_errors={name: error.to(dtype) for name, error in std_errors.items()},
            sampling_errors={name: error.to(dtype) for name, error in sampling_errors.items()},
            site_kl=self._site_kl(first.sites, dtype),
            counts=self.means.count.long(),
            num_data=self.num_data,
            threshold=threshold,
            epsilon=self.epsilon,
            delta=delta,
            num_particles=num_particles,
            cost=self.cost / self.num_data,
        )

    def _site_kl(self, names: tuple[str, ...], dtype: torch.dtype) -> Mapping[str, Estimate]:
        total = self.site_kl
        columns = (total.mean, total.mean_std_error, total.mean_sampling_error)
        return {name: Estimate(*(column[j].to(dtype) for column in columns)) for j, name in enumerate(names)}
