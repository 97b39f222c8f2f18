"""Search for a placement by the cuts that bind it: cheap enough for a CPU.

By duality (equation 3 of docs/method.md with `y` uniform on a set; Hall's theorem) the optimum of
one batch is

    max over sets S of ranks of   (load of the experts whose copies all lie in S) / |S|,

so a placement is judged by its *cuts* S. The search keeps a pool of cuts that were binding for some
batch under some placement. One small matrix product gives the values of all cuts of the pool in
every batch after a change of the placement. These bound the new optima from below, which is nearly
always enough to reject the change. A change that passes is checked against new cuts, found by
separation, and then against solutions of the program itself. The tight sets of both join the pool,
so a rejected change adds the cut that it violated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.placement import Placement
from lplb_triton.placement.nodes import TrafficPrice
from lplb_triton.solver import solve

__all__ = ["CutSearch"]

_Float = NDArray[np.float32]
_Double = NDArray[np.float64]
_Bool = NDArray[np.bool_]
_Int = NDArray[np.int64]

# Weight of the mean over the worst tenth of the batches, beside the mean over all.
TAIL_WEIGHT = 0.1
# Every third number of trials, a pool of more than the second number of cuts is reduced to the
# first number.
POOL_KEEP, POOL_MAX, TRIM_INTERVAL = 1024, 1536, 16
# Rounds of growing and shrinking a cut by one rank, and batches for which that is done.
SEPARATION_ROUNDS, SEPARATION_BATCHES = 6, 64
# Batches whose program is solved before a change is kept: those nearest to a cut that the change
# makes heavier, those whose optimum it lowers most, and random ones.
SOLVE_RAISED, SOLVE_RELIEVED, SOLVE_ANY = 16, 8, 16
SOLVE_TOLERANCE = 3e-3
# All programs are solved after this many kept changes.
CHECKPOINT_CHANGES = 50
# Consecutive batches that a change is tried on before it is tried on all.
SCREENING_BATCHES = 96
# Smallest improvement of the score, in mean rank loads, that counts.
MIN_GAIN = 1e-6
# Smallest amount by which a new cut must exceed the optimum that the pool gives.
MIN_VIOLATION = 1e-4
# An optimum this close to a perfect balance counts as perfect.
PERFECT = 1e-4
# Chance that the slot of a swap is drawn by load, and chance that a trial gives a redundant slot to
# another expert instead of a swap.
BY_LOAD_CHANCE, REASSIGN_CHANCE = 0.3, 0.4
# Chance that a trial changes one slot only where experts stay at home.
REASSIGN_HOME_CHANCE = 0.5
# Where traffic has a price: chance that a trial brings a copy to a node without one, and chance
# that it moves an expert with one copy there instead of copying it.
NEARER_CHANCE, SWAP_NEARER_CHANCE = 0.3, 0.5


class _Change(NamedTuple):
    """Slots and the experts that they are to hold."""

    slots: list[int]
    experts: list[int]


class CutSearch:
    """A local search that changes a placement, and the pool of cuts that judges it.

    Notation: E experts, G ranks, B batches, P cuts in the pool.
    """

    def __init__(
        self,
        start: Placement,
        load: _Float,
        price: _Float,
        domain: _Int,
        rng: np.random.Generator,
        fixed: _Bool | None = None,
        traffic: TrafficPrice | None = None,
    ) -> None:
        self.traffic = traffic  # price of tokens that leave their node, or None
        self.rng, self.ranks = rng, start.ep_size
        self.price = price  # [E, G] score that a copy on a rank costs
        self.domain = domain  # [G] domain of each rank
        self.load = load  # [B, E]
        self.load_t = np.ascontiguousarray(load.T)
        self.expert: _Int = start.phy2log.numpy().astype(np.int64)  # of each slot
        self.rank: _Int = start.rank_of_slot.numpy().astype(np.int64)  # of each slot
        # Slots whose experts stay, or None.
        self.fixed = fixed
        self.copies: _Int = np.zeros((load.shape[1], self.ranks), dtype=np.int64)
        np.add.at(self.copies, (self.expert, self.rank), 1)
        # [B, G] tokens that are bound to each rank, see `TrafficPrice.bind_tokens`.
        self.bound: _Double = np.zeros((len(load), self.ranks))
        if traffic is not None:
            self.bound += load @ traffic.bind_tokens(self.copies, slice(None))
        self.cuts: _Bool = np.zeros((0, self.ranks), dtype=np.bool_)  # [P, G]
        self.size: _Float = np.zeros(0, dtype=np.float32)  # [P] ranks in a cut
        # [P, E] 1 where all copies of an expert lie in a cut.
        self.confined: _Float = np.zeros((0, load.shape[1]), dtype=np.float32)
        # [P, B] bound of a cut on a batch's optimum; [B] the largest of these.
        self.value_of: _Float = np.zeros((0, len(load)), dtype=np.float32)
        self.value: _Float = np.ones(len(load), dtype=np.float32)
        self.used: _Int = np.zeros(0, dtype=np.int64)  # [P] trial in which a cut last mattered
        self.known: set[bytes] = set()
        self.trial = 0
        self.add_cuts(np.eye(self.ranks, dtype=np.bool_))

    def run(self, trials: int) -> tuple[Placement, float]:
        """Try changes; return the best placement at a checkpoint and its mean excess."""
        optimum, best = self.solve_batches(), self.expert.copy()
        best_score, excess = self.score(optimum) + self.compute_price(), float(optimum.mean()) - 1.0
        kept = 0
        for self.trial in range(1, trials + 1):
            moved = self.try_change()
            kept += moved
            if self.trial % TRIM_INTERVAL == 0:
                self.trim_pool()
            # A perfect balance may still be had with less traffic.
            perfect = self.traffic is None and not bool((self.value > 1.0 + PERFECT).any())
            if perfect or (moved and kept % CHECKPOINT_CHANGES == 0) or self.trial == trials:
                optimum = self.solve_batches()
                score = self.score(optimum) + self.compute_price()
                if score < best_score:
                    best_score, best = score, self.expert.copy()
                    excess = float(optimum.mean()) - 1.0
            if perfect and not (self.value > 1.0 + PERFECT).any():
                break
        return Placement(best, self.ranks, n_logical=self.load.shape[1]), excess

    def score(self, value: _Float) -> float:
        """Weigh the mean of optima and the mean of the worst tenth, ``[B]`` to one number."""
        tail = max(1, len(value) // 10)
        worst = np.partition(value, len(value) - tail)[-tail:]
        return float(value.mean() + TAIL_WEIGHT * worst.mean())

    def compute_price(self) -> float:
        """Sum of the prices of all copies of the placement and of its traffic."""
        price = float(self.price[self.expert, self.rank].sum())
        if self.traffic is None:
            return price
        return price + self.traffic.price_copies(self.copies, self.bound)

    def evaluate_cuts(self, cuts: _Bool) -> tuple[_Float, _Float]:
        """Compute rows of `confined` and `value_of` for cuts under the current placement."""
        outside = (~cuts).astype(np.float32) @ (self.copies.T > 0).astype(np.float32)
        confined = (outside == 0).astype(np.float32)
        return confined, (confined / cuts.sum(1, dtype=np.float32)[:, None]) @ self.load_t

    def update_values(self) -> None:
        """Recompute the bounds on the optima that the pool gives."""
        self.value = np.maximum(self.value_of.max(0), 1.0)

    def add_cuts(self, cuts: _Bool) -> bool:
        """Add the cuts that the pool lacks, and return whether there were any."""
        new_cuts = []
        for cut in cuts:
            key = cut.tobytes()
            if key not in self.known and cut.any():
                self.known.add(key)
                new_cuts.append(cut)
        if not new_cuts:
            return False
        new = np.stack(new_cuts)
        confined, value_of = self.evaluate_cuts(new)
        self.cuts = np.concatenate([self.cuts, new])
        self.confined = np.concatenate([self.confined, confined])
        self.value_of = np.concatenate([self.value_of, value_of])
        self.used = np.concatenate([self.used, np.full(len(new), self.trial)])
        self.size = self.cuts.sum(1, dtype=np.float32)
        self.value = np.maximum(self.value, value_of.max(0))
        return True

    def trim_pool(self) -> None:
        """Drop the cuts that have not been binding for longest if the pool is too large."""
        if len(self.cuts) <= POOL_MAX:
            return
        used = self.used.copy()
        used[self.value_of.argmax(0)] = self.trial + 1
        used[: self.ranks] = self.trial + 1
        keep = np.sort(np.argsort(-used, kind="stable")[:POOL_KEEP])
        self.cuts, self.used, self.size = self.cuts[keep], self.used[keep], self.size[keep]
        self.confined, self.value_of = self.confined[keep], self.value_of[keep]
        self.known = {cut.tobytes() for cut in self.cuts}
        self.update_values()

    def separate_cuts(self, batches: _Int, rows: _Int | None = None) -> bool:
        """Search for violated cuts of some batches, and return whether the pool got any.

        The heaviest cut of each batch, of the pool or of some rows of it, grows or shrinks a few
        times by the rank that gives the largest value. Cuts that exceed the bound on the batch's
        optimum join the pool.
        """
        held, load = (self.copies > 0).astype(np.float32), self.load[batches]
        near = self.value_of[:, batches] if rows is None else self.value_of[rows][:, batches]
        cut = (self.cuts if rows is None else self.cuts[rows])[near.argmax(0)]  # [b, G]
        row = np.arange(len(cut))
        best, best_value = cut.copy(), self.value[batches]
        for _ in range(SEPARATION_ROUNDS):
            outside = (~cut).astype(np.float32) @ held.T
            inside = load * (outside == 0)
            total, size = inside.sum(1, keepdims=True), cut.sum(1, keepdims=True)
            grown = (total + (load * (outside == 1)) @ held) / (size + 1)
            shrunk = (total - inside @ held) / np.maximum(size - 1, 1)
            candidate = np.where(cut, np.where(size > 1, shrunk, 0), grown)
            which = candidate.argmax(1)
            value = candidate[row, which]
            cut[row, which] ^= True
            better = value > best_value + MIN_VIOLATION
            best[better], best_value[better] = cut[better], value[better]
        violated = best_value > self.value[batches] + MIN_VIOLATION
        return bool(violated.any()) and self.add_cuts(best[violated])

    def solve_batches(self, batches: _Int | None = None) -> _Float:
        """Solve the programs of batches, add their tight sets to the pool, return the optima."""
        placement = Placement(self.expert, self.ranks, n_logical=self.load.shape[1])
        load = self.load if batches is None else self.load[batches]
        counts = torch.from_numpy(load)
        solution = solve(placement.problem(counts), tolerance=SOLVE_TOLERANCE, dtype=torch.float32)
        loads = placement.rank_loads(counts, solution).numpy()
        self.add_cuts(find_level_cuts(loads, load, self.copies > 0))
        optimum: _Float = solution.max_load.clamp(min=1.0).float().numpy()
        return optimum

    def propose_change(self) -> _Change | None:
        """Draw a change that moves load out of the binding cut of a batch.

        Batches are drawn with chances in proportion to their excess over a perfect balance.
        """
        rng = self.rng
        if self.traffic is not None:
            level = not bool((self.value > 1.0 + PERFECT).any())
            if level or rng.random() < NEARER_CHANCE:
                return self.propose_nearer(self.traffic)
        batch = _draw_index(rng, self.value - 1.0)
        row = int(self.value_of[:, batch].argmax())
        in_cut = self.cuts[row][self.rank]
        inner = np.flatnonzero(in_cut & (self.confined[row, self.expert] > 0))
        outer = np.flatnonzero(~in_cut)
        if not inner.size or not outer.size:
            return None
        heavy = int(inner[_draw_index(rng, self.load[batch, self.expert[inner]])])
        if self.fixed is not None:
            return self.propose_copy(heavy, in_cut)
        if rng.random() < REASSIGN_CHANCE:
            same = self.domain[self.rank[outer]] == self.domain[self.rank[heavy]]
            spare = outer[same & (self.copies.sum(1)[self.expert[outer]] > 1)]
            if not spare.size:
                return None
            there = int(spare[rng.integers(spare.size)])
            return _Change([there], [int(self.expert[heavy])])
        here = heavy if rng.random() < BY_LOAD_CHANCE else int(inner[rng.integers(inner.size)])
        there = int(outer[rng.integers(outer.size)])
        mover, other = int(self.expert[here]), int(self.expert[there])
        if self.copies[other, self.rank[here]]:
            return None
        crossing = self.domain[self.rank[here]] != self.domain[self.rank[there]]
        if crossing and (self.copies[[mover, other]].sum(1) > 1).any():
            return None
        return _Change([there, here], [mover, other])

    def propose_copy(self, heavy: int, in_cut: _Bool) -> _Change | None:
        """Draw a change of slots that are not fixed: one outside the cut gets a heavy expert.

        In half of the trials the expert that was there moves to a slot inside the cut.
        """
        assert self.fixed is not None
        rng, expert = self.rng, int(self.expert[heavy])
        domain = self.domain[self.rank[heavy]]
        same = ~self.fixed & (self.domain[self.rank] == domain)
        outer = np.flatnonzero(~in_cut & same)
        if not outer.size:
            return None
        there = int(outer[rng.integers(outer.size)])
        inner = np.flatnonzero(in_cut & same)
        if not inner.size or rng.random() < REASSIGN_HOME_CHANCE:
            return _Change([there], [expert])
        here, other = int(inner[rng.integers(inner.size)]), int(self.expert[there])
        if self.copies[other, self.rank[here]]:
            return None
        return _Change([there, here], [expert, other])

    def propose_nearer(self, traffic: TrafficPrice) -> _Change | None:
        """Draw a change by which a node gets a copy that it lacks, with chances by its tokens.

        An expert with one copy moves there by a swap; others get a copy in place of an expert with
        several.
        """
        rng = self.rng
        lacking = traffic.demand * (traffic.count_by_node(self.copies) == 0)
        if not lacking.any():
            return None
        expert, node = divmod(_draw_index(rng, lacking.reshape(-1)), traffic.n_nodes)
        in_node = self.rank // traffic.ranks_per_node == node
        free = in_node if self.fixed is None else in_node & ~self.fixed
        count = self.copies.sum(1)
        if count[expert] == 1 and self.fixed is None and rng.random() < SWAP_NEARER_CHANCE:
            here = int(np.flatnonzero(self.expert == expert)[0])
            there = int(rng.choice(np.flatnonzero(in_node)))
            other = int(self.expert[there])
            if self.copies[other, self.rank[here]]:
                return None
            return _Change([there, here], [expert, other])
        spare = np.flatnonzero(free & (count[self.expert] > 1))
        if not spare.size:
            return None
        return _Change([int(rng.choice(spare))], [expert])

    def apply_change(self, change: _Change) -> _Change:
        """Put experts into slots, and return the change that undoes it."""
        undo = _Change(change.slots, [int(self.expert[slot]) for slot in change.slots])
        experts = np.array(sorted({*change.experts, *undo.experts}))
        if self.traffic is not None:
            before = self.traffic.bind_tokens(self.copies[experts], experts)
        for slot, expert in zip(*change, strict=True):
            rank = self.rank[slot]
            self.copies[self.expert[slot], rank] -= 1
            self.copies[expert, rank] += 1
            self.expert[slot] = expert
        if self.traffic is not None:
            after = self.traffic.bind_tokens(self.copies[experts], experts)
            self.bound += self.load[:, experts] @ (after - before)
        return undo

    def try_change(self) -> bool:
        """Try one change, and return whether the pool, new cuts and the program let it stay."""
        change = self.propose_change()
        if change is None:
            return False
        price = self.compute_price()
        undo = self.apply_change(change)
        # The score has to fall by more than the price rises.
        min_fall = self.compute_price() - price + MIN_GAIN
        experts = sorted({*change.experts, *undo.experts})
        confined = np.empty((len(self.cuts), len(experts)), dtype=np.float32)
        for i, expert in enumerate(experts):
            confined[:, i] = self.cuts[:, np.flatnonzero(self.copies[expert])].all(1)
        delta = (confined - self.confined[:, experts]) / self.size[:, None]
        first = int(self.rng.integers(max(1, len(self.value) - SCREENING_BATCHES + 1)))
        some = slice(first, first + SCREENING_BATCHES)
        screened = self.value_of[:, some] + delta @ self.load_t[experts, some]
        value, before = np.maximum(screened.max(0), 1.0), self.value[some]
        if self.score(value) > self.score(before) - min_fall:
            self.apply_change(undo)
            self.used[screened[:, (value - before).argmax()].argmax()] = self.trial
            return False
        old_value, old_value_of = self.value, self.value_of
        old_confined = self.confined[:, experts]
        self.value_of = old_value_of + delta @ self.load_t[experts]
        self.confined[:, experts] = confined
        self.update_values()
        if self.verify_change(old_value, np.flatnonzero((delta > 0).any(1)), min_fall):
            return True
        rows = len(old_value_of)
        self.apply_change(undo)
        self.confined[:rows, experts] = old_confined
        self.confined[rows:], new = self.evaluate_cuts(self.cuts[rows:])
        self.value_of = np.concatenate([old_value_of, new])
        self.update_values()
        return False

    def verify_change(self, before: _Float, raised: _Int, min_fall: float) -> bool:
        """Search for cuts that a change violates, and return whether its score stays better.

        ``before`` ``[B]`` are the bounds before the change, ``raised`` numbers the cuts that it
        makes heavier, and the score must have fallen by ``min_fall``.
        """
        target = self.score(before) - min_fall
        if self.score(self.value) > target:
            return False
        near = self.value_of[raised].max(0) if raised.size else before
        by_raised = np.argsort(self.value - near, kind="stable")
        by_relief = np.argsort(self.value - before, kind="stable")
        if raised.size and self.separate_cuts(by_raised[:SEPARATION_BATCHES], raised):
            if self.score(self.value) > target:
                return False
        # The loop ends: every round adds a cut that the pool lacks, and there are finitely many.
        while self.separate_cuts(by_relief[:SEPARATION_BATCHES]):
            if self.score(self.value) > target:
                return False
        some = self.rng.permutation(len(before))[:SOLVE_ANY]
        batches = [by_raised[:SOLVE_RAISED], by_relief[:SOLVE_RELIEVED], some]
        self.solve_batches(np.unique(np.concatenate(batches)))
        return self.score(self.value) <= target


def _draw_index(rng: np.random.Generator, weight: _Float | _Double) -> int:
    """Draw an index with chances in proportion to the weights."""
    ends = np.cumsum(weight, dtype=np.float64)
    return min(int(np.searchsorted(ends, rng.random() * ends[-1], "right")), len(ends) - 1)


def find_level_cuts(loads: _Double, weight: _Float, held: _Bool) -> _Bool:
    """Find the best cut among the level sets of each batch's rank loads, ``[B, G]``."""
    batch, ranks = loads.shape
    order = np.argsort(-loads, axis=1, kind="stable")
    position = np.empty_like(order)
    np.put_along_axis(position, order, np.broadcast_to(np.arange(ranks), order.shape), axis=1)
    last = np.zeros((batch, len(held)), dtype=np.int64)
    for rank in range(ranks):
        last = np.where(held[:, rank], np.maximum(last, position[:, rank, None]), last)
    total = np.zeros((batch, ranks))
    np.add.at(total, (np.arange(batch)[:, None], last), weight)
    density = total.cumsum(1) / np.arange(1, ranks + 1)
    cuts: _Bool = position <= density.argmax(1)[:, None]
    return cuts
