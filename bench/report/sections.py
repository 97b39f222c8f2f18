"""The sections of a report, each with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from lplb_triton.bench.report import charts, words
from lplb_triton.bench.report.svg import PANEL, WIDE
from lplb_triton.bench.tables import LABELS
from lplb_triton.bench.types import Floats

__all__ = [
    "draw_table",
    "show_batch_sizes",
    "show_combinations",
    "show_experts",
    "show_layers",
    "show_live",
    "show_ranks",
    "show_remainder",
    "show_time",
    "show_waiting",
]

LOAD_AXIS = "most loaded rank (mean load = 1)"
MOST_RANK, MOST_EXPERT = 2.0, 4.0
NAMES = {
    "none": "no balancing",
    "eplb": "EPLB, copies share evenly",
    "integer": "linear program, in whole tokens",
}
KINDS = {"none": "none", "eplb": "eplb", "integer": "lp"}


def draw_figure(name: str, title: str, text: str, body: str, legend: str = "") -> str:
    """Lay out a figure: its title, what to look for, the picture and its legend."""
    return (
        f'<figure id="{name}">\n<figcaption><b>{escape(title)}</b>{text}</figcaption>\n{body}\n'
        f"{legend}</figure>"
    )


def draw_legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """Lay out a legend of (kind, shape, name)."""
    items = [
        f"<li>{charts.draw_swatch(kind, shape)}<span>{escape(name)}</span></li>"
        for kind, shape, name in entries
    ]
    return '<ul class="legend">' + "".join(items) + "</ul>\n"


def draw_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table, which scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def show_waiting(cell: Mapping[str, Any]) -> str:
    """Show what the headline says: the most loaded rank of each way, work and waiting."""
    found = cell["imbalance"]
    bars = []
    for name, label in NAMES.items():
        mean, p95 = float(found[name]["mean"]), float(found[name]["p95"])
        parts = [("work", 1.0), (KINDS[name], mean - 1)]
        bars.append(charts.Bar(label, parts, f"{mean:.2f} (p95 {p95:.2f})", p95))
    bound = float(np.mean([layer["bound"] for layer in cell["by_layer"]]))
    parts = [("work", 1.0), ("copies", bound - 1)]
    bars.append(charts.Bar("least that these copies allow", parts, f"{bound:.2f}"))
    told = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    title = "How long the most loaded rank works"
    return draw_figure(
        "waiting",
        title,
        "All ranks wait for the most loaded one. The grey part of a bar is the mean load, the "
        "coloured part is what the others wait for.",
        charts.draw_bars(
            "waiting-picture", title, f"Load of the most loaded rank, mean load 1. {told}.",
            bars, LOAD_AXIS, 1.0,
        ),
        draw_legend([("work", "box", "mean load"), ("", "mark", "95th percentile of the batches")]),
    )  # fmt: skip


def average_layers(cell: Mapping[str, Any]) -> tuple[dict[str, Floats], Floats]:
    """Mean over the layers of each batch's imbalance, by way, and of the bound."""
    layers = cell["by_layer"]
    values = {
        name: np.array([layer["imbalance"][name] for layer in layers], dtype=np.float64).mean(
            axis=0
        )
        for name in NAMES
    }
    bounds = np.array([layer["bound"] for layer in layers], dtype=np.float64)
    return values, bounds.mean(axis=0)


def show_time(cell: Mapping[str, Any], stretches: Sequence[Mapping[str, Any]]) -> str:
    """Show the imbalance over the test batches, and the ranks of one of them."""
    values, bound = average_layers(cell)
    thin, each = charts.thin_out(np.stack([*values.values(), bound]))
    x = (np.arange(thin.shape[1]) * float(each)).tolist()
    x[-1] = max(x[-1], x[0])
    sizes = [int(part["test"][1]) - int(part["test"][0]) for part in stretches]
    cuts = [float(end) - 0.5 for end in np.cumsum(sizes)[:-1]] if len(sizes) <= 40 else []
    lines = [
        charts.Line(KINDS[name], row.tolist()) for name, row in zip(values, thin, strict=False)
    ]
    legend = [(KINDS[name], f"line{at}", label) for at, (name, label) in enumerate(NAMES.items())]
    means = ", ".join(f"{NAMES[name]} {v.mean():.3f}" for name, v in values.items())
    text = "The shaded area is out of reach: no split of tokens over these copies gets below."
    if cuts:
        text += " Dotted: from here on another stretch of the recording, with its own history."
    if each > 1:
        text += f" Each point is the mean of {each} batches."
    title = "Most loaded rank over the test batches, mean over the layers"
    over_time = draw_figure(
        "over-time", title, text,
        charts.draw_lines(
            "over-time-picture", title,
            f"Lines over {len(bound)} test batches, means: {means}, bound {bound.mean():.3f}.",
            lines, x=x, x_axis="test batch", y_axis=LOAD_AXIS, below=thin[-1].tolist(), cuts=cuts,
            y_range=(0.8, max(1.05, 1.03 * float(thin.max()))),
        ),
        draw_legend([*legend, ("limit", "box", "out of reach")]),
    )  # fmt: skip
    return over_time + "\n" + _show_one_batch(cell["example"])


def _show_one_batch(example: Mapping[str, Any]) -> str:
    """Show the sorted rank loads of the typical batch."""
    loads = {name: np.sort(np.array(example["loads"][name], dtype=float))[::-1] for name in NAMES}
    mean = max(float(loads["none"].mean()), 1e-12)
    ranks = len(loads["none"])
    lines = [charts.Line(KINDS[name], (row / mean).tolist()) for name, row in loads.items()]
    told = ", ".join(
        f"{NAMES[name]} from {row[0] / mean:.2f} to {row[-1] / mean:.2f}"
        for name, row in loads.items()
    )
    title = f"Ranks of one batch (layer {int(example['layer'])}, batch {int(example['batch'])})"
    ticks = [(1.0, "1"), (float(ranks), str(ranks))] if ranks > 1 else [(1.0, "1")]
    return draw_figure(
        "one-batch", title,
        "The batch whose gain over EPLB is the median of all. Each line has its own order of "
        "ranks, the most loaded first; a flat line is a perfect balance.",
        charts.draw_lines(
            "one-batch-picture", title, f"Sorted rank loads, mean load 1: {told}.", lines,
            x=[float(i + 1) for i in range(ranks)], x_ticks=ticks,
            x_axis="ranks, the most loaded first", y_axis="load of a rank (mean load = 1)",
            level=(1.0, "mean load"),
        ),
        draw_legend([
            (KINDS[name], f"line{at}", label) for at, (name, label) in enumerate(NAMES.items())
        ]),
    )  # fmt: skip


def show_layers(cell: Mapping[str, Any]) -> str:
    """Show every layer by itself."""
    layers = [int(layer["layer"]) for layer in cell["by_layer"]]
    values = {
        KINDS[name]: [float(np.mean(layer["imbalance"][name])) for layer in cell["by_layer"]]
        for name in NAMES
    }
    values["bound"] = [float(np.mean(layer["bound"])) for layer in cell["by_layer"]]
    if not np.isfinite(np.array(list(values.values()))).all():
        raise ValueError("layers must have finite values")
    told = "; ".join(
        f"layer {layer}: {values['none'][at]:.2f}, {values['eplb'][at]:.2f}, "
        f"{values['lp'][at]:.2f}, at least {values['bound'][at]:.2f}"
        for at, layer in enumerate(layers)
    )
    title = "Most loaded rank of each layer, mean over the test batches"
    return draw_figure(
        "layers", title, "A layer whose marks are far to the right gains most.",
        charts.draw_layers(
            "layers-picture", title,
            f"No balancing, EPLB, linear program, and the least of any split. {told}.",
            layers, values, "most loaded rank (mean = 1, log scale)",
        ),
        draw_legend([
            ("none", "ring", NAMES["none"]), ("eplb", "square", NAMES["eplb"]),
            ("lp", "diamond", NAMES["integer"]),
            ("", "mark", "least that these copies allow"),
        ]),
    )  # fmt: skip


def show_ranks(found: Mapping[str, Any]) -> str:
    """Show the load of every rank over time, under EPLB and under the linear program."""
    batches = [int(batch) for batch in found["batches"]]
    maps = []
    for number, layer in enumerate(found["layers"]):
        for name in ("eplb", "integer"):
            percent = np.array(layer[name], dtype=np.float64)
            title = f"Layer {int(layer['layer'])}: {'EPLB' if name == 'eplb' else 'linear program'}"
            text = (
                f"Load of {percent.shape[1]} ranks over {len(batches)} batches, from "
                f"{percent.min():.0f}% to {percent.max():.0f}% of the mean load."
            )
            picture = charts.draw_map(
                f"ranks-{number}-{name}-picture", title, text,
                charts.color_loads(percent.T / 100, MOST_RANK), "rank", "test batch",
                (str(batches[0]), str(batches[-1])), height=170,
            )  # fmt: skip
            range_text = _say_range(percent)
            caption = f"<figcaption><b>{escape(title)}</b>{range_text}</figcaption>"
            maps.append(f"<figure>{caption}{picture}</figure>")
    scale = charts.draw_scale("ranks-scale", MOST_RANK)
    return (
        "<p>A row is a rank, a column a batch. Orange ranks have more than the mean load, and the "
        "strongest orange of a column sets its time; blue ranks have less and wait. A row that "
        "stays orange has hot experts whose copies lie in the wrong places.</p>\n"
        f'<div class="pairs">{"".join(maps)}</div>\n<figure><figcaption>Load of a rank over the '
        f"mean load of its batch</figcaption>{scale}</figure>"
    )


def _say_range(percent: Floats) -> str:
    """Say how far loads are from the mean, which a map of small differences hardly shows."""
    most = float(np.abs(percent - 100).max())
    if most < 5:
        return f"All ranks within {max(most, 0.1):.1f}% of the mean."
    return f"From {percent.min():.0f}% to {percent.max():.0f}% of the mean."


def show_remainder(report: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Show what the remaining imbalance is made of, and what a change would leave of it."""
    same = [c for c in report["cells"] if c["applicable"] and c["ep"] == cell["ep"]]
    bars, rows = [], []
    for other in same:
        bound = float(np.mean([layer["bound"] for layer in other["by_layer"]]))
        lp, tokens = (float(other["imbalance"][name]["mean"]) for name in ("lp", "integer"))
        parts = [100 * (bound - 1), 100 * (lp - bound), 100 * (tokens - lp)]
        label = f"{other['placement']}, {words.count_slots(int(other['slots']))}"
        kinds = zip(("copies", "solver", "tokens"), parts, strict=True)
        bars.append(charts.Bar(label, list(kinds), f"{sum(parts):.1f}%"))
        together = [*parts, sum(parts)]
        # Rounding first keeps a tiny negative number from becoming -0.00.
        rows.append([escape(label), *(f"{round(v, 2) + 0.0:.2f}%" for v in together)])
    told = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    title = "What is left above the mean load"
    made_of = draw_figure(
        "remainder", title,
        f"For each placement compared on {int(cell['ep'])} ranks. The placement's part is what no "
        "split over its copies can remove: more slots or other copies can. Whole tokens count "
        "less in larger batches.",
        charts.draw_bars("remainder-picture", title, f"Part above the mean load. {told}.", bars,
                         "above the mean load, %"),
        draw_legend([
            ("copies", "box", "placement and slots"), ("solver", "box", "tolerance of the solver"),
            ("tokens", "box", "whole tokens"),
        ]),
    )  # fmt: skip
    header = ["", "placement and slots", "solver", "whole tokens", "together"]
    return "\n".join(
        [made_of, draw_table(header, rows), _show_changes(report["shown"]["changes"], cell)]
    )


def _show_changes(changes: Sequence[Mapping[str, Any]], cell: Mapping[str, Any]) -> str:
    names = {
        "nothing": "as it is",
        "slots": "one more slot per rank",
        "chain": "placement chain, same slots",
        "fresh": "placed by these very batches",
    }
    left = [100 * (float(change["imbalance"]) - 1) for change in changes]
    bars: list[charts.Bar] = []
    for change, percent in zip(changes, left, strict=True):
        gains = not bars or round(percent, 1) < round(left[0], 1)
        text = f"{percent:.1f}%" if gains else f"{percent:.1f}%, no gain"
        bars.append(charts.Bar(names[change["change"]], [("lp", percent)], text))
    told = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    title = "What one change would leave above the mean load"
    return draw_figure(
        "changes", title,
        "The same batches, at most about 128 of them, with one thing changed."
        + _explain_fresh(changes, cell),
        charts.draw_bars("changes-picture", title, f"Part above the mean load. {told}.", bars,
                         "above the mean load, %"),
    )  # fmt: skip


def _explain_fresh(changes: Sequence[Mapping[str, Any]], cell: Mapping[str, Any]) -> str:
    if all(change["change"] != "fresh" for change in changes):
        return ""
    why = "it is made for the loads of all batches together"
    if cell["placement"] == "eplb":
        why = "EPLB doesn't know of the linear program"
    return (
        f" “Placed by these very batches”: {words.name_method(cell)} made from these very batches, "
        f"roughly what newer loads could give; it can be worse, since {why}."
    )


def show_batch_sizes(shown: Mapping[str, Any]) -> str:
    """Show from which batch size on it pays, and how the imbalance changes with the size."""
    saving = shown["saving"]
    rows = [
        [
            words.name_size(size),
            *(_format_from(size["pays_from"][name], saving["grid"]) for name in ("eplb", "none")),
        ]
        for size in saving["sizes"]
    ]
    larger = [
        [
            f"{int(row['batches'])}",
            f"{row['rows']:,.0f}",
            *(f"{row[name]:.3f}" for name in ("none", "eplb", "integer")),
            f"{100 * (1 - row['integer'] / row['eplb']):.0f}%",
        ]
        for row in shown["batch_sizes"]
    ]
    header = ["batches", "mean load", "no balancing", "EPLB", "linear program", "less than EPLB"]
    return "\n".join(
        [
            _draw_saving(saving),
            draw_table(["it pays from (tokens of a rank)", "over EPLB", "over none"], rows),
            f'<p class="note">Times: {escape(str(saving["source"]))}; communication, routing and '
            "attention are left out. For your own sizes and GPU: <code>lplb-bench advise --trace "
            "FILE --hidden N --inner N --top-k N --tokens N</code>.</p>",
            "<h3>Larger batches</h3>",
            "<p>Successive batches added up stand for larger ones: how many, the mean load of a "
            "rank (tokens times top-k), and the most loaded rank over that mean.</p>",
            draw_table(header, larger),
        ]
    )


def _draw_saving(saving: Mapping[str, Any]) -> str:
    """Draw what is saved over the sizes of batches, if any batch has tokens."""
    sizes = [size for size in saving["sizes"] if size["net"][0] is not None]
    if not sizes:
        return ""
    x = np.log2([float(size) for size in saving["grid"]]).tolist()
    net = np.clip(100 * np.array([size["net"] for size in sizes], dtype=np.float64), -20, 100)
    low, high = min(-5.0, 1.1 * float(net.min())), max(5.0, 1.1 * float(net.max()))
    pays = [f"{words.name_size(s)}: {s['pays_from']['eplb'] or 'never'}" for s in sizes]
    names = [f"{s['name']} ({int(s['hidden'])} x {int(s['inner'])})" for s in sizes]
    title = "Time that is saved over EPLB, after what balancing costs"
    lines = [charts.Line(f"size{at}", row.tolist()) for at, row in enumerate(net)]
    return draw_figure(
        "saving", title,
        "Balancing pays where a line is above 0. <strong>Predicted</strong> from the recorded "
        "loads, as if batches of every size had them; forward pass (in training the backward pass "
        "adds twice the work, so that it pays earlier). Lines are cut off below -20%. Sizes: width "
        "of the model x inner width of an expert.",
        charts.draw_lines(
            "saving-picture", title,
            "Tokens of a rank from which on it pays: " + "; ".join(pays) + ".",
            lines, x=x, x_ticks=[(v, f"{2 ** round(v):,}") for v in x if round(v) % 3 == 1],
            x_axis="tokens of a rank in a batch", y_axis="time saved, % of EPLB's",
            y_range=(low, high), level=(0.0, "pays above this line"),
        ),
        draw_legend([(line.kind, f"line{at}", names[at]) for at, line in enumerate(lines)]),
    )  # fmt: skip


def _format_from(tokens: Any, grid: Sequence[int]) -> str:
    return f"not up to {int(grid[-1]):,}" if tokens is None else f"{int(tokens):,}"


def show_experts(found: Mapping[str, Any]) -> str:
    """Show the load of every expert over time."""
    tokens = np.array(found["tokens"], dtype=np.float64)
    ratio = tokens / np.maximum(tokens.mean(1, keepdims=True), 1e-12)
    order = (-ratio.mean(0)).argsort(kind="stable")
    steps = [int(step) for step in found["steps"]]
    colors = charts.color_loads(ratio.T[order], MOST_EXPERT)
    title = f"Experts of layer {int(found['layer'])}, the most loaded first"
    most = ", ".join(f"{at} ({ratio[:, at].mean():.1f})" for at in order[:5])
    text = (
        f"Load of {tokens.shape[1]} experts over {len(steps)} parts of the trace. Most loaded, in "
        f"times the mean load: {most}."
    )
    pictures = [
        f'<div class="{kind}">'
        + charts.draw_map(
            f"experts-{kind}", title, text, colors, "place of the expert", "step of the trace",
            (str(steps[0]), str(steps[-1])), 1, width, 260,
        )
        + "</div>"
        for kind, width in (("wide", WIDE), ("narrow", PANEL))
    ]  # fmt: skip
    return draw_figure(
        "experts-map", title,
        "A row is an expert, a column a part of the trace. A placement can know what lasts; spots "
        "that come and go only the batch itself tells. " + escape(text),
        "\n".join(pictures) + "\n" + charts.draw_scale("experts-scale", MOST_EXPERT),
    )  # fmt: skip


def show_live(found: Mapping[str, Any]) -> str:
    """Show what live slots would add in one layer."""
    lp, live = (np.array(found["imbalance"][name], dtype=np.float64) for name in ("lp", "live"))
    thin, each = charts.thin_out(np.stack([lp, live]))
    title = f"Most loaded rank of layer {int(found['layer'])} with and without live slots"
    if not found["fetching"]:
        return (
            f'<p id="live-slots">{words.count_slots(int(found["live"]))} more on each rank, to be '
            f"filled where a batch needs it, would fetch nothing in any of the {len(lp):,} test "
            f"batches of layer {int(found['layer'])}: {words.name_cell(found)}.</p>"
        )
    legend = (("lp", "line0", "linear program"), ("size3", "line1", "the same with live slots"))
    return draw_figure(
        "live-slots", title,
        f"{words.count_slots(int(found['live']))} more on each rank, filled with an expert where a "
        f"batch needs it: {words.name_cell(found)}. {100 * found['fetching']:.1f}% of the batches "
        f"would fetch, those whose program leaves more than {found['above']:g} times the mean "
        f"load; {found['pieces']:.2f} experts per rank and batch. Mean {lp.mean():.3f} without and "
        f"{live.mean():.3f} with live slots, largest {lp.max():.3f} and {live.max():.3f}.",
        charts.draw_lines(
            "live-picture", title,
            f"Means {lp.mean():.3f} without and {live.mean():.3f} with live slots.",
            [charts.Line(kind, row.tolist()) for (kind, *_), row in zip(legend, thin, strict=True)],
            x=(np.arange(thin.shape[1]) * float(each)).tolist(), x_axis="test batch",
            y_axis=LOAD_AXIS,
        ),
        draw_legend(legend),
    )  # fmt: skip


def show_combinations(cells: Sequence[Mapping[str, Any]]) -> str:
    """List the imbalance of every combination: mean, 95th percentile and largest."""
    rows = []
    for cell in cells:
        if not cell["applicable"]:
            reason = f"n/a: {escape(str(cell['reason']))}"
            rows.append([words.name_cell(cell, short=True), reason, *[""] * (len(LABELS) - 1)])
            continue
        values = [
            "<br>".join(f"{cell['imbalance'][name][k]:.3f}" for k in ("mean", "p95", "max"))
            for name in LABELS
        ]
        rows.append([words.name_cell(cell, short=True), *values])
    text = "<p>The most loaded rank over the mean load: mean, 95th percentile and largest.</p>\n"
    return text + draw_table(["combination", *LABELS.values()], rows)
