"""Search for a placement by the cuts that bind it: cheap enough for a CPU.

By duality (equation 3 of docs/method.md with `y` uniform on a set; Hall's theorem) the optimum of
one batch is

    max over sets S of ranks of   (load of the experts whose copies all lie in S) / |S|,

so a placement is judged by its *cuts* S. The search keeps a pool of cuts that were binding for some
batch under some placement. What a change of the placement does to every cut of the pool in every
batch is one small matrix product, and gives a lower bound of the new optima that is nearly always
enough to refuse. A change that the pool likes is held against cuts sought afresh around it, then
against the program itself, whose tight sets join the pool: a refused change teaches the pool the
cut that spoilt it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.placement import Placement
from lplb_triton.solver import solve

__all__ = ["CutSearch"]

_Float = NDArray[np.float32]
_Double = NDArray[np.float64]
_Bool = NDArray[np.bool_]
_Int = NDArray[np.int64]

# Weight of the mean over the worst tenth of the batches, beside the mean over all.
TAIL_WEIGHT = 0.1
# The pool is cut back to the first number of cuts when it outgrows the second, every so many
# trials.
POOL_KEEP, POOL_MAX, POOL_TRIALS = 1024, 1536, 16
# Rounds of growing and shrinking a cut by one rank, and batches for which that is done.
SEPARATION_ROUNDS, SEPARATION_BATCHES = 6, 64
# Batches whose program is solved before a change is kept: near a cut that the change makes
# heavier, most relieved by it, and any.
SOLVE_RAISED, SOLVE_RELIEVED, SOLVE_ANY = 16, 8, 16
SOLVE_TOLERANCE = 3e-3
# Kept changes between two solutions of all programs.
CHECKPOINT = 50
# Neighbouring batches that a change is tried on before it is tried on all.
GLANCE = 96
# Smallest improvement of the score, in mean rank loads, that counts.
MIN_GAIN = 1e-6
# Cuts closer than this to what the pool knows are no news.
NEWS = 1e-4
# Parts of the trials that draw the moved slot by load, and that hand a spare slot on.
BY_LOAD, HAND_ON = 0.3, 0.4


class _Change(NamedTuple):
    """Slots and the experts that they are to hold."""

    slots: list[int]
    experts: list[int]


class CutSearch:
    """A placement under change, and the cuts it is judged by.

    Notation: E experts, G ranks, B batches, P cuts in the pool.
    """

    def __init__(
        self,
        start: Placement,
        load: _Float,
        price: _Float,
        domain: _Int,
        rng: np.random.Generator,
    ) -> None:
        self.rng, self.ranks = rng, start.ep_size
        self.price = price  # [E, G] score that a copy on a rank costs
        self.domain = domain  # [G] domain of each rank
        self.load = load  # [B, E]
        self.load_t = np.ascontiguousarray(load.T)
        self.expert: _Int = start.phy2log.numpy().astype(np.int64)  # of each slot
        self.rank: _Int = start.rank_of_slot.numpy().astype(np.int64)  # of each slot
        self.copies: _Int = np.zeros((load.shape[1], self.ranks), dtype=np.int64)
        np.add.at(self.copies, (self.expert, self.rank), 1)
        self.cuts: _Bool = np.zeros((0, self.ranks), dtype=np.bool_)  # [P, G]
        self.size: _Float = np.zeros(0, dtype=np.float32)  # [P] ranks in a cut
        # [P, E] 1 where all copies of an expert lie in a cut.
        self.confined: _Float = np.zeros((0, load.shape[1]), dtype=np.float32)
        # [P, B] what a cut says of a batch's optimum; [B] the largest of these.
        self.value_of: _Float = np.zeros((0, len(load)), dtype=np.float32)
        self.value: _Float = np.ones(len(load), dtype=np.float32)
        self.used: _Int = np.zeros(0, dtype=np.int64)  # [P] trial in which a cut last mattered
        self.known: set[bytes] = set()
        self.trial = 0
        self.add_cuts(np.eye(self.ranks, dtype=np.bool_))

    def run(self, trials: int) -> tuple[Placement, float]:
        """Try changes; return the best placement at a checkpoint and its mean excess."""
        optimum, best = self.certify(), self.expert.copy()
        best_score, excess = self.score(optimum) + self.cost(), float(optimum.mean()) - 1.0
        kept = 0
        for self.trial in range(1, trials + 1):
            moved = self.step()
            kept += moved
            if self.trial % POOL_TRIALS == 0:
                self.trim()
            perfect = not bool((self.value > 1.0 + NEWS).any())
            if perfect or (moved and kept % CHECKPOINT == 0) or self.trial == trials:
                optimum = self.certify()
                score = self.score(optimum) + self.cost()
                if score < best_score:
                    best_score, best = score, self.expert.copy()
                    excess = float(optimum.mean()) - 1.0
            if perfect and not (self.value > 1.0 + NEWS).any():
                break
        return Placement(best, self.ranks, n_logical=self.load.shape[1]), excess

    def score(self, value: _Float) -> float:
        """Mean of optima, and a little of the mean of the worst tenth."""
        tail = max(1, len(value) // 10)
        worst = np.partition(value, len(value) - tail)[-tail:]
        return float(value.mean() + TAIL_WEIGHT * worst.mean())

    def cost(self) -> float:
        """Price of the placement."""
        return float(self.price[self.expert, self.rank].sum())

    def measure(self, cuts: _Bool) -> tuple[_Float, _Float]:
        """Rows of `confined` and `value_of` for cuts under the current placement."""
        outside = (~cuts).astype(np.float32) @ (self.copies.T > 0).astype(np.float32)
        confined = (outside == 0).astype(np.float32)
        return confined, (confined / cuts.sum(1, dtype=np.float32)[:, None]) @ self.load_t

    def settle(self) -> None:
        """Recompute the optima as far as the pool knows them."""
        self.value = np.maximum(self.value_of.max(0), 1.0)

    def add_cuts(self, cuts: _Bool) -> bool:
        """Add the cuts that the pool lacks; return whether there were any."""
        fresh = []
        for cut in cuts:
            key = cut.tobytes()
            if key not in self.known and cut.any():
                self.known.add(key)
                fresh.append(cut)
        if not fresh:
            return False
        new = np.stack(fresh)
        confined, value_of = self.measure(new)
        self.cuts = np.concatenate([self.cuts, new])
        self.confined = np.concatenate([self.confined, confined])
        self.value_of = np.concatenate([self.value_of, value_of])
        self.used = np.concatenate([self.used, np.full(len(new), self.trial)])
        self.size = self.cuts.sum(1, dtype=np.float32)
        self.value = np.maximum(self.value, value_of.max(0))
        return True

    def trim(self) -> None:
        """Drop the cuts that were not binding for longest when the pool is too large."""
        if len(self.cuts) <= POOL_MAX:
            return
        used = self.used.copy()
        used[self.value_of.argmax(0)] = self.trial + 1
        used[: self.ranks] = self.trial + 1
        keep = np.sort(np.argsort(-used, kind="stable")[:POOL_KEEP])
        self.cuts, self.used, self.size = self.cuts[keep], self.used[keep], self.size[keep]
        self.confined, self.value_of = self.confined[keep], self.value_of[keep]
        self.known = {cut.tobytes() for cut in self.cuts}
        self.settle()

    def separate(self, batches: _Int, rows: _Int | None = None) -> bool:
        """Look for heavier cuts of some batches; return whether the pool has news.

        Grows and shrinks each batch's heaviest cut (of the pool or of some rows of it) by the
        rank that is best for it, a few times, and pools what beats the batch's optimum so far.
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
            better = value > best_value + NEWS
            best[better], best_value[better] = cut[better], value[better]
        news = best_value > self.value[batches] + NEWS
        return bool(news.any()) and self.add_cuts(best[news])

    def certify(self, batches: _Int | None = None) -> _Float:
        """Solve the batches' programs, pool their tight sets, return the optima."""
        placement = Placement(self.expert, self.ranks, n_logical=self.load.shape[1])
        load = self.load if batches is None else self.load[batches]
        counts = torch.from_numpy(load)
        solution = solve(placement.problem(counts), tolerance=SOLVE_TOLERANCE, dtype=torch.float32)
        loads = placement.rank_loads(counts, solution).numpy()
        self.add_cuts(_level_cuts(loads, load, self.copies > 0))
        optimum: _Float = solution.max_load.clamp(min=1.0).float().numpy()
        return optimum

    def propose(self) -> _Change | None:
        """Draw a change that takes load out of the binding cut of a batch.

        The batch is drawn by its excess over a perfect balance.
        """
        rng = self.rng
        batch = _draw(rng, self.value - 1.0)
        row = int(self.value_of[:, batch].argmax())
        in_cut = self.cuts[row][self.rank]
        inner = np.flatnonzero(in_cut & (self.confined[row, self.expert] > 0))
        outer = np.flatnonzero(~in_cut)
        if not inner.size or not outer.size:
            return None
        heavy = int(inner[_draw(rng, self.load[batch, self.expert[inner]])])
        if rng.random() < HAND_ON:
            same = self.domain[self.rank[outer]] == self.domain[self.rank[heavy]]
            spare = outer[same & (self.copies.sum(1)[self.expert[outer]] > 1)]
            if not spare.size:
                return None
            there = int(spare[rng.integers(spare.size)])
            return _Change([there], [int(self.expert[heavy])])
        here = heavy if rng.random() < BY_LOAD else int(inner[rng.integers(inner.size)])
        there = int(outer[rng.integers(outer.size)])
        mover, other = int(self.expert[here]), int(self.expert[there])
        if self.copies[other, self.rank[here]]:
            return None
        crossing = self.domain[self.rank[here]] != self.domain[self.rank[there]]
        if crossing and (self.copies[[mover, other]].sum(1) > 1).any():
            return None
        return _Change([there, here], [mover, other])

    def fill(self, change: _Change) -> _Change:
        """Put experts into slots; return the change that undoes it."""
        undo = _Change(change.slots, [int(self.expert[slot]) for slot in change.slots])
        for slot, expert in zip(*change, strict=True):
            rank = self.rank[slot]
            self.copies[self.expert[slot], rank] -= 1
            self.copies[expert, rank] += 1
            self.expert[slot] = expert
        return undo

    def step(self) -> bool:
        """Try one change; keep it if the pool, cuts sought afresh and the program approve."""
        change = self.propose()
        if change is None:
            return False
        cost = self.cost()
        undo = self.fill(change)
        # The score has to fall by more than the price rises.
        least = self.cost() - cost + MIN_GAIN
        experts = sorted({*change.experts, *undo.experts})
        confined = np.empty((len(self.cuts), len(experts)), dtype=np.float32)
        for i, expert in enumerate(experts):
            confined[:, i] = self.cuts[:, np.flatnonzero(self.copies[expert])].all(1)
        delta = (confined - self.confined[:, experts]) / self.size[:, None]
        first = int(self.rng.integers(max(1, len(self.value) - GLANCE + 1)))
        some = slice(first, first + GLANCE)
        glance = self.value_of[:, some] + delta @ self.load_t[experts, some]
        value, before = np.maximum(glance.max(0), 1.0), self.value[some]
        if self.score(value) > self.score(before) - least:
            self.fill(undo)
            self.used[glance[:, (value - before).argmax()].argmax()] = self.trial
            return False
        old_value, old_value_of = self.value, self.value_of
        old_confined = self.confined[:, experts]
        self.value_of = old_value_of + delta @ self.load_t[experts]
        self.confined[:, experts] = confined
        self.settle()
        if self.approved(old_value, np.flatnonzero((delta > 0).any(1)), least):
            return True
        rows = len(old_value_of)
        self.fill(undo)
        self.confined[:rows, experts] = old_confined
        self.confined[rows:], new = self.measure(self.cuts[rows:])
        self.value_of = np.concatenate([old_value_of, new])
        self.settle()
        return False

    def approved(self, before: _Float, raised: _Int, least: float) -> bool:
        """Look for cuts that spoil a change; return whether its score stays better.

        Takes the optima before the change, [B], the cuts that it makes heavier, and by how much
        the score must fall.
        """
        target = self.score(before) - least
        if self.score(self.value) > target:
            return False
        near = self.value_of[raised].max(0) if raised.size else before
        by_raised = np.argsort(self.value - near, kind="stable")
        by_relief = np.argsort(self.value - before, kind="stable")
        if raised.size and self.separate(by_raised[:SEPARATION_BATCHES], raised):
            if self.score(self.value) > target:
                return False
        # Every round adds a cut that the pool lacks, and there are finitely many.
        while self.separate(by_relief[:SEPARATION_BATCHES]):
            if self.score(self.value) > target:
                return False
        some = self.rng.permutation(len(before))[:SOLVE_ANY]
        batches = [by_raised[:SOLVE_RAISED], by_relief[:SOLVE_RELIEVED], some]
        self.certify(np.unique(np.concatenate(batches)))
        return self.score(self.value) <= target


def _draw(rng: np.random.Generator, weight: _Float) -> int:
    """Draw an index with a chance in proportion to its weight."""
    ends = np.cumsum(weight, dtype=np.float64)
    return min(int(np.searchsorted(ends, rng.random() * ends[-1], "right")), len(ends) - 1)


def _level_cuts(loads: _Double, weight: _Float, held: _Bool) -> _Bool:
    """Best cut among the level sets of each batch's rank loads: [B, G]."""
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
