"""Exact global quotas: from every rank's counts to this rank's part of each copy's quota.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lplb_triton.kernels.launch import KernelCall, launch_call
from lplb_triton.kernels.live.launch import LiveCopies
from lplb_triton.kernels.rounding import SHARE_BITS, compute_rounding_offset


@triton.jit
def _measure_overlap(begin, size, other_begin, other_size):
    """Return the length of the intersection of two intervals."""
    end = tl.minimum(begin + size, other_begin + other_size)
    return tl.maximum(end - tl.maximum(begin, other_begin), 0)


@triton.jit
def _compute_global_quota_end(cumulative_ptr, first, j, n_copies, total, offset):
    """Count all ranks' tokens of an expert that go to copies up to ``j`` (equation 15)."""
    inner = (j >= 0) & (j < n_copies - 1)
    share = tl.load(cumulative_ptr + first + j, mask=inner, other=0).to(tl.int64)
    end = tl.where(inner, (total * share + offset) >> SHARE_BITS, 0)
    return tl.where(j == n_copies - 1, total, end).to(tl.int32)


@triton.jit
def _match_ranks(
    supply_ptrs, cumulative_ptr, index_ptr, there, begin, demand, first, j, n_copies, total,
    offset,
):  # fmt: skip
    """Match ranks with the copies that they hold, in order of copies (equation 16).

    All arguments from ``there`` to ``demand`` are by copy: ``begin`` is the sum of what the copies
    before take, ``supply_ptrs`` are the addresses of the holder's counts. ``index_ptr`` is that of
    the expert's first copy in ``copy_index``. Returns, by copy, the tokens that its rank keeps.
    """
    supply = tl.load(supply_ptrs, mask=there, other=0)
    index = tl.load(index_ptr + j, mask=there, other=0)
    taken_before = begin - _compute_global_quota_end(
        cumulative_ptr, first, j - index - 1, n_copies, total, offset
    )
    return tl.minimum(tl.maximum(supply - taken_before, 0), demand)


@triton.jit
def _make_shares(quota, count, rank, expert):
    """Make the cumulative shares that turn a rank's ``count`` into ``quota``, by copy (17)."""
    end = tl.cumsum(quota, 0).to(tl.int64)
    offset = compute_rounding_offset(rank.to(tl.int64), expert.to(tl.int64))
    size = tl.maximum(count, 1).to(tl.int64)
    share = ((end << SHARE_BITS) - offset + size - 1) // size
    return tl.where(end > 0, share, 0).to(tl.int32)


@triton.jit
def _match_nodes(
    supply, holder, there, demand, at_home, quota, kept, count, rank, n_ranks, ranks_per_node,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Match ranks with copies on their own node, in order of ranks and of copies (equation 16).

    ``demand`` is what copies still take once ranks have kept ``at_home``, by copy. Returns this
    rank's ``quota`` and the demand that is left, by copy, this rank's tokens that stay on the
    node and those that are left, and tokens that earlier ranks have left.
    """
    r = tl.arange(0, RANKS)
    node = r // ranks_per_node
    holder_node = tl.where(there, holder // ranks_per_node, -1)
    own_before = tl.sum(tl.where((node == rank // ranks_per_node) & (r < rank), supply, 0), 0)
    earlier_home = (holder_node == rank // ranks_per_node) & (holder < rank)
    own_before -= tl.sum(tl.where(earlier_home, at_home, 0), 0)
    own = count - kept
    on_node = kept
    left_before = 0
    rest = demand
    for at in range(0, tl.cdiv(n_ranks, ranks_per_node)):
        wanted = tl.where(holder_node == at, demand, 0)
        home = tl.sum(tl.where(holder_node == at, at_home, 0), 0)
        offered = tl.sum(tl.where(node == at, supply, 0), 0) - home
        matched = tl.minimum(offered, tl.sum(wanted, 0))
        begin = tl.cumsum(wanted, 0) - wanted
        rest -= _measure_overlap(begin, wanted, 0, matched)
        if at < rank // ranks_per_node:
            left_before += offered - matched
        if at == rank // ranks_per_node:
            own_matched = _measure_overlap(own_before, own, 0, matched)
            here = _measure_overlap(begin, wanted, own_before, own_matched)
            quota += here
            on_node += tl.sum(here, 0)
            left_before += tl.maximum(own_before - matched, 0)
            own -= own_matched
    return quota, rest, on_node, own, left_before


@triton.jit(
    do_not_specialize=[
        "rank",
        "n_ranks",
        "n_logical",
        "slots_per_rank",
        "ranks_per_node",
        "n_static",
    ],
    do_not_specialize_on_alignment=["gathered_ptr", "cumulative_ptr", "mine_ptr", "traffic_ptr"],
)
def divide_quotas_kernel(
    gathered_ptr,  # [n_ranks, n_logical] int32: every rank's counts
    cumulative_ptr,  # [n_copies] int32: cumulative shares as the solver writes them
    copy_start_ptr,  # [n_logical + 1] int32: first copy of each expert
    copy_slot_ptr,  # [n_copies] int32: physical id of each copy
    copy_index_ptr,  # [n_copies] int32: number of a copy among those of its expert on its rank
    mine_ptr,  # [n_copies] int32: gets shares that `select_kernel` turns into the exact quotas
    traffic_ptr,  # [3] int64, added to: tokens that stay on the rank, on the node, and all
    rank,  # this rank's number
    n_ranks,
    n_logical,
    slots_per_rank,
    ranks_per_node,
    # What the batch's live slots change, see live/arguments.py; read only with LIVE.
    live_flag_ptr,  # [1] int32
    live_first_ptr,  # [n_logical] int32
    live_last_ptr,  # [n_logical] int32
    live_slot_ptr,  # int32: physical ids of the copies from number n_static on
    live_index_ptr,  # int32: as copy_index, of these copies
    n_static,  # static copies
    RANKS: tl.constexpr,  # n_ranks or more, a power of two
    COPIES: tl.constexpr,  # copies of any expert or more, a power of two
    LIVE: tl.constexpr,  # whether there are live slots
):
    """Write one rank's cumulative shares for one expert (equations 15 to 17). Grid (n_logical,)."""
    expert = tl.program_id(0)
    first = tl.load(copy_start_ptr + expert)
    n_copies = tl.load(copy_start_ptr + expert + 1) - first
    slot_ptr, index_ptr = copy_slot_ptr + first, copy_index_ptr + first
    if LIVE:
        if tl.load(live_flag_ptr) > 0:
            moved = tl.load(live_first_ptr + expert)
            if moved > 0:
                first = moved
                n_copies = tl.load(live_last_ptr + expert) + 1 - moved
                slot_ptr = live_slot_ptr + (moved - n_static)
                index_ptr = live_index_ptr + (moved - n_static)
    r = tl.arange(0, RANKS)
    j = tl.arange(0, COPIES)
    there = j < n_copies
    supply = tl.load(gathered_ptr + r * n_logical + expert, mask=r < n_ranks, other=0)
    count = tl.sum(tl.where(r == rank, supply, 0), 0)
    holder = tl.load(slot_ptr + j, mask=there, other=-1) // slots_per_rank
    holder = tl.where(there, holder, -1)

    # Equation 15: what each copy takes of all ranks' tokens.
    total = tl.sum(supply, 0).to(tl.int64)
    offset = compute_rounding_offset(0, expert.to(tl.int64))
    end = _compute_global_quota_end(cumulative_ptr, first, j, n_copies, total, offset)
    begin = _compute_global_quota_end(cumulative_ptr, first, j - 1, n_copies, total, offset)
    demand = tl.where(there, end - begin, 0)

    # Equation 16: own rank first, its copies in order.
    at_home = _match_ranks(
        gathered_ptr + holder * n_logical + expert, cumulative_ptr, index_ptr, there, begin,
        demand, first, j, n_copies, total, offset,
    )  # fmt: skip
    quota = tl.where(holder == rank, at_home, 0)
    kept = tl.sum(quota, 0)
    rest = demand - at_home

    # Then its own node.
    quota, rest, on_node, own, left_before = _match_nodes(
        supply, holder, there, rest, at_home, quota, kept, count, rank, n_ranks, ranks_per_node,
        RANKS,
    )  # fmt: skip

    # Then the other nodes.
    begin = tl.cumsum(rest, 0) - rest
    quota += _measure_overlap(begin, rest, left_before, own)

    # Equation 17: the shares that this rank's rounding turns into these quotas.
    share = _make_shares(quota, count, rank, expert)
    tl.store(mine_ptr + first + j, share, mask=there)
    tl.atomic_add(traffic_ptr, kept.to(tl.int64), sem="relaxed")
    tl.atomic_add(traffic_ptr + 1, on_node.to(tl.int64), sem="relaxed")
    tl.atomic_add(traffic_ptr + 2, count.to(tl.int64), sem="relaxed")


class Quotas(NamedTuple):
    """What turns shares of all ranks into this rank's own (equations 15 to 17)."""

    gathered: torch.Tensor
    """[n_ranks, n_logical] int32, every rank's counts."""
    copy_start: torch.Tensor
    copy_slot: torch.Tensor
    copy_index: torch.Tensor
    mine: torch.Tensor
    """[n_copies] int32, gets this rank's cumulative shares."""
    traffic: torch.Tensor
    """[3] int64, is added to: tokens that stay on the rank, on the node, and all."""
    rank: int
    slots_per_rank: int
    ranks_per_node: int
    max_copies: int
    """At least as many as any expert has copies, live ones included."""
    live: LiveCopies | None = None
    """The copies of the batch, if there are live slots."""


def divide_call(cumulative: torch.Tensor, quotas: Quotas) -> KernelCall:
    """Prepare `divide_quotas`."""
    n_ranks, n_logical = quotas.gathered.shape
    args = (
        quotas.gathered, cumulative, *quotas[1:6],
        quotas.rank, n_ranks, n_logical, quotas.slots_per_rank, quotas.ranks_per_node,
        *(quotas.live or [quotas.copy_slot] * 5), quotas.copy_slot.numel(),
    )  # fmt: skip
    ranks = max(2, triton.next_power_of_2(n_ranks))
    copies = max(2, triton.next_power_of_2(quotas.max_copies))
    constants = (ranks, copies, quotas.live is not None)
    return KernelCall(divide_quotas_kernel, n_logical, args, constants, {"num_warps": 1})


def divide_quotas(cumulative: torch.Tensor, quotas: Quotas) -> None:
    """Write ``quotas.mine`` for ``cumulative`` [n_copies] int32 as the solver leaves it."""
    launch_call(divide_call(cumulative, quotas))
