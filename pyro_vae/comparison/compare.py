"""Compare models by their log p(x) on the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from ..evidence import Evidence
from ..gaps import Gaps
from ..options import real_number
from ..records import LEVEL, warn_about
from .comparison import Comparison
from .paired_difference import PairedDifference, paired
from .same_data import check_records, check_same_data, check_same_kind, remarks_on
from .sides import Side, side_of_elbo, side_of_log_evidence
from .told_apart import holm


def compare(records: Mapping[str, Evidence | Gaps], *, level: float = LEVEL) -> Comparison:
    r"""Compare models by their log p(x) on the same data, with paired differences::

        d_n = log p_a(x_n) - log p_b(x_n) per datum, paired: what both models have in common cancels

    The mean of d has two errors. For *these* data it has the **Monte Carlo error**, sqrt(sum_n s_a,n^2 + s_b,n^2) / N. For
    *other* data from the same population it has the **sampling error**, sd(d) / sqrt(N), which includes the first. The claim
    "told apart" is about the population. Its p-value is the larger of those of Student's t on d and of Hall's t, which
    corrects for skewness. It is corrected for the number of pairs by Holm's method. With a probability of 95% or more, no
    claim is made about equal models. Measured at level 0.95, for several distributions of d::

        equal models told apart      N = 20     100     1000
        Gaussian                       3.1%    4.5%     5.1%     standard error .15%, at N = 1000 .3%
        exponential                    2.5%    4.0%     4.1%     Student's t alone: 8.3% at N = 20
        log-normal                     4.0%    4.4%     4.4%     13.4%
        1 of 20 data has it all         17%    2.8%     4.1%     21%

    No test of a mean is valid if the mean depends on rare data and none of them is in the sample, as in the last row at N =
    20. If they are in the sample, `few_decide` of the pair is true, and a sentence names them.

    log p(x) is usually a lower bound. The amount by which the mean of the lower model may be too low, by its interval, is
    subtracted from the difference before the test. A datum in doubt is too low by an unknown amount. If more than 5% of the
    data of the lower model are in doubt, no claim is made; if fewer are, the claim must also hold without them. Doubts about
    the higher model do not matter. Data with NaN or -inf are left out of the means; a model with -inf where the other is
    finite is never claimed to be better.

    The ELBO is compared in the same way. If its order differs, a sentence says so: a model is then ahead by its better
    guide, not by a better model. Compare on data that were not used to train any of the models.

    :param records: two or more `Evidence` or `Gaps` of the same data, by the names of their models. That the data are the
        same is checked by the `fingerprint` of the records, a hash of the observed values in float32.
    :param level: level of claims and intervals.

    :returns: a `Comparison` of N data: print it, `plot` it, take its `pairs`.
    :raises ComparisonError: if data, their order or their number differ, and if log p(x) are of different kinds: a density
        and a probability, or log p(x) and a score of values outside the support.
    :raises OptionError: for a level outside (0, 1).

    References: Hall (1992), "On the Removal of Skewness by Transformation", Journal of the Royal Statistical Society B 54,
    221-228. Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure", https://www.jstor.org/stable/4615733.

    The trained models are compared. Training them again is a third source of error, which cannot be measured with one
    trained model each. Records made with the same ``seed=`` may share noise; the stated Monte Carlo error of their
    difference is then too large.

    Example::

        loader = DataLoader(TensorDataset(x_test), batch_size=100)
        gaps = {name: pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), loader) for name, vae in models.items()}
        print(pv.compare(gaps))
    """
    level = real_number("level", level, highest=1.0, ends="()")
    checked = check_records(records)
    check_same_data(checked)
    check_same_kind(checked)
    sides = [side_of_log_evidence(name, record, level) for name, record in checked.items()]
    comparison = Comparison(
        records=checked,
        pairs=all_pairs(sides, level),
        elbo_pairs=all_pairs([side_of_elbo(name, record) for name, record in checked.items()], level),
        level=level,
        remarks=remarks_on(checked),
    )
    warn_about(comparison, stacklevel=2)
    return comparison


def all_pairs(sides: Sequence[Side], level: float) -> tuple[PairedDifference, ...]:
    """The M (M - 1) / 2 pairs of M models, with p corrected for all of them; those of the best model first."""
    found = [paired(one, other, level) for one, other in combinations(sides, 2)]
    corrected = [replace(p, corrected=c) for p, c in zip(found, holm([p.p_value for p in found]), strict=True)]
    wins = {side.name: sum(p.first == side.name for p in found) for side in sides}
    return tuple(sorted(corrected, key=lambda p: (-wins[p.first], -wins[p.second])))
