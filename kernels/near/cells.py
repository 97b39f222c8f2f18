"""A batch in units by cell, the plans that a search begins with, and the shares of its last one.

Equation numbers refer to docs/method.md. Cells are handled in order of experts and ranks, all of
them at once, so that sums over an expert's cells are differences of running sums. Rows of scratch
are [NEAR_ROWS, slots] int32: units and surpluses of the candidates, and surpluses of the token
plan.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.lanes import load_lanes
from lplb_triton.kernels.rounding import SHARE_BITS
from lplb_triton.kernels.solve.tiles import SHARE_ONE

EXPERT = tl.constexpr(int(_layout.NearField.EXPERT))
SLOT = tl.constexpr(int(_layout.NearField.SLOT))
FIRST = tl.constexpr(int(_layout.NearField.FIRST))
LAST = tl.constexpr(int(_layout.NearField.LAST))
BEGIN = tl.constexpr(int(_layout.NearField.BEGIN))
END = tl.constexpr(int(_layout.NearField.END))
NODE_BEGIN = tl.constexpr(int(_layout.NearField.NODE_BEGIN))
NODE_CELLS = tl.constexpr(int(_layout.NearField.NODE_CELLS))
SOURCE = tl.constexpr(int(_layout.NearField.SOURCE))
CANDIDATES = tl.constexpr(_layout.NEAR_CANDIDATES)
BLEND = tl.constexpr(_layout.NEAR_BLEND)
BLEND_BITS = tl.constexpr(_layout.NEAR_BLEND_BITS)
# Rows of scratch.
UNITS, SURPLUS = tl.constexpr(0), tl.constexpr(_layout.NEAR_CANDIDATES)
TOKEN_SURPLUS = tl.constexpr(2 * _layout.NEAR_CANDIDATES)
# Two numbers below 2**31 in one word of 64 bits are summed up at once.
HIGH_BITS = tl.constexpr(32)
# Ranks of a node whose counts are loaded at once.
RANKS_AT_ONCE = tl.constexpr(8)
# Cells of an expert on a node whose surpluses are loaded at once.
CELLS_AT_ONCE = tl.constexpr(2)


class Cells(NamedTuple):
    """Columns of the table ``near_cells``, see `NearField`."""

    number: Any
    """[BLOCK] of each column."""
    is_cell: Any
    expert: Any
    slot: Any
    first: Any
    last: Any
    begin: Any
    end: Any
    node_begin: Any
    node_cells: Any
    source: Any


@triton.jit
def load_cells(cells_ptr, most_cells, BLOCK: tl.constexpr):
    """Load the table of cells."""
    number = tl.arange(0, BLOCK)
    inside = number < most_cells
    expert = tl.load(cells_ptr + EXPERT * most_cells + number, mask=inside, other=-1)
    slot = tl.load(cells_ptr + SLOT * most_cells + number, mask=inside, other=0)
    first = tl.load(cells_ptr + FIRST * most_cells + number, mask=inside, other=0)
    last = tl.load(cells_ptr + LAST * most_cells + number, mask=inside, other=0)
    begin = tl.load(cells_ptr + BEGIN * most_cells + number, mask=inside, other=0)
    end = tl.load(cells_ptr + END * most_cells + number, mask=inside, other=0)
    node_begin = tl.load(cells_ptr + NODE_BEGIN * most_cells + number, mask=inside, other=0)
    node_cells = tl.load(cells_ptr + NODE_CELLS * most_cells + number, mask=inside, other=0)
    source = tl.load(cells_ptr + SOURCE * most_cells + number, mask=inside, other=0)
    is_cell = expert >= 0
    expert = tl.maximum(expert, 0)
    return Cells(
        number, is_cell, expert, slot, first, last, begin, end, node_begin, node_cells,
        source,
    )  # fmt: skip


@triton.jit
def _count_node(gathered_ptr, cells, n_sources, n_logical, ranks_per_node):
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
def _accumulate(values, begin):
    """Sum up from number ``begin`` to each number, including both."""
    running = tl.cumsum(values, 0)
    before = tl.gather(running, tl.maximum(begin - 1, 0), 0)
    return running - tl.where(begin > 0, before, 0)


@triton.jit
def _divide_by_shares(total, share_before, share, cells):
    """Return the units of an expert before each cell and up to it, by the token plan (34)."""
    total = total.to(tl.int64)
    before = (total * share_before.to(tl.int64)) >> SHARE_BITS
    end = (total * share.to(tl.int64)) >> SHARE_BITS
    end = tl.where(cells.number == cells.end, total, end)
    before = tl.where(cells.is_cell & (cells.number > cells.begin), before, 0)
    return before.to(tl.int32), tl.where(cells.is_cell, end, 0).to(tl.int32)


@triton.jit
def _divide_node(there, cells):
    """Return the part of its node's units that each cell takes near first (equation 34)."""
    each = there // tl.maximum(cells.node_cells, 1)
    at = cells.number - cells.node_begin
    own = each + (at < there - each * cells.node_cells).to(tl.int32)
    return tl.where(cells.is_cell, own, 0)


@triton.jit
def _divide_rest(rest, room, all_room):
    """Return the part of an expert's units without a copy near that room up to a cell gets."""
    wanted = rest.to(tl.float64) * room.to(tl.float64) / all_room.to(tl.float64)
    return wanted.to(tl.int32)


@triton.jit
def _start_near(cells, total, own, units):
    """Return the units of each cell near first (equation 36)."""
    here = tl.where(cells.is_cell, tl.maximum(units - own, 0) + 1, 0)
    both = _accumulate((own.to(tl.int64) << HIGH_BITS) + here, cells.begin)
    all_both = tl.gather(both, cells.end, 0)
    near = (all_both >> HIGH_BITS).to(tl.int32)
    room, all_room = both.to(tl.int32), tl.maximum(all_both.to(tl.int32), 1)
    rest = tl.where(cells.is_cell, total - near, 0)
    end = _divide_rest(rest, room, all_room)
    end = tl.where(cells.number == cells.end, rest, end)
    before = _divide_rest(rest, room - here, all_room)
    return own + tl.where(cells.is_cell, end - before, 0)


@triton.jit
def load_batch(
    gathered_ptr, counts_ptr, cumulative_ptr, cells, n_sources, n_logical, ranks_per_node
):
    """Load each cell's tokens, all and those from its node, and the shares before and up to it."""
    tokens = tl.maximum(tl.load(counts_ptr + cells.expert, mask=cells.is_cell, other=0), 0)
    near = _count_node(gathered_ptr, cells, n_sources, n_logical, ranks_per_node)
    has_before = cells.is_cell & (cells.number > cells.begin)
    share_before = tl.load(cumulative_ptr + cells.first - 1, mask=has_before, other=0)
    share = tl.load(cumulative_ptr + cells.last, mask=cells.is_cell, other=0)
    return tokens, near, share_before, share


class Batch(NamedTuple):
    """A batch in units (equations 33 and 34)."""

    total: Any
    """[BLOCK] units of each cell's expert."""
    own: Any
    """[BLOCK] what each cell takes near first."""
    before: Any
    """[BLOCK] units of its expert before each cell, by the token plan."""
    end: Any
    """[BLOCK] units up to it."""
    every: Any
    """Units of experts with several cells, int64."""
    least: Any
    """Those of them that leave their node by every plan, int64."""


@triton.jit
def scale_batch(loaded, cells, shift):
    """Turn what `load_batch` has loaded into units; returns `Batch`."""
    tokens, near, share_before, share = loaded
    total = scale(tokens, shift)
    own = _divide_node(scale(near, shift), cells)
    before, end = _divide_by_shares(total, share_before, share, cells)
    firsts = tl.where(cells.is_cell & (cells.number == cells.begin), total, 0)
    sums = tl.sum((firsts.to(tl.int64) << HIGH_BITS) + own, 0)
    every = sums >> HIGH_BITS
    return Batch(total, own, before, end, every, every - (sums - (every << HIGH_BITS)))


@triton.jit
def write_starts(rows_ptr, cells, batch, n_slots):
    """Write units and surpluses that the candidates begin with (equation 36)."""
    own, units = batch.own, batch.end - batch.before
    near = _start_near(cells, batch.total, own, units)
    for k in tl.static_range(CANDIDATES):
        # Every second candidate begins with the token plan.
        start = units if k % 2 else near
        tl.store(rows_ptr + (UNITS + k) * n_slots + cells.slot, start, mask=cells.is_cell)
        at = rows_ptr + (SURPLUS + k) * n_slots + cells.slot
        tl.store(at, start - own, mask=cells.is_cell)
    at = rows_ptr + TOKEN_SURPLUS * n_slots + cells.slot
    tl.store(at, units - own, mask=cells.is_cell)


@triton.jit
def sum_far(cells_ptr, rows_ptr, parts, most_cells, most_on_node, n_slots, BLOCK: tl.constexpr):
    """Sum up the units that leave nodes with a copy (equation 33).

    ``parts`` [CANDIDATES] are how much of the token plan is blended into each candidate. Returns
    the sums of all candidates and of the token plan, [CANDIDATES] int64 each. The warp of a
    candidate does this alone, and so loads what it needs of all cells.
    """
    k = tl.arange(0, CANDIDATES)[:, None]
    number = k * 0 + tl.arange(0, BLOCK)[None, :]
    inside = number < most_cells
    expert = tl.load(cells_ptr + EXPERT * most_cells + number, mask=inside, other=-1)
    begin = tl.load(cells_ptr + NODE_BEGIN * most_cells + number, mask=inside, other=0)
    n_cells = tl.load(cells_ptr + NODE_CELLS * most_cells + number, mask=inside, other=0)
    # The first cell of an expert on a node sums up all of them.
    counts = (expert >= 0) & (number == begin)
    surplus_ptr = rows_ptr + (SURPLUS + k) * n_slots
    token_ptr = rows_ptr + TOKEN_SURPLUS * n_slots
    run, token_run = number * 0, number * 0
    for first in range(0, most_on_node, CELLS_AT_ONCE):
        # Loads of a block are under way at the same time.
        loaded, tokens = (), ()
        for i in tl.static_range(CELLS_AT_ONCE):
            there = counts & (first + i < n_cells)
            at = cells_ptr + SLOT * most_cells + number + (first + i)
            slot = tl.load(at, mask=there, other=0)
            loaded += (load_lanes(surplus_ptr + slot, there, CANDIDATES, BLOCK),)
            tokens += (load_lanes(token_ptr + slot, there, CANDIDATES, BLOCK),)
        for i in tl.static_range(CELLS_AT_ONCE):
            run += loaded[i]
            token_run += tokens[i]
    part = parts.to(tl.int64)[:, None]
    mixed = run.to(tl.int64) * (BLEND - part) + token_run.to(tl.int64) * part
    far = tl.sum(tl.maximum(-(mixed >> BLEND_BITS), 0), 1)
    return far, tl.sum(tl.maximum(-token_run, 0).to(tl.int64), 1)


@triton.jit
def _make_share(end, size):
    """Make the cumulative share that is nearest to ``end`` units of ``size`` (equation 38)."""
    share = ((end << SHARE_BITS).to(tl.float64) / size + 0.5).to(tl.int64)
    return tl.minimum(share, SHARE_ONE)


@triton.jit
def write_near_shares(rows_ptr, cumulative_ptr, cells, batch, choice, part, n_slots, multiplicity):
    """Write the shares of candidate ``choice`` with ``part`` of the token plan (37 and 38)."""
    at = rows_ptr + (choice + UNITS) * n_slots + cells.slot
    units = tl.load(at, mask=cells.is_cell, other=0)
    end = _accumulate(units, cells.begin)
    before = (end - units).to(tl.int64) * (BLEND - part) + batch.before.to(tl.int64) * part
    end = end.to(tl.int64) * (BLEND - part) + batch.end.to(tl.int64) * part
    size = tl.maximum(batch.total, 1).to(tl.float64)
    share = _make_share(end >> BLEND_BITS, size)
    # Experts without tokens keep their shares.
    written = cells.is_cell & (batch.total > 0)
    tl.store(cumulative_ptr + cells.last, share.to(tl.int32), mask=written)
    if multiplicity > 1:
        share_before = _make_share(before >> BLEND_BITS, size)
        n_copies = cells.last - cells.first + 1
        for copy in range(0, multiplicity - 1):
            gained = (share - share_before) * (copy + 1) // n_copies
            there = written & (cells.first + copy < cells.last)
            at = cumulative_ptr + cells.first + copy
            tl.store(at, (share_before + gained).to(tl.int32), mask=there)
