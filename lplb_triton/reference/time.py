"""Plans by time: the twin of kernels/time, in whole numbers and float32.

Equation numbers refer to docs/method.md. ``K`` is the number of candidates, ``G`` the number of
ranks of a group and ``n`` the number of its cells (see time_tables.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lplb_triton._layout import OFFSET_BY_EXPERT, SHARE_BITS, SHARE_ONE
from lplb_triton.reference.time_tables import TimeTables, find_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.costs.time_cost import TimeCost

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float32]

__all__ = [
    "CANDIDATES",
    "JUDGED",
    "TimePlan",
    "count_ranks",
    "find_starts",
    "improve_cells",
    "plan_time",
    "split_evenly",
    "write_shares",
]

# Plans that are judged as they are, and those that are improved: their start, whether moves go by
# the smoothed table, and whether they go through classes from the last to the first.
JUDGED = ("tokens", "even", "home")
CANDIDATES = (
    ("tokens", True, True),
    ("balanced", True, True),
    ("closed", False, False),
    ("even", False, False),
)
# Weight of both ranks' times beside that of the slower one, and what a split must win by (29).
SUM_WEIGHT = np.float32(0.1)
KEEP = np.float32(0.999999)
# No plan is taken whose time is above the least of those of `JUDGED`, times this (31).
MOST_SLOWER = np.float32(1.01)


class TimePlan(NamedTuple):
    """A plan of one group."""

    rows: Ints
    """[n] rows of each cell."""
    choice: int
    """Number of the plan among those of `JUDGED`, then of `CANDIDATES`."""
    times: Floats
    """[4] microseconds of the slowest rank: tokens, this plan, and both by the smoothed table."""


class _Ranks(NamedTuple):
    """Sums over the cells of ranks, int64 of any shape (equation 28)."""

    active: Ints
    narrow: Ints
    wide: Ints
    rows: Ints


def split_evenly(copy_start: Ints) -> Ints:
    """Return cumulative shares that split every expert evenly over its copies."""
    n_copies = np.diff(copy_start)
    number = np.arange(int(copy_start[-1])) - copy_start[:-1].repeat(n_copies) + 1
    shares: Ints = (number << SHARE_BITS) // n_copies.repeat(n_copies)
    return shares


def _count_by_cell(tables: TimeTables, counts: Ints, cumulative: Ints, copy_start: Ints) -> Ints:
    """Count the tokens of each cell under cumulative shares (equation 15)."""
    expert = tables.experts.repeat(np.diff(tables.start))
    n = counts[expert]
    offset = _round_offsets(expert)

    def count_up_to(copy: Ints) -> Ints:
        inside = copy >= copy_start[expert]
        share = np.where(inside, cumulative[np.maximum(copy, 0)], 0)
        ends = (n * share + offset) >> SHARE_BITS
        ends = np.where(copy == copy_start[expert + 1] - 1, n, np.minimum(ends, n))
        found: Ints = np.where(inside, ends, 0)
        return found

    return count_up_to(tables.last) - count_up_to(tables.first - 1)


def _round_offsets(expert: Ints) -> Ints:
    """Return the offset of rank 0's rounding of experts (equation 13)."""
    offsets: Ints = (expert * OFFSET_BY_EXPERT + SHARE_ONE // 2) % SHARE_ONE
    return offsets


def find_starts(
    tables: TimeTables, cost: TimeCost, counts: Ints, cumulative: Ints, copy_start: Ints
) -> dict[str, Ints]:
    """Find the plans that the search begins with (equation 30).

    Parameters
    ----------
    tables : TimeTables
        Of the group.
    cost : TimeCost
        Its tile sizes are used.
    counts : numpy.ndarray
        ``[n_logical]`` int64, tokens of each expert over all ranks.
    cumulative : numpy.ndarray
        ``[n_copies]`` int64, cumulative shares of the token plan in units of 2**-24.
    copy_start : numpy.ndarray
        ``[n_logical + 1]`` int64.

    Returns
    -------
    dict of str to numpy.ndarray
        ``[n]`` int64 rows of each cell, by name.
    """
    total = counts[tables.experts]

    def put_all(cells: Ints) -> Ints:
        rows = np.zeros(tables.n_cells, dtype=np.int64)
        rows[cells] = total
        return rows

    tokens = _count_by_cell(tables, counts, cumulative, copy_start)
    mean = int(total.sum()) // (tables.n_ranks * tables.n_slots)
    least = cost.sides[int(mean >= cost.wide_from)] // 2
    return {
        "tokens": tokens,
        "even": _count_by_cell(tables, counts, split_evenly(copy_start), copy_start),
        "home": put_all(tables.home),
        "balanced": put_all(tables.balanced),
        "closed": _close_small(tables, tokens, least),
    }


def _close_small(tables: TimeTables, rows: Ints, least: int) -> Ints:
    """Move rows of cells with fewer than ``least`` to the expert's largest cell, the first."""
    closed: Ints = rows.copy()
    for begin, end in zip(tables.start[:-1], tables.start[1:], strict=True):
        mine = closed[begin:end]
        largest = int(mine.argmax())
        small = mine < least
        small[largest] = False
        mine[largest] += mine[small].sum()
        mine[small] = 0
    return closed


def count_ranks(tables: TimeTables, cost: TimeCost, rows: Ints) -> _Ranks:
    """Sum up cells by rank, ``[n]`` to four arrays ``[G]`` (equation 28)."""

    def sum_up(values: NDArray[Any]) -> Ints:
        return np.bincount(tables.rank, values, tables.n_ranks).astype(np.int64)

    narrow, wide = (-(-rows // side) for side in cost.sides)
    return _Ranks(sum_up(rows > 0), sum_up(narrow), sum_up(wide), sum_up(rows))


def _change_ranks(cost: TimeCost, ranks: _Ranks, old: Ints, new: Ints) -> _Ranks:
    """Return the sums of ranks after one cell of each goes from ``old`` to ``new`` rows."""
    narrow, wide = (-(-new // side) + (-old // side) for side in cost.sides)
    return _Ranks(
        ranks.active + (new > 0) - (old > 0),
        ranks.narrow + narrow,
        ranks.wide + wide,
        ranks.rows + new - old,
    )


def _find_times(tables: TimeTables, cost: TimeCost, ranks: _Ranks, smoothed: bool) -> Floats:
    """Return the microseconds of ranks (equation 28)."""
    return cost.evaluate(*ranks, tables.n_slots, smoothed)


def improve_cells(
    tables: TimeTables,
    cost: TimeCost,
    rows: Ints,
    smoothed: bool,
    backward: bool,
    margin: int,
) -> Ints:
    """Go through the classes of edges, and let every edge take the best of four splits (29).

    Parameters
    ----------
    tables : TimeTables
        Of the group.
    cost : TimeCost
        By which splits are compared.
    rows : numpy.ndarray
        ``[n]`` int64 rows of each cell.
    smoothed : bool
        Whether by the smoothed table.
    backward : bool
        Whether from the last class to the first.
    margin : int
        Rows by which a tile that is not the last ends early.

    Returns
    -------
    numpy.ndarray
        ``[n]`` int64, the new rows.
    """
    rows = rows.copy()
    ranks = count_ranks(tables, cost, rows)
    for k in find_steps(tables, backward):
        _improve_class(tables, cost, rows, ranks, smoothed, tables.classes[k], margin)
    return rows


def _improve_class(
    tables: TimeTables,
    cost: TimeCost,
    rows: Ints,
    ranks: _Ranks,
    smoothed: bool,
    edges: Ints,
    margin: int,
) -> None:
    """Make one step, in place; no rank occurs twice in the edges of a class."""
    a, b = edges.T
    at_a, at_b = tables.rank[a], tables.rank[b]
    x_a, x_b = rows[a], rows[b]
    both = x_a + x_b
    of_a, of_b = (_Ranks(*(values[at] for values in ranks)) for at in (at_a, at_b))
    t_a, t_b = (_find_times(tables, cost, of, smoothed) for of in (of_a, of_b))
    is_wide = of_a.rows + of_b.rows >= 2 * tables.n_slots * cost.wide_from
    side = np.where(is_wide, cost.sides[1], cost.sides[0])
    # The slower rank gives its last tile; of equal ones the higher rank does.
    slower = t_a > t_b
    cut = _cut_last_tile(np.where(slower, x_a, x_b), side, margin)
    best = (np.maximum(t_a, t_b) + SUM_WEIGHT * (t_a + t_b)) * KEEP
    new = x_a
    for tried in (both, np.zeros_like(both), np.where(slower, cut, both - cut)):
        t_a = _find_times(tables, cost, _change_ranks(cost, of_a, x_a, tried), smoothed)
        t_b = _find_times(tables, cost, _change_ranks(cost, of_b, x_b, both - tried), smoothed)
        value = np.maximum(t_a, t_b) + SUM_WEIGHT * (t_a + t_b)
        new = np.where(value < best, tried, new)
        best = np.minimum(value, best)
    for at, of, old, rows_of in ((at_a, of_a, x_a, new), (at_b, of_b, x_b, both - new)):
        changed = _change_ranks(cost, of, old, rows_of)
        for values, part in zip(ranks, changed, strict=True):
            values[at] = part
    rows[a], rows[b] = new, both - new


def _cut_last_tile(rows: Ints, side: Ints, margin: int) -> Ints:
    """Return the rows that are left without the last tile, which may be a part of one."""
    whole = np.maximum(rows - 1 + margin, 0) // side * side - margin
    left: Ints = np.minimum(np.maximum(whole, 0), rows)
    return left


def plan_time(
    tables: TimeTables,
    cost: TimeCost,
    counts: Ints,
    cumulative: Ints,
    copy_start: Ints,
    margin: int = 0,
) -> TimePlan:
    """Plan a batch of one group by time (equations 28 to 31).

    Parameters
    ----------
    tables, cost, counts, cumulative, copy_start
        As for `find_starts`.
    margin : int
        Rows by which tiles end early: of use where ranks round their quotas on their own.

    Returns
    -------
    TimePlan
        Slower than the token plan, the even split or experts at home by 1% at most.
    """
    starts = find_starts(tables, cost, counts, cumulative, copy_start)
    plans = [starts[name] for name in JUDGED]
    plans += [
        improve_cells(tables, cost, starts[name], smoothed, backward, margin)
        for name, smoothed, backward in CANDIDATES
    ]
    sums = [count_ranks(tables, cost, rows) for rows in plans]
    exact, smoothed = (
        np.array([_find_times(tables, cost, one, table).max() for one in sums])
        for table in (False, True)
    )
    limit = exact[: len(JUDGED)].min() * MOST_SLOWER
    choice = int(np.argmin(np.where(exact <= limit, smoothed, np.inf)))
    times = np.array([exact[0], exact[choice], smoothed[0], smoothed[choice]], dtype=np.float32)
    return TimePlan(plans[choice], choice, times)


def write_shares(
    tables: TimeTables, plan: TimePlan, counts: Ints, cumulative: Ints, copy_start: Ints
) -> None:
    """Write the cumulative shares of a plan, in place of those of the token plan (equation 27).

    The token plan keeps its shares, unless a rank has several copies of an expert: of these only
    the first gets tokens.

    Parameters
    ----------
    tables, counts, copy_start
        As for `find_starts`.
    plan : TimePlan
        The plan.
    cumulative : numpy.ndarray
        ``[n_copies]`` int64, changed.
    """
    if plan.choice == 0 and (tables.first == tables.last).all():
        return
    n_cells = np.diff(tables.start)
    expert = tables.experts.repeat(n_cells)
    ends = plan.rows.cumsum()
    ends -= np.append(0, ends)[tables.start[:-1]].repeat(n_cells)
    n = counts[expert]
    share = -(-((ends << SHARE_BITS) - _round_offsets(expert)) // np.maximum(n, 1))
    share = np.where(ends == 0, 0, np.where(ends == n, SHARE_ONE, share))
    share = np.where(tables.last == copy_start[expert + 1] - 1, SHARE_ONE, share)
    times = tables.last - tables.first + 1
    copy = tables.first.repeat(times) + np.arange(int(times.sum()))
    copy -= (times.cumsum() - times).repeat(times)
    cumulative[copy] = share.repeat(times)
