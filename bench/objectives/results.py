"""Make rows of the comparison, and sum them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lplb_triton.bench.objectives.batches import Batch
from lplb_triton.bench.objectives.plans import WAYS, WayPlan, choose_way
from lplb_triton.bench.objectives.timing import choose_ranks
from lplb_triton.bench.types import Row

__all__ = ["make_row", "summarize_rows"]

OTHERS = tuple(way for way in WAYS if way != "time")
# Tokens of a rank by which batches are summed up.
FEW, MIDDLE, MANY = 16, (64, 1024), 4096


def make_row(
    batch: Batch, plans: dict[str, WayPlan], measured: dict[str, float] | None, most: int
) -> Row:
    """Make the row of one batch.

    Parameters
    ----------
    batch, plans
        What was planned.
    measured
        Microseconds by way, or None where nothing was measured.
    most
        Ranks of a way that were timed, at most.

    Returns
    -------
    dict
        ``model``, ``ep``, ``slots``, ``placement``, ``load``, ``tokens``, ``batch``; ``ways``, by
        way ``predicted_us`` and ``measured_us`` of the slowest rank, ``timed`` and ``left_out``
        ranks, ``active`` and ``rows`` of the ranks with the most; ``picked``, the way other than
        ``time`` that is predicted to be the fastest.
    """
    ways: Row = {}
    for way, (ranks, left_out) in choose_ranks(plans, most).items():
        plan = plans[way]
        ways[way] = {
            "predicted_us": float(plan.us.max()),
            "measured_us": None if measured is None else measured[way],
            "timed": 0 if measured is None else len(ranks),
            "left_out": left_out,
            "active": int((plan.rows > 0).sum(1).max()),
            "rows": int(plan.rows.sum(1).max()),
        }
    return {
        "model": batch.name,
        "ep": batch.ep,
        "slots": batch.slots,
        "placement": batch.method,
        "load": batch.load,
        "tokens": batch.tokens,
        "batch": batch.number,
        "ways": ways,
        "picked": choose_way(plans),
    }


def summarize_rows(rows: Sequence[Row]) -> Row:
    """Sum up rows of `make_row`: all measured, or none.

    Returns
    -------
    dict
        ``basis``, ``"measured"`` or ``"predicted"``; ``table``, by ranks, slots and tokens what
        `_compare` returns; ``sums``, the same by name of all batches, of those of each placement,
        of 16 tokens a rank by ranks, of 64 to 1,024 tokens, and of 4,096 or more, as far as there
        are any; ``errors``, ``median``, ``worst`` and ``bias`` of the relative difference of
        predicted from measured times of the slowest rank, None if not measured.
    """
    basis = "predicted" if rows[0]["ways"]["time"]["measured_us"] is None else "measured"
    table = [
        {"ep": ep, "slots": slots, "tokens": tokens, **_compare(some, basis)}
        for (ep, slots, tokens), some in _group(rows, ("ep", "slots", "tokens")).items()
    ]
    parts = {
        "all": list(rows),
        **{f"all, {name}": some for (name,), some in _group(rows, ("placement",)).items()},
        **{
            f"{FEW} tokens, EP {ep}": some
            for (tokens, ep), some in _group(rows, ("tokens", "ep")).items()
            if tokens == FEW
        },
        "64-1,024 tokens": [r for r in rows if MIDDLE[0] <= r["tokens"] <= MIDDLE[1]],
        "4,096+ tokens": [r for r in rows if r["tokens"] >= MANY],
    }
    return {
        "basis": basis,
        "table": table,
        "sums": {name: _compare(some, basis) for name, some in parts.items() if some},
        "errors": _summarize_errors(rows) if basis == "measured" else None,
    }


def _group(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by some of their members, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(found.items()))


def _compare(rows: Sequence[Row], basis: str) -> Row:
    """Compare ``time`` with the others.

    Returns ``batches``; by way, geometric mean of the slowest rank's time over that of ``tokens``
    (``over_tokens``); of ``time`` over the best other way, mean and largest (``over_best``,
    ``worst_over_best``), and over the picked one (``over_picked``); ``wins``, in how many batches
    each way is the fastest, ties to all of them.
    """
    us = np.array([[row["ways"][way][f"{basis}_us"] for way in WAYS] for row in rows])
    by_way = dict(zip(WAYS, us.T, strict=True))
    best = us[:, [WAYS.index(way) for way in OTHERS]].min(1)
    picked = np.array([row["ways"][row["picked"]][f"{basis}_us"] for row in rows])
    over_best = by_way["time"] / best
    return {
        "batches": len(rows),
        "over_tokens": {way: _mean(by_way[way] / by_way["tokens"]) for way in WAYS},
        "over_best": _mean(over_best),
        "worst_over_best": float(over_best.max()),
        "over_picked": _mean(by_way["time"] / picked),
        "wins": {way: int((by_way[way] <= us.min(1)).sum()) for way in WAYS},
    }


def _mean(ratios: Any) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.log(ratios).mean()))


def _summarize_errors(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return median and worst relative error of predictions, of ``all`` and of each way."""
    by_way = {
        way: np.array(
            [row["ways"][way]["predicted_us"] / row["ways"][way]["measured_us"] - 1 for row in rows]
        )
        for way in WAYS
    }
    by_way["all"] = np.concatenate(list(by_way.values()))
    return {
        way: {
            "median": float(np.median(np.abs(off))),
            "worst": float(np.abs(off).max()),
            "bias": float(np.median(off)),
        }
        for way, off in by_way.items()
    }
