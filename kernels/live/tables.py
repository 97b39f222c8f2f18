"""The copies of this batch: static ones and live ones, as *select* reads them.

Copies of an expert with pieces are listed anew, one after the other, behind the static copies of
all experts. Equation numbers refer to docs/method.md.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.rounding import SHARE_BITS, compute_rounding_offset
from lplb_triton.kernels.solve.tiles import SHARE_ONE

# Static copies of an expert that are handled at once.
COPIES_AT_ONCE = tl.constexpr(4)
# Pieces that all pieces are compared with at once.
PIECES_AT_ONCE = tl.constexpr(8)


@triton.jit
def load_total(counts_ptr, expert, known):
    """Load the tokens of experts over all ranks, int64; 0 where none is ``known``."""
    # The load is volatile, or it could return a stale line of a cache.
    count = tl.load(counts_ptr + expert, mask=known, other=0, volatile=True)
    return tl.maximum(count, 0).to(tl.int64)


@triton.jit
def count_running(cumulative_ptr, copy, expert, total, is_inner):
    """Count an expert's tokens up to each of its copies, over all ranks (equation 15).

    ``is_inner`` is whether another copy follows; the last one's count is the total.
    """
    share = tl.load(cumulative_ptr + copy, mask=is_inner, other=0).to(tl.int64)
    offset = compute_rounding_offset(0, expert.to(tl.int64))
    running = (total * share + offset) >> SHARE_BITS
    return tl.where(is_inner, tl.minimum(running, total), total)


@triton.jit
def make_share(running, expert, total):
    """Make the cumulative share that equation 15 turns into ``running`` tokens (equation 27)."""
    offset = compute_rounding_offset(0, expert.to(tl.int64))
    size = tl.maximum(total, 1)
    wanted = (running << SHARE_BITS) - offset
    # A quotient in float64 takes less time than one of integers. It is off by far less than a half,
    # so the one wanted, rounded up, is the nearest whole number or the next.
    share = (wanted.to(tl.float64) / size.to(tl.float64) + 0.5).to(tl.int64)
    share += (share * size < wanted).to(tl.int64)
    share = tl.where(running == total, SHARE_ONE, share)
    return tl.where(running == 0, 0, share).to(tl.int32)


@triton.jit
def _load_pieces(pieces_ptr, piece, n_live, n_steps, tables):
    """Load the static slot of pieces of the first ``n_steps`` steps, its expert, and units.

    The expert is -1 where there is no piece.
    """
    there = piece < n_live
    step = tl.load(pieces_ptr + 2 * n_live + piece, mask=there, other=0)
    at = tl.load(pieces_ptr + piece, mask=there, other=0) - 1
    units = tl.load(pieces_ptr + n_live + piece, mask=there, other=0)
    # Slots of steps that are not kept may hold anything.
    is_kept = (step > 0) & (step <= n_steps)
    at = tl.where(is_kept, at, -1)
    expert = tl.load(tables.slot_experts + at, mask=is_kept, other=-1)
    return at, expert, tl.where(is_kept, units, 0)


@triton.jit
def _compare_pieces(pieces_ptr, expert, units, piece, n_live):
    """Count pieces of the same expert and sum their units: those of lower slots, and all.

    Experts and units take the place of static slots and units at ``pieces_ptr``.
    """
    # Several threads may hold the same piece, and all of them have read its slot by then.
    tl.debug_barrier()
    tl.store(pieces_ptr + piece, expert, mask=piece < n_live)
    tl.store(pieces_ptr + n_live + piece, units, mask=piece < n_live)
    tl.debug_barrier()
    n_ahead, n_every, ahead, every = piece * 0, piece * 0, piece * 0, piece * 0
    for block in range(0, n_live, PIECES_AT_ONCE):
        # Loads of a block are under way at the same time.
        experts, sizes = (), ()
        for i in tl.static_range(PIECES_AT_ONCE):
            other = block + i
            experts += (tl.load(pieces_ptr + other, mask=other < n_live, other=-1),)
            sizes += (tl.load(pieces_ptr + n_live + other, mask=other < n_live, other=0),)
        for i in tl.static_range(PIECES_AT_ONCE):
            same = (expert == experts[i]) & (expert >= 0)
            is_ahead = same & (piece > block + i)
            n_every += same.to(tl.int32)
            n_ahead += is_ahead.to(tl.int32)
            every += tl.where(same, sizes[i], 0)
            ahead += tl.where(is_ahead, sizes[i], 0)
    return n_ahead, n_every, ahead, every


@triton.jit
def _count_static_copies(
    counts_ptr, cumulative_ptr, expert, is_leader, begin, start, n_static, scratch, sizes
):
    """Write the running tokens of the static copies of the leaders' experts, from ``begin`` on."""
    total = load_total(counts_ptr, expert, is_leader)[:, None]
    for first in range(0, sizes.most_copies, COPIES_AT_ONCE):
        k = first + tl.arange(0, COPIES_AT_ONCE)[None, :]
        there = is_leader[:, None] & (k < n_static[:, None])
        is_inner = there & (k < n_static[:, None] - 1)
        running = count_running(
            cumulative_ptr, start[:, None] + k, expert[:, None], total, is_inner
        )
        tl.store(scratch.running + begin[:, None] + k, running.to(tl.int32), mask=there)


@triton.jit
def _take_from_copies(scratch, is_piece, begin, source, n_static, tokens, sizes):
    """Take tokens of pieces from the running tokens of their source and of the copies behind it."""
    for first in range(0, sizes.most_copies, COPIES_AT_ONCE):
        k = first + tl.arange(0, COPIES_AT_ONCE)[None, :]
        there = is_piece[:, None] & (k >= source[:, None]) & (k < n_static[:, None])
        # The order of sums of whole numbers doesn't matter.
        tl.atomic_add(
            scratch.running + begin[:, None] + k, -tokens[:, None], mask=there, sem="relaxed"
        )


@triton.jit
def _write_static_copies(
    counts_ptr, cumulative_ptr, expert, is_leader, begin, start, n_static, scratch, tables, sizes,
    n_copies,
):  # fmt: skip
    """Write shares and slots of the static copies of the leaders' experts, from ``begin`` on."""
    total = load_total(counts_ptr, expert, is_leader)[:, None]
    for first in range(0, sizes.most_copies, COPIES_AT_ONCE):
        k = first + tl.arange(0, COPIES_AT_ONCE)[None, :]
        there = is_leader[:, None] & (k < n_static[:, None])
        to = begin[:, None] + k
        # Other threads have subtracted from these words, past the first cache.
        running = tl.load(scratch.running + to, mask=there, other=0, volatile=True)
        share = make_share(running.to(tl.int64), expert[:, None], total)
        tl.store(cumulative_ptr + n_copies + to, share, mask=there)
        _copy_slots(start[:, None] + k, to, there, scratch, tables)


@triton.jit
def _copy_slots(copy, to, there, scratch, tables):
    """Copy what is known of static copies to the batch's list."""
    tl.store(scratch.slot + to, tl.load(tables.copy_slot + copy, mask=there, other=0), mask=there)
    place = tl.load(tables.copy_index + copy, mask=there, other=0)
    tl.store(scratch.copy_index + to, place, mask=there)


@triton.jit
def write_copies(
    counts_ptr,  # [E] int32
    cumulative_ptr,  # [2 n_copies + G L] int32, written from n_copies on
    pieces_ptr,  # [3, G L] int32
    n_steps,  # how many of the steps are kept
    shift,
    scratch,
    tables,
    sizes,
    P: tl.constexpr,  # live slots of all ranks, padded
    LIVE: tl.constexpr,
    SHARED: tl.constexpr,  # whether experts may have several static copies
):
    """Write the copies of experts with pieces, and their cumulative shares (equation 27).

    Returns by live slot its expert, -1 for none, and its tokens; and the number of halvings that
    find one of the copies of an expert.
    """
    n_copies = sizes.n_ranks * sizes.n_slots
    n_live = sizes.n_ranks * LIVE
    piece = tl.arange(0, P)
    at, expert, units = _load_pieces(pieces_ptr, piece, n_live, n_steps, tables)
    is_piece = expert >= 0
    # Where all experts have one static copy, these are in the order of experts.
    start, n_static = expert, is_piece.to(tl.int32)
    if SHARED:
        start = tl.load(tables.copy_start + expert, mask=is_piece, other=0)
        n_static = tl.load(tables.copy_start + expert + 1, mask=is_piece, other=0) - start
    total = load_total(counts_ptr, expert, is_piece)
    n_ahead, n_every, ahead, every = _compare_pieces(pieces_ptr, expert, units, piece, n_live)
    tokens = units << shift
    ahead, every = ahead.to(tl.int64) << shift, every.to(tl.int64) << shift
    # The first piece of an expert lists all of its copies.
    is_leader = is_piece & (n_ahead == 0)
    size = tl.where(is_leader, n_static + n_every, 0)
    begin = tl.cumsum(size, 0) - size
    tl.store(scratch.first + expert, n_copies + begin, mask=is_leader)
    tl.store(scratch.last + expert, n_copies + begin + size - 1, mask=is_leader)
    is_shared = is_leader & (n_static > 1)
    some_shared = n_steps < 0
    if SHARED:
        some_shared = tl.max(is_shared.to(tl.int32), 0) > 0
    if SHARED and some_shared:
        _count_static_copies(
            counts_ptr, cumulative_ptr, expert, is_shared, begin, start, n_static, scratch, sizes
        )
    # A single static copy keeps what the live ones leave.
    is_single = is_leader & (n_static == 1)
    kept = make_share(total - every, expert, total)
    tl.store(cumulative_ptr + n_copies + begin, kept, mask=is_single)
    _copy_slots(start, begin, is_single, scratch, tables)
    tl.debug_barrier()
    first = tl.load(scratch.first + expert, mask=is_piece, other=0) - n_copies
    if SHARED and some_shared:
        source = (tl.load(tables.slot_words + at, mask=is_piece, other=0) >> 2) - start
        _take_from_copies(
            scratch, is_piece & (n_static > 1), first, source, n_static, tokens, sizes
        )
        tl.debug_barrier()
        _write_static_copies(
            counts_ptr, cumulative_ptr, expert, is_shared, begin, start, n_static, scratch,
            tables, sizes, n_copies,
        )  # fmt: skip
    running = total - every + ahead + tokens
    to = first + n_static + n_ahead
    tl.store(cumulative_ptr + n_copies + to, make_share(running, expert, total), mask=is_piece)
    slot = piece // LIVE * (sizes.n_slots + LIVE) + sizes.n_slots + piece % LIVE
    tl.store(scratch.slot + to, slot, mask=is_piece)
    tl.store(scratch.copy_index + to, tl.zeros((P,), tl.int32), mask=is_piece)
    most = tl.max(size, 0)
    halvings = most * 0
    while (1 << halvings) < most:
        halvings += 1
    return expert, tokens, halvings
