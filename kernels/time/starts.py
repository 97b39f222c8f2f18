"""The plans that the search by time begins with, and the shares of the plan that it ends with.

Equation numbers refer to docs/method.md. Cells are handled in the order of slots, all places of a
group's ranks one after the other. Plans of rows are [TIME_PLANS, slots] int32: those that are
judged, then those that are improved.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.live.tables import make_share
from lplb_triton.kernels.rounding import SHARE_BITS, compute_rounding_offset
from lplb_triton.kernels.solve.tiles import SHARE_ONE

EXPERT = tl.constexpr(int(_layout.TimeField.EXPERT))
FIRST = tl.constexpr(int(_layout.TimeField.FIRST))
LAST = tl.constexpr(int(_layout.TimeField.LAST))
AT = tl.constexpr(int(_layout.TimeField.AT))
WORD = tl.constexpr(int(_layout.TimeField.WORD))
BEFORE = tl.constexpr(int(_layout.TimeField.BEFORE))
END = tl.constexpr(int(_layout.TimeField.END))
NUMBER_BITS = tl.constexpr(_layout.TIME_RANK_BITS)
NUMBER_MASK = tl.constexpr(_layout.TIME_RANK_MASK)
# Numbers of the plans.
TOKENS, EVEN, HOME = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FROM_TOKENS, FROM_BALANCED = tl.constexpr(3), tl.constexpr(4)
FROM_CLOSED, FROM_EVEN = tl.constexpr(5), tl.constexpr(6)
# Cells of an expert whose rows are loaded at once.
CELLS_AT_ONCE = tl.constexpr(4)


@triton.jit
def _split_word(word):
    """Return a cell's number among those of its expert, and how many these are."""
    number = (word >> 2) & NUMBER_MASK
    return number, word >> (NUMBER_BITS + 2)


@triton.jit
def _count_between(total, share_before, share, offset, has_before, is_last):
    """Count an expert's tokens between two cumulative shares (equation 15), int32.

    The first one counts as 0 unless the cell has copies before it.
    """
    before = (total * share_before.to(tl.int64) + offset) >> SHARE_BITS
    end = (total * share.to(tl.int64) + offset) >> SHARE_BITS
    end = tl.where(is_last, total, tl.minimum(end, total))
    return (end - tl.where(has_before, tl.minimum(before, total), 0)).to(tl.int32)


@triton.jit
def load_cells(cells_ptr, begin, n_slots, BLOCK: tl.constexpr):
    """Load what `write_starts` reads of a block of cells: experts, copies, words, even shares."""
    slot = begin + tl.arange(0, BLOCK)
    inside = slot < n_slots
    expert = tl.load(cells_ptr + EXPERT * n_slots + slot, mask=inside, other=-1)
    first = tl.load(cells_ptr + FIRST * n_slots + slot, mask=inside, other=0)
    last = tl.load(cells_ptr + LAST * n_slots + slot, mask=inside, other=0)
    word = tl.load(cells_ptr + WORD * n_slots + slot, mask=inside, other=0)
    even_before = tl.load(cells_ptr + BEFORE * n_slots + slot, mask=inside, other=0)
    even_end = tl.load(cells_ptr + END * n_slots + slot, mask=inside, other=0)
    return expert, first, last, word, even_before, even_end


@triton.jit
def write_starts(
    counts_ptr, cumulative_ptr, cells_ptr, plans_ptr, cells, n_slots, BLOCK: tl.constexpr
):
    """Write all plans but the one of closed copies (equation 30); returns the group's tokens.

    ``cells`` is the first block of `load_cells`, which needs nothing of the batch.
    """
    found = tl.zeros((), tl.int64)
    for begin in range(0, n_slots, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < n_slots
        expert, first, last, word, even_before, even_end = cells
        there = expert >= 0
        expert = tl.maximum(expert, 0)
        total = tl.load(counts_ptr + expert, mask=there, other=0)
        total = tl.maximum(total, 0).to(tl.int64)
        number, n_cells = _split_word(word)
        has_before, is_last = there & (number > 0), number == n_cells - 1
        before = tl.load(cumulative_ptr + first - 1, mask=has_before, other=0)
        end = tl.load(cumulative_ptr + last, mask=there, other=0)
        cells = load_cells(cells_ptr, begin + BLOCK, n_slots, BLOCK)
        offset = compute_rounding_offset(0, expert.to(tl.int64))
        tokens = _count_between(total, before, end, offset, has_before, is_last)
        even = _count_between(total, even_before, even_end, offset, has_before, is_last)
        everything = total.to(tl.int32)
        home = tl.where((word & 1) > 0, everything, 0)
        balanced = tl.where((word & 2) > 0, everything, 0)
        tl.store(plans_ptr + TOKENS * n_slots + slot, tokens, mask=inside)
        tl.store(plans_ptr + EVEN * n_slots + slot, even, mask=inside)
        tl.store(plans_ptr + HOME * n_slots + slot, home, mask=inside)
        tl.store(plans_ptr + FROM_TOKENS * n_slots + slot, tokens, mask=inside)
        tl.store(plans_ptr + FROM_BALANCED * n_slots + slot, balanced, mask=inside)
        tl.store(plans_ptr + FROM_EVEN * n_slots + slot, even, mask=inside)
        found += tl.sum(home.to(tl.int64), 0)
    return found


@triton.jit
def _load_rows(lists_ptr, rows_ptr, at, begin, n):
    """Load the rows of CELLS_AT_ONCE cells of each expert, 0 from its ``n``-th on.

    ``at`` is where the expert's cells begin in the lists. Loads are under way at the same time.
    """
    slots, found = (), ()
    for i in tl.static_range(CELLS_AT_ONCE):
        slots += (tl.load(lists_ptr + at + (begin + i), mask=begin + i < n, other=0),)
    for i in tl.static_range(CELLS_AT_ONCE):
        found += (tl.load(rows_ptr + slots[i], mask=begin + i < n, other=0),)
    return found


@triton.jit
def write_closed(cells_ptr, lists_ptr, plans_ptr, n_slots, most_cells, least, BLOCK: tl.constexpr):
    """Write the token plan without cells of fewer than ``least`` rows (equation 30).

    Their rows go to the expert's largest cell, the first of several.
    """
    for begin in range(0, n_slots, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < n_slots
        at = tl.load(cells_ptr + AT * n_slots + slot, mask=inside, other=0)
        word = tl.load(cells_ptr + WORD * n_slots + slot, mask=inside, other=0)
        number, n_cells = _split_word(word)
        largest, which, small = tl.zeros_like(at) - 1, tl.zeros_like(at), tl.zeros_like(at)
        for begin_cell in range(0, most_cells, CELLS_AT_ONCE):
            found = _load_rows(lists_ptr, plans_ptr, at, begin_cell, tl.where(inside, n_cells, 0))
            for i in tl.static_range(CELLS_AT_ONCE):
                rows = found[i]
                # What is not there counts as 0 rows, and is no larger than the first cell.
                small += tl.where(rows < least, rows, 0)
                larger = rows > largest
                which = tl.where(larger, begin_cell + i, which)
                largest = tl.where(larger, rows, largest)
        rows = tl.load(plans_ptr + slot, mask=inside, other=0)
        others = small - tl.where(largest < least, largest, 0)
        kept = tl.where(rows < least, 0, rows)
        kept = tl.where(number == which, rows + others, kept)
        kept = tl.where(n_cells > 0, kept, 0)
        tl.store(plans_ptr + FROM_CLOSED * n_slots + slot, kept, mask=inside)


@triton.jit
def write_shares(
    counts_ptr, cumulative_ptr, cells_ptr, lists_ptr, rows_ptr, n_slots, most_cells,
    multiplicity, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the cumulative shares of a plan (equation 27); a cell's first copy gets its rows."""
    for begin in range(0, n_slots, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < n_slots
        expert = tl.load(cells_ptr + EXPERT * n_slots + slot, mask=inside, other=-1)
        first = tl.load(cells_ptr + FIRST * n_slots + slot, mask=inside, other=0)
        last = tl.load(cells_ptr + LAST * n_slots + slot, mask=inside, other=0)
        at = tl.load(cells_ptr + AT * n_slots + slot, mask=inside, other=0)
        word = tl.load(cells_ptr + WORD * n_slots + slot, mask=inside, other=0)
        is_cell = expert >= 0
        expert = tl.maximum(expert, 0)
        total = tl.load(counts_ptr + expert, mask=is_cell, other=0)
        total = tl.maximum(total, 0).to(tl.int64)
        number, n_cells = _split_word(word)
        end = tl.zeros_like(total)
        for begin_cell in range(0, most_cells, CELLS_AT_ONCE):
            found = _load_rows(
                lists_ptr, rows_ptr, at, begin_cell, tl.where(is_cell, number + 1, 0)
            )
            for i in tl.static_range(CELLS_AT_ONCE):
                end += found[i].to(tl.int64)
        share = make_share(end, expert, total)
        share = tl.where(number == n_cells - 1, SHARE_ONE, share)
        for copy in range(0, multiplicity):
            there = is_cell & (first + copy <= last)
            tl.store(cumulative_ptr + first + copy, share, mask=there)
