"""Draw the batches on which objectives are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import TimeCost, place
from lplb_triton.bench.advise.models import MODELS, Model
from lplb_triton.bench.placement import (
    Case,
    explain_impossible,
    make_by_history,
    synthetic_cases,
    trace_cases,
)
from lplb_triton.placement import Placement
from lplb_triton.traces import trace as traces

__all__ = ["LOADS", "PLACEMENTS", "Batch", "Grid", "draw_batches"]

# ``trace``: the packaged trace, of a model with fewer experts the first ones. ``skewed``: lognormal
# popularity with jitter from batch to batch, as `synthetic_cases` draws it.
LOADS = ("trace", "skewed")
# Placements made from the history, ``time`` and ``home-time`` for batches of the same size.
PLACEMENTS = ("time", "home-time", "chain", "home-chain", "eplb", "home")
BY_TIME = ("time", "home-time")
# Batches by which placements for plans by time are judged.
SAMPLES = 12
# Part of a trace's batches that placements are made from.
HISTORY = 0.5


@dataclass(frozen=True)
class Grid:
    """What is compared: every combination of these.

    Attributes
    ----------
    models
        Names of published models.
    ep, slots, tokens
        Ranks, redundant slots of each, and tokens of each in a batch.
    placements
        Of `PLACEMENTS`.
    loads
        Of `LOADS`.
    batches
        Batches of each combination, of other layers or seeds.
    """

    models: tuple[str, ...]
    ep: tuple[int, ...]
    slots: tuple[int, ...]
    tokens: tuple[int, ...]
    placements: tuple[str, ...] = PLACEMENTS
    loads: tuple[str, ...] = LOADS
    batches: int = 1


@dataclass(frozen=True)
class Batch:
    """One batch on one placement."""

    name: str
    """Of the model."""
    model: Model
    ep: int
    slots: int
    method: str
    """By which the placement was made."""
    load: str
    tokens: int
    """Of a rank."""
    number: int

    def place(self, cost: TimeCost) -> Placement:
        """Make the placement from the history of the load; ``cost`` is for those by time."""
        by_time = self.method in BY_TIME
        rows = self.tokens * self.model.top_k if by_time else None
        key = self.load, self._case, self.model.experts
        return _place(self.method, key, self.ep, self.slots, rows, cost if by_time else None)

    def count(self) -> NDArray[np.int64]:
        """Draw the tokens of every expert, ``[n_logical]``, by the loads of a test batch."""
        case = _list_cases(self.load, self.model.experts)[self._case]
        total = self.tokens * self.ep * self.model.top_k
        # The same model and ranks have the same draws for every number of slots and placement.
        rng = np.random.default_rng((self.number, self.tokens, self.ep, LOADS.index(self.load)))
        seen = case.test.sum(1)
        seen = seen[seen.sum(1) > 0]
        weights = seen[int(rng.integers(len(seen)))].double().numpy()
        return rng.multinomial(total, weights / weights.sum()).astype(np.int64)

    @property
    def _case(self) -> int:
        """Number of the layer or seed."""
        return self.number % len(_list_cases(self.load, self.model.experts))


@lru_cache(maxsize=16)
def _list_cases(load: str, experts: int) -> tuple[Case, ...]:
    """List layers of the packaged trace, or seeds of synthetic loads."""
    if load == "skewed":
        return synthetic_cases(experts)
    return tuple(
        Case(case.name, case.history[:, :experts], case.test[:, :, :experts])
        for case in trace_cases(traces.packaged(), HISTORY)
    )


@lru_cache(maxsize=256)
def _place(
    method: str,
    source: tuple[str, int, int],
    ep: int,
    slots: int,
    rows: int | None,
    cost: TimeCost | None,
) -> Placement:
    """Make a placement; ``source`` are the load, its case and the experts."""
    load, case, experts = source
    history = _list_cases(load, experts)[case].history
    if method not in BY_TIME:
        return make_by_history(method, history, ep, slots, torch.device("cpu"), None)
    return place(
        history.double(), ep, redundant_per_rank=slots, samples=SAMPLES,
        keep_home=method == "home-time", objective="time", cost=cost, rows_per_rank=rows,
    )  # fmt: skip


def draw_batches(grid: Grid, seed: int = 0) -> tuple[list[Batch], list[dict[str, object]]]:
    """List the batches of a grid in random order, all first batches before all second ones.

    Parameters
    ----------
    grid
        What is compared.
    seed
        Of the order.

    Returns
    -------
    batches : list of Batch
        Whatever number of them is taken from the start is a sample of the grid.
    left_out : list of dict
        ``model``, ``ep``, ``slots``, ``load`` and ``reason`` of combinations that can't be made.
    """
    rng = np.random.default_rng(seed)
    possible, left_out = _list_possible(grid)
    found: list[Batch] = []
    for number in range(grid.batches):
        each = [
            Batch(name, MODELS[name], ep, slots, method, load, tokens, number)
            for name, ep, slots, load in possible
            for method in grid.placements
            for tokens in grid.tokens
        ]
        found += [each[i] for i in rng.permutation(len(each))]
    return found, left_out


def _list_possible(
    grid: Grid,
) -> tuple[Sequence[tuple[str, int, int, str]], list[dict[str, object]]]:
    """List the combinations that can be made, and say why others can't."""
    possible, left_out = [], []
    trace_experts = traces.packaged().experts
    for name in grid.models:
        experts = MODELS[name].experts
        for ep in grid.ep:
            for slots in grid.slots:
                for load in grid.loads:
                    reason = explain_impossible(experts, ep, slots)
                    if reason is None and load == "trace" and experts > trace_experts:
                        reason = f"the packaged trace has {trace_experts} experts, not {experts}"
                    if reason is None:
                        possible.append((name, ep, slots, load))
                    else:
                        head = {"model": name, "ep": ep, "slots": slots, "load": load}
                        left_out.append({**head, "reason": reason})
    return possible, left_out
