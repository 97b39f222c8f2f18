"""Simulate live slots on many ranks: products measured on one GPU, fetches from a measured rate.

The grouped products of the ranks with the most rows are timed, with the rows that their slots have;
the layer takes as long as the slowest. With live slots it also takes as long as the busiest
port needs for the experts that it sends or receives, at the rate that a run on two GPUs measured.
Nothing is taken to overlap. Dispatch, combine, routing and the plan itself are left out.

========  ======================================================================================
``none``  experts in order, no copies
``lplb``  as many static slots as the others have together, placed by the history, and the LP
``live``  fewer static slots, the LP, and live slots for what the batch makes hot
========  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.bench.advise.gpu_times import time_rank
from lplb_triton.bench.advise.live import (
    LiveBatch,
    count_transfers,
    plan_live_batch,
    scale_batches,
    suggest_live_above,
    suggest_live_cost,
)
from lplb_triton.bench.advise.models import BYTES, MATRICES, Model
from lplb_triton.bench.live.plans import HOME, Base, StaticPlan, make_static_plan
from lplb_triton.bench.live.sources import Source
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.types import Row
from lplb_triton.live import MOST_ABOVE
from lplb_triton.reference.live import LiveCase

__all__ = ["WAYS", "LiveSettings", "find_break_even", "measure_teraflops", "simulate_live"]

WAYS = ("none", "lplb", "live")
# Ranks with the most rows whose products are timed; the slowest is one of them.
TIMED_RANKS = 2
# Products of both passes, in forward passes.
TRAINING = 3


@dataclass(frozen=True)
class LiveSettings:
    """What is simulated.

    Attributes
    ----------
    base
        Static placement below the live slots.
    live
        Live slots of a rank; ``lplb`` has as many more static ones.
    pull_rate
        GB/s at which a port moves weights, measured.
    training
        Count the backward pass: three times the products, another pull, and the gradients.
    """

    base: Base
    live: int
    pull_rate: float
    training: bool = False


def measure_teraflops(
    model: Model,
    ep: int,
    tokens: int,
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
) -> float:
    """Measure the rate of a rank's products with as many rows for each of its experts.

    Parameters
    ----------
    model, ep, tokens
        Sizes, ranks, and tokens of a rank.
    weights
        Of at least the experts of a rank.
    timer, device
        Timer of the launches, and the device that they run on.
    """
    n_local = model.experts // ep
    rows = [max(1, tokens * model.top_k // n_local)] * n_local
    used = weights[0][:n_local], weights[1][:n_local]
    took = time_rank(rows, used, timer, device)
    return 2 * MATRICES * model.hidden * model.inner * sum(rows) / took / 1e6


def simulate_live(
    model: Model,
    ep: int,
    source: Source,
    tokens: Sequence[int],
    settings: LiveSettings,
    weights: tuple[torch.Tensor, torch.Tensor],
    teraflops: float,
    timer: Timer,
    device: torch.device | str,
    progress: Callable[[], None] | None = None,
) -> list[Row]:
    """Simulate one model on one number of ranks.

    Parameters
    ----------
    model, ep
        Sizes and ranks.
    source
        Loads.
    tokens
        Of a rank in a batch; each gives a row.
    settings
        Of the live slots.
    weights
        Of all slots of a rank.
    teraflops
        Measured rate of the products, for ``live_cost``.
    timer, device
        Timer of the launches, and the device that they run on.
    progress
        Called after each row.

    Returns
    -------
    list of dict
        ``tokens``; ``above`` and ``cost``, the rules; means over the batches of ``us`` by way
        (``live`` with its fetches), ``products_us`` by way, ``imbalance`` by way, ``pieces``,
        ``fetching``, ``sent`` and ``received`` (experts at the busiest port) and ``fetch_us``.
    """
    cost = suggest_live_cost(
        gigabytes_per_second=settings.pull_rate, teraflops=teraflops, training=settings.training
    )
    base = settings.base
    more = Base("chain" if base.name == HOME else base.name, base.slots + settings.live)
    plans = [_plan(source, ep, one) for one in (Base(HOME, 0), more, base)]
    rows: list[Row] = []
    for size in tokens:
        above = suggest_live_above(cost, size, model.top_k)
        case = LiveCase(ep, settings.live, MOST_ABOVE if above is None else above, cost)
        found: list[Row] = []
        scaled = [
            [scale_batches(one, size * model.top_k * ep) for one in by_case] for by_case in plans
        ]
        for none, lplb, live in zip(*scaled, strict=True):
            for batch in range(len(none.counts)):
                planned = plan_live_batch(case, live, batch)
                tables = {
                    "none": _find_rows(none, batch, ep),
                    "lplb": _find_rows(lplb, batch, ep),
                    "live": planned.live if planned.pieces else planned.static,
                }
                found.append(_time_batch(model, tables, planned, settings, weights, timer, device))
        rows.append({"tokens": size, "above": above, "cost": cost, **_average(found)})
        if progress is not None:
            progress()
    return rows


def _plan(source: Source, ep: int, base: Base) -> list[StaticPlan]:
    """Place and solve a source's batches, case by case."""
    found = []
    for case in source.cases:
        counts = case.test.sum(1)
        counts = counts[counts.sum(1) > 0]
        # With so many tokens the shares hold for every batch size.
        counts = (counts.double() * (1e8 / counts.sum(1, keepdim=True))).round().long()
        found.append(make_static_plan(base, case.history, counts.numpy(), ep))
    return found


def _find_rows(static: StaticPlan, batch: int, ep: int) -> NDArray[np.int64]:
    """Count the rows of each slot without live slots."""
    unlimited = LiveCase(ep, 1, float("inf"))
    return plan_live_batch(unlimited, static, batch).static


def _time_batch(
    model: Model,
    tables: dict[str, NDArray[np.int64]],
    planned: LiveBatch,
    settings: LiveSettings,
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
) -> Row:
    """Time one batch by every way."""
    work = TRAINING if settings.training else 1
    products, imbalance = {}, {}
    for way, table in tables.items():
        load = table.sum(1)
        imbalance[way] = float(load.max() / load.mean())
        slowest = np.argsort(-load, kind="stable")[:TIMED_RANKS]
        used = weights[0][: table.shape[1]], weights[1][: table.shape[1]]
        products[way] = work * max(
            time_rank(table[rank].tolist(), used, timer, device) for rank in slowest
        )
    piece_us = MATRICES * BYTES * model.hidden * model.inner / settings.pull_rate / 1e3
    fetch_us = max(planned.ports) * piece_us * count_transfers(settings.training)
    return {
        "products_us": products,
        "us": {**products, "live": products["live"] + fetch_us},
        "imbalance": imbalance,
        "pieces": planned.pieces,
        "fetching": planned.pieces > 0,
        "sent": planned.ports[0],
        "received": planned.ports[1],
        "fetch_us": fetch_us,
    }


def _average(found: Sequence[Row]) -> Row:
    """Average the figures of batches."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return float(np.mean(values))

    averaged: Row = mean(found)
    return {"batches": len(found), **averaged}


def find_break_even(rows: Sequence[Row]) -> int | None:
    """Return the least tokens per rank from which on live slots beat static ones in every row.

    Parameters
    ----------
    rows
        Of one model, number of ranks and workload, by rising tokens.
    """
    found = None
    for row in reversed(rows):
        if row["us"]["live"] >= row["us"]["lplb"]:
            break
        found = row["tokens"]
    return found
