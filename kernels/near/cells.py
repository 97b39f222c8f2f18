"""A batch in units by cell, the plans that the search begins with, and the shares that it ends with.

Equation numbers refer to docs/method.md. Cells are handled in the order of slots, all places of a
group's ranks one after the other, all at once. Rows of scratch are [NEAR_ROWS, slots] int32: what
cells take near first, the token plan, then units and surpluses of the candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.rounding import SHARE_BITS
from lplb_triton.kernels.solve.tiles import SHARE_ONE

EXPERT = tl.constexpr(int(_layout.NearField.EXPERT))
FIRST = tl.constexpr(int(_layout.NearField.FIRST))
LAST = tl.constexpr(int(_layout.NearField.LAST))
AT = tl.constexpr(int(_layout.NearField.AT))
NUMBER = tl.constexpr(int(_layout.NearField.NUMBER))
NODE = tl.constexpr(int(_layout.NearField.NODE))
SOURCE = tl.constexpr(int(_layout.NearField.SOURCE))
NUMBER_BITS = tl.constexpr(_layout.NEAR_RANK_BITS)
NUMBER_MASK = tl.constexpr(_layout.NEAR_RANK_MASK)
CANDIDATES = tl.constexpr(_layout.NEAR_CANDIDATES)
BLEND = tl.constexpr(_layout.NEAR_BLEND)
BLEND_BITS = tl.constexpr(_layout.NEAR_BLEND_BITS)
# Rows of scratch.
OWN, TOKENS = tl.constexpr(0), tl.constexpr(1)
UNITS, SURPLUS = tl.constexpr(2), tl.constexpr(2 + _layout.NEAR_CANDIDATES)
# Ranks of a node whose counts are loaded at once.
RANKS_AT_ONCE = tl.constexpr(8)


class Cells(NamedTuple):
    """Fields of the table ``near_cells`` by slot, see `NearField`."""

    slot: Any
    is_cell: Any
    expert: Any
    first: Any
    last: Any
    at: Any
    number: Any
    n_cells: Any
    on_node: Any
    n_on_node: Any
    source: Any


@triton.jit
def load_cells(cells_ptr, n_slots, BLOCK: tl.constexpr):
    """Load the fields of all slots; where no cell is, there are no cells of an expert."""
    slot = tl.arange(0, BLOCK)
    inside = slot < n_slots
    expert = tl.load(cells_ptr + EXPERT * n_slots + slot, mask=inside, other=-1)
    first = tl.load(cells_ptr + FIRST * n_slots + slot, mask=inside, other=0)
    last = tl.load(cells_ptr + LAST * n_slots + slot, mask=inside, other=0)
    at = tl.load(cells_ptr + AT * n_slots + slot, mask=inside, other=0)
    number = tl.load(cells_ptr + NUMBER * n_slots + slot, mask=inside, other=0)
    node = tl.load(cells_ptr + NODE * n_slots + slot, mask=inside, other=0)
    source = tl.load(cells_ptr + SOURCE * n_slots + slot, mask=inside, other=0)
    return Cells(
        slot,
        expert >= 0,
        tl.maximum(expert, 0),
        first,
        last,
        at,
        number & NUMBER_MASK,
        number >> NUMBER_BITS,
        node & NUMBER_MASK,
        node >> NUMBER_BITS,
        source,
    )


@triton.jit
def count_node(gathered_ptr, cells, n_sources, n_logical, ranks_per_node):
    """Count the tokens of each cell's expert from the ranks of its node."""
    found = cells.expert * 0
    for first in range(0, ranks_per_node, RANKS_AT_ONCE):
        # Loads of a block are under way at the same time.
        loaded = ()
        for i in tl.static_range(RANKS_AT_ONCE):
            source = cells.source + (first + i)
            there = cells.is_cell & (first + i < ranks_per_node) & (source < n_sources)
            at = source.to(tl.int64) * n_logical + cells.expert
            loaded += (tl.load(gathered_ptr + at, mask=there, other=0),)
        for i in tl.static_range(RANKS_AT_ONCE):
            found += tl.maximum(loaded[i], 0)
    return found


@triton.jit
def scale(tokens, shift):
    """Turn tokens into units, rounded down (equation 33)."""
    return tl.where(shift >= 0, tokens << tl.maximum(shift, 0), tokens >> tl.maximum(-shift, 0))


@triton.jit
def divide_by_shares(total, share_before, share, cells):
    """Return the units of each cell by the token plan (equation 34)."""
    total = total.to(tl.int64)
    before = (total * share_before.to(tl.int64)) >> SHARE_BITS
    end = (total * share.to(tl.int64)) >> SHARE_BITS
    end = tl.where(cells.number == cells.n_cells - 1, total, end)
    units = end - tl.where(cells.number > 0, before, 0)
    return tl.where(cells.is_cell, units, 0).to(tl.int32)


@triton.jit
def divide_node(there, cells):
    """Return the part of its node's units that each cell takes near first (equation 34)."""
    each = there // tl.maximum(cells.n_on_node, 1)
    own = each + (cells.on_node < there - each * cells.n_on_node).to(tl.int32)
    return tl.where(cells.is_cell, own, 0)


@triton.jit
def _divide_rest(rest, room, all_room):
    """Return the part of an expert's units without a copy near that room up to a cell gets."""
    wanted = rest.to(tl.float64) * room.to(tl.float64) / all_room.to(tl.float64)
    return wanted.to(tl.int32)


@triton.jit
def write_starts(rows_ptr, lists_ptr, cells, total, own, tokens, n_slots, most_cells):
    """Write units and surpluses that the candidates begin with (equation 35)."""
    room, room_before, all_room, near = own * 0, own * 0, own * 0, own * 0
    for j in range(0, most_cells):
        there = cells.is_cell & (j < cells.n_cells)
        other = tl.load(lists_ptr + cells.at + j, mask=there, other=0)
        other_own = tl.load(rows_ptr + OWN * n_slots + other, mask=there, other=0)
        other_tokens = tl.load(rows_ptr + TOKENS * n_slots + other, mask=there, other=0)
        found = tl.where(there, tl.maximum(other_tokens - other_own, 0) + 1, 0)
        near += other_own
        all_room += found
        room += tl.where(j <= cells.number, found, 0)
        room_before += tl.where(j < cells.number, found, 0)
    rest = total - near
    all_room = tl.maximum(all_room, 1)
    end = _divide_rest(rest, room, all_room)
    end = tl.where(cells.number == cells.n_cells - 1, rest, end)
    before = _divide_rest(rest, room_before, all_room)
    start = own + tl.where(cells.is_cell, end - before, 0)
    inside = cells.slot < n_slots
    for k in tl.static_range(CANDIDATES):
        # Every second candidate begins with the token plan.
        units = tokens if k % 2 else start
        tl.store(rows_ptr + (UNITS + k) * n_slots + cells.slot, units, mask=inside)
        tl.store(rows_ptr + (SURPLUS + k) * n_slots + cells.slot, units - own, mask=inside)


@triton.jit
def sum_far(rows_ptr, lists_ptr, cells, parts, n_slots, most_on_node):
    """Sum up the units that leave nodes with a copy (equation 33).

    ``parts`` [CANDIDATES] are how much of the token plan is blended into each candidate. Returns
    the sums of all candidates, [CANDIDATES] int64, and that of the token plan.
    """
    k = tl.arange(0, CANDIDATES)[:, None]
    # The first cell of an expert on a node sums up all of them.
    counts = cells.is_cell & (cells.on_node == 0)
    token_run = cells.slot * 0
    run = k * 0 + token_run[None, :]
    for i in range(0, most_on_node):
        there = counts & (i < cells.n_on_node)
        other = tl.load(lists_ptr + cells.at + cells.number + i, mask=there, other=0)
        token_run += tl.load(rows_ptr + TOKENS * n_slots + other, mask=there, other=0)
        token_run -= tl.load(rows_ptr + OWN * n_slots + other, mask=there, other=0)
        at = (SURPLUS + k) * n_slots + other[None, :]
        run += tl.load(rows_ptr + at, mask=(k >= 0) & there[None, :], other=0)
    part = parts.to(tl.int64)[:, None]
    mixed = run.to(tl.int64) * (BLEND - part) + token_run.to(tl.int64)[None, :] * part
    far = tl.sum(tl.maximum(-(mixed >> BLEND_BITS), 0), 1)
    return far, tl.sum(tl.maximum(-token_run, 0).to(tl.int64), 0)


@triton.jit
def _make_share(end, size):
    """Make the cumulative share that is nearest to ``end`` units of ``size`` (equation 38)."""
    share = ((end << SHARE_BITS).to(tl.float64) / size + 0.5).to(tl.int64)
    return tl.minimum(share, SHARE_ONE)


@triton.jit
def write_near_shares(
    rows_ptr, lists_ptr, cumulative_ptr, cells, total, choice, part, n_slots, most_cells,
    multiplicity,
):  # fmt: skip
    """Write the cumulative shares of candidate ``choice`` (equations 37 and 38)."""
    end, before = cells.slot.to(tl.int64) * 0, cells.slot.to(tl.int64) * 0
    units_ptr = rows_ptr + (choice + UNITS) * n_slots
    for j in range(0, most_cells):
        there = cells.is_cell & (j <= cells.number)
        other = tl.load(lists_ptr + cells.at + j, mask=there, other=0)
        found = tl.load(units_ptr + other, mask=there, other=0).to(tl.int64) * (BLEND - part)
        token = tl.load(rows_ptr + TOKENS * n_slots + other, mask=there, other=0)
        found += token.to(tl.int64) * part
        end += found
        before += tl.where(j < cells.number, found, 0)
    size = tl.maximum(total, 1).to(tl.float64)
    share = _make_share(end >> BLEND_BITS, size)
    share_before = _make_share(before >> BLEND_BITS, size)
    # Experts without tokens keep their shares.
    written = cells.is_cell & (total > 0)
    tl.store(cumulative_ptr + cells.last, share.to(tl.int32), mask=written)
    n_copies = cells.last - cells.first + 1
    for copy in range(0, multiplicity - 1):
        gained = (share - share_before) * (copy + 1) // n_copies
        there = written & (cells.first + copy < cells.last)
        at = cumulative_ptr + cells.first + copy
        tl.store(at, (share_before + gained).to(tl.int32), mask=there)
