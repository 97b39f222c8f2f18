"""Search for a placement with the program itself as the judge: thousands of programs a launch.

On a GPU one launch solves the programs of many (placement, batch) pairs at once, so that every
change can be tried exactly. Each step

1. finds a binding cut of every batch (see `lplb_triton.placement.cut_search`) from
   its optimum's rank loads;
2. prices every change there is to first order, a few matrix products for all of them: what a
   cut's batch gains when an expert gets a copy outside it, and loses when one is taken away;
3. draws candidates by price, solves them for some batches, the best of these for all batches,
   and keeps the best change if the score falls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lplb_triton._torch_op import opaque
from lplb_triton.placement import Placement
from lplb_triton.problem import Problem
from lplb_triton.solution import Solution
from lplb_triton.solver import solve

__all__ = ["CANDIDATES", "ExactSearch"]

# Candidates of a step, batches that they are tried on, and candidates tried on all batches.
CANDIDATES, GLANCE, FINALISTS = 64, 64, 4
# Candidates are drawn in proportion to this power of their price.
PRICE_POWER = 0.5
# A few programs more would not fit the memory at 64 ranks and 128 columns.
MOST_PROGRAMS = 8192
TOLERANCE = 5e-4
# Weight of the mean over the worst tenth of the batches, beside the mean over all.
TAIL_WEIGHT = 0.1
# Smallest improvement of the score, in mean rank loads, that counts.
MIN_GAIN = 1e-6
# An optimum this close to a perfect balance is one.
PERFECT = 1e-4


def _tail_score(value: torch.Tensor) -> torch.Tensor:
    """Mean of optima over the last axis, and a little of the mean of the worst tenth."""
    tail = max(1, value.shape[-1] // 10)
    return value.mean(-1) + TAIL_WEIGHT * value.topk(tail, -1).values.mean(-1)


def _optima(max_loads: list[torch.Tensor], n_placements: int) -> torch.Tensor:
    """Largest loads by placement and batch, none below a perfect balance."""
    return torch.cat(max_loads).reshape(n_placements, -1).float().clamp(min=1.0)


class ExactSearch:
    """A placement under change. E experts, G ranks, S slots, B batches, K candidates.

    What the caller has set for torch, such as autocast, makes no difference.
    """

    @opaque
    def __init__(
        self,
        start: Placement,
        load: torch.Tensor,
        price: torch.Tensor,
        domain: torch.Tensor,
        generator: torch.Generator,
    ) -> None:
        device = load.device
        self.load, self.generator = load, generator  # [B, E]
        self.price = price.to(device)  # [E, G] score that a copy on a rank costs
        self.domain = domain.to(device)  # [G] domain of each rank
        self.ranks, self.columns = start.ep_size, max(1, start.n_physical - start.n_logical)
        self.expert, self.rank = (
            start.phy2log.long().to(device),
            start.rank_of_slot.long().to(device),
        )
        self.copies = torch.zeros(start.n_logical, self.ranks, dtype=torch.float32, device=device)
        self.copies.index_put_(
            (self.expert, self.rank),
            torch.ones_like(self.rank, dtype=torch.float32),
            accumulate=True,
        )
        optimum, loads = self.plan(self.copies[None], load)
        self.optimum, self.loads = optimum[0], loads[0]  # [B], and [B, G] rank loads
        self.steps = 0
        # Changes that were good but not the best: tried again in the next step.
        self.second = torch.empty(0, dtype=torch.int64, device=device)

    @opaque
    def run(self, steps: int) -> tuple[Placement, float]:
        """Make changes; return the placement and its mean excess over a perfect balance."""
        for _ in range(steps):
            if not bool((self.optimum > 1 + PERFECT).any()) or not self.step():
                break
            self.steps += 1
        placement = Placement(self.expert.cpu(), self.ranks, n_logical=len(self.copies))
        return placement, float(self.optimum.mean()) - 1.0

    def problem(self, copies: torch.Tensor, load: torch.Tensor) -> Problem:
        """Programs of placements ``[K, E, G]`` over batches ``[b, E]``, placements first."""
        held = copies > 0
        spread = held.sum(2)
        fixed = load @ (held & (spread == 1).unsqueeze(2)).float()
        expert = (spread > 1).float().topk(min(self.columns, spread.shape[1]), 1).indices
        shared = spread.gather(1, expert) > 1
        mask = held.gather(1, expert.unsqueeze(2).expand(-1, -1, self.ranks)).mT
        mask = mask & shared.unsqueeze(1)
        weights = load.T[expert].mT * shared.unsqueeze(1)
        n_batches = len(load)
        return Problem(
            weights.flatten(0, 1).contiguous(),
            fixed.flatten(0, 1),
            mask.repeat_interleave(n_batches, 0),
        )

    def solved(
        self, copies: torch.Tensor, load: torch.Tensor
    ) -> Iterator[tuple[Problem, Solution]]:
        """Solve programs as of `problem`, as many at once as memory allows."""
        at_once = max(1, MOST_PROGRAMS // len(load))
        for part in torch.split(copies, at_once):
            problem = self.problem(part, load)
            yield problem, solve(problem, tolerance=TOLERANCE)

    def solve(self, copies: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """Optima in mean rank loads, ``[K, b]``."""
        parts = [solution.max_load for _, solution in self.solved(copies, load)]
        return _optima(parts, len(copies))

    def plan(self, copies: torch.Tensor, load: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Optima as of `solve`, and the rank loads that reach them, ``[K, b, G]``."""
        optima, loads = [], []
        for problem, solution in self.solved(copies, load):
            optima.append(solution.max_load)
            loads.append(problem.fixed + (problem.weights.unsqueeze(1) * solution.shares).sum(2))
        optimum = _optima(optima, len(copies))
        return optimum, torch.cat(loads).reshape(*optimum.shape, self.ranks)

    def cuts(self) -> torch.Tensor:
        """Best cut among the level sets of each batch's rank loads, ``[B, G]`` 0 or 1."""
        loads = self.loads
        position = loads.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # An expert lies in the prefix that ends with the last of its ranks.
        last = torch.where(self.copies > 0, position.unsqueeze(1), -1).amax(2)
        total = torch.zeros_like(loads).scatter_add_(1, last, self.load.to(loads.dtype))
        size = torch.arange(1, self.ranks + 1, device=loads.device)
        best = (total.cumsum(1) / size).argmax(1, keepdim=True)
        return (position <= best).float()

    def prices(self) -> torch.Tensor:
        """First-order change of the score by every swap and hand-over, ``[S * S + E * S]``.

        Entry ``s * S + t`` swaps the experts of slots s and t; entry ``S * S + e * S + t`` gives
        slot t to expert e. Impossible ones cost infinity.
        """
        cut = self.cuts()
        batches = len(cut)
        tail = max(1, batches // 10)
        weight = (self.optimum > 1 + PERFECT).float() / batches
        weight[self.optimum.topk(tail).indices] += TAIL_WEIGHT / tail
        part = self.load * (weight / cut.sum(1)).unsqueeze(1)
        outer = 1 - cut
        copies_outside = outer @ (self.copies > 0).float().T
        gain = (part * (copies_outside == 0)).T @ outer  # [E, G] by a copy of e on g
        expert, rank, price, domain = self.expert, self.rank, self.price, self.domain
        # What a slot holds alone outside the cut is confined to it once the slot is gone.
        alone = (part * (copies_outside == 1))[:, expert] * outer[:, rank]
        alone = alone * (self.copies[expert, rank] == 1)
        go = alone.T @ cut - gain[expert] + price[expert] - price[expert, rank].unsqueeze(1)
        count = self.copies.sum(1)
        same = domain[rank].unsqueeze(1) == domain  # [S, G]
        barred = (self.copies[expert] > 0) | (~same & (count[expert] > 1).unsqueeze(1))
        go = go.masked_fill(barred, torch.inf)[:, rank]  # [S, S] the one half of a swap
        swap = (go + go.T).masked_fill(torch.ones_like(go, dtype=torch.bool).tril(), torch.inf)
        give = alone.sum(0) - price[expert, rank] + (price - gain)[:, rank]  # [E, S]
        home = domain[self.copies.argmax(1)]
        barred = (self.copies > 0) | (home.unsqueeze(1) != domain)
        give = give.masked_fill(barred[:, rank] | (count[expert] < 2), torch.inf)
        return torch.cat([swap.flatten(), give.flatten()])

    def slots(self, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two slots and their new experts, each ``[K, 2]``; twice the same where one changes."""
        n_slots = len(self.expert)
        first, second = change // n_slots, change % n_slots
        is_swap = first < n_slots
        one = torch.where(is_swap, first.clamp(max=n_slots - 1), second)
        given = torch.where(is_swap, self.expert[second], first - n_slots)
        other = torch.where(is_swap, self.expert[one], given)
        return torch.stack([one, second], 1), torch.stack([given, other], 1)

    def changed(self, change: torch.Tensor) -> torch.Tensor:
        """Count copies by expert and rank after each change alone, ``[K, E, G]``."""
        slots, experts = self.slots(change)
        once = torch.ones_like(slots, dtype=torch.float32)
        once[:, 1] = (slots[:, 0] != slots[:, 1]).float()
        copies = self.copies.repeat(len(change), 1, 1)
        row = torch.arange(len(change), device=change.device).unsqueeze(1).expand(-1, 2)
        rank = self.rank[slots]
        copies.index_put_((row, self.expert[slots], rank), -once, accumulate=True)
        copies.index_put_((row, experts, rank), once, accumulate=True)
        return copies

    def score(self, copies: torch.Tensor, optimum: torch.Tensor) -> torch.Tensor:
        """Score of placements ``[K, E, G]`` with optima ``[K, b]``: ``[K]``."""
        return _tail_score(optimum) + (copies * self.price).sum((1, 2))

    def step(self) -> bool:
        """Make the best of some changes if it is one; return whether there was any to try."""
        price = self.prices()
        worth = (-price).clamp(min=0.0)
        noise = torch.empty_like(price).exponential_(generator=self.generator)
        key = PRICE_POWER * worth.log() - noise.log()
        key[self.second[torch.isfinite(price[self.second])]] = torch.inf
        top = key.topk(min(CANDIDATES, len(key)))
        change = top.indices[top.values > -torch.inf]
        if not len(change):
            return False
        here = self.copies[None]
        copies = self.changed(change)
        n_batches = len(self.load)
        first = int(
            torch.randint(
                max(1, n_batches - GLANCE + 1),
                (),
                generator=self.generator,
                device=self.load.device,
            )
        )
        some = slice(first, first + GLANCE)
        before = self.score(here, self.optimum[None, some])
        gain = before - self.score(copies, self.solve(copies, self.load[some]))
        best = gain.topk(min(FINALISTS, len(gain)))
        last = best.indices[best.values > 0]
        if not len(last):
            self.second = last
            return True
        optimum, loads = self.plan(copies[last], self.load)
        gain = self.score(here, self.optimum[None]) - self.score(copies[last], optimum)
        winner = int(gain.argmax())
        self.second = change[last[gain > MIN_GAIN]]
        if float(gain[winner]) > MIN_GAIN:
            slots, experts = self.slots(change[last[winner]].reshape(1))
            self.expert[slots[0]] = experts[0]
            self.copies = copies[last[winner]].clone()
            self.optimum, self.loads = optimum[winner], loads[winner]
        return True
