"""Search for a placement by solving the program exactly, thousands of programs in a launch.

On a GPU one launch solves the programs of many (placement, batch) pairs at once, so that every
change can be judged by its exact optima. Each step

1. finds a binding cut of every batch (see `lplb_triton.placement.cut_search`) from
   its optimum's rank loads;
2. estimates every possible change to first order by a few matrix products: what a cut's batch
   gains when an expert gets a copy outside the cut, and loses when a copy is removed;
3. draws candidates by these estimates, solves them for some batches and the best of them for all
   batches, and keeps the best change if the score falls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lplb_triton._torch_op import opaque
from lplb_triton.placement import Placement
from lplb_triton.placement.nodes import DeviceTraffic, TrafficPrice
from lplb_triton.problem import Problem
from lplb_triton.solution import Solution
from lplb_triton.solver import solve

__all__ = ["CANDIDATES", "ExactSearch"]

# Candidates of a step, batches that they are tried on, and candidates that are then tried on all
# batches.
CANDIDATES, SCREENING_BATCHES, SHORTLIST_SIZE = 64, 64, 4
# Candidates are drawn in proportion to this power of their estimated gain.
GAIN_POWER = 0.5
# Programs of a launch; many more would exceed the memory of a GPU at 64 ranks and 128 columns.
MAX_PROGRAMS = 8192
TOLERANCE = 5e-4
# Weight of the mean over the worst tenth of the batches, beside the mean over all.
TAIL_WEIGHT = 0.1
# Smallest improvement of the score, in mean rank loads, that counts.
MIN_GAIN = 1e-6
# An optimum this close to a perfect balance counts as perfect.
PERFECT = 1e-4


def _score_optima(value: torch.Tensor) -> torch.Tensor:
    """Weigh the mean of optima over the last axis and the mean of the worst tenth."""
    tail = max(1, value.shape[-1] // 10)
    return value.mean(-1) + TAIL_WEIGHT * value.topk(tail, -1).values.mean(-1)


def _join_optima(max_loads: list[torch.Tensor], n_placements: int) -> torch.Tensor:
    """Join optima by placement and batch, none below a perfect balance."""
    return torch.cat(max_loads).reshape(n_placements, -1).float().clamp(min=1.0)


class ExactSearch:
    """A local search that changes a placement.

    Notation: E experts, G ranks, S slots, B batches, K candidates. Torch's settings in the caller,
    such as autocast, make no difference.
    """

    @opaque
    def __init__(
        self,
        start: Placement,
        load: torch.Tensor,
        price: torch.Tensor,
        domain: torch.Tensor,
        generator: torch.Generator,
        fixed: torch.Tensor | None = None,
        traffic: TrafficPrice | None = None,
    ) -> None:
        device = load.device
        # Price of tokens that leave their node, or None.
        self.traffic = None if traffic is None else DeviceTraffic(traffic, device)
        self.load, self.generator = load, generator  # [B, E]
        self.price = price.to(device)  # [E, G] score that a copy on a rank costs
        self.domain = domain.to(device)  # [G] domain of each rank
        # [S] slots whose experts stay.
        self.fixed = (
            torch.zeros(start.n_physical, dtype=torch.bool, device=device)
            if fixed is None
            else fixed.to(device)
        )
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
        optimum, loads = self.find_optima_and_loads(self.copies[None], load)
        self.optimum, self.loads = optimum[0], loads[0]  # [B], and [B, G] rank loads
        self.steps = 0
        # Changes that were good but not the best are candidates of the next step again.
        self.runners_up = torch.empty(0, dtype=torch.int64, device=device)

    @opaque
    def run(self, steps: int) -> tuple[Placement, float]:
        """Make changes, and return the placement and its mean excess over a perfect balance."""
        for _ in range(steps):
            # A perfect balance may still be had with less traffic.
            perfect = self.traffic is None and not bool((self.optimum > 1 + PERFECT).any())
            if perfect or not self.make_change():
                break
            self.steps += 1
        placement = Placement(self.expert.cpu(), self.ranks, n_logical=len(self.copies))
        return placement, float(self.optimum.mean()) - 1.0

    def build_problems(self, copies: torch.Tensor, load: torch.Tensor) -> Problem:
        """Build programs of placements ``[K, E, G]`` for batches ``[b, E]``, placement-major."""
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

    def solve_in_chunks(
        self, copies: torch.Tensor, load: torch.Tensor
    ) -> Iterator[tuple[Problem, Solution]]:
        """Solve the programs of `build_problems`, as many at once as memory allows."""
        at_once = max(1, MAX_PROGRAMS // len(load))
        for part in torch.split(copies, at_once):
            problem = self.build_problems(part, load)
            yield problem, solve(problem, tolerance=TOLERANCE)

    def find_optima(self, copies: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """Find optima in mean rank loads, ``[K, b]``."""
        parts = [solution.max_load for _, solution in self.solve_in_chunks(copies, load)]
        return _join_optima(parts, len(copies))

    def find_optima_and_loads(
        self, copies: torch.Tensor, load: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the optima ``[K, b]`` and the rank loads that attain them, ``[K, b, G]``."""
        optima, loads = [], []
        for problem, solution in self.solve_in_chunks(copies, load):
            optima.append(solution.max_load)
            loads.append(problem.fixed + (problem.weights.unsqueeze(1) * solution.shares).sum(2))
        optimum = _join_optima(optima, len(copies))
        return optimum, torch.cat(loads).reshape(*optimum.shape, self.ranks)

    def find_cuts(self) -> torch.Tensor:
        """Find the best cut among the level sets of each batch's rank loads, ``[B, G]`` 0 or 1."""
        loads = self.loads
        position = loads.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # An expert lies in the prefix that ends with the last of its ranks.
        last = torch.where(self.copies > 0, position.unsqueeze(1), -1).amax(2)
        total = torch.zeros_like(loads).scatter_add_(1, last, self.load.to(loads.dtype))
        size = torch.arange(1, self.ranks + 1, device=loads.device)
        best = (total.cumsum(1) / size).argmax(1, keepdim=True)
        return (position <= best).float()

    def estimate_changes(self) -> torch.Tensor:
        """Estimate to first order how every change alters the score, ``[S * S + E * S]``.

        Entry ``s * S + t`` swaps the experts of slots s and t; entry ``S * S + e * S + t`` gives
        slot t to expert e. Impossible ones cost infinity.
        """
        cut = self.find_cuts()
        batches = len(cut)
        tail = max(1, batches // 10)
        weight = (self.optimum > 1 + PERFECT).float() / batches
        weight[self.optimum.topk(tail).indices] += TAIL_WEIGHT / tail
        part = self.load * (weight / cut.sum(1)).unsqueeze(1)
        outer = 1 - cut
        copies_outside = outer @ (self.copies > 0).float().T
        gain = (part * (copies_outside == 0)).T @ outer  # [E, G] by a copy of e on g
        expert, rank, price, domain = self.expert, self.rank, self.price, self.domain
        # Load whose only copy outside the cut is in a slot is confined to the cut without the slot.
        alone = (part * (copies_outside == 1))[:, expert] * outer[:, rank]
        alone = alone * (self.copies[expert, rank] == 1)
        leave = alone.T @ cut - gain[expert] + price[expert] - price[expert, rank].unsqueeze(1)
        if self.traffic is not None:
            leave = leave + self.traffic.price_leaving(self.copies, expert, rank)
        count = self.copies.sum(1)
        same = domain[rank].unsqueeze(1) == domain  # [S, G]
        barred = (self.copies[expert] > 0) | (~same & (count[expert] > 1).unsqueeze(1))
        leave = leave.masked_fill(barred, torch.inf)[:, rank]  # [S, S] one half of a swap
        swap = (leave + leave.T).masked_fill(
            torch.ones_like(leave, dtype=torch.bool).tril(), torch.inf
        )
        reassign = alone.sum(0) - price[expert, rank] + (price - gain)[:, rank]  # [E, S]
        if self.traffic is not None:
            reassign = reassign + self.traffic.price_giving(self.copies, expert, rank)
        home = domain[self.copies.argmax(1)]
        barred = (self.copies > 0) | (home.unsqueeze(1) != domain)
        reassign = reassign.masked_fill(barred[:, rank] | (count[expert] < 2), torch.inf)
        swap = swap.masked_fill(self.fixed | self.fixed.unsqueeze(1), torch.inf)
        reassign = reassign.masked_fill(self.fixed, torch.inf)
        return torch.cat([swap.flatten(), reassign.flatten()])

    def decode_changes(self, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode changes to two slots and their new experts, ``[K, 2]`` each.

        Both slots are the same where only one changes.
        """
        n_slots = len(self.expert)
        first, second = change // n_slots, change % n_slots
        is_swap = first < n_slots
        one = torch.where(is_swap, first.clamp(max=n_slots - 1), second)
        given = torch.where(is_swap, self.expert[second], first - n_slots)
        other = torch.where(is_swap, self.expert[one], given)
        return torch.stack([one, second], 1), torch.stack([given, other], 1)

    def apply_changes(self, change: torch.Tensor) -> torch.Tensor:
        """Count copies by expert and rank after each change on its own, ``[K, E, G]``."""
        slots, experts = self.decode_changes(change)
        once = torch.ones_like(slots, dtype=torch.float32)
        once[:, 1] = (slots[:, 0] != slots[:, 1]).float()
        copies = self.copies.repeat(len(change), 1, 1)
        row = torch.arange(len(change), device=change.device).unsqueeze(1).expand(-1, 2)
        rank = self.rank[slots]
        copies.index_put_((row, self.expert[slots], rank), -once, accumulate=True)
        copies.index_put_((row, experts, rank), once, accumulate=True)
        return copies

    def score_placements(
        self, copies: torch.Tensor, optimum: torch.Tensor, load: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Score placements ``[K, E, G]`` with optima ``[K, b]``, prices included: ``[K]``.

        ``load`` ``[b, E]`` are the batches of the optima; None for all.
        """
        score = _score_optima(optimum) + (copies * self.price).sum((1, 2))
        if self.traffic is None:
            return score
        return score + self.traffic.price_copies(copies, self.load if load is None else load)

    def make_change(self) -> bool:
        """Make the best of some changes if it lowers the score; return whether any was possible."""
        estimate = self.estimate_changes()
        gain = (-estimate).clamp(min=0.0)
        noise = torch.empty_like(estimate).exponential_(generator=self.generator)
        key = GAIN_POWER * gain.log() - noise.log()
        key[self.runners_up[torch.isfinite(estimate[self.runners_up])]] = torch.inf
        top = key.topk(min(CANDIDATES, len(key)))
        change = top.indices[top.values > -torch.inf]
        if not len(change):
            return False
        here = self.copies[None]
        copies = self.apply_changes(change)
        n_batches = len(self.load)
        first = int(
            torch.randint(
                max(1, n_batches - SCREENING_BATCHES + 1),
                (),
                generator=self.generator,
                device=self.load.device,
            )
        )
        some = slice(first, first + SCREENING_BATCHES)
        load = self.load[some]
        before = self.score_placements(here, self.optimum[None, some], load)
        gain = before - self.score_placements(copies, self.find_optima(copies, load), load)
        best = gain.topk(min(SHORTLIST_SIZE, len(gain)))
        last = best.indices[best.values > 0]
        if not len(last):
            self.runners_up = last
            return True
        optimum, loads = self.find_optima_and_loads(copies[last], self.load)
        before = self.score_placements(here, self.optimum[None])
        gain = before - self.score_placements(copies[last], optimum)
        winner = int(gain.argmax())
        self.runners_up = change[last[gain > MIN_GAIN]]
        if float(gain[winner]) > MIN_GAIN:
            slots, experts = self.decode_changes(change[last[winner]].reshape(1))
            self.expert[slots[0]] = experts[0]
            self.copies = copies[last[winner]].clone()
            self.optimum, self.loads = optimum[winner], loads[winner]
        return True
