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
# One slot on fewer ranks may be too little for any plan. Slots on top of others have targets for
# these numbers of ranks.
LEAST_RANKS, TOPPED_UP = 16, (8, 32, 64)


def judge_targets(rows: Sequence[Row]) -> list[Row]:
    """Hold the figures of `lplb_triton.bench.live.run` against what live slots are to reach.

    With experts at home, the fullest rank of a batch may have one token more than the target says,
    as rounding to whole tokens alone costs that.

    Parameters
    ----------
    rows
        Of a comparison with the rules by default (``above`` 1.02, no cost and no limits).

    Returns
    -------
    list of dict
        ``ep``, ``live``, ``base``, ``what``, ``figure``, ``less_a_token`` (the figure if each
        fullest rank had one token less, or None where that does not count), ``most`` and
        ``holds``, for every target that the comparison has something for.
    """
    found: list[Row] = []
    for row in rows:
        if row["base"] == "home":
            found += _judge_all(row)
        elif (row["base"], row["live"]) == ("chain:2", 1) and row["ep"] in TOPPED_UP:
            found += _judge_sources(row)
    return found


def _judge_all(row: Row) -> list[Row]:
    """Hold all batches together against the targets of experts at home."""
    live, found = row["live"], []
    if live == 2 or row["ep"] >= LEAST_RANKS:
        for statistic, most in (("mean", MEAN[live]), ("max", MOST[live])):
            figure = row["all"]["imbalance"]["live"][statistic]
            less = row["all"]["live"]["less_a_token"][statistic]
            found.append(_judge(row, f"{statistic} of all", figure, most, less))
    return found


def _judge_sources(row: Row) -> list[Row]:
    found = []
    for source in row["sources"]:
        name, live = source["name"], source["live"]
        if name in SHIFTING:
            mean = source["imbalance"]["live"]["mean"]
            found.append(_judge(row, f"mean of {name}", mean, SHIFTING_MEAN))
        if name in STEADY:
            found.append(_judge(row, f"fetch, {name}", live["fetching"], STEADY_PART))
    return found


def _judge(
    row: Row, what: str, figure: float, most: float, less_a_token: float | None = None
) -> dict[str, Any]:
    counted = figure if less_a_token is None else less_a_token
    return {
        **{name: row[name] for name in ("ep", "live", "base")},
        **{"what": what, "figure": figure, "less_a_token": less_a_token, "most": most},
        "holds": counted <= most,
    }
