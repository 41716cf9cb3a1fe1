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
    r"""Which of several models has the higher log p(x), as far as these data can tell::

        d_n = log p_a(x_n) - log p_b(x_n)          per datum, paired: what makes a datum hard for both cancels

    Two questions have two errors. On *these* data the mean of d is known but for the **Monte Carlo error**,
    sqrt(sum_n s_a,n^2 + s_b,n^2) / N. For *other* data of the same kind it is known but for the **sampling error**,
    sd(d) / sqrt(N), which contains the first. A claim, "told apart", is about the second question. Its p is the larger of
    those of Student's t on d and of Hall's t, which corrects for skewness, times the number of pairs that Holm's method
    asks for: with a chance of 95% or more nothing is claimed of equal models. Measured at level 0.95, by the law of d::

        equal models told apart      N = 20     100     1000
        Gaussian                       3.1%    4.5%     5.1%     standard error .15%, at N = 1000 .3%
        exponential                    2.5%    4.0%     4.1%     Student's t alone: 8.3% at N = 20
        log-normal                     4.0%    4.4%     4.4%     13.4%
        1 of 20 data has it all         17%    2.8%     4.1%     21%

    No test of a mean is safe where rare data carry it and none of them is in the sample, as in the last row at N = 20. Where
    they are in the sample, `few_decide` of a pair is true, and a sentence names them.

    log p(x) is mostly a lower bound. By how much the mean of the losing one may be too low, by its own interval, is taken
    off the difference before it is tested. A datum in doubt is too low by an unknown amount, so doubts of the loser forbid
    the claim above 5% of the data, and up to that it must hold without them; doubts of the winner do no harm. Data with NaN
    or -inf are left out of the means; a model with -inf where the other has a number is not told apart as the better one.

    The same is said of the ELBO, and where its order is another one, a sentence says so: then a model is ahead because its
    guide fits better, not because it does. Compare on data that none of the models was trained on.

    :param records: two or more `Evidence` or `Gaps` of the same data by the names of their models. Whether the data are the
        same is known from the `fingerprint` of the records, made from the observed values in float32.
    :param level: of claims and intervals.

    :returns: a `Comparison` of N data: print it, `plot` it, take its `pairs`.
    :raises ComparisonError: for other data, another order, another number of data, and for log p(x) of other kinds: a
        density and a probability, or log p(x) and a score of values outside the support.
    :raises OptionError: for a level outside (0, 1).

    References: Hall (1992), "On the Removal of Skewness by Transformation", Journal of the Royal Statistical Society B 54,
    221-228. Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure", https://www.jstor.org/stable/4615733.

    Models are compared as they are. Training them again is a third source of error, about which one pair of trained models
    says nothing. Records made with one ``seed=`` may share noise; the Monte Carlo error of their difference is then stated
    larger than it is.

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
    """Of M models M (M - 1) / 2 pairs, with p corrected for all of them; those of the best model first."""
    found = [paired(one, other, level) for one, other in combinations(sides, 2)]
    corrected = [replace(p, corrected=c) for p, c in zip(found, holm([p.p_value for p in found]), strict=True)]
    wins = {side.name: sum(p.first == side.name for p in found) for side in sides}
    return tuple(sorted(corrected, key=lambda p: (-wins[p.first], -wins[p.second])))
