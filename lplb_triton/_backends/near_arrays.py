"""What the kernel that keeps tokens near reads of a placement, as numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lplb_triton._backends.cells import count_earlier
from lplb_triton._layout import (
    N_NEAR_EXTENTS,
    N_NEAR_FIELDS,
    NEAR_RANK_BITS,
    NEAR_RELAXED_AT,
    NEAR_SHIFT_AT,
    NEAR_WITHIN_AT,
    NearExtent,
    NearField,
)
from lplb_triton.reference.near_tables import find_steps, make_near_tables, step_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement
    from lplb_triton.reference.near_tables import NearTables, Step

    Words = NDArray[np.int32]

__all__ = ["make_near_arrays"]


def make_near_arrays(placement: Placement, ranks_per_node: int) -> dict[str, NDArray[Any]]:
    """Make what near plans read of a placement; see `NearTables` of the kernels.

    Shapes depend on the placement's sizes alone.
    """
    groups = make_near_tables(placement, ranks_per_node)
    n_group, n_places, n_ranks = placement.n_group, placement.static_per_rank, placement.group_size
    # A cell is the first copy of its expert on its rank, and an expert with several has one more
    # copy than it has redundant ones.
    width = max(1, 2 * placement.redundant_per_group)
    cells = np.zeros((n_group, N_NEAR_FIELDS, width), dtype=np.int32)
    cells[:, NearField.EXPERT] = -1
    lone = np.full((n_group, n_places, n_ranks), -1, dtype=np.int32)
    on_rank = np.zeros((n_group, n_ranks), dtype=np.int32)
    steps = np.zeros((n_group, 2, step_limit(n_ranks), n_ranks), dtype=np.int32)
    steps[:] = np.arange(n_ranks)
    extents = np.zeros((n_group, N_NEAR_EXTENTS), dtype=np.int32)
    for group, tables in enumerate(groups):
        _fill_cells(cells[group], tables)
        lone[group, count_earlier(tables.lone_rank), tables.lone_rank] = tables.lone_experts
        on_rank[group] = np.bincount(tables.rank, minlength=n_ranks)
        for backward in (False, True):
            order = find_steps(tables, backward)
            for number, step in enumerate(order):
                _fill_step(steps[group, int(backward), number], tables, step)
        of_group = extents[group]
        of_group[NearExtent.N_STEPS] = len(find_steps(tables, False))
        of_group[NearExtent.MULTIPLICITY] = 1 + (tables.last - tables.first).max(initial=0)
        of_group[NearExtent.MOST_CELLS] = on_rank[group].max()
        of_group[NearExtent.MOST_ON_NODE] = tables.node_cells.max(initial=0)
        of_group[NearExtent.MOST_LONE] = (lone[group] >= 0).sum(0).max()
    return {
        "near_cells": cells,
        "near_lone": lone,
        "near_ranks": on_rank,
        "near_steps": steps,
        "near_extents": extents,
    }


def _fill_cells(cells: Words, tables: NearTables) -> None:
    """Fill a group's table of cells, [fields, cells]."""
    n_cells = np.diff(tables.start)
    fields = {
        NearField.EXPERT: tables.experts.repeat(n_cells),
        NearField.SLOT: tables.place * tables.n_ranks + tables.rank,
        NearField.FIRST: tables.first,
        NearField.LAST: tables.last,
        NearField.BEGIN: tables.start[:-1].repeat(n_cells),
        NearField.END: tables.start[1:].repeat(n_cells) - 1,
        NearField.NODE_BEGIN: tables.node_first,
        NearField.NODE_CELLS: tables.node_cells,
        NearField.SOURCE: tables.node * tables.ranks_per_node,
    }
    for field, values in fields.items():
        cells[field, : tables.n_cells] = values


def _fill_step(words: Words, tables: NearTables, step: Step) -> None:
    """Fill the words of one step, [group_size]; see `_layout`."""
    a, b = tables.classes[step.number].T
    word = (tables.node[a] == tables.node[b]).astype(np.int64) << NEAR_WITHIN_AT
    word |= int(step.relaxed) << NEAR_RELAXED_AT | step.shift << NEAR_SHIFT_AT
    words[tables.rank[a]] = word | tables.rank[b] | tables.place[a] << NEAR_RANK_BITS
    words[tables.rank[b]] = word | tables.rank[a] | tables.place[b] << NEAR_RANK_BITS
