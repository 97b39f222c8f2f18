"""Predict which objective of a balancer is the faster one, by tokens of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import Placement, TimeCost
from lplb_triton._layout import MAX_COUNT, TIME_MOST_SLOTS
from lplb_triton.bench.advise.models import Model
from lplb_triton.bench.advise.overhead import predict_overhead_us
from lplb_triton.bench.objectives.plans import WAYS, plan_batch
from lplb_triton.bench.placement import Case, make_by_history
from lplb_triton.bench.types import Floats
from lplb_triton.costs.gemm import GemmModel

__all__ = ["OBJECTIVE_GRID", "TIME_US", "advise_objective"]

# Tokens of a rank that are predicted, beside those asked for.
OBJECTIVE_GRID = (8, 16, 64, 256, 1024, 4096)
# Placements that are compared, and batches in all, evenly spread over the cases.
PLACEMENTS, BATCHES = ("eplb", "chain"), 3
# Microseconds that planning by time adds to a run on one H200: 10 to 14, see docs/results/time.md.
TIME_US = 12.0
# Products of both passes, in forward passes.
TRAINING = 3


def advise_objective(
    model: Model,
    gemm: GemmModel,
    cases: Sequence[Case],
    ep: int,
    tokens: int,
    slots: Sequence[int],
    *,
    training: bool = False,
    tolerance: float = 1e-3,
) -> list[dict[str, Any]]:
    """Predict a layer's time under each objective, each on its best placement, by batch size.

    Parameters
    ----------
    model, gemm, cases, ep, slots, training, tolerance
        As for `lplb_triton.bench.advise.advise`.
    tokens
        Tokens of a rank that are predicted beside `OBJECTIVE_GRID`.

    Returns
    -------
    list of dict
        By rising ``tokens``: ``layer_us`` by ``none`` (experts in order, no copies), ``even``,
        ``tokens`` and ``time``, means over batches of whole tokens drawn by the cases' test
        batches; ``placed``, the ``placement`` and ``slots`` of each; ``added_us``, what each
        adds to a layer; and ``best``, the way with the least sum of both. Empty where a rank has
        more slots than a cost has room for, or a batch more than 2**31 - 1 rows.
    """
    most_slots, most_tokens = model.experts // ep + max(slots), max(*OBJECTIVE_GRID, tokens)
    if most_slots > TIME_MOST_SLOTS or most_tokens * ep * model.top_k > MAX_COUNT:
        return []
    chosen = [cases[i] for i in _spread(len(cases), BATCHES)]
    cost = TimeCost.for_model(model.hidden, model.inner, most_active=most_slots, model=gemm)
    placed = {
        (kind, spare): [
            make_by_history(kind, case.history, ep, spare, torch.device("cpu"), None)
            for case in chosen
        ]
        for kind in PLACEMENTS
        for spare in slots
    }
    work = TRAINING if training else 1
    rows = []
    for size in sorted({*OBJECTIVE_GRID, tokens}):
        drawn = _draw_counts(chosen, size * ep * model.top_k, size)
        means = {
            key: work * _predict_means(made, drawn, cost, tolerance) for key, made in placed.items()
        }
        best = {way: min(means, key=lambda key: means[key][i]) for i, way in enumerate(WAYS)}
        layer = {way: float(means[best[way]][i]) for i, way in enumerate(WAYS)}
        run = sum(predict_overhead_us(ep, size).values())
        added = {"none": 0.0, "even": 0.0, "tokens": run, "time": run + TIME_US}
        rows.append(
            {
                "tokens": size,
                "layer_us": layer,
                "placed": {
                    way: None if way == "none" else {"placement": kind, "slots": spare}
                    for way, (kind, spare) in best.items()
                },
                "added_us": added,
                "best": min(WAYS, key=lambda way: layer[way] + added[way]),
            }
        )
    return rows


def _draw_counts(cases: Sequence[Case], rows: int, seed: int) -> list[list[NDArray[np.int64]]]:
    """Draw batches of so many rows by the test batches of each case."""
    rng = np.random.default_rng(seed)
    drawn = []
    for case in cases:
        loads = case.test.sum(1)
        loads = loads[loads.sum(1) > 0].double()
        some = loads.numpy()[_spread(len(loads), -(-BATCHES // len(cases)))]
        drawn.append([rng.multinomial(rows, one / one.sum()).astype(np.int64) for one in some])
    return drawn


def _predict_means(
    placed: Sequence[Placement],
    drawn: Sequence[Sequence[NDArray[np.int64]]],
    cost: TimeCost,
    tolerance: float,
) -> Floats:
    """Return the slowest rank's mean time by each of `WAYS`."""
    found = [
        [float(plan.us.max()) for plan in plan_batch(one, cost, counts, tolerance).values()]
        for one, batches in zip(placed, drawn, strict=True)
        for counts in batches
    ]
    means: Floats = np.mean(found, axis=0)
    return means


def _spread(n: int, most: int) -> list[int]:
    """Return up to ``most`` of ``n`` numbers, evenly spread."""
    return sorted(set(np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()))
