"""What is written down: the page, JSON, CSV and the figure hold the same numbers, and the page needs nothing else."""

import csv
import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
from report_helpers import diagnosed, linear_pair

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def page():
    """Sixteen numbers per datum are an image of 4 x 4."""
    _, model, guide, x = linear_pair("encoder", data_dim=16)
    return diagnosed(model, guide, x)


class Reader(HTMLParser):
    """The numbers on the page by row, and every address it names."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.pictures, self._row = {}, [], 0, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "tr":
            self._row = attributes.get("data-number")
        if self._row is not None and "data-value" in attributes:
            self.rows.setdefault(int(self._row), []).append(float(attributes["data-value"]))
        self.addresses += [attributes[name] for name in ("src", "href", "action", "srcset") if name in attributes]
        self.pictures += tag == "img"


def check_numbers(text, written):
    rows = Reader(text).rows
    assert len(rows) == len(written["numbers"]) > 40
    for place, row in enumerate(written["numbers"]):
        for shown, name in zip(rows[place], ("value", "std_error", "sampling_error"), strict=True):
            expected = row[name]
            assert (math.isnan(shown) and expected is None) or shown == (float(expected) if expected is not None else None)


def test_the_page_has_the_numbers_of_the_json_and_no_outside(page, tmp_path):
    page.to_html(tmp_path / "page.html")
    page.to_json(tmp_path / "page.json")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    check_numbers(text, written)
    reader = Reader(text)
    assert reader.pictures >= 8
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert 'name="viewport"' in text and "@media print" in text
    for part in (page.headline, page.advice, "sampling error", "torch", "seed 0"):
        assert part in text.replace("&#39;", "'").replace("\u00b1", "+-"), part
    assert written["culprit"] == page.culprit and len(written["records"]["test"]["elbo"]) == 60


def test_text_from_the_user_is_escaped(page, tmp_path):
    from dataclasses import replace

    replace(page, left_out={"surgery": "<b>latents & 'z'</b>"}).to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>latents" not in text and "&lt;b&gt;latents &amp;" in text


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
    assert lines[0].startswith("Diagnosis: The encoder is what keeps the ELBO from log p(x)")
    assert all(len(line) <= 120 for line in lines)
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
