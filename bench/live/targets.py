"""What live slots are to reach, held against a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lplb_triton.bench.types import Row

__all__ = ["judge_targets"]

# Shifting loads that live slots are for, and steady ones on which nothing is to be fetched. The
# last one is a public trace of switch-base-64, by the name of its file.
SHIFTING = ("rotating", "burst", "packaged trace")
STEADY = ("zipf", "hot experts", "switch_base_64.npz")
MEAN, MOST = {1: 1.012, 2: 1.011}, {1: 1.07, 2: 1.16}
SHIFTING_MEAN, STEADY_PART = 1.02, 0.05


def judge_targets(rows: Sequence[Row]) -> list[Row]:
    """Hold the figures of `lplb_triton.bench.live.run` against what live slots are to reach.

    Parameters
    ----------
    rows
        Of a comparison with the rules by default (``above`` 1.02, no cost and no limits).

    Returns
    -------
    list of dict
        ``ep``, ``live``, ``base``, ``what``, ``figure``, ``most`` and ``holds``, for every target
        that the comparison has something for.
    """
    found: list[Row] = []
    for row in rows:
        live = row["live"]
        if row["base"] == "home":
            whole = row["all"]["imbalance"]["live"]["mean"]
            if live == 2 or row["ep"] >= 16:
                found.append(_judge(row, "mean imbalance, all", whole, MEAN[live]))
            if live == 2 and row["ep"] == 8:
                largest = row["all"]["imbalance"]["live"]["max"]
                found.append(_judge(row, "max imbalance, all", largest, MOST[live]))
            if live == 1 and row["ep"] >= 16:
                less = row["all"]["live"]["less_a_token"]
                found.append(_judge(row, "max imbalance less a token, all", less, MOST[live]))
        elif (row["base"], live) == ("chain:2", 1):
            found += _judge_sources(row)
    return found


def _judge_sources(row: Row) -> list[Row]:
    found = []
    for source in row["sources"]:
        name, live = source["name"], source["live"]
        if name in SHIFTING:
            mean = source["imbalance"]["live"]["mean"]
            found.append(_judge(row, f"mean imbalance, {name}", mean, SHIFTING_MEAN))
        if name in STEADY:
            part = live["fetching"]
            found.append(_judge(row, f"part of batches that fetch, {name}", part, STEADY_PART))
    return found


def _judge(row: Row, what: str, figure: float, most: float) -> dict[str, Any]:
    head = {name: row[name] for name in ("ep", "live", "base")}
    return {**head, "what": what, "figure": figure, "most": most, "holds": figure <= most}
