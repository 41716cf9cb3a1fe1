"""Errors for records of different data, or with log p(x) of different kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ComparisonError, listed, quoted
from ..evidence import Evidence
from ..gaps import Gaps
from .sides import evidence_of

SAME_LOADER = "Evaluate all models on one loader without shuffle=True"


def check_records(records: Any) -> dict[str, Evidence | Gaps]:
    """Check that `records` is a mapping of two or more records by name."""
    if not isinstance(records, Mapping) or len(records) < 2:
        got = f"{len(records)} record" if isinstance(records, Mapping) else type(records).__name__
        raise ComparisonError(f"compare needs a dict of two or more records by name, got {got}: compare({{'a': a, 'b': b}})")
    for name, record in records.items():
        if not isinstance(name, str) or not isinstance(record, (Evidence, Gaps)):
            raise ComparisonError(
                f"compare needs Evidence or Gaps by name, got {type(record).__name__} under {name!r}: pass what an "
                "estimator of log p(x) or InferenceGaps returned (of a Sandwich its lower or its upper)"
            )
    return dict(records)


def check_same_data(records: Mapping[str, Evidence | Gaps]) -> None:
    """Check the data by number, and by fingerprint where the records have one."""
    sizes = {name: len(record) for name, record in records.items()}
    if len(set(sizes.values())) > 1:
        raise ComparisonError(
            f"the records are about different numbers of data ({', '.join(f'{n!r}: {k}' for n, k in sizes.items())}), so "
            f"there are no differences per datum. {SAME_LOADER} and without drop_last=True"
        )
    if 0 in sizes.values():
        raise ComparisonError("the records hold no data: pass records of at least one datum")
    known = {n: f.cpu() for n, r in records.items() if (f := evidence_of(r).fingerprint) is not None}
    if known:
        first, *others = known
        for name in others:
            compare_fingerprints(first, known[first], name, known[name])
    check_subsamples(records)


def compare_fingerprints(first: str, ours: Tensor, second: str, theirs: Tensor) -> None:
    if torch.equal(ours, theirs):
        return
    if torch.equal(ours.sort().values, theirs.sort().values):
        raise ComparisonError(
            f"'{first}' and '{second}' have the same data in different orders (data {listed(ours != theirs)} of "
            f"{len(ours)} differ): {SAME_LOADER}"
        )
    different = ours != theirs
    which = "all data" if bool(different.all()) else f"data {listed(different)} of {len(ours)}"
    raise ComparisonError(
        f"'{first}' and '{second}' are about different data: {which} differ. {SAME_LOADER}, with the same "
        "preprocessing: data on another scale are other data, and their log p(x) is another quantity. If only the "
        "order of numbers within a datum or the sites differ, dataclasses.replace(record, fingerprint=None) turns the "
        "check off"
    )


def check_subsamples(records: Mapping[str, Evidence | Gaps]) -> None:
    """Check the data of subsampled plates where there is no fingerprint."""
    known = {n: i.cpu() for n, r in records.items() if (i := evidence_of(r).index) is not None}
    for name, index in list(known.items())[1:]:
        first = next(iter(known))
        if not torch.equal(index, known[first]):
            raise ComparisonError(
                f"'{first}' and '{name}' used different data of the subsampled plate (data "
                f"{listed(index != known[first])} differ): give both estimators the same seed="
            )


def check_same_kind(records: Mapping[str, Evidence | Gaps]) -> None:
    """Check that all are probabilities, or all densities, or all scores."""
    kinds = {n: m for n, r in records.items() if (m := evidence_of(r).measure)}
    if len(set(kinds.values())) > 1:
        raise ComparisonError(
            f"p(x) is not of one kind ({', '.join(f'{n!r}: {m}' for n, m in kinds.items())}): a density may be above "
            "one, a probability of discrete data may not, so their logarithms cannot be compared. Give all models "
            "likelihoods of one kind (for numbers 0 to n nn.Binomial(n) or nn.DiscretizedLogistic are probabilities)"
        )
    checked = {n: evidence_of(r).support_checked for n, r in records.items()}
    if len(set(checked.values())) > 1:
        scores = quoted(n for n, c in checked.items() if not c)
        raise ComparisonError(
            f"{scores} hold scores of values outside the support of the likelihood (check_support=False), the others "
            "log p(x): these are different quantities. Bring the data into the support of all likelihoods"
        )


def remarks_on(records: Mapping[str, Evidence | Gaps]) -> tuple[str, ...]:
    """Sentences about unchecked assumptions and about numbers that are not log p(x)."""
    said = []
    if unknown := [n for n, r in records.items() if evidence_of(r).fingerprint is None]:
        said.append(f"{quoted(unknown)}: no fingerprint, so it was not checked that the data are the same.")
    if not evidence_of(next(iter(records.values()))).support_checked:
        said.append("All numbers are scores of values outside the support, not log p(x).")
    givens = {n: evidence_of(r).given for n, r in records.items()}
    if any(givens.values()):
        said.append("Given: " + "; ".join(f"'{n}' {quoted(names)}" for n, names in givens.items() if names) + ".")
    return tuple(said)
