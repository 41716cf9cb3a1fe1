"""The result of `diagnose`, with text, figure, HTML, JSON and CSV output."""

from __future__ import annotations

import csv
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, described
from ..gaps import GAPS
from ..records import Estimate, Result, text_file
from ..records.printing import WIDTH
from .culprits import advice_of, culprit_of, headline_of
from .figure import draw
from .findings import Finding, findings_of
from .measured import Measured
from .numbers import Number, numbers_of
from .page import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"fine": "ok", "fault": "!!", "undecided": "??"}


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(Result, Measured):
    """What is wrong with a VAE, as `diagnose` found it: print it, `plot` it, write it with `to_html`, `to_json`, `to_csv`.

    :ivar test: the `Gaps` of held-out data.
    :ivar train: those of training data.
    :ivar units: the `UnitActivity` of all training data; `None`, like the next four, where it was left out.
    :ivar surgery: the `Surgery` of all training data.
    :ivar self_check: the trial of the estimator on data simulated from the model.
    :ivar calibration: the `Calibration` of the guide on data simulated from the model.
    :ivar samples: the `SampleCheckResult`: reconstruction error, sharpness, nearest neighbours.
    :ivar simulation: a draw from the model, for its picture.
    :ivar reconstruction: test data and what the model makes of them, for their picture.
    :ivar left_out: why a part is missing, by its name.
    :ivar settings: the options of the call, seed included.
    :ivar versions: of the packages behind the numbers.
    :ivar about: names of model, guide and data sets, and the date.
    :ivar seconds: the time it took.
    """

    _rows_are = "numbers"

    left_out: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    about: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One claim per topic: latents, estimate, gap, calibration, held-out data, samples."""
        return findings_of(self)

    @cached_property
    def numbers(self) -> list[Number]:
        """Every number with its errors; the same rows stand on the page, in JSON and in CSV."""
        return numbers_of(self)

    @property
    def culprit(self) -> str:
        """What to change first: "collapse", "blind encoder", "estimate", "encoder", "overfitted encoder",
        "overfitted model", "family", "undecided" or "none"."""
        return culprit_of(self, self.findings)

    @property
    def headline(self) -> str:
        """The culprit in a sentence, with its size in nats per datum and its Monte Carlo error."""
        return headline_of(self, self.culprit)

    @property
    def advice(self) -> str:
        """What to do about it."""
        return advice_of(self, self.culprit)

    def verdict(self) -> str:
        """What is wrong and what to change first, in two sentences."""
        return f"{self.headline} {self.advice}"

    def plot(self, figure: Figure | None = None) -> Figure:
        """All pictures of this diagnosis in one figure; a new one by default."""
        return draw(self, self.headline, figure)

    def to_html(self, path: str | PathLike[str], *, title: str = "") -> None:
        """Write one page that needs no other file and no network: verdict, numbers, pictures, terms, provenance.

        :param path: of the file; one that exists is replaced.
        :param title: of the page, such as "Digits, run 12"; by default the names of model and guide.
        """
        if not isinstance(title, str):
            raise OptionError(f"title must be words, got {described(title)}")
        with text_file(path) as file:
            file.write(render(self, self.numbers, title or f"Diagnosis of {self._pair()}"))

    def _pair(self) -> str:
        """The names of model and guide."""
        return f"{self.about.get('model', 'a model')} and {self.about.get('guide', 'its guide')}"

    def to_dict(self) -> dict[str, Any]:
        """Verdict, numbers, settings, and every record in full (per datum), as plain Python. NaN and infinities stay."""
        records = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "culprit": self.culprit,
            "verdict": self.verdict(),
            "findings": [asdict(finding) for finding in self.findings],
            "numbers": [asdict(row) for row in self.numbers],
            "about": dict(self.about),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "left_out": dict(self.left_out),
            "seconds": self.seconds,
            "records": {name: record.to_dict() for name, record in records.items() if hasattr(record, "to_dict")},
        }

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write `to_dict()`; NaN becomes null, and an infinity the string "inf" or "-inf", as JSON has neither."""
        with text_file(path) as file:
            json.dump(proper(self.to_dict()), file, indent=1, allow_nan=False)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write `numbers`, one row each; names, date, settings and versions are columns at the end of each row."""
        provenance = {**self.about, **self.settings, **self.versions}
        with text_file(path) as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Number)] + list(provenance))
            writer.writeheader()
            writer.writerows({**asdict(row), **provenance} for row in self.numbers)

    def _columns(self) -> dict[str, list[Any]]:
        """A row for each of `numbers`."""
        return {field.name: [getattr(row, field.name) for row in self.numbers] for field in fields(Number)}

    def _num_rows(self) -> int:
        return len(self.numbers)

    def _in_short(self) -> str:
        return f"{self.culprit}: {len(self.test)} test and {len(self.train)} training data"

    def __str__(self) -> str:
        lines = wrapped(f"Diagnosis: {self.headline}") + wrapped(f"First: {self.advice}") + [""]
        for finding in self.findings:
            lines += wrapped(f"[{MARKS[finding.state]}] {finding.claim}", indent="     ")
        lines += ["", f"{'nats per datum':<32}{'test (sampling error)':>26}{'train (sampling error)':>26}"]
        test, train = self.test.summary(), self.train.summary()
        for name in test:
            title = f"  {self.test.titles[name]}" if name in GAPS else self.test.titles[name]
            lines.append(f"{title:<32}" + "".join(f"{cell(side[name]):>26}" for side in (test, train)))
        if any(estimate.doubt for side in (test, train) for estimate in side.values()):
            lines.append("in doubt: more than 5% of the data are in doubt, so the error is not to be trusted")
        for part, why in self.left_out.items():
            lines += wrapped(f"Left out: {part}: {why}")
        lines.append(
            f"{len(self.test)} test and {len(self.train)} training data; {self.seconds:.0f} s; to_html(path) has all of it"
        )
        return "\n".join(lines)


def cell(estimate: Estimate) -> str:
    return f"{float(estimate.value):.3f} (in doubt)" if estimate.doubt else estimate.with_error(sampling=True)


def wrapped(paragraph: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(paragraph, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def proper(tree: Any) -> Any:
    """Without the numbers that JSON does not have."""
    if isinstance(tree, Mapping):
        return {key: proper(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [proper(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None if math.isnan(tree) else ("inf" if tree > 0 else "-inf")
    return tree
