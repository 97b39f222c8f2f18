"""The HTML report: what is on the page, that it needs no network, and the command."""

import base64
import io
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers.traces import make_trace
from PIL import Image

from lplb_triton.bench import balance, charts, cli, report
from lplb_triton.bench.live import find_gain
from lplb_triton.traces import trace as traces

VOID = {"meta", "img"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """Ids, tags by id, and whatever could load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.links, self.text = [], {}, [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "data", "srcset")]
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids[attrs["id"]] = []
        if tag not in VOID:
            self.open.append((tag, attrs.get("id")))
        for _, name in self.open:
            if name:
                self.ids[name].append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    traces.save(folder / "a&b.npz", make_trace())
    common = ["--device", "cpu", "--ep", "8", "--placement", "eplb,none,cube", "--slots", "1,2"]
    assert cli.main(["report", str(folder / "a&b.npz"), *common, "--out", str(folder / "o")]) == 0
    return folder / "o"


def count(page, name, tag, kind=None):
    return sum(t == tag and kind in (None, a.get("class")) for t, a in page.ids[name])


def test_the_page(result):
    """The page has a section for every cell, with a mark for each rank and each flow."""
    text = (result / "report.html").read_text(encoding="utf-8")
    page, figures = Page(text), json.loads((result / "balance.json").read_text())
    assert {"summary", "heat", "timing"} <= set(page.ids)
    cells = [cell for cell in figures["cells"] if cell["applicable"]]
    assert len(cells) == 4 and f"cell{len(cells)}" not in page.ids
    for number, cell in enumerate(cells):
        name = f"cell{number}"
        assert count(page, f"{name}-imbalance", "polyline") == 5
        assert count(page, f"{name}-loads", "rect") == 8 * 3 + 3
        assert count(page, f"{name}-placement", "circle", "rank") == 8
        flows = cell["example"]["flows"]
        assert count(page, f"{name}-placement", "path", "flow") == len(flows) == 8 * cell["slots"]
        assert (f"{name}-solver" in page.ids) == (cell["slots"] > 0)
        assert all(f["from"] != f["to"] for f in flows if cell["placement"] == "cube")
    assert "n/a: cube needs a positive multiple" in page.text and "a&b.npz" in page.text
    assert "not the GPU kernel's time" in page.text


def test_the_page_says_what_live_slots_would_add(result):
    """A section has both imbalances of each batch, and how many batches would fetch."""
    figures = json.loads((result / "balance.json").read_text())
    found = figures["live"]
    assert (found["ep"], found["placement"], found["slots"]) == (8, "eplb", 1)
    lp, live = (np.array(found["imbalance"][name]) for name in ("lp", "live"))
    assert len(lp) == len(live) == 6 and (live <= lp).all()
    # Live slots are filled where the LP leaves more, and nowhere else. Whole tokens add a little.
    assert (live[lp <= 1.01] == lp[lp <= 1.01]).all() and (live < lp).mean() == found["fetching"]
    cell = figures["cells"][0]
    (layer,) = (row for row in cell["by_layer"] if row["layer"] == found["layer"])
    assert lp == pytest.approx(np.array(layer["imbalance"]["lp"]), abs=0.05)
    page = Page((result / "report.html").read_text(encoding="utf-8"))
    assert count(page, "live", "polyline") == 2
    assert f"{100 * found['fetching']:.1f}% of the batches would fetch" in page.text
    # Figures of a version without live slots have no such section.
    for older in ({k: v for k, v in figures.items() if k != "live"}, {**figures, "live": None}):
        assert "live" not in Page(report.html(older)).ids


def test_topologies_of_several_groups_have_no_live_slots():
    """Where every placement has several groups of ranks, nothing is said of live slots."""
    trace = make_trace(sources=1)
    cells = balance.run(trace, balance.Options((16,), (2,), ("ring:8",)))
    assert cells[0].reason is None and find_gain(trace, cells) is None


def test_an_empty_batch_is_balanced():
    """A batch without tokens needs no live slots and has imbalance 1."""
    counts = make_trace(layers=1).counts.copy()
    counts[-1] = 0
    trace = traces.Trace(counts, np.arange(len(counts)))
    found = find_gain(trace, balance.run(trace, balance.Options((8,), (1,), ("eplb",))))
    assert found["imbalance"]["lp"][-1] == found["imbalance"]["live"][-1] == 1.0


def test_it_needs_no_network(result):
    """The page has no scripts or links, and its one image is embedded."""
    page = Page((result / "report.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(page.links[0].split(",")[1])))
    assert image.size == (12, 32)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_chromium(result, tmp_path):
    """Chromium shows the page's elements unchanged, and its picture is not blank."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000"]
    address = (result / "report.html").as_uri()
    run = {"capture_output": True, "check": True, "timeout": 120, "env": dict(os.environ, LANG="C")}
    dom = subprocess.run([CHROMIUM, *options, "--dump-dom", address], **run).stdout.decode()
    # The browser's tree, not the file: nothing was dropped or moved by its parser.
    source, shown = (Page(text) for text in ((result / "report.html").read_text("utf-8"), dom))
    assert set(shown.ids) == set(source.ids)
    for name in source.ids:
        tags = [[tag for tag, _ in page.ids[name]] for page in (source, shown)]
        assert tags[0] == [tag for tag in tags[1] if tag != "tbody" or "tbody" in tags[0]]
    picture = tmp_path / "report.png"
    subprocess.run([CHROMIUM, *options, f"--screenshot={picture}", address], **run)
    with Image.open(picture) as image:
        assert image.size == (1200, 3000)
        colors = image.convert("RGB").getcolors(1 << 24)
    # Text, lines and bars: more than a few colors, and most of the page is not one of them.
    assert len(colors) > 100 and max(n for n, _ in colors) < 0.95 * 1200 * 3000


def test_the_heat_map_shows_the_hot_expert():
    """The heat map is hot where an expert's load is far above the mean."""
    counts = np.full((6, 1, 1, 4), 10)
    counts[3:, 0, 0, 2] = 100
    found = report.heat(traces.Trace(counts, np.arange(6)), 0)
    assert found["steps"] == list(range(6)) and found["tokens"][4] == [10, 10, 100, 10]
    shown = report._heat({"heat": found})
    image = Image.open(io.BytesIO(base64.b64decode(shown.split("base64,")[1].split('"')[0])))
    assert image.getpixel((0, 2)) == charts.MEAN and image.getpixel((5, 2))[0] > 150
    assert image.getpixel((5, 2))[2] < 100 < image.getpixel((5, 0))[2]


def test_flows_are_the_tokens_of_the_plan():
    """Loads in place change into those of the plan if the flows' tokens are moved."""
    trace = make_trace()
    options = balance.Options((8,), (1,), ("ring:8",))
    (cell,) = balance.run(trace, options)
    example = cell.worst()
    flows = report.flows(trace, options, cell)
    assert len(flows) == 8 and {f["to"] for f in flows} == set(range(8))
    loads = example.loads["none"] * 0
    part = cell.results[0].stretch
    totals = trace.totals()[:, example.layer]
    in_place = balance.make_placement(
        "ring:8", torch.from_numpy(totals[: part.split].sum(0)).double(), 8, 1
    )
    for slot, expert in enumerate(in_place.phy2log.tolist()):
        if slot % 5 < 4:
            loads[slot // 5] += totals[example.batch, expert]
    for flow in flows:
        loads[flow["from"]] -= flow["tokens"]
        loads[flow["to"]] += flow["tokens"]
    assert np.abs(loads - example.loads["lp"]).max() <= 2


def test_from_json(result, tmp_path, capsys):
    """A report made from JSON equals the first one, and a file without a report is refused."""
    assert cli.main(["report", str(result / "balance.json"), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == f"report: {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").read_bytes() == (result / "report.html").read_bytes()
    for content, match in (
        ('{"command": "verify"}', "lplb-bench balance wrote"),
        ('{"command": "balance", "cells": []}', "run it again"),
        ('{"command": "balance"}', "cells"),
        ("{", "FILE"),
    ):
        (tmp_path / "bad.json").write_text(content)
        assert cli.main(["report", str(tmp_path / "bad.json")]) == cli.USAGE
        assert match in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none.npz")]) == cli.USAGE


def paths_of(value, path=()):
    """Every place in nested dicts and lists; of a list the first two."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:2])
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("new", [None, "<b>", -1, 1e300, [], {}, [[1]], [{"a": 1}], True])
def test_a_changed_report_is_a_page_or_an_error(result, new):
    """A report with any one value changed gives a page or a named error."""
    figures = json.loads((result / "balance.json").read_text())
    figures["cells"] = figures["cells"][:1]
    refused = 0
    for path in paths_of(figures):
        if path and path[0] != "command":
            try:
                assert report.html(changed(figures, path, new)).startswith("<!DOCTYPE html>")
            except ValueError as error:
                assert "report" in str(error)
                refused += 1
    assert refused > 20


def test_deeply_nested_json_is_refused(tmp_path, capsys):
    """JSON that is nested too deeply is refused with its file's name."""
    for text in (
        "[" * 10**5 + "]" * 10**5,
        '{"command":' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}",
    ):
        path = tmp_path / "deep.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"deep\.json: JSON is nested too deeply"):
            report.read(path)
        assert cli.main(["report", str(path)]) == cli.USAGE
        assert "argument FILE" in capsys.readouterr().err


def test_what_is_read(tmp_path):
    """Only a JSON object is read as a report, and invalid JSON is refused by file name."""
    (tmp_path / "a.json").write_text('{"command": "verify"}')
    assert report.read(tmp_path / "a.json") == {"command": "verify"}
    (tmp_path / "a.json").write_text("[[1]]")
    assert report.read(tmp_path / "a.json") is None and report.read(tmp_path / "a.npz") is None
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        report.read(tmp_path / "a.json")


def test_no_report(tmp_path, capsys):
    """`--no-report` writes no page, and `--report` without a folder is refused."""
    traces.save(tmp_path / "t.npz", make_trace())
    common = ["balance", "--trace", str(tmp_path / "t.npz"), "--device", "cpu", "--ep", "8"]
    assert cli.main([*common, "--no-report", "--out", str(tmp_path / "o")]) == 0
    assert not (tmp_path / "o" / "report.html").exists()
    assert cli.main([*common, "--report", "--json", str(tmp_path / "x.json")]) == cli.USAGE
    assert "--report" in capsys.readouterr().err
    assert cli.main([*common, "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(tmp_path / "o" / "report.html"))
