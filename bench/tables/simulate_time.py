"""Make the tables of `lplb-bench simulate-time`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_us
from lplb_triton.bench.tables.grid import Grid

__all__ = ["make_objective_runs_grid", "make_simulate_time_grids"]

_WAYS = ("none", "even", "tokens", "time")


def make_simulate_time_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench simulate-time``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    is_measured = report["summary"]["basis"] == "measured"
    grids = [_make_sizes(report), _make_winners(report), _make_sums(report)]
    if is_measured:
        grids += [_make_errors(report), _make_batches(report)]
    return grids


_COLUMNS = ("batches", "none", "even", "time", "over best", "worst", "over picked", "fastest")


def _make_sizes(report: dict[str, Any]) -> Grid:
    """Lay out ratios by ranks, slots and tokens."""
    summary, o = report["summary"], report["options"]
    rows = [
        (f"EP {row['ep']}, {row['slots']}", str(row["tokens"]), *_list_ratios(row))
        for row in summary["table"]
    ]
    left = report["not_begun"]
    reasons = sorted({f"{one['model']}: {one['reason']}" for one in report["left_out"]})
    how = (
        f"Measured: products of the ranks predicted within 15% of the slowest, at most {o['ranks']}"
        f" of each way, one after the other on one GPU, median of {o['rounds']} rounds."
        if summary["basis"] == "measured"
        else "Predicted by the packaged times of one H100, not measured."
    )
    return Grid(
        f"Simulation, {summary['basis']}: the slowest rank's expert products",
        ("ranks, slots", "tokens", *_COLUMNS),
        rows,
        (
            f"{how} Loads: {', '.join(o['loads'])}; placements: {', '.join(o['placements'])}; "
            f"models: {', '.join(o['models'])}. No communication, no routing.",
            "none (experts in order, no copies), even, time: geometric mean of the slowest rank's "
            "time over that of the plan by tokens. over best: of time over the best of the other "
            "three in a batch, mean, and worst. over picked: over the one of the three that is "
            "predicted to be the fastest. fastest: how often time is, ties too.",
            *([f"{left} batches were not begun in {o['seconds']:g} s."] if left else []),
            *(f"n/a: {reason}." for reason in reasons),
        ),
    )


def _make_winners(report: dict[str, Any]) -> Grid:
    """Lay out which way has the least mean time, and by how much."""
    cells: dict[str, dict[str, str]] = {}
    heads: dict[str, None] = {}
    for row in report["summary"]["table"]:
        over = row["over_tokens"]
        first, second = sorted(_WAYS, key=lambda way: (over[way], _WAYS.index(way)))[:2]
        head = f"EP {row['ep']}, {row['slots']}"
        heads[head] = None
        less = f"{100 * (over[first] / over[second] - 1):.1f}%"
        cells.setdefault(str(row["tokens"]), {})[head] = f"{first} {less}"
    return Grid(
        f"Where each objective wins, {report['summary']['basis']}",
        ("tokens", *heads),
        [
            (tokens, *(by_head.get(head, "n/a") for head in heads))
            for tokens, by_head in sorted(cells.items(), key=lambda item: int(item[0]))
        ],
        (
            "The way with the least geometric mean of the slowest rank's time, and how much less "
            "than the next one's that is. Columns: ranks, redundant slots of each.",
        ),
    )


def _list_ratios(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of `_COLUMNS`."""
    over = row["over_tokens"]
    return (
        str(row["batches"]),
        *(f"{over[way]:.3f}" for way in ("none", "even", "time")),
        *(f"{row[name]:.3f}" for name in ("over_best", "worst_over_best", "over_picked")),
        f"{row['wins']['time'] / row['batches']:.0%}",
    )


def _make_sums(report: dict[str, Any]) -> Grid:
    """Lay out what holds over many sizes."""
    sums = report["summary"]["sums"]
    rows = [(name, *_list_ratios(row)) for name, row in sums.items()]
    return Grid("Summed up", ("batches of", *_COLUMNS), rows)


def _make_errors(report: dict[str, Any]) -> Grid:
    """Lay out how far predictions are off."""
    return Grid(
        "Predicted against measured time of the slowest rank",
        ("way", "median", "worst", "bias"),
        [
            (way, f"{off['median']:.1%}", f"{off['worst']:.1%}", f"{off['bias']:+.1%}")
            for way, off in report["summary"]["errors"].items()
        ],
        ("bias: median of the signed errors; above 0 predictions are too high.",),
    )


def _make_batches(report: dict[str, Any]) -> Grid:
    """Lay out every batch."""
    rows = []
    for row in report["rows"]:
        ways = row["ways"]
        off = [ways[way]["predicted_us"] / ways[way]["measured_us"] - 1 for way in _WAYS]
        rows.append(
            (
                f"{row['model']} {row['ep']}/{row['slots']} {row['placement']}, {row['load']}",
                str(row["tokens"]),
                *(f"{ways[way]['measured_us']:.0f}" for way in _WAYS),
                row["picked"],
                "/".join(f"{100 * one:+.0f}" for one in off),
            )
        )
    return Grid(
        "Every batch: measured microseconds of the slowest rank",
        ("model EP/slots", "tokens", *_WAYS, "picked", "off, %"),
        rows,
        ("off: predicted over measured times, of none/even/tokens/time.",),
    )


def make_objective_runs_grid(report: dict[str, Any]) -> Grid:
    """Lay out the report of ``lplb-bench simulate-time --runs``."""
    return Grid(
        "Balancer.run by tokens and by time, microseconds",
        ("model EP/slots", "tokens", "by tokens", "by time", "again", "added"),
        [
            (
                f"{row['model']} {row['ep']}/{row['slots']} {row['placement']}",
                str(row["tokens"]),
                *(format_us(row["us"][name]["median"]) for name in ("tokens", "time", "again")),
                format_us(_add_up(row["us"])),
            )
            for row in report["rows"]
        ],
        (
            f"Medians over {report['options']['batches']} batches of one rank, whose counts are "
            "not summed. again: by tokens once more, after by time. added: by time less the mean "
            "of both by tokens. Every run was made twice, with the same ids.",
        ),
    )


def _add_up(us: dict[str, Any]) -> float:
    """Return the median time that planning by time adds."""
    before, after = us["tokens"]["median"], us["again"]["median"]
    return float(us["time"]["median"] - (before + after) / 2)
