"""Plan a batch by every way, and predict the ranks' times.

========== =====================================================================================
``none``   experts in order, the same number on each rank, no copies
``even``   the placement, each expert's tokens split evenly over its copies
``tokens`` the placement, tokens split by the LP: ``objective="tokens"``
``time``   the placement, split by predicted times: ``objective="time"``
========== =====================================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import TimeCost, reference, solve
from lplb_triton.placement import Placement
from lplb_triton.reference.time import plan_time, split_evenly
from lplb_triton.reference.time_tables import make_time_tables

__all__ = ["WAYS", "WayPlan", "choose_way", "plan_batch"]

Ints = NDArray[np.int64]
WAYS = ("none", "even", "tokens", "time")


class WayPlan(NamedTuple):
    """Rows of every slot by one way, and what ranks are predicted to take."""

    rows: Ints
    """``[ep_size, slots]``"""
    us: NDArray[np.float32]
    """``[ep_size]`` predicted microseconds."""


def plan_batch(
    placement: Placement, cost: TimeCost, counts: Ints, tolerance: float = 1e-3
) -> dict[str, WayPlan]:
    """Plan one batch by each of `WAYS`, with exact quotas (``quotas="global"``).

    Parameters
    ----------
    placement
        Without live slots; ``none`` doesn't use it.
    cost
        By which ``time`` plans, and all are predicted.
    counts
        ``[n_logical]`` tokens of each expert.
    tolerance
        Certified gap of the LP.

    Returns
    -------
    dict of str to WayPlan

    Raises
    ------
    SolveError
        If the LP isn't certified.
    """
    s = placement.structure
    solution = solve(
        placement.problem(torch.from_numpy(counts)), tolerance=tolerance, backend="torch"
    )
    solution.check()
    tables = (s.copy_cell, s.copy_index, s.copy_multiplicity, s.copy_start)
    cumulative = reference.cumulative_shares(
        solution.shares, *(torch.tensor(table, device="cpu") for table in tables)
    )
    shares = cumulative.reshape(-1).numpy().astype(np.int64)
    copy_start = s.copy_start.astype(np.int64)
    by_time = np.zeros((placement.ep_size, placement.slots_per_rank), dtype=np.int64)
    for group, cells in enumerate(make_time_tables(placement)):
        plan = plan_time(cells, cost, counts, shares, copy_start)
        by_time[group * placement.group_size + cells.rank, cells.place] = plan.rows
    rows = {
        "none": counts.reshape(placement.ep_size, -1),
        "even": _split(placement, counts, split_evenly(copy_start)),
        "tokens": _split(placement, counts, shares),
        "time": by_time,
    }
    return {way: WayPlan(table, cost.predict(table)) for way, table in rows.items()}


def _split(placement: Placement, counts: Ints, cumulative: Ints) -> Ints:
    """Return the rows of every slot, ``[ep_size, slots]``, under cumulative shares."""
    s = placement.structure
    start = torch.tensor(s.copy_start, device="cpu")
    rows = np.zeros(placement.n_physical, dtype=np.int64)
    rows[s.copy_slot] = reference.copy_quotas(
        torch.from_numpy(counts), torch.from_numpy(cumulative), start, 0
    ).numpy()
    return rows.reshape(placement.ep_size, -1)


def choose_way(plans: dict[str, WayPlan]) -> str:
    """Return the way other than ``time`` whose slowest rank is predicted to take the least."""
    others = [way for way in WAYS if way != "time"]
    return min(others, key=lambda way: float(plans[way].us.max()))
