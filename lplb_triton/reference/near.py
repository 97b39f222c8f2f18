"""Plans that keep tokens near: the twin of kernels/near, in whole numbers and float64 quotients.

Equation numbers refer to docs/method.md. ``G`` is the number of ranks of a group and ``n`` the
number of its cells (see near_tables.py). Loads are in *units*, parts or multiples of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lplb_triton._layout import (
    NEAR_ALLOWANCE_BITS,
    NEAR_BLEND,
    NEAR_BLEND_BITS,
    NEAR_LAST_SHIFT,
    NEAR_UNIT_BITS,
    SHARE_BITS,
    SHARE_ONE,
)
from lplb_triton.reference.near_tables import find_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.reference.near_tables import NearTables

    Ints = NDArray[np.int64]

__all__ = [
    "CANDIDATES",
    "Candidate",
    "NearCase",
    "NearPlan",
    "find_case",
    "plan_near",
    "write_near_shares",
]


class Candidate(NamedTuple):
    """How one of the plans that are compared is made (equation 36)."""

    near_first: bool
    """Whether it begins near first; otherwise it begins with the token plan."""
    backward: bool
    """Whether its steps go through the classes from the last to the first."""
    falling: bool
    """Whether its price falls, and its later sweeps move more."""


CANDIDATES = (
    Candidate(True, False, True),
    Candidate(False, False, False),
    Candidate(True, True, True),
    Candidate(False, True, True),
)


class NearCase(NamedTuple):
    """A batch of one group in units (equations 33 and 34)."""

    shift: int
    """A token is ``2**shift`` units."""
    total: Ints
    """[E] units of each expert."""
    own: Ints
    """[n] the part of its node's tokens that a cell takes near first."""
    homeless: Ints
    """[E] units from nodes without a copy, which leave their node by every plan."""
    tokens: Ints
    """[n] the token plan."""
    fixed: Ints
    """[G] loads by lone experts."""
    mean: int
    """Mean load of a rank."""


class NearPlan(NamedTuple):
    """A plan of one group."""

    total: Ints
    """[E] units of each expert."""
    ends: Ints
    """[n] units up to each cell, summed over the expert's cells."""
    choice: int
    """0 is the token plan; otherwise one and the number of the candidate."""
    numbers: NDArray[np.float32]
    """[NEAR_REPORTED] tokens of experts with several cells that leave their node by the token plan,
    by this plan, and by every plan; all of their tokens; the largest load; the load that it may
    have; and the choice."""

    @property
    def max_load(self) -> np.float32:
        """The largest load in tokens."""
        found: np.float32 = self.numbers[4]
        return found


def _scale(values: Ints, shift: int) -> Ints:
    """Turn tokens into units, rounded down."""
    return values << shift if shift >= 0 else values >> -shift


def _difference(ends: Ints, start: Ints) -> Ints:
    """Turn sums over an expert's cells into one number for each cell."""
    before = np.append(0, ends[:-1])
    before[start[:-1]] = 0
    found: Ints = ends - before
    return found


def _accumulate(values: Ints, start: Ints) -> Ints:
    """Sum up over the cells of each expert."""
    running = values.cumsum()
    begun = np.append(0, running)[start[:-1]]
    found: Ints = running - begun.repeat(np.diff(start))
    return found


def find_case(
    tables: NearTables, gathered: Ints, cumulative: Ints, copy_start: Ints
) -> NearCase | None:
    """Turn a batch into units; None if the group has no tokens.

    Parameters
    ----------
    tables : NearTables
        Of the group.
    gathered : numpy.ndarray
        ``[ranks, n_logical]`` int64, tokens of each expert by source rank, over all ranks.
    cumulative : numpy.ndarray
        ``[n_copies]`` int64, cumulative shares of the token plan in units of 2**-24.
    copy_start : numpy.ndarray
        ``[n_logical + 1]`` int64.
    """
    n_cells = np.diff(tables.start)
    expert = tables.experts.repeat(n_cells)
    counts = gathered.sum(0)
    fixed = np.bincount(tables.lone_rank, counts[tables.lone_experts], tables.n_ranks)
    every = int(counts[tables.experts].sum() + fixed.sum())
    if every <= 0:
        return None
    exponent = int(np.float32(every).view(np.int32) >> 23) - 127
    shift = NEAR_UNIT_BITS - exponent
    total = _scale(counts[tables.experts], shift)

    n_nodes = -(-len(gathered) // tables.ranks_per_node)
    by_node = np.zeros((n_nodes, gathered.shape[1]), dtype=np.int64)
    np.add.at(by_node, np.arange(len(gathered)) // tables.ranks_per_node, gathered)
    there = _scale(by_node[tables.node, expert], shift)
    number = np.arange(tables.n_cells) - tables.node_first
    each = there // tables.node_cells
    own = each + (number < there - each * tables.node_cells)
    of = np.arange(len(n_cells)).repeat(n_cells)
    homeless = total - np.bincount(of, own, len(n_cells)).astype(np.int64)

    ends = (total.repeat(n_cells) * cumulative[tables.last]) >> SHARE_BITS
    ends = np.where(tables.last == copy_start[expert + 1] - 1, total.repeat(n_cells), ends)
    tokens = _difference(ends, tables.start)
    fixed = _scale(fixed.astype(np.int64), shift)
    mean = int(_scale(np.int64(every), shift)) // tables.n_ranks
    return NearCase(shift, total, own, homeless, tokens, fixed, mean)


def _start_near(tables: NearTables, case: NearCase) -> Ints:
    """Put every node's tokens on its own copies, and the others as the token plan has room (36)."""
    n_cells = np.diff(tables.start)
    room = _accumulate(np.maximum(case.tokens - case.own, 0) + 1, tables.start)
    all_room = room[tables.start[1:] - 1].repeat(n_cells)
    rest = case.homeless.repeat(n_cells)
    ends = (rest.astype(np.float64) * room.astype(np.float64) / all_room).astype(np.int64)
    ends[tables.start[1:] - 1] = case.homeless
    return case.own + _difference(ends, tables.start)


def _sum_by_rank(tables: NearTables, case: NearCase, x: Ints) -> Ints:
    """Return the load of each rank, [G]."""
    return case.fixed + np.bincount(tables.rank, x, tables.n_ranks).astype(np.int64)


def _sum_far(tables: NearTables, surplus: Ints) -> int:
    """Sum up the units that leave nodes with a copy, from surpluses by cell (equation 33)."""
    by_run = np.bincount(tables.node_first, surplus, tables.n_cells).astype(np.int64)
    return int(np.maximum(-by_run, 0).sum())


def _divide(values: Ints, quarters: int) -> Ints:
    """Return ``quarters / 4`` of whole numbers, rounded towards zero."""
    found: Ints = (values * quarters + np.where(values < 0, 3, 0)) >> 2
    return found


def _move(
    tables: NearTables, edges: Ints, x: Ints, surplus: Ints, load: Ints, low: int, price: int,
    quarters: int,
) -> None:  # fmt: skip
    """Make one step, in place; no rank occurs twice in the edges of a class (equation 35)."""
    a, b = edges.T
    at_a, at_b = tables.rank[a], tables.rank[b]
    load_a, load_b = load[at_a], load[at_b]
    ahead = load_a - load_b
    near, far = surplus[a], -surplus[b]
    fewer = np.maximum(low + price - load_b, _divide(ahead + price, quarters))
    same = _divide(ahead, quarters)
    more = np.minimum(load_a - low - price, _divide(ahead - price, quarters))
    moved = np.minimum(fewer, np.minimum(near, far))
    moved = np.maximum(moved, np.minimum(same, np.maximum(near, far)))
    moved = np.maximum(moved, more)
    within = tables.node[a] == tables.node[b]
    moved = np.where(within, same, moved)
    moved = np.clip(moved, -x[b], x[a])
    x[a] -= moved
    x[b] += moved
    load[at_a] -= moved
    load[at_b] += moved
    left, right = surplus[a] - moved, surplus[b] + moved
    # Cells of one node share what the node has above its own tokens.
    both = left + right
    surplus[a] = np.where(within, both >> 1, left)
    surplus[b] = np.where(within, both - (both >> 1), right)


def _search(
    tables: NearTables, case: NearCase, candidate: Candidate, aim: int
) -> tuple[Ints, Ints, Ints]:
    """Make a candidate; returns its units and surpluses by cell, and its loads (equation 36)."""
    x = _start_near(tables, case) if candidate.near_first else case.tokens.copy()
    surplus, load = x - case.own, _sum_by_rank(tables, case, x)
    for step in find_steps(tables, candidate.backward):
        shift = step.shift if candidate.falling else NEAR_LAST_SHIFT
        price = max(case.mean >> shift, 1)
        low = aim - price - (price >> 1)
        quarters = 3 if candidate.falling and step.relaxed else 2
        edges = tables.classes[step.number]
        _move(tables, edges, x, surplus, load, low, price, quarters)
    return x, surplus, load


def _find_blend(load: Ints, token_load: Ints, aim: int) -> int:
    """Return how much of the token plan brings all loads within the aim (equation 37)."""
    over, gained = load - aim, load - token_load
    part = over.astype(np.float64) * NEAR_BLEND / np.maximum(gained, 1)
    part = np.where(gained > over, part, NEAR_BLEND).astype(np.int64) + 1
    return int(np.where(over > 0, np.minimum(part, NEAR_BLEND), 0).max())


def plan_near(
    tables: NearTables,
    gathered: Ints,
    cumulative: Ints,
    copy_start: Ints,
    bound: float,
    slack: float,
) -> NearPlan | None:
    """Plan a batch of one group near its tokens (equations 33 to 37).

    Parameters
    ----------
    tables, gathered, cumulative, copy_start
        As for `find_case`.
    bound : float
        A load in tokens that no plan can beat; float32.
    slack : float
        The plan may have this part more than the bound, or the token plan's largest load.

    Returns
    -------
    NearPlan or None
        No more tokens leave their node than by the token plan. None if the group has no tokens.
    """
    case = find_case(tables, gathered, cumulative, copy_start)
    if case is None:
        return None
    token_load = _sum_by_rank(tables, case, case.tokens)
    unit = np.float32(2.0**case.shift)
    allowed = np.float32(bound) * np.float32(1 + slack) * unit
    limit = max(int(token_load.max()), int(allowed))
    aim = limit - (case.mean >> NEAR_ALLOWANCE_BITS) - tables.n_slots
    token_surplus = case.tokens - case.own
    token_far = _sum_far(tables, token_surplus)
    x, load, part, far, choice = case.tokens, token_load, 0, token_far, 0
    token_ends = _accumulate(case.tokens, tables.start)
    for number, candidate in enumerate(CANDIDATES, start=1):
        found, surplus, loads = _search(tables, case, candidate, aim)
        blend = _find_blend(loads, token_load, aim)
        runs = np.bincount(tables.node_first, surplus, tables.n_cells).astype(np.int64)
        token_runs = np.bincount(tables.node_first, token_surplus, tables.n_cells).astype(np.int64)
        mixed = (runs * (NEAR_BLEND - blend) + token_runs * blend) >> NEAR_BLEND_BITS
        new_far = int(np.maximum(-mixed, 0).sum())
        if new_far < far:
            x, load, part, far, choice = found, loads, blend, new_far, number
    ends = _accumulate(x, tables.start) * (NEAR_BLEND - part) + token_ends * part
    load = (load * (NEAR_BLEND - part) + token_load * part) >> NEAR_BLEND_BITS
    least = int(case.homeless.sum())
    amounts = least + token_far, least + far, least, case.total.sum(), load.max(), limit
    numbers = [np.float32(amount) / unit for amount in amounts]
    reported = np.array([*numbers, choice], dtype=np.float32)
    return NearPlan(case.total, ends >> NEAR_BLEND_BITS, choice, reported)


def write_near_shares(tables: NearTables, plan: NearPlan, cumulative: Ints) -> None:
    """Write the cumulative shares of a plan, in place of those of the token plan (equation 38).

    The token plan keeps its shares, and so do experts without tokens. Several copies of an expert
    on one rank divide its share evenly.

    Parameters
    ----------
    tables : NearTables
        Of the group.
    plan : NearPlan
        The plan.
    cumulative : numpy.ndarray
        ``[n_copies]`` int64, changed.
    """
    if plan.choice == 0:
        return
    n_cells = np.diff(tables.start)
    total = plan.total.repeat(n_cells)
    size = np.maximum(total, 1).astype(np.float64)
    share = ((plan.ends << SHARE_BITS).astype(np.float64) / size + 0.5).astype(np.int64)
    share = np.minimum(share, SHARE_ONE)
    before = share - _difference(share, tables.start)
    for cell in np.flatnonzero(total > 0).tolist():
        first, last = int(tables.first[cell]), int(tables.last[cell])
        number = np.arange(1, last - first + 2)
        gained = (share[cell] - before[cell]) * number // (last - first + 1)
        cumulative[first : last + 1] = before[cell] + gained
