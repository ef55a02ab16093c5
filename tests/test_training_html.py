"""freezeout report: one page that holds all it shows."""

import base64
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from freezeout_ext.training import cli

RUN = ["--data", "digits", "--model", "wrn-10-1", "--batch-size", "128", "--steps", "30"]
RUN += ["--threads", "1", "--device", "cpu", "--t0", "0.6"]
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags nest; gathers attributes, text and tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    assert cli.main(["train", *RUN, "--out", str(root / "a <run>")]) == 0
    arms = ["--seeds", "2", "--arms", "full", "freezeout", "short"]
    assert cli.main(["compare", *RUN, *arms, "--out", str(root / "comparison")]) == 0
    return root / "a <run>", root / "comparison"


@pytest.fixture(scope="module")
def page(folders):
    out = folders[0].parent / "page.html"
    assert cli.main(["report", *map(str, folders), "--out", str(out)]) == 0
    return out.read_text()


def test_needs_nothing_from_elsewhere(page):
    parsed = Page(page)
    links = [value for name, value in parsed.attributes if name in ("src", "href")]
    assert len(links) == 2 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)
    for link in links:
        assert ElementTree.fromstring(base64.b64decode(link.partition(",")[2])).tag.endswith("svg")


def test_shows_what_the_folders_hold(folders, page):
    parsed = Page(page)
    text = "".join(parsed.text)
    result = json.loads((folders[0] / "result.json").read_text())
    summary = json.loads((folders[1] / "compare.json").read_text())
    assert "a <run>" in text and "comparison" in text
    assert f"{100 * result['test_accuracy']:.2f} %" in text
    firsts = [row[0] for row in parsed.rows if row]
    for arm in summary["arms"]:
        assert arm["name"] in firsts
    for transition in result["transitions"]:
        assert str(transition["step"]) in firsts
    assert result["engagement"]["source"] in text
    assert result["conditions"]["torch"] in text and "batch 128" in text
    assert sum("saved, predicted" in row for row in parsed.rows) == 1 + sum(
        bool(a["transitions"]) for a in summary["arms"]
    )


def test_is_written_beside_the_first_run_and_marks_one_that_goes_on(folders, capsys):
    result = folders[0] / "result.json"
    kept = result.read_text()
    result.unlink()
    try:
        assert cli.main(["report", str(folders[0])]) == 0
    finally:
        result.write_text(kept)
    assert "not finished: epoch 3" in (folders[0] / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path, folders, capsys):
    assert cli.main(["report", str(folders[0]), str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert "run must be the folder of a comparison or of a run with at least one epoch" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_charts_are_as_wide_as_a_phone(page):
    """4.8 inches are 346 points: the letters of 8 to 10 points then have about their size on a phone."""
    images = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    widths = [ElementTree.fromstring(base64.b64decode(image)).get("width") for image in images]
    assert widths == ["345.6pt", "345.6pt"]
