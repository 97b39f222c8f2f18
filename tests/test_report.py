"""The HTML report: what is on the page, that it needs no network, and the command."""

import itertools
import json

import numpy as np
import pytest
from helpers.browser import CHROMIUM, measure_page
from helpers.html_pages import Page
from helpers.traces import make_trace

from lplb_triton.bench import cli, report
from lplb_triton.traces import trace as traces

SECTIONS = ["time", "by-layer", "ranks", "left", "batch-size", "experts", "near", "live",
            "combinations", "details", "words"]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Folder of a report on a trace whose name has to be escaped."""
    folder = tmp_path_factory.mktemp("report")
    traces.save(folder / "a&b.npz", make_trace())
    common = ["--device", "cpu", "--ep", "8", "--placement", "eplb,none,cube", "--slots", "1,2"]
    assert cli.main(["report", str(folder / "a&b.npz"), *common, "--out", str(folder / "o")]) == 0
    return folder / "o"


@pytest.fixture(scope="module")
def text(result):
    """The page."""
    return (result / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def figures(result):
    """The figures that the page shows."""
    return json.loads((result / "balance.json").read_text())


@pytest.fixture(scope="module")
def fetching_text(figures):
    """The page of figures in which live slots are filled in one of six batches."""
    live = {**figures["live"], "fetching": 1 / 6, "pieces": 0.02}
    live["imbalance"] = {"lp": [1.001] * 5 + [1.2], "live": [1.001] * 5 + [1.105]}
    return report.html({**figures, "live": live})


def shown_cell(figures):
    """Return the combination that the page is about."""
    return figures["cells"][figures["shown"]["cell"]]


def test_the_headline_says_what_is_gained(text, figures):
    """The first heading and the number beside it are those of the figures."""
    page, cell = Page(text), shown_cell(figures)
    mean = {k: cell["imbalance"][k]["mean"] for k in ("none", "eplb", "integer")}
    p95 = {k: cell["imbalance"][k]["p95"] for k in ("none", "eplb", "integer")}
    over = {k: f"{100 * (1 - mean['integer'] / mean[k]):.0f}%" for k in ("none", "eplb")}
    head = page.texts["summary"]
    assert f"The slowest rank gets {over['eplb']} fewer tokens than with EPLB" in head
    assert f"{over['none']} fewer than with no balancing" in head
    assert f"\N{MINUS SIGN}{over['eplb']}" in head and "in tokens, not in time" in head
    assert f"{100 * (1 - p95['integer'] / p95['eplb']):.0f}% fewer tokens than with EPLB" in head
    bound = np.mean([layer["bound"] for layer in cell["by_layer"]])
    assert f"can do better than {100 * (1 - bound / mean['eplb']):.0f}% fewer tokens than" in head
    assert text.index("<h1>") < text.index("<figure") < text.index("What do I gain?")


def test_the_three_answers(text, figures):
    """The head of the page answers what is gained, from which batch size, and what to change."""
    head, shown = Page(text).texts["summary"], figures["shown"]
    mean = shown_cell(figures)["imbalance"]["integer"]["mean"]
    assert f"has {mean:.2f} times the mean load" in head
    for size in shown["saving"]["sizes"]:
        start = size["pays_from"]["eplb"]
        wanted = "does not pay up to 131,072" if start is None else f"pays from {start:,} on"
        assert wanted in head and size["name"] in head
    now = shown["changes"][0]["imbalance"]
    for change in shown["changes"][1:]:
        told = f"{change['imbalance']:.3f} instead of {now:.3f}"
        assert (told in head) == (change["imbalance"] < 0.99 * now)


def test_the_sections(text, figures):
    """Contents list every section, and pictures have a mark for everything that they show."""
    page, cell = Page(text), shown_cell(figures)
    assert [link[1:] for link in page.links if link.startswith("#")][-len(SECTIONS) :] == SECTIONS
    assert set(SECTIONS) <= set(page.ids)
    assert page.count("waiting", "rect", "work") == 2 * 4 + 1
    assert page.count("over-time", "path", "line") == 2 * 3 + 3
    assert page.count("over-time", "path", "limit") == 2
    assert page.count("one-batch", "path", "line") == 2 * 3 + 3
    layers = len(cell["by_layer"])
    assert page.count("layers", "circle", "none") == 2 * layers + 1
    assert page.count("layers", "path", "mark") == 2 * layers + 1
    assert page.count("ranks", "image") == 2 * layers
    assert page.count("changes", "rect", "lp") == 2 * len(figures["shown"]["changes"])
    assert page.count("saving", "path", "line") == 3 * len(figures["shown"]["saving"]["sizes"])
    assert "n/a: cube needs a positive multiple" in page.texts["combinations"]
    assert "a&b.npz" in page.text and "not the GPU kernel's time" in page.texts["details"]


def test_every_picture_has_a_text_and_units(fetching_text):
    """Pictures have a title and a description, figures a caption, and axes their units."""
    page = Page(fetching_text)
    pictures = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(pictures) > 20
    for attrs in pictures:
        title, description = attrs["aria-labelledby"].split()
        assert page.texts[title] and len(page.texts[description]) > 20
    others = [a for t, a in page.tags if t == "svg" and "role" not in a]
    assert all(attrs["aria-hidden"] == "true" for attrs in others)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figure") == tags.count("figcaption") >= 10
    for name, axes in {
        "waiting": ("most loaded rank (mean load = 1)",),
        "over-time": ("test batch", "most loaded rank (mean load = 1)"),
        "one-batch": ("ranks, the most loaded first", "load of a rank (mean load = 1)"),
        "layers": ("most loaded rank (mean = 1, log scale)", "layer 0"),
        "ranks": ("test batch", "rank"),
        "remainder": ("above the mean load, %",),
        "changes": ("above the mean load, %",),
        "saving": ("tokens of a rank in a batch", "time saved, % of EPLB's"),
        "experts-map": ("step of the trace", "place of the expert"),
        "live-slots": ("test batch", "most loaded rank (mean load = 1)"),
    }.items():
        assert all(axis in page.texts[name] for axis in axes), name


def test_lines_on_top_of_each_other_stay_visible(fetching_text):
    """Of the lines of a picture each is narrower than those that are drawn before it."""
    page = Page(fetching_text)
    for name in ("over-time-picture-t", "one-batch-picture-t", "saving-picture-t"):
        assert name in page.ids
    for name in ("over-time", "one-batch", "saving", "live-slots"):
        lines = [a for t, a in page.ids[name] if t == "path" and "line" in a["class"].split()]
        half = len(lines) // 3
        widths = [float(attrs["stroke-width"]) for attrs in lines[:half]]
        assert len(widths) >= 2 and widths == sorted(set(widths), reverse=True)


def test_the_page_says_what_live_slots_would_add(text, fetching_text, figures):
    """A section has both imbalances of each batch, and how many batches would fetch."""
    found, cell = figures["live"], shown_cell(figures)
    assert all(found[name] == cell[name] for name in ("ep", "placement", "slots"))
    lp, live = (np.array(found["imbalance"][name]) for name in ("lp", "live"))
    assert len(lp) == len(live) == 6 and (live <= lp).all()
    # Live slots are filled where the LP leaves more, and nowhere else. Whole tokens add a little.
    assert (live[lp <= 1.01] == lp[lp <= 1.01]).all() and (live < lp).mean() == found["fetching"]
    (layer,) = (row for row in cell["by_layer"] if row["layer"] == found["layer"])
    assert lp == pytest.approx(np.array(layer["imbalance"]["lp"]), abs=0.05)
    page = Page(fetching_text)
    assert page.count("live", "path", "line") == 2 * 2 + 2
    assert "16.7% of the batches would fetch" in page.text
    assert "1.018 instead of 1.034" in page.text and "(without the time of fetching)" in page.text
    # Where nothing is fetched there is a sentence in place of two equal lines.
    page = Page(text)
    assert found["fetching"] == 0 and page.count("live", "path", "line") == 0
    assert "would fetch nothing in any of the 6 test batches" in page.texts["live-slots"]
    # Figures of a version without live slots have no such section.
    for older in ({k: v for k, v in figures.items() if k != "live"}, {**figures, "live": None}):
        assert "live" not in Page(report.html(older)).ids


def test_it_needs_no_network(text):
    """The page has no scripts, its links stay on it, and its images are embedded."""
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium(text, tmp_path, scheme):
    """In three widths nothing is cut off, overlaps or scrolls sideways, in light and dark."""
    shown = measure_page(text, (360, 800, 1400), scheme, tmp_path)
    assert [page["width"] for page in shown] == [360, 800, 1400]
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
    for page in shown:
        assert page["found"] == [] and page["ground"] == grounds[scheme]
        # Of the two sizes of a picture one is shown.
        assert page["pictures"] == shown[0]["pictures"] > 12


def test_from_json(result, tmp_path, capsys):
    """A report made from JSON equals the first one, and a file without a report is refused."""
    assert cli.main(["report", str(result / "balance.json"), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == f"report: {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").read_bytes() == (result / "report.html").read_bytes()
    for content, match in (
        ('{"command": "verify"}', "lplb-bench balance wrote"),
        ('{"command": "balance", "cells": []}', "run it again"),
        ('{"command": "balance", "cells": [{"applicable": true}]}', "run it again"),
        ('{"command": "balance"}', "cells"),
        ("{", "FILE"),
    ):
        (tmp_path / "bad.json").write_text(content)
        assert cli.main(["report", str(tmp_path / "bad.json")]) == cli.USAGE
        assert match in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none.npz")]) == cli.USAGE


def paths_of(value, path=()):
    """Every place in nested dicts and lists; of a list the first."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:1])
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def changed(value, path, new):
    """Copy nested dicts and lists with another value in one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def test_a_changed_report_is_a_page_or_an_error(figures):
    """A report with any one value changed gives a page or a named error."""
    figures = dict(figures, cells=[shown_cell(figures)], shown=dict(figures["shown"], cell=0))
    figures["shown"]["ranks"] = dict(figures["shown"]["ranks"])
    figures["shown"]["ranks"]["layers"] = figures["shown"]["ranks"]["layers"][:1]
    report.html(figures)
    values = itertools.cycle([None, "<i>", -1, 1e300, [], {}, [[1]], [{"a": 1}], True])
    refused = pages = 0
    for path in paths_of(figures):
        if not path or path[0] in ("command", "environment", "options"):
            continue
        for new in itertools.islice(values, 4):
            try:
                page = report.html(changed(figures, path, new))
            except ValueError as error:
                assert "report" in str(error)
                refused += 1
                continue
            assert page.startswith("<!DOCTYPE html>") and "<i>" not in page
            assert "NaN" not in page and "nan " not in page
            pages += 1
    assert refused > 100 and pages > 50


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
