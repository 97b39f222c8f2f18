"""What launchers need of live slots: tables, rules, scratch, and where a plan is written."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from lplb_triton import _layout
from lplb_triton.kernels.launch import KernelCall, launch_call
from lplb_triton.kernels.live.plan import MOST_EXPERTS_AT_ONCE, plan_live_kernel

# The most offers of a rank that stay in registers; the next ones are loaded when these are used up.
MOST_OFFERS = 8


class LiveTables(NamedTuple):
    """Device tables of a placement with live slots, int32; see live/arguments.py."""

    slot_words: torch.Tensor
    """[S, G]"""
    slot_experts: torch.Tensor
    """[S, G]"""
    slot_holders: torch.Tensor
    """[S, G, cdiv(G, 32)]"""
    slot_homes: torch.Tensor
    """[S, G]"""
    copy_start: torch.Tensor
    """[n_logical + 1]"""
    copy_slot: torch.Tensor
    """[n_copies]"""
    copy_index: torch.Tensor
    """[n_copies]"""
    most_copies: torch.Tensor
    """[1] the most static copies of an expert."""


class LiveRules(NamedTuple):
    """When and how live slots are filled; see `lplb_triton.Balancer`."""

    above: float
    cost: int
    fanout: int
    """0 for no limit."""
    domain: int
    """Ranks of a domain, 0 for one domain."""


class LiveCopies(NamedTuple):
    """Views of a stream's scratch that tell the copies of this batch; int32."""

    flag: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    slot: torch.Tensor
    copy_index: torch.Tensor


class Live(NamedTuple):
    """All that planning live slots takes besides what every solve does."""

    tables: LiveTables
    resident: torch.Tensor | None
    """[G, L] int32, what live slots hold already; it is kept up to date."""
    scratch: torch.Tensor
    """[`live_scratch_words`] int32."""
    versions: torch.Tensor
    """[channels] int32: checksum of the placement and of the last plan."""
    base: torch.Tensor
    """[1] int32: checksum of the placement."""
    out: torch.Tensor
    """[G L + 4] int32: experts of live slots, then load, bound and gap in bits of float32, and
    how many experts are fetched."""
    rules: LiveRules
    live_per_rank: int

    @property
    def copies(self) -> LiveCopies:
        """What select reads."""
        n_slots, n_ranks = self.tables.slot_words.shape
        n_logical, n_copies = self.tables.copy_start.numel() - 1, n_slots * n_ranks
        n_moved = n_copies + n_ranks * self.live_per_rank
        sizes = (_layout.LIVE_LANES, n_logical, n_logical, n_moved, n_moved)
        return LiveCopies(*self.scratch[: sum(sizes)].split(sizes))

    def args(self) -> tuple[Any, ...]:
        """Return the run-time arguments of the solving kernel, the output last."""
        rules, resident = self.rules, self.resident
        n_ranks = self.tables.slot_words.shape[1]
        return (
            *self.tables, self.scratch if resident is None else resident, self.scratch,
            self.versions, self.base,
            float(rules.above), round_aim(rules.above), rules.cost, rules.fanout or n_ranks * 2,
            rules.domain or n_ranks, self.out,
        )  # fmt: skip

    def constants(self) -> tuple[int | bool, ...]:
        """Return LIVE, SLICES, MOST, MORE, EXPERTS, P, SHARED, PRICED, DOMAINS and RESIDENT."""
        n_slots, n_ranks = self.tables.slot_words.shape
        rules, n_logical = self.rules, self.tables.copy_start.numel() - 1
        return (
            self.live_per_rank,
            -(-n_ranks // _layout.LIVE_LANES),
            max(2, min(MOST_OFFERS, n_slots)),
            n_slots > MOST_OFFERS,
            min(MOST_EXPERTS_AT_ONCE, max(16, triton.next_power_of_2(n_logical))),
            max(16, triton.next_power_of_2(n_ranks * self.live_per_rank)),
            self.tables.slot_words.numel() > n_logical,
            rules.cost > 0 or rules.fanout > 0,
            0 < rules.domain < n_ranks,
            self.resident is not None,
        )


# Constants of a kernel without live slots.
NO_LIVE = (0, 1, 2, False, 16, 16, False, False, False, False)


def no_live_args(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return arguments that a kernel without live slots doesn't read."""
    n = len(LiveTables._fields) + 4
    return (*[tensor] * n, 0.0, 0, 0, 0, 0, tensor)


def plan_live_call(
    counts: torch.Tensor, cumulative: torch.Tensor, max_load: torch.Tensor, live: Live
) -> KernelCall:
    """Prepare `plan_live`."""
    n_slots, n_ranks = live.tables.slot_words.shape
    n_logical = counts.numel()
    ranks = max(8, triton.next_power_of_2(n_ranks))
    *pointers, above, aim, cost, fanout, domain, out = live.args()
    rules = above, aim, cost, fanout, domain
    args = (counts, cumulative, max_load, *pointers, out, *rules, n_ranks, n_slots, n_logical)
    constants = (ranks, max(16, triton.next_power_of_2(n_logical)), *live.constants())
    # All warps search for the same pieces, so more of them would share its instructions' time.
    options = {"num_warps": 4}
    return KernelCall(plan_live_kernel, 1, args, constants, options)


def plan_live(
    counts: torch.Tensor, cumulative: torch.Tensor, max_load: torch.Tensor, live: Live
) -> None:
    """Plan live slots in a launch of its own, for given shares of the static copies.

    ``counts`` [n_logical] int32, ``cumulative`` [2 n_copies + G L] int32, whose first n_copies are
    given, ``max_load`` [1] float32 of these shares. Writes ``live.out``, ``live.scratch`` and the
    rest of ``cumulative``.
    """
    launch_call(plan_live_call(counts, cumulative, max_load, live))


def round_aim(above: float) -> int:
    """Return half of what a load may lie above the mean, in units of 2**-LIVE_AIM_BITS."""
    return int((above - 1.0) * 0.5 * (1 << _layout.LIVE_AIM_BITS))
