"""What planning by time reads of a placement: cells, edges in classes, balanced homes.

Equation numbers refer to docs/method.md. A *cell* is here a pair of an expert and a rank that has a
copy of it; several copies of an expert on one rank are one cell. Cells of a group are numbered by
expert, then by rank.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

    Ints = NDArray[np.int64]

__all__ = ["TimeTables", "balance_homes", "find_steps", "make_time_tables", "step_limit"]

# Up to so many cells of an expert are joined each with each (equation 29).
MOST_ALL_JOINED = 4
# Steps of classes, at most: up to so many ranks of a group, and for more; and sweeps at most.
FEW_RANKS, STEPS_OF_FEW, STEPS_OF_MANY, MOST_SWEEPS = 32, 12, 8, 3


class TimeTables(NamedTuple):
    """Cells of one group, and the edges between them; int64."""

    start: Ints
    """[E + 1] first cell of each expert of the group."""
    experts: Ints
    """[E] their numbers, ascending."""
    rank: Ints
    """[n] rank of each cell within the group."""
    place: Ints
    """[n] slot within the rank, the first of several."""
    first: Ints
    """[n] first copy of each cell among all copies of the placement."""
    last: Ints
    """[n] last copy of each cell."""
    home: Ints
    """[E] cell of each expert's home."""
    balanced: Ints
    """[E] one cell of each expert, so that ranks get equal numbers (equation 30)."""
    classes: tuple[Ints, ...]
    """[m, 2] cells that the edges of each class join, the lower rank first."""
    n_ranks: int
    n_slots: int
    """Static slots of a rank."""

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.rank)


def step_limit(n_ranks: int) -> int:
    """Return how many steps of classes are made, at most, in a group of ``n_ranks``."""
    return STEPS_OF_FEW if n_ranks <= FEW_RANKS else STEPS_OF_MANY


def find_steps(tables: TimeTables, backward: bool) -> list[int]:
    """List the classes in the order in which steps go through them (equation 29)."""
    n = len(tables.classes)
    order = range(n - 1, -1, -1) if backward else range(n)
    steps = [k for _ in range(MOST_SWEEPS) for k in order]
    return steps[: step_limit(tables.n_ranks)]


def make_time_tables(placement: Placement) -> list[TimeTables]:
    """Make the tables of every group of a placement."""
    s = placement.structure
    n_copies = np.diff(s.copy_start)
    expert = np.arange(placement.n_logical).repeat(n_copies)
    rank, place = np.divmod(s.copy_slot.astype(np.int64), placement.slots_per_rank)
    first = np.flatnonzero(s.copy_index == 0)
    last = first + s.copy_multiplicity[first] - 1
    home_slot = placement.log2phy[:, 0].numpy()
    tables = []
    for group in range(placement.n_group):
        mine = first[s.cell_group[expert[first]] == group]
        behind = last[s.cell_group[expert[first]] == group]
        experts, start = np.unique(expert[mine], return_index=True)
        start = np.append(start, len(mine))
        at = rank[mine] - group * placement.group_size
        of = np.arange(len(experts)).repeat(np.diff(start))
        # The home is a copy of its cell, which has others if its rank has several copies.
        at_home = rank[mine] == (home_slot[experts] // placement.slots_per_rank)[of]
        home = np.flatnonzero(at_home)
        balanced = balance_homes(start, at, home, placement.group_size)
        tables.append(
            TimeTables(
                start.astype(np.int64),
                experts.astype(np.int64),
                at,
                place[mine],
                mine,
                behind,
                home,
                balanced,
                _find_classes(start, at),
                placement.group_size,
                placement.static_per_rank,
            )  # fmt: skip
        )
    return tables


@lru_cache(maxsize=64)
def _join_cells(n: int) -> tuple[tuple[int, int], ...]:
    """List the pairs of n cells that edges join: all of them, or the edges of a hypercube."""
    pairs = combinations(range(n), 2)
    return tuple(p for p in pairs if n <= MOST_ALL_JOINED or (p[0] ^ p[1]).bit_count() == 1)


def _find_classes(start: Ints, rank: Ints) -> tuple[Ints, ...]:
    """Put the edges into classes that name no rank twice, each into the first that has room."""
    taken = [0] * (int(rank.max(initial=0)) + 1)  # Bit k is set if the rank has an edge of class k.
    classes: list[list[tuple[int, int]]] = []
    ranks = rank.tolist()
    for begin, end in zip(start[:-1].tolist(), start[1:].tolist(), strict=True):
        for i, j in _join_cells(end - begin):
            a, b = ranks[begin + i], ranks[begin + j]
            either = taken[a] | taken[b]
            k = (~either & (either + 1)).bit_length() - 1
            taken[a] |= 1 << k
            taken[b] |= 1 << k
            if k == len(classes):
                classes.append([])
            classes[k].append((begin + i, begin + j))
    return tuple(np.array(one, dtype=np.int64) for one in classes)


def balance_homes(start: Ints, rank: Ints, home: Ints, n_ranks: int) -> Ints:
    """Choose a cell for each expert so that ranks get as equal numbers as cells allow (30).

    Experts move along shortest paths from the ranks with the most of them to ranks with at least
    two fewer, until there is no such path.

    Parameters
    ----------
    start : numpy.ndarray
        ``[E + 1]`` first cell of each expert.
    rank : numpy.ndarray
        ``[n]`` rank of each cell.
    home : numpy.ndarray
        ``[E]`` the cells to begin with.
    n_ranks : int
        Number of ranks.

    Returns
    -------
    numpy.ndarray
        ``[E]`` int64 cells.
    """
    chosen: Ints = home.copy()
    counts = np.bincount(rank[chosen], minlength=n_ranks)
    while True:
        for top in range(int(counts.max()), int(counts.min()) + 1, -1):
            path = _find_path(start, rank, chosen, counts, top)
            if path:
                break
        else:
            break
        counts[rank[path[0][1]]] += 1
        for expert, cell in path:
            source, chosen[expert] = chosen[expert], cell
        counts[rank[source]] -= 1
    return chosen


def _find_path(
    start: Ints, rank: Ints, chosen: Ints, counts: Ints, top: int
) -> list[tuple[int, int]]:
    """Find a shortest path from ranks with ``top`` experts to one with two fewer, or return [].

    The path is the experts that move and their new cells, the last move first.
    """
    on_rank: list[list[int]] = [[] for _ in counts]
    for expert, cell in enumerate(chosen):
        on_rank[rank[cell]].append(expert)
    sources = np.flatnonzero(counts == top).tolist()
    before: dict[int, tuple[int, int] | None] = dict.fromkeys(sources)
    queue = deque(sources)
    while queue:
        for expert in on_rank[queue.popleft()]:
            for cell in range(int(start[expert]), int(start[expert + 1])):
                to = int(rank[cell])
                if to in before:
                    continue
                before[to] = expert, cell
                queue.append(to)
                if counts[to] <= top - 2:
                    return _trace_back(before, rank, chosen, to)
    return []


def _trace_back(
    before: dict[int, tuple[int, int] | None], rank: Ints, chosen: Ints, end: int
) -> list[tuple[int, int]]:
    """Return the moves that lead to rank ``end``, the last one first."""
    path: list[tuple[int, int]] = []
    move = before[end]
    while move is not None:
        path.append(move)
        move = before[int(rank[chosen[move[0]]])]
    return path
