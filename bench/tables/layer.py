"""Make the tables of the section ``live`` of `lplb-bench ep`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_or_na, format_us
from lplb_triton.bench.tables.grid import Grid

__all__ = ["make_layer_grids"]

# Each the median of its slowest rank; the waits of one pass for other ranks may be in the other.
_PARTS = ("ids", "forward", "backward")


def make_layer_grids(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    """Lay out the section.

    Parameters
    ----------
    rows
        Figures of the section's one variant.
    options
        Of the whole run.

    Returns
    -------
    list of Grid
    """
    (found,) = (row["routings"] for row in rows.values())
    return [_make_times_grid(found), _make_errors_grid(found)]


def _make_times_grid(found: dict[str, Any]) -> Grid:
    """Lay out the times of the forms by routing."""
    times = [
        _make_times_line(routing, name, form)
        for routing, row in found.items()
        for name, form in row["forms"].items()
        if "us" in form
    ]
    first = next(iter(found.values()))
    s = first["sizes"]
    return Grid(
        "One MoE layer, forward and backward, microseconds",
        (
            *("routing", "form", "imbalance", "median", "p99", *_PARTS),
            *("over even", "over even ranks", "over lplb", "pieces", "GB/s"),
        ),
        times,
        (
            f"{s['experts']} experts, top-{s['top_k']}, {s['tokens']} tokens per rank, hidden "
            f"{s['hidden']}, inner {s['inner']}, {first['dtype']}, {s['redundant']} static "
            f"redundant slots per rank, {s['live']} live ones, live_above {s['above']}, "
            f"live_cost {s['cost']}; {s['rounds']} runs of each form, in turns, slowest rank. "
            f"changing: {s['hot']} experts of one rank that {s['share']:.0%} of the tokens "
            "choose each, others in every batch. steady: loads near those that copies were "
            "placed by. even ranks: none with the experts of each batch renumbered such that "
            "ranks are even. even: as many tokens for every expert. "
            "ids: physical ids alone, which forward includes. over: median of the "
            "quotients, run by run. pieces: live slots that a batch fills. GB/s: weights at the "
            "busiest port over the time of a fetch alone. "
            "lplb, live: static copies are filled once per step, which isn't timed; with "
            "spread they are sent in each pass.",
        ),
    )


def _make_times_line(routing: str, name: str, form: dict[str, Any]) -> tuple[str, ...]:
    """Lay out the times of one form."""
    imbalance = form["imbalance"]
    # A form that others are compared with may be wrong, and then has no times.
    over = [form.get(f"over_{other}", {}).get("median") for other in ("even", "even ranks", "lplb")]
    rate = (form.get("fetch_gb_s") or {}).get("median")
    return (
        *(routing, name, f"{sum(imbalance) / len(imbalance):.3f}"),
        *(format_us(form["us"][k]) for k in ("median", "p99")),
        *(format_us(form[f"{k}_us"]["median"]) for k in _PARTS),
        *(format_or_na(value, ".3f") for value in over),
        *(format_or_na(form.get("pieces"), ".1f"), format_or_na(rate, ".1f")),
    )


def _make_errors_grid(found: dict[str, Any]) -> Grid:
    """Lay out how far outputs and gradients are from those of none."""
    errors: list[tuple[str, ...]] = []
    for routing, row in found.items():
        for name, form in row["forms"].items():
            if "errors" in form:
                cells = (f"{error:.1e}" for error in form["errors"].values())
                errors.append((routing, name, *cells, "right" if "us" in form else "WRONG"))
        noise = (f"{error:.1e}" for error in row["reversed_errors"].values())
        errors.append((routing, "reversed", *noise, ""))
    return Grid(
        "Outputs and gradients against those of none",
        ("routing", "form", "output", "loss", "x", "gates", "w_in", "w_out", "verdict"),
        errors,
        (
            "Largest relative difference, by norm, over the ranks and batches; of weights, "
            "over the experts too. reversed: none with the rows of each slot in the opposite "
            "order, which shows what rounding alone changes. A form that is wrong isn't timed.",
        ),
    )
