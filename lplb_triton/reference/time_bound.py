"""A time that no plan can beat (equation 32 of docs/method.md), for tests and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.costs.time_cost import TimeCost
    from lplb_triton.reference.time_tables import TimeTables

    Ints = NDArray[np.int64]
    Doubles = NDArray[np.float64]

__all__ = ["bound_time"]

# Sets of the fullest ranks, by what their loads may lie below the largest one, relatively.
DEPTHS = (4e-4, 6.4e-3, 2.56e-2)
# Halvings of the interval that the bound is sought in.
HALVINGS = 12
# What the linear programs may be off by.
SLACK = 1e-7


def bound_time(tables: TimeTables, cost: TimeCost, counts: Ints, rows: Ints, upper: float) -> float:
    """Find a time of the slowest rank, by the exact table, that no plan can beat.

    Parameters
    ----------
    tables : TimeTables
        Of the group.
    cost : TimeCost
        Times of ranks.
    counts : numpy.ndarray
        ``[n_logical]`` int64, tokens of each expert.
    rows : numpy.ndarray
        ``[n]`` int64, any plan by cell, such as the token plan's: its loads choose sets of ranks.
    upper : float
        Time of a plan.

    Returns
    -------
    float
        At most ``upper``.
    """
    total = counts[tables.experts]
    loads = np.bincount(tables.rank, rows, tables.n_ranks)
    sets = [np.ones(tables.n_ranks, dtype=bool)]
    sets += [loads >= loads.max() * (1 - depth) for depth in DEPTHS]
    sets += list(np.eye(tables.n_ranks, dtype=bool))
    needs = []
    for members in {tuple(one.tolist()) for one in sets}:
        inside = np.logical_and.reduceat(np.array(members)[tables.rank], tables.start[:-1])
        confined = total[inside & (total > 0)]
        if len(confined):
            needs.append((confined, sum(members)))
    low, high = 0.0, upper
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        points = _list_points(cost, tables.n_slots, middle, int(total.sum()))
        if all(_fits(cost, points, confined, size) for confined, size in needs):
            high = middle
        else:
            low = middle
    return low


def _list_points(cost: TimeCost, n_slots: int, limit: float, most_rows: int) -> Doubles:
    """List what a rank can be within a time: active cells, tiles, fine tiles and rows, [p, 4].

    A fine tile has as many rows as the smaller of both tiles. For each size, number of active cells
    and number of tiles there is one point, with the most rows.
    """
    found = [np.zeros((1, 4))]
    border, fine = cost.wide_from * n_slots, min(cost.sides)
    for size, side in enumerate(cost.sides):
        least = border if size else 1
        most = most_rows if size else min(border - 1, most_rows)
        for active in range(1, n_slots + 1):
            tiles = np.arange(active, -(-most // side) + n_slots + 1)
            over = np.maximum(tiles - (cost.table.shape[2] - 1), 0)
            times = cost.table[size, active, tiles - over] + over * float(cost.slopes[size])
            # A millionth is the round-off of times in float32.
            left = limit * (1 + 1e-6) - times.astype(np.float64)
            by_time = (
                np.floor(left / cost.per_row) if cost.per_row > 0 else np.full(len(left), most)
            )
            rows = np.minimum(np.minimum(tiles * side, by_time), most)
            there = (left >= 0) & (rows >= max(least, active))
            there &= rows >= (tiles - active) * side + active
            one = tiles[there]
            part = (np.full(len(one), active), one, one * (side // fine), rows[there])
            found.append(np.stack(part, 1).astype(np.float64))
    return np.concatenate(found)


def _fits(cost: TimeCost, points: Doubles, confined: Ints, size: int) -> bool:
    """Whether a mean of points can be that of ``size`` ranks that hold ``confined`` experts."""
    from scipy.optimize import linprog  # slow to import, needed here only

    most = points[:, 3].max()
    if most < 1:
        return False
    sides = max(cost.sides), min(cost.sides)
    wanted = [
        np.ceil(confined / most).sum(),
        *((-(-confined // side)).sum() for side in sides),
        confined.sum(),
    ]
    need = np.array(wanted, dtype=np.float64) / size
    if (points.max(0) < need - SLACK).any():
        return False
    if (points >= need).all(1).any():
        return True
    found = linprog(
        np.zeros(len(points)), A_ub=-points.T, b_ub=-need + SLACK, A_eq=np.ones((1, len(points))),
        b_eq=[1],
    )  # fmt: skip
    # 2 says that there is no solution; anything else proves nothing.
    return bool(found.status != 2)
