"""Counting what was routed, for placements and reports, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lplb_triton.kernels.launch import KernelCall, launch_call

# Ids that one program counts.
LOAD_BLOCK = 2048
# The most experts that the kernel counts: the bins of its histogram are in shared memory.
MOST_EXPERTS = 4096


@triton.jit(do_not_specialize=["n_ids", "batch", "n_logical", "n_local", "n_slots", "n_ranks"])
def record_loads_kernel(
    ids_ptr,  # [n_ids] logical ids, negative ones are dropped choices
    slots_ptr,  # [n_ids] physical ids, as the ids were routed
    load_ptr,  # [n_logical] int64, added to
    by_home_ptr,  # [n_rows, n_ranks] int64: row `batch` gets the choices by home rank
    by_rank_ptr,  # the same by the rank that they were routed to
    n_ids,
    batch,
    n_logical,
    n_local,
    n_slots,  # slots per rank
    n_ranks,
    N_ROWS: tl.constexpr,
    EXPERT_BINS: tl.constexpr,  # a power of two above n_logical
    RANK_BINS: tl.constexpr,  # a power of two above n_ranks
    BLOCK: tl.constexpr,
):
    """Count one batch, a block of ids per program; the first one clears the next batch's row."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < n_ids
    ids = tl.load(ids_ptr + position, mask=inside, other=-1).to(tl.int32)
    slots = tl.load(slots_ptr + position, mask=inside, other=-1).to(tl.int32)
    kept = ids >= 0
    experts = tl.arange(0, EXPERT_BINS)
    counts = tl.histogram(tl.where(kept, ids, n_logical), EXPERT_BINS)
    some = (experts < n_logical) & (counts > 0)
    tl.atomic_add(load_ptr + experts, counts.to(tl.int64), mask=some)
    ranks = tl.arange(0, RANK_BINS)
    row = batch % N_ROWS * n_ranks
    homes = tl.histogram(tl.where(kept, ids // n_local, n_ranks), RANK_BINS)
    some = (ranks < n_ranks) & (homes > 0)
    tl.atomic_add(by_home_ptr + row + ranks, homes.to(tl.int64), mask=some)
    routed = tl.histogram(tl.where(slots >= 0, slots // n_slots, n_ranks), RANK_BINS)
    some = (ranks < n_ranks) & (routed > 0)
    tl.atomic_add(by_rank_ptr + row + ranks, routed.to(tl.int64), mask=some)
    if tl.program_id(0) == 0:
        following = (batch + 1) % N_ROWS * n_ranks
        nothing = tl.zeros([RANK_BINS], dtype=tl.int64)
        tl.store(by_home_ptr + following + ranks, nothing, mask=ranks < n_ranks)
        tl.store(by_rank_ptr + following + ranks, nothing, mask=ranks < n_ranks)


def record_loads(
    ids: torch.Tensor,
    slots: torch.Tensor,
    load: torch.Tensor,
    by_home: torch.Tensor,
    by_rank: torch.Tensor,
    batch: int,
    n_slots: int,
) -> None:
    """Add one batch's choices to ``load``, and write them by rank; see `record_loads_kernel`.

    ``ids`` and ``slots`` are contiguous, of one shape and dtype, on the device of the others. There
    are at most `MOST_EXPERTS` experts. ``n_slots`` is the number of slots per rank.
    """
    n_ids, n_logical = ids.numel(), load.numel()
    n_rows, n_ranks = by_home.shape
    args = (
        ids, slots, load, by_home, by_rank, n_ids, batch % n_rows, n_logical,
        n_logical // n_ranks, n_slots, n_ranks,
    )  # fmt: skip
    expert_bins = triton.next_power_of_2(n_logical + 1)
    constants = (n_rows, expert_bins, triton.next_power_of_2(n_ranks + 1), LOAD_BLOCK)
    grid = max(triton.cdiv(n_ids, LOAD_BLOCK), 1)
    launch_call(KernelCall(record_loads_kernel, grid, args, constants, {"num_warps": 8}))
