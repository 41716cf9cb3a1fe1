"""What is written down: the page, JSON, CSV and the figure hold the same numbers, and the page needs nothing else."""

import csv
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import date
from functools import partial
from html import unescape
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
import torch
from report_helpers import diagnosed, linear_pair
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_vae.errors import OptionError
from pyro_vae.records import Estimate
from pyro_vae.report.diagnose import name_of, name_of_data
from pyro_vae.report.digits import with_error
from pyro_vae.report.glossary import TERMS, linked
from pyro_vae.report.sections import texts_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def page():
    """Sixteen numbers per datum are an image of 4 x 4."""
    _, model, guide, x = linear_pair("encoder", data_dim=16)
    return diagnosed(model, guide, x)


class Reader(HTMLParser):
    """The numbers on the page by place and field, as attributes and as text; every address and every id."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.shown, self.addresses, self.ids, self.pictures, self._cell = {}, {}, [], [], 0, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "data-number" in attributes:
            self._cell = int(attributes["data-number"]), attributes["data-field"]
            assert self._cell not in self.numbers
            self.numbers[self._cell] = float(attributes["data-value"])
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [attributes[name] for name in ("src", "href", "action", "srcset") if name in attributes]
        self.pictures += tag == "img"

    def handle_data(self, text):
        if self._cell is not None:
            self.shown[self._cell] = text

    def handle_endtag(self, tag):
        if tag == "td":
            self._cell = None


def check_numbers(text, written):
    """Every number has a cell, and where it has an error, that has one too."""
    numbers = Reader(text).numbers
    assert len({place for place, _ in numbers}) == len(written["numbers"]) > 40
    for place, row in enumerate(written["numbers"]):
        for name in ("value", "std_error", "sampling_error"):
            if row[name] is not None:
                assert numbers[place, name] == float(row[name])
            else:
                assert math.isnan(numbers.get((place, name), math.nan))


def test_the_page_has_the_numbers_of_the_json_and_no_outside(page, tmp_path):
    page.to_html(tmp_path / "page.html")
    page.to_json(tmp_path / "page.json")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    check_numbers(text, written)
    reader = Reader(text)
    assert reader.pictures >= 8
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in reader.addresses)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert 'name="viewport"' in text and "@media print" in text
    words = unescape(re.sub("<[^>]*>", "", text)).replace("\u00b1", "+-")
    claims = [finding.claim for finding in page.findings]
    today = date.today().isoformat()
    for part in (
        page.headline,
        page.advice,
        *claims,
        "torch",
        "seed 0",
        "model model",
        "guide guide",
        "test data list, 60",
        today,
    ):
        assert part in words, part
    assert written["culprit"] == page.culprit and len(written["records"]["test"]["elbo"]) == 60


def test_text_from_the_user_is_escaped(page, tmp_path):
    named = replace(page, left_out={"surgery": "<b>latents & 'z'</b>"}, about={"model": "<i>m</i>"})
    named.to_html(tmp_path / "page.html", title="<u>nats</u>")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>latents" not in text and "&lt;b&gt;latents &amp;" in text
    assert "<i>m" not in text and "<u>" not in text and "<title>&lt;u&gt;nats&lt;/u&gt;</title>" in text
    with pytest.raises(OptionError, match="title"):
        page.to_html(tmp_path / "page.html", title=3)


def test_terms_lead_to_a_sentence_on_the_page(page, tmp_path):
    page.to_html(tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    linked_to = {address[1:] for address in reader.addresses if address.startswith("#")}
    assert len(set(reader.ids)) == len(reader.ids) and linked_to <= set(reader.ids)
    unlinked = {"datum", "posterior-collapse", "q-z"}  # words of few pages
    assert {term.anchor for term in TERMS} - unlinked <= linked_to
    html = linked("the ELBO of <ELBO>, ELBOs and q(z): pv.Monitor(x, f(y)).history, beta=pv.LinearAnnealing(...), nats")
    assert html == (
        'the <a href="#elbo">ELBO</a> of &lt;ELBO&gt;, ELBOs and <a href="#q-z">q(z)</a>: '
        "<code>pv.Monitor(x, f(y)).history</code>, <code>beta=pv.LinearAnnealing(...)</code>, "
        '<a href="#nats">nats</a>'
    )


def test_test_and_training_data_stand_side_by_side(page, tmp_path):
    page.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    places = {(row.part, row.name, row.data): place for place, row in enumerate(page.numbers)}
    rows = [set(map(int, re.findall(r'data-number="(\d+)"', row))) for row in re.findall("<tr>(.*?)</tr>", text, re.S)]
    for name in page.test.titles.values():
        assert {places["gaps", name, data] for data in ("test", "train")} in rows


def test_errors_have_two_digits_and_values_as_many_decimals(page, tmp_path):
    """No error is printed as zero that is not zero."""
    page.to_html(tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert reader.shown[0, "value"] == texts_of(page.numbers[0])["value"]
    for (place, field), text in reader.shown.items():
        number = reader.numbers[place, field]
        if field == "value" or text.startswith(("<", "not")):
            continue
        decimals = len(text.partition(".")[2])
        assert float(text) == pytest.approx(number, rel=0.05, abs=5e-5)
        assert len(text.replace(".", "").lstrip("0")) == 2 or decimals in (0, 4), text
        assert len(reader.shown[place, "value"].partition(".")[2]) >= decimals
    number = page.numbers[0]
    for value, errors, expected in (
        (-112.7726, (0.00153, 1.608), ("-112.7726", "0.0015", "1.6")),
        (6.868, (0.0996, 0.3), ("6.87", "0.10", "0.30")),
        (6.868, (0.0, 0.3), ("6.87", "0", "0.30")),
        (6.868, (1e-6, math.nan), ("6.8680", "<0.0001", "")),
        (420.24, (math.nan, math.nan), ("420", "", "")),
        (0.00243, (math.nan, math.nan), ("0.00243", "", "")),
        (22986.4, (12.3, 456.7), ("22986", "12", "457")),
        (math.inf, (math.nan, math.nan), ("inf", "", "")),
    ):
        row = replace(number, value=value, std_error=errors[0], sampling_error=errors[1], doubt="")
        assert tuple(texts_of(row).values()) == expected


@pytest.mark.parametrize(
    ("value", "error", "options", "expected"),
    [
        (6.8688, 0.0015, {}, "6.869 +- 0.002 nats"),
        (6.8688, 0.0015, {"most": 2}, "6.87 nats"),  # an error of 0.00 would say that there is none
        (6.3075, 1.84, {"unit": ""}, "6.3 +- 1.8"),
        (6.3075, 0.0996, {}, "6.31 +- 0.10 nats"),
        (6.3075, 0.0, {}, "6.308 nats"),
        (6.3075, math.nan, {}, "6.308 nats (error unknown)"),
        (1234.5, 67.8, {}, "1234 +- 68 nats"),
    ],
)
def test_sentences_print_no_more_digits_than_are_known(value, error, options, expected):
    assert with_error(Estimate(*torch.tensor([value, error, error], dtype=torch.float64)), **options) == expected


def test_no_record_prints_an_error_as_zero():
    small, none = (Estimate(*torch.tensor([6.8688, error, error], dtype=torch.float64)) for error in (4e-4, 0.0))
    assert (small.with_error(), small.with_error(4)) == ("6.869 +- <0.001", "6.8688 +- 0.0004")
    assert none.with_error() == "6.869 +- 0.000"


def test_programs_and_data_are_called_by_their_names():
    class Vae(torch.nn.Module):
        def model(self, x): ...

    made = Vae()
    assert [name_of(p) for p in (made.model, partial(made.model, 1), made)] == ["Vae.model", "Vae.model", "Vae"]
    data = TensorDataset(torch.zeros(3))
    assert name_of_data(DataLoader(Subset(data, [0]))) == "TensorDataset" and name_of_data([data]) == "list"


def test_json_is_proper_json(page, tmp_path):
    page.to_json(tmp_path / "page.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "page.json").read_text(), parse_constant=refuse)


def test_csv_has_a_row_per_number_with_seed_and_versions(page, tmp_path):
    page.to_csv(tmp_path / "page.csv")
    with open(tmp_path / "page.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(page.numbers)
    for row, number in zip(rows, page.numbers, strict=True):
        assert (row["part"], row["data"], row["name"], row["unit"]) == (number.part, number.data, number.name, number.unit)
        for name in ("value", "std_error", "sampling_error"):
            value = getattr(number, name)
            assert float(row[name]) == value or math.isnan(value)
        assert row["seed"] == "0" and row["torch"] and row["pyro-ppl"] and int(row["num_data"]) == number.num_data
    assert {"cost", "gaps", "surgery", "units", "self-check", "samples", "held-out"} <= {row["part"] for row in rows}


def test_the_figure_has_all_panels_and_leaves_other_figures_alone(page, tmp_path):
    before = plt.get_fignums()
    page.to_html(tmp_path / "page.html")
    assert plt.get_fignums() == before
    own = plt.figure()
    assert page.plot(own) is own
    assert len(own.axes) >= 8
    plt.close(own)
    new = page.plot()
    assert new is not own
    plt.close(new)


def test_it_prints_the_verdict_first(page):
    lines = str(page).splitlines()
    assert lines[0].startswith("Diagnosis: The encoder causes most of the gap between the ELBO and log p(x)")
    assert all(len(line) <= 88 for line in lines)
    assert page.verdict() == f"{page.headline} {page.advice}"


PROBE = """<script>window.onload = () => {
  const asked = performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"));
  const pictures = [...document.images].map(image => image.naturalWidth);
  const width = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = JSON.stringify({asked, pictures, width});
}</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
@pytest.mark.parametrize("size", ["1200,900", "500,900"], ids=["desk", "phone"])
def test_a_browser_shows_it_without_a_request(page, tmp_path, size):
    """The numbers as the browser read them; all pictures there; nothing asked for; nothing wider than the window."""
    page.to_html(tmp_path / "page.html")
    page.to_json(tmp_path / "page.json")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(text.replace("</body>", PROBE), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}", "--dump-dom"]
    shown = subprocess.run([*command, (tmp_path / "probed.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    check_numbers(shown.stdout, json.loads((tmp_path / "page.json").read_text()))
    probe = json.loads(unescape(re.search(r"<title>(.*?)</title>", shown.stdout)[1]))
    assert probe["asked"] == []
    assert len(probe["pictures"]) >= 8 and min(probe["pictures"]) > 500
    assert probe["width"] <= 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
def test_it_prints_on_three_pages(page, tmp_path):
    page.to_html(tmp_path / "page.html")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'page.pdf'}"]
    subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, check=True, timeout=120)
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) == 3
