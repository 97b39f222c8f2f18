"""The plan of live slots: the twin of kernels/live, in whole numbers.

Equation numbers refer to docs/method.md. ``G`` is the number of ranks, ``S`` the number of static
slots of a rank, ``L`` the number of its live slots and ``E`` the number of experts. Ties go to the
higher rank and to the higher slot, as in the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lplb_triton._layout import (
    LIVE_AIM_BITS,
    LIVE_CUTS,
    LIVE_HALVINGS,
    LIVE_MISS_BITS,
    LIVE_PASSES,
    LIVE_ROOM_SHARE,
    LIVE_UNIT_BITS,
    OFFSET_BY_EXPERT,
    SHARE_BITS,
    SHARE_ONE,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

    Ints = NDArray[np.int64]

__all__ = [
    "Copies",
    "LiveCase",
    "LiveOutcome",
    "Piece",
    "find_homes",
    "find_live_bound",
    "list_copies",
    "plan_live",
    "split_running",
]


class Copies(NamedTuple):
    """Copies of all experts, expert by expert; int64."""

    start: Ints
    """[E + 1] first copy of each expert."""
    rank: Ints
    """[n_copies] rank of each copy."""
    place: Ints
    """[n_copies] slot of each copy within its rank."""


class LiveCase(NamedTuple):
    """What a plan is made for: sizes and rules; see `lplb_triton.Balancer`."""

    ep_size: int
    live_per_rank: int
    above: float
    """A plan is made if the largest load exceeds this many times the mean."""
    cost: int = 0
    """Tokens that a fetched expert costs at the busiest port."""
    fanout: int = 0
    """The most copies of experts that are fetched from one home rank; 0 sets no limit."""
    domain: int = 0
    """Consecutive ranks among which experts may be fetched; 0 stands for all."""

    @property
    def is_priced(self) -> bool:
        """Whether fetching has a cost or a limit by port."""
        return self.cost > 0 or self.fanout > 0

    @property
    def is_limited(self) -> bool:
        """Whether less may be fetched than live slots hold."""
        return self.is_priced or 0 < self.domain < self.ep_size


class Piece(NamedTuple):
    """Tokens that move from a static copy to a live slot."""

    expert: int
    copy: int
    """The static copy that they come from."""
    rank: int
    slot: int
    """Live slot of ``rank``."""
    tokens: int


@dataclass
class LiveOutcome:
    """A plan of live slots."""

    pieces: list[Piece]
    experts: Ints
    """[G, L] what each live slot holds in this batch, -1 for nothing."""
    max_load: float
    bound: float
    """A load that no plan of this many live slots can beat (equation 26)."""
    copies: Copies
    """Static copies, and behind those of each expert its live ones; ``place`` counts live slots
    behind the static ones."""
    cumulative: Ints
    """[n_copies] cumulative shares of these copies in units of 2**-24."""

    @property
    def gap(self) -> float:
        """Relative gap between the largest load and the bound."""
        return (self.max_load - self.bound) / self.max_load if self.max_load > 0 else 0.0


def list_copies(placement: Placement) -> Copies:
    """List the static copies of a placement."""
    s = placement.structure
    rank, place = np.divmod(s.copy_slot.astype(np.int64), placement.slots_per_rank)
    return Copies(s.copy_start.astype(np.int64), rank, place)


def round_offsets(n_experts: int) -> Ints:
    """Return the offset of rank 0's rounding by expert (equation 13)."""
    offsets: Ints = (np.arange(n_experts) * OFFSET_BY_EXPERT + SHARE_ONE // 2) % SHARE_ONE
    return offsets


def count_running(counts: Ints, cumulative: Ints, copies: Copies) -> Ints:
    """Count the tokens of an expert up to each of its copies, over all ranks (equation 15)."""
    n_copies = np.diff(copies.start)
    n = counts.repeat(n_copies)
    running: Ints = (n * cumulative + round_offsets(len(counts)).repeat(n_copies)) >> SHARE_BITS
    last = copies.start[1:] - 1
    running[last] = counts
    running = np.minimum(running, n)
    return running


def choose_unit_shift(max_load: float, slots: int, ranks: int) -> int:
    """Return by how many bits tokens are shifted, so that a rank's load has few bits.

    Rounding to shares moves less than 2**-24 of all tokens, and two, from copy to copy.
    """
    largest = int(max_load)
    largest += slots * ((largest * ranks >> SHARE_BITS) + 2)
    return max(0, largest.bit_length() - LIVE_UNIT_BITS)


def find_homes(copies: Copies) -> Ints:
    """Find the rank of each expert's original, ``[E]``: the copy of the lowest slot of its rank."""
    expert = np.repeat(np.arange(len(copies.start) - 1), np.diff(copies.start))
    order = np.lexsort((copies.rank, copies.place, expert))
    homes: Ints = copies.rank[order[copies.start[:-1]]]
    return homes


def _scale_cost(cost: int, shift: int) -> int:
    """Return a cost in units, which is not 0 unless it was."""
    return min(max(cost >> shift, min(cost, 1)), 1 << LIVE_UNIT_BITS)


class _State:
    """Loads and offers of all ranks while pieces are found, in units of 2**shift tokens."""

    def __init__(
        self,
        case: LiveCase,
        copies: Copies,
        tokens: Ints,
        n_slots: int,
        target: int,
        largest_first: bool,
    ) -> None:
        g, ranks = case.ep_size, copies.rank
        self.case, self.copies, self.target = case, copies, target
        self.largest_first = largest_first
        self.offer = np.zeros((g, n_slots), dtype=np.int64)
        self.offer[ranks, copies.place] = tokens
        self.copy_at = np.full((g, n_slots), -1)
        self.copy_at[ranks, copies.place] = np.arange(len(ranks))
        self.expert_of = np.repeat(np.arange(len(copies.start) - 1), np.diff(copies.start))
        self.home = find_homes(copies)
        self.held = np.zeros((len(copies.start) - 1, g), dtype=np.bool_)
        self.held[self.expert_of, ranks] = True
        self.surplus = self.offer.sum(1) - target
        self.total_surplus = int(np.maximum(self.surplus, 0).sum())
        self.room = int(np.maximum(-self.surplus, 0).sum())
        self.free = np.full(g, case.live_per_rank)
        self.sent = np.zeros(g, dtype=np.int64)
        self.received = np.zeros(g, dtype=np.int64)

    def find_receiver(self, expert: int, wanted: int, resident: Ints) -> tuple[int, bool]:
        """Find the rank that takes tokens of ``expert``, -1 for none, and whether it has it."""
        deficit = np.where((self.free > 0) & ~self.held[expert], -self.surplus, 0)
        if self.case.domain:
            ranks = np.arange(self.case.ep_size)
            near = ranks // self.case.domain == self.home[expert] // self.case.domain
            deficit = np.where(near, deficit, 0)
        there = (resident == expert).any(1) & (deficit > 0)
        if there.any():
            return _last_largest(np.where(there, deficit, 0)), True
        if deficit.max() <= 0 or self._is_exhausted(expert):
            return -1, False
        # The smallest deficit that holds all of it, or else the largest.
        holds = (deficit >= wanted) & (not self.largest_first)
        value = np.where(holds, (1 << (LIVE_UNIT_BITS + 2)) - deficit, deficit)
        return _last_largest(np.where(deficit > 0, value, 0)), False

    def _is_exhausted(self, expert: int) -> bool:
        """Whether the home rank of ``expert`` has sent as many copies as it may."""
        return 0 < self.case.fanout <= int(self.sent[self.home[expert]])

    def choose_amount(self, giver: int, receiver: int, offered: int) -> int:
        """Return how much moves: what the giver has too much, or more where room gets scarce.

        A receiver's last slot is filled up if the room of the others might not hold what is left.
        The giver then falls below the target, and may receive through its own slot.
        """
        wanted = min(int(self.surplus[giver]), offered)
        deficit = -int(self.surplus[receiver])
        amount = min(wanted, deficit)
        left = self.total_surplus - amount
        if self.free[receiver] == 1 and left > ((self.room - deficit) >> 4) * LIVE_ROOM_SHARE:
            amount = min(deficit, offered)
        return amount

    def move(self, giver: int, place: int, receiver: int, amount: int, fetched: bool) -> None:
        """Move ``amount`` units to a live slot of ``receiver``."""
        had, deficit = int(self.surplus[giver]), -int(self.surplus[receiver])
        self.room += max(amount - had, 0)
        self.room -= deficit if self.free[receiver] == 1 else amount
        self.total_surplus -= min(amount, had)
        self.surplus[giver] -= amount
        self.surplus[receiver] += amount
        self.offer[giver, place] -= amount
        self.free[receiver] -= 1
        expert = self.expert_of[self.copy_at[giver, place]]
        self.held[expert, receiver] = True
        if fetched:
            self.sent[self.home[expert]] += 1
            self.received[receiver] += 1


def _last_largest(values: Ints) -> int:
    """Return the last position of the largest value."""
    return len(values) - 1 - int(values[::-1].argmax())


class _Found(NamedTuple):
    """What a pass has found, in units."""

    price: int
    """Largest load, and what fetching costs (equation 25)."""
    peak: int
    pieces: list[tuple[int, int, int, int]]
    """Static copy, receiving rank, its live slot, and units."""


def _find_pieces(state: _State, resident: Ints) -> _Found:
    """Find pieces one by one; with a price, keep those of the first steps that cost least."""
    case, target = state.case, state.target
    used = np.zeros_like(resident, dtype=np.bool_)
    pieces: list[tuple[int, int, int, int]] = []
    peak = int(state.surplus.max()) + target
    best = _Found(peak, peak, [])
    while state.room > 0:
        giver = _last_largest(state.surplus)
        if state.surplus[giver] <= 0:
            break
        place = _last_largest(state.offer[giver])
        offered = int(state.offer[giver, place])
        if offered <= 0:
            # The largest load stays what it is.
            break
        copy = int(state.copy_at[giver, place])
        expert = int(state.expert_of[copy])
        wanted = min(int(state.surplus[giver]), offered)
        receiver, there = state.find_receiver(expert, wanted, np.where(used, -1, resident))
        if receiver < 0:
            state.offer[giver, place] = 0
            continue
        amount = state.choose_amount(giver, receiver, offered)
        slot = _choose_slot(used[receiver], resident[receiver], expert if there else -1)
        state.move(giver, place, receiver, amount, not there)
        used[receiver, slot] = True
        pieces.append((copy, receiver, slot, amount))
        peak = max(int(state.surplus.max()), 0) + target
        price = peak + int(max(state.sent.max(), state.received.max())) * case.cost
        if price < best.price or not case.is_priced:
            best = _Found(price, peak, pieces.copy())
    if len(best.pieces) == len(pieces):
        peak = int(state.surplus.max()) + target
        best = best._replace(peak=peak, price=best.price if case.is_priced else peak)
    return best


def _choose_slot(used: NDArray[np.bool_], holds: Ints, expert: int) -> int:
    """Choose an unused live slot: the one that holds ``expert``, or else the first empty one."""
    for slot, (taken, inside) in enumerate(zip(used, holds, strict=True)):
        if not taken and inside == expert:
            return slot
    return int(used.argmin())


def plan_live(
    case: LiveCase,
    counts: Ints,
    cumulative: Ints,
    copies: Copies,
    max_load: float,
    resident: Ints | None = None,
) -> LiveOutcome:
    """Plan what this batch's live slots hold, on top of a plan of the static copies.

    Parameters
    ----------
    case : LiveCase
        Sizes and rules.
    counts : numpy.ndarray
        ``[E]`` int64, tokens of each expert over all ranks.
    cumulative : numpy.ndarray
        ``[n_copies]`` int64, cumulative shares of static copies in units of 2**-24.
    copies : Copies
        Static copies.
    max_load : float
        Largest load of their plan, in tokens.
    resident : numpy.ndarray or None
        ``[G, L]`` int64, what the live slots hold already, -1 for nothing.

    Returns
    -------
    LiveOutcome
        Without pieces if the largest load is low enough, or if no piece is worth its price.
    """
    n_slots = int(copies.place.max()) + 1
    slots = np.full((case.ep_size, case.live_per_rank), -1) if resident is None else resident.copy()
    mean = float(counts.sum()) / case.ep_size
    kept: list[Piece] = []
    bound = min(mean, max_load)
    if np.float32(max_load) > np.float32(case.above) * np.float32(mean):
        kept, max_load, bound = _search(case, counts, cumulative, copies, max_load, slots.copy())
        for piece in kept:
            slots[piece.rank, piece.slot] = piece.expert
    live_copies, live_cumulative = _add_copies(counts, cumulative, copies, kept, n_slots)
    return LiveOutcome(kept, slots, max_load, bound, live_copies, live_cumulative)


def _search(
    case: LiveCase, counts: Ints, cumulative: Ints, copies: Copies, max_load: float, resident: Ints
) -> tuple[list[Piece], float, float]:
    """Find pieces in a few passes; returns them, the largest load and a bound.

    The first pass aims at half of what the rules allow above the mean. If it misses that by much,
    the second one aims at what can't be beaten, and fills the largest deficits first; later ones
    aim halfway between that and what was found. With limits, which the bound doesn't know, the
    second pass is like the later ones.
    """
    n_slots = int(copies.place.max()) + 1
    tokens = split_running(count_running(counts, cumulative, copies), copies.start)
    shift = choose_unit_shift(max_load, n_slots, case.ep_size)
    tokens >>= shift
    loads = np.bincount(copies.rank, tokens, case.ep_size).astype(np.int64)
    mean = -(-int(loads.sum()) // case.ep_size)
    aim = int((case.above - 1.0) * 0.5 * (1 << LIVE_AIM_BITS))
    first_target = target = mean + (mean * aim >> LIVE_AIM_BITS)
    best = _Found(int(loads.max()), int(loads.max()), [])
    # Tokens are whole, but a larger unit may be divided.
    bound = mean if shift == 0 else int(loads.sum()) // case.ep_size
    case = case._replace(cost=_scale_cost(case.cost, shift))
    for n_passes in range(1, LIVE_PASSES + 1):
        largest_first = n_passes == 2 and not case.is_limited
        state = _State(case, copies, tokens, n_slots, target, largest_first)
        found = _find_pieces(state, resident)
        if found.price < best.price:
            best = found
        if best.peak <= first_target + (first_target >> LIVE_MISS_BITS):
            break
        if n_passes == 1:
            bound = max(bound, find_live_bound(case, counts >> shift, copies, loads))
        least = max(first_target, bound)
        target = (least + best.peak) // 2
        if n_passes == 1 and not case.is_limited:
            target = least
        if target >= best.peak:
            break
    expert_of = np.repeat(np.arange(len(counts)), np.diff(copies.start))
    pieces = [
        Piece(int(expert_of[copy]), copy, rank, slot, units << shift)
        for copy, rank, slot, units in best.pieces
    ]
    if pieces:
        max_load = float(best.peak << shift)
    mean_load = float(counts.sum()) / case.ep_size
    return pieces, max_load, min(max_load, max(mean_load, float(bound << shift)))


def split_running(running: Ints, start: Ints) -> Ints:
    """Turn running sums by copy into tokens by copy."""
    tokens = np.diff(running, prepend=0)
    tokens[start[:-1]] = running[start[:-1]]
    return tokens


def _add_copies(
    counts: Ints, cumulative: Ints, copies: Copies, pieces: list[Piece], n_slots: int
) -> tuple[Copies, Ints]:
    """Append live copies to those of their experts, and divide the experts' tokens anew.

    Shares of experts without a piece stay as they are (equation 27).
    """
    n_copies = np.diff(copies.start)
    tokens = split_running(count_running(counts, cumulative, copies), copies.start)
    parts: list[tuple[Ints, Ints, Ints]] = []
    by_expert: dict[int, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda p: (p.rank, p.slot)):
        by_expert.setdefault(piece.expert, []).append(piece)
        tokens[piece.copy] -= piece.tokens
    offsets = round_offsets(len(counts))
    for expert, n in enumerate(counts.tolist()):
        own = slice(copies.start[expert], copies.start[expert + 1])
        live = by_expert.get(expert, [])
        shares = cumulative[own]
        if live:
            ends = np.append(tokens[own], [p.tokens for p in live]).cumsum()
            shares = -((int(offsets[expert]) - (ends << SHARE_BITS)) // n)
            shares = np.where(ends == 0, 0, np.where(ends == n, SHARE_ONE, shares))
            n_copies[expert] += len(live)
        ranks = np.append(copies.rank[own], [p.rank for p in live]).astype(np.int64)
        places = np.append(copies.place[own], [n_slots + p.slot for p in live]).astype(np.int64)
        parts.append((ranks, places, shares))
    rank, place, share = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Copies(np.append(0, n_copies.cumsum()), rank, place), share


def find_live_bound(case: LiveCase, counts: Ints, copies: Copies, loads: Ints) -> int:
    """Find a load that no plan of live slots can beat, from sets of loaded ranks (equation 26).

    Parameters
    ----------
    case : LiveCase
        Sizes.
    counts : numpy.ndarray
        ``[E]`` int64, tokens of each expert.
    copies : Copies
        Static copies.
    loads : numpy.ndarray
        ``[G]`` int64, loads by the plan of the static copies; they choose the sets.

    Returns
    -------
    int
        In tokens, rounded down; 0 if no set says anything.
    """
    best = 0
    lowest = np.minimum.reduceat(loads[copies.rank], copies.start[:-1])
    mean, peak = -(-int(loads.sum()) // case.ep_size), int(loads.max())
    for cut in range(1, LIVE_CUTS + 1):
        threshold = mean + (peak - mean) * cut // LIVE_CUTS
        size = int((loads >= threshold).sum())
        inside = counts[lowest >= threshold]
        lost = case.live_per_rank * (case.ep_size - size)
        low, high = 0, peak + 1
        # ``lost`` times a level plus what is above it is at least the sum of the ``lost`` largest;
        # the level that halving finds is near the best one.
        for _ in range(LIVE_HALVINGS):
            middle = (low + high) // 2
            if int((inside > middle).sum()) > lost:
                low = middle
            else:
                high = middle
        kept = int(np.minimum(inside, high).sum()) - lost * high
        best = max(best, kept // size)
    return best
