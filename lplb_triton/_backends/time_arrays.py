"""What the kernel that plans by time reads of a placement and of a cost, as numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lplb_triton._layout import (
    N_TIME_EXTENTS,
    N_TIME_FIELDS,
    TIME_RANK_BITS,
    TimeExtent,
    TimeField,
)
from lplb_triton.reference.time import split_evenly
from lplb_triton.reference.time_tables import find_steps, make_time_tables, step_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.costs import TimeCost
    from lplb_triton.placement import Placement
    from lplb_triton.reference.time_tables import TimeTables

    Words = NDArray[np.int32]

__all__ = ["make_cost_arrays", "make_time_arrays"]


def make_time_arrays(placement: Placement) -> dict[str, NDArray[Any]]:
    """Make what planning by time reads of a placement; see `TimeTables` of the kernels.

    Shapes depend on the placement's sizes alone.
    """
    groups = make_time_tables(placement)
    sizes = placement.n_group, placement.static_per_rank, placement.group_size
    n_slots = sizes[1] * sizes[2]
    cells = np.zeros((sizes[0], N_TIME_FIELDS, n_slots), dtype=np.int32)
    cells[:, TimeField.EXPERT] = -1
    lists = np.zeros((sizes[0], n_slots), dtype=np.int32)
    steps = np.zeros((sizes[0], 2, step_limit(sizes[2]), sizes[2]), dtype=np.int32)
    steps[:] = np.arange(sizes[2])
    extents = np.zeros((sizes[0], N_TIME_EXTENTS), dtype=np.int32)
    even = np.append(split_evenly(placement.structure.copy_start.astype(np.int64)), 0)
    for group, tables in enumerate(groups):
        _fill_cells(cells[group], lists[group], tables, even)
        for backward in (False, True):
            order = find_steps(tables, backward)
            for step, k in enumerate(order):
                _fill_step(steps[group, int(backward), step], tables, tables.classes[k])
        extents[group, TimeExtent.N_STEPS] = len(find_steps(tables, False))
        extents[group, TimeExtent.MOST_CELLS] = np.diff(tables.start).max(initial=0)
        extents[group, TimeExtent.MULTIPLICITY] = 1 + (tables.last - tables.first).max(initial=0)
    shape = sizes[0], N_TIME_FIELDS, sizes[1], sizes[2]
    return {
        "time_cells": cells.reshape(shape),
        "time_lists": lists,
        "time_steps": steps,
        "time_extents": extents,
    }


def _fill_cells(cells: Words, lists: Words, tables: TimeTables, even: NDArray[np.int64]) -> None:
    """Fill a group's tables of cells, [fields, slots] and [slots]; slots count place by place.

    ``even`` [n_copies + 1] are the cumulative shares of the even split, and 0.
    """
    n_cells = np.diff(tables.start)
    slot = tables.place * tables.n_ranks + tables.rank
    lists[: tables.n_cells] = slot
    at = tables.start[:-1].repeat(n_cells)
    word = np.zeros(tables.n_cells, dtype=np.int64)
    word[tables.home] |= 1
    word[tables.balanced] |= 2
    word |= (np.arange(tables.n_cells) - at) << 2
    word |= n_cells.repeat(n_cells) << (2 + TIME_RANK_BITS)
    fields = {
        TimeField.EXPERT: tables.experts.repeat(n_cells),
        TimeField.FIRST: tables.first,
        TimeField.LAST: tables.last,
        TimeField.AT: at,
        TimeField.WORD: word,
        TimeField.BEFORE: np.where(np.arange(tables.n_cells) > at, even[tables.first - 1], 0),
        TimeField.END: even[tables.last],
    }
    for field, values in fields.items():
        cells[field, slot] = values


def _fill_step(words: Words, tables: TimeTables, edges: NDArray[np.int64]) -> None:
    """Fill the words of one class, [group_size]: the other rank, and above it the own place."""
    a, b = edges.T
    words[tables.rank[a]] = tables.rank[b] | tables.place[a] << TIME_RANK_BITS
    words[tables.rank[b]] = tables.rank[a] | tables.place[b] << TIME_RANK_BITS


def make_cost_arrays(cost: TimeCost, n_slots: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Make what the kernel reads of a cost, for ranks with ``n_slots`` slots.

    Returns
    -------
    tuple of numpy.ndarray
        ``[2, 2, n_slots + 1, T]`` float32, the table and the smoothed one; and [3] float32, what a
        narrow tile, a wide tile and a row add.
    """
    tables = np.stack([cost.table[:, : n_slots + 1], cost.smoothed[:, : n_slots + 1]])
    return tables, np.array([*cost.slopes, cost.per_row], dtype=np.float32)
