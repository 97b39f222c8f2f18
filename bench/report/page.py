"""The page of a report: one HTML file that needs no network and no script."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from lplb_triton.bench.report import sections, traffic, words
from lplb_triton.bench.report.style import STYLE

__all__ = ["html"]

# Words of the page, for a reader who comes from elsewhere.
WORDS = {
    "rank": "A GPU of the expert-parallel group, which holds some of the experts of each layer.",
    "load": "Tokens that a rank computes in a layer, counted once for each of their experts.",
    "imbalance": "Load of the most loaded rank over the mean load of a batch. 1 is perfect.",
    "slowest rank": "The most loaded one of a batch, for which all others wait.",
    "redundant slot": "Room on a rank for one more expert: a copy of one that lies elsewhere.",
    "EPLB": "A placement by past loads that copies hot experts; copies of an expert share evenly.",
    "linear program (LP)": "Decides for each batch, from its own loads, how many tokens each copy "
    "takes, so that the most loaded rank has as few as possible.",
    "whole tokens": "What is left after ranks have rounded the plan to whole tokens.",
    "least that these copies allow": "The certified bound: no split over the same copies puts "
    "fewer tokens on the most loaded rank.",
    "95th percentile (p95)": "Nineteen of twenty batches are better than this.",
}


def html(report: Mapping[str, Any]) -> str:
    """Lay out a page.

    Parameters
    ----------
    report
        What ``lplb-bench balance`` writes as JSON.

    Returns
    -------
    str
        A whole HTML document.

    Raises
    ------
    ValueError
        If the report is of another command, of a version without what the page shows, or was
        changed into something else.
    """
    if report.get("command") != "balance":
        raise ValueError("report must be what lplb-bench balance wrote")
    try:
        # A mean of nothing or an overflow is no figure for a page.
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error", RuntimeWarning)
            return _lay_out(report)
    except _OldReportError:
        raise
    except (
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        ValueError,
        RuntimeWarning,
    ) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"report is not as lplb-bench balance writes it ({what})") from error


class _OldReportError(ValueError):
    """The message is complete, so that nothing is added to it."""


def _lay_out(report: Mapping[str, Any]) -> str:
    if not any(cell["applicable"] for cell in report["cells"]) or "shown" not in report:
        raise _OldReportError(
            "report has no results, or was written by an older version: run it again"
        )
    shown = report["shown"]
    cell = report["cells"][shown["cell"]]
    parts = [
        ("time", "Over time", sections.show_time(cell, report["trace"]["stretches"])),
        ("by-layer", "By layer", sections.show_layers(cell)),
        ("ranks", "Rank loads over time", sections.show_ranks(shown["ranks"])),
        ("left", "What is left, and why", sections.show_remainder(report, cell)),
        ("batch-size", "From which batch size on", sections.show_batch_sizes(shown)),
        ("experts", "Experts over time", sections.show_experts(report["heat"])),
    ]
    if shown.get("traffic") is not None:
        parts.append(("near", "Near and far", traffic.show_traffic(shown["traffic"])))
    # Live slots are for placements of one group only.
    if report.get("live") is not None:
        parts.append(("live", "Live slots", sections.show_live(report["live"])))
    parts += [
        ("combinations", "All combinations", sections.show_combinations(report["cells"])),
        ("details", "Solver, times, machine", _show_details(report)),
        ("words", "Words", _show_words()),
    ]
    source = escape(str(report["options"]["trace"]))
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in parts)
    body = [f'<section id="{name}">\n<h2>{title}</h2>\n{text}\n</section>'
            for name, title, text in parts]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Load balance: {source}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<div class="page">\n{_show_head(report, cell, source)}\n'
        f'<nav aria-label="Contents"><h2>Contents</h2><ul>{links}</ul></nav>\n<main>\n'
        + "\n".join(body)
        + "\n</main>\n</div>\n</body>\n</html>\n"
    )


def _show_head(report: Mapping[str, Any], cell: Mapping[str, Any], source: str) -> str:
    """Lay out the headline, its picture and the three answers."""
    headline, number, unit, text = words.say_headline(cell)
    batches = words.count_things(len(cell["by_layer"][0]["bound"]), "test batch")
    layers = words.count_things(len(cell["by_layer"]), "layer")
    answers = (
        ("What do I gain?", words.answer_gain(cell)),
        (
            "From which batch size on?",
            words.answer_batch_size(report["shown"]["saving"], report["shown"]["batch_sizes"]),
        ),
        ("What should I change?", words.answer_changes(report, cell)),
    )
    cards = "".join(f"<div><h2>{name}</h2>{text}</div>" for name, text in answers)
    return (
        f'<header id="summary">\n<p class="source">Load balance of {source}: '
        f"{words.name_cell(cell)}</p>\n"
        f"<h1>{headline}</h1>\n"
        f'<p class="number">{number}</p>\n<p class="note">{unit}, in tokens, not in time; '
        f"mean over {batches} of {layers}</p>\n<p>{text}</p>\n"
        f"{sections.show_waiting(cell)}\n"
        f'<div class="answers">{cards}</div>\n</header>'
    )


def _show_details(report: Mapping[str, Any]) -> str:
    """List certificates and times of the solver, the trace and the machine."""
    trace, rows = report["trace"], []
    for cell in report["cells"]:
        if not cell["applicable"]:
            continue
        lps = cell["lps"]
        if not lps["count"]:
            rows.append([words.name_cell(cell, short=True), "no LP", "", "", ""])
            continue
        gap = "none" if lps["max_gap"] is None else f"{lps['max_gap']:.1e}"
        rows.append(
            [
                words.name_cell(cell, short=True),
                f"{int(lps['certified'])} of {int(lps['count'])}",
                gap,
                f"{lps['mean_iterations']:.1f}, {int(lps['max_iterations'])}",
                f"{lps['median_us_per_lp']:.2f}",
            ]
        )
    header = ["combination", "certified", "largest gap", "steps: mean, max", "us per LP"]
    time_is = next(cell["lps"]["time_is"] for cell in report["cells"] if cell["applicable"])
    environment = {k: v for k, v in report["environment"].items() if v is not None}
    facts = [
        words.count_things(int(trace[f"{name}es" if name == "batch" else f"{name}s"]), name)
        for name in ("expert", "layer", "batch", "source")
    ]
    return (
        f"<p>{facts[0]}, {facts[1]}, {facts[2]} from {facts[3]}. Experts were placed by the first "
        "batches of each stretch, and the following ones balanced.</p>\n"
        + sections.draw_table(header, rows)
        + f'\n<p class="note">Time per LP: {escape(str(time_is))}. The whole comparison took '
        f"{report['seconds']:.1f} s.</p>\n"
        + sections.draw_table(
            ["machine", ""], [[escape(str(k)), escape(str(v))] for k, v in environment.items()]
        )
    )


def _show_words() -> str:
    pairs: Sequence[tuple[str, str]] = list(WORDS.items())
    return "<dl>" + "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in pairs) + "</dl>"
