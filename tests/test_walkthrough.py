"""The walk from a model of transformers to its report, and the page of it."""

import ast
import importlib
import json
import sys

import pytest
from helpers.html_pages import Page
from pages import ROOT

pytest.importorskip("transformers", minversion="5.24")
SCRIPT = ROOT / "examples" / "walkthrough.py"


@pytest.fixture
def render(monkeypatch):
    """The module that renders scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module("render")
    del sys.modules["render"]


def test_a_model_gets_a_report_of_its_own_trace(render, tmp_path, monkeypatch):
    """Ten statements besides imports lead to a report that gains, and to a page that shows it."""
    monkeypatch.chdir(tmp_path)
    render.render(SCRIPT, tmp_path / "walk.html")
    figures = json.loads((tmp_path / "lplb-bench-results" / "balance.json").read_text())
    assert figures["trace"]["experts"] == 64 and figures["trace"]["meta"]["hidden"] == 64
    means = figures["cells"][figures["shown"]["cell"]]["imbalance"]
    assert means["integer"]["mean"] < 0.95 * means["eplb"]["mean"] < 0.8 * means["none"]["mean"]
    report = Page((tmp_path / "lplb-bench-results" / "report.html").read_text(encoding="utf-8"))
    assert "this model's experts" in report.texts["summary"]
    page = Page((tmp_path / "walk.html").read_text(encoding="utf-8"))
    assert "It pays here. Recommended" in page.text and "From a model to a report" in page.text
    links = [link for link in page.links if not link.startswith("data:")]
    assert links == ["lplb-bench-results/report.html"] * 2
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 1 and pictures[0]["alt"]


def test_it_is_short(render):
    """The walk has at most ten statements besides imports."""
    code = [text for kind, text in render.split_cells(SCRIPT.read_text()) if kind == "code"]
    found = [node for node in ast.walk(ast.parse("\n".join(code))) if isinstance(node, ast.stmt)]
    assert sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in found) <= 10


def test_cells_are_told_apart(render):
    """Comments of a text cell lose their sign, programs stay as they are."""
    cells = render.split_cells("# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1  # one\n\n")
    assert cells == [("markdown", "# A\n\nb\n"), ("code", "x = 1  # one")]
