"""A load that no plan with live slots can beat; equation numbers refer to docs/method.md."""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.live.arguments import CUTS, HALVINGS
from lplb_triton.kernels.live.tables import load_total


@triton.jit
def _find_lowest(scratch, tables, sizes, expert):
    """Find the smallest load of a rank that holds each expert."""
    is_expert = expert < sizes.n_logical
    start = tl.load(tables.copy_start + expert, mask=is_expert, other=0)
    end = tl.load(tables.copy_start + expert + 1, mask=is_expert, other=0)
    lowest = tl.full(expert.shape, 0x7FFFFFFF, tl.int32)
    for k in range(0, sizes.most_copies):
        there = start + k < end
        slot = tl.load(tables.copy_slot + start + k, mask=there, other=0)
        load = tl.load(scratch.loads + slot // sizes.slots_per_rank, mask=there, other=0x7FFFFFFF)
        lowest = tl.minimum(lowest, load)
    return tl.where(is_expert, lowest, -1)


@triton.jit
def find_live_bound(
    counts_ptr,  # [E] int32
    mean,
    peak,
    shift,
    scratch,
    tables,
    sizes,
    G: tl.constexpr,
    EXPERTS: tl.constexpr,  # experts that are handled at once
    LIVE: tl.constexpr,
):
    """Find a bound from sets of the ranks above a threshold (equation 26), in units.

    Ranks outside of a set fetch LIVE experts each at most. ``scratch.loads`` is read.
    """
    rank = tl.arange(0, G)
    cut = 1 + tl.arange(0, CUTS)
    threshold = mean + (peak - mean) * cut // CUTS
    load = tl.load(scratch.loads + rank, mask=rank < sizes.n_ranks, other=-1)
    size = tl.sum((load[None, :] >= threshold[:, None]).to(tl.int32), 1)
    lost = LIVE * (sizes.n_ranks - size)
    first = tl.arange(0, EXPERTS)
    first_lowest = _find_lowest(scratch, tables, sizes, first)
    first_tokens = load_total(counts_ptr, first, first < sizes.n_logical)
    first_tokens = (first_tokens >> shift).to(tl.int32)
    for block in range(EXPERTS, sizes.n_logical, EXPERTS):
        expert = block + tl.arange(0, EXPERTS)
        lowest = _find_lowest(scratch, tables, sizes, expert)
        tl.store(scratch.lowest + expert, lowest, mask=expert < sizes.n_logical)
    tl.debug_barrier()
    first_inside = first_lowest[None, :] >= threshold[:, None]
    low = threshold * 0
    high = low + peak + 1
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        above = first_inside & (first_tokens[None, :] > middle[:, None])
        n_above = tl.sum(above.to(tl.int32), 1)
        for block in range(EXPERTS, sizes.n_logical, EXPERTS):
            inside, tokens = _load_inside(
                counts_ptr, scratch, sizes, block, threshold, shift, EXPERTS
            )
            n_above += tl.sum((inside & (tokens[None, :] > middle[:, None])).to(tl.int32), 1)
        low = tl.where(n_above > lost, middle, low)
        high = tl.where(n_above > lost, high, middle)
    kept = tl.sum(tl.where(first_inside, tl.minimum(first_tokens[None, :], high[:, None]), 0), 1)
    for block in range(EXPERTS, sizes.n_logical, EXPERTS):
        inside, tokens = _load_inside(counts_ptr, scratch, sizes, block, threshold, shift, EXPERTS)
        kept += tl.sum(tl.where(inside, tl.minimum(tokens[None, :], high[:, None]), 0), 1)
    # A set for which this is negative says nothing.
    return tl.max(tl.maximum(kept - lost * high, 0) // size, 0)


@triton.jit
def _load_inside(counts_ptr, scratch, sizes, block, threshold, shift, EXPERTS: tl.constexpr):
    """Load a block of experts: whether each lies in each set [CUTS, EXPERTS], and its units."""
    expert = block + tl.arange(0, EXPERTS)
    is_expert = expert < sizes.n_logical
    lowest = tl.load(scratch.lowest + expert, mask=is_expert, other=-1)
    tokens = (load_total(counts_ptr, expert, is_expert) >> shift).to(tl.int32)
    return lowest[None, :] >= threshold[:, None], tokens
