"""What near plans read of a placement: cells, their nodes, and edges in classes.

Equation numbers refer to docs/method.md. A *cell* is here a pair of an expert and a rank that has a
copy of it, for experts with copies on several ranks; several copies of an expert on one rank are
one cell. Cells of a group are numbered by expert, then by rank, so the cells of an expert on one
node follow each other. Experts on one rank only are *lone*.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lplb_triton._layout import NEAR_LAST_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

    Ints = NDArray[np.int64]

__all__ = ["NearTables", "Step", "find_steps", "make_near_tables", "step_limit"]

# Up to so many cells of an expert are joined each with each (equation 35).
MOST_ALL_JOINED = 4
# Steps of classes, at most: up to so many ranks of a group, and for more; and sweeps at most.
FEW_RANKS, STEPS_OF_FEW, STEPS_OF_MANY, MOST_SWEEPS = 16, 48, 16, 8
# The price of a token that leaves its node begins at the mean load over 2 to this power.
FIRST_SHIFT = 3


class NearTables(NamedTuple):
    """Cells of one group, and the edges between them; int64."""

    start: Ints
    """[E + 1] first cell of each expert of the group that has several."""
    experts: Ints
    """[E] their numbers, ascending."""
    rank: Ints
    """[n] rank of each cell within the group."""
    place: Ints
    """[n] number of each cell among those of its rank."""
    first: Ints
    """[n] first copy of each cell among all copies of the placement."""
    last: Ints
    """[n] last copy of each cell."""
    node: Ints
    """[n] node of each cell, counted over all ranks."""
    node_first: Ints
    """[n] first cell of the same expert on the same node."""
    node_cells: Ints
    """[n] number of such cells."""
    lone_experts: Ints
    """[l] experts of the group that are on one rank only, ascending."""
    lone_rank: Ints
    """[l] their ranks within the group."""
    classes: tuple[Ints, ...]
    """[m, 2] cells that the edges of each class join, the lower rank first."""
    n_ranks: int
    n_slots: int
    """Static slots of a rank."""
    ranks_per_node: int

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.rank)


class Step(NamedTuple):
    """One step of a candidate's search (equation 36)."""

    number: int
    """Number of the class whose edges move tokens."""
    shift: int
    """The price is the mean load over 2 to this power, for candidates whose price falls."""
    relaxed: bool
    """Whether such candidates move three quarters of a difference instead of a half."""


def step_limit(n_ranks: int) -> int:
    """Return how many steps of classes are made, at most, in a group of ``n_ranks``."""
    return STEPS_OF_FEW if n_ranks <= FEW_RANKS else STEPS_OF_MANY


def find_steps(tables: NearTables, backward: bool) -> list[Step]:
    """List the steps of a search that goes through the classes in order, or backward."""
    n = len(tables.classes)
    n_steps = min(step_limit(tables.n_ranks), MOST_SWEEPS * n)
    falls = NEAR_LAST_SHIFT + 1 - FIRST_SHIFT
    return [
        Step(n - 1 - k % n if backward else k % n, FIRST_SHIFT + k * falls // n_steps, k >= n)
        for k in range(n_steps)
    ]


def make_near_tables(placement: Placement, ranks_per_node: int) -> list[NearTables]:
    """Make the tables of every group of a placement."""
    s = placement.structure
    expert = np.arange(placement.n_logical).repeat(np.diff(s.copy_start))
    first = np.flatnonzero(s.copy_index == 0)
    last = first + s.copy_multiplicity[first] - 1
    is_lone = np.bincount(expert[first], minlength=placement.n_logical) == 1
    rank = s.copy_slot.astype(np.int64) // placement.slots_per_rank
    tables = []
    for group in range(placement.n_group):
        here = s.cell_group[expert[first]] == group
        lone = first[here & is_lone[expert[first]]]
        several = here & ~is_lone[expert[first]]
        mine, behind = first[several], last[several]
        experts, start = np.unique(expert[mine], return_index=True)
        start = np.append(start, len(mine)).astype(np.int64)
        node = rank[mine] // ranks_per_node
        # A run is the cells of an expert on one node.
        begins = np.ones(len(mine), dtype=np.bool_)
        begins[1:] = (np.diff(expert[mine]) != 0) | (np.diff(node) != 0)
        run = begins.cumsum() - 1
        at = rank[mine] - group * placement.group_size
        tables.append(
            NearTables(
                start,
                experts.astype(np.int64),
                at,
                _count_earlier(at),
                mine,
                behind,
                node,
                np.flatnonzero(begins)[run],
                np.bincount(run)[run],
                expert[lone],
                rank[lone] - group * placement.group_size,
                _find_classes(start, at, node),
                placement.group_size,
                placement.static_per_rank,
                ranks_per_node,
            )
        )
    return tables


def _count_earlier(keys: Ints) -> Ints:
    """Count the earlier entries that have the same key."""
    order = keys.argsort(kind="stable")
    per_key = np.bincount(keys)
    nth = np.empty(len(keys), dtype=np.int64)
    nth[order] = np.arange(len(keys)) - (per_key.cumsum() - per_key).repeat(per_key)
    return nth


@lru_cache(maxsize=64)
def _join_cells(n: int) -> tuple[tuple[int, int], ...]:
    """List the pairs of n cells that edges join: all of them, or the edges of a hypercube."""
    pairs = combinations(range(n), 2)
    return tuple(p for p in pairs if n <= MOST_ALL_JOINED or (p[0] ^ p[1]).bit_count() == 1)


def _find_classes(start: Ints, rank: Ints, node: Ints) -> tuple[Ints, ...]:
    """Put the edges into classes that name no rank twice, each into the first that has room.

    Edges within a node come first, since what they move costs nothing, then those of ranks with
    many edges.
    """
    edges = [
        (begin + i, begin + j)
        for begin, end in zip(start[:-1].tolist(), start[1:].tolist(), strict=True)
        for i, j in _join_cells(end - begin)
    ]
    if not edges:
        return ()
    a, b = np.array(edges, dtype=np.int64).T
    degree = np.bincount(np.append(rank[a], rank[b]))
    order = np.lexsort((-degree[rank[a]] - degree[rank[b]], node[a] != node[b]))
    taken = [0] * len(degree)  # Bit k is set if the rank has an edge of class k.
    classes: list[list[tuple[int, int]]] = []
    for at in order.tolist():
        i, j = edges[at]
        either = taken[rank[i]] | taken[rank[j]]
        k = (~either & (either + 1)).bit_length() - 1
        taken[rank[i]] |= 1 << k
        taken[rank[j]] |= 1 << k
        if k == len(classes):
            classes.append([])
        classes[k].append((i, j))
    return tuple(np.array(one, dtype=np.int64) for one in classes)
