"""Predict from which batch size on balancing pays, for the loads of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lplb_triton import Placement, TimeCost
from lplb_triton._layout import TIME_MOST_RANKS
from lplb_triton.bench.advise import MODELS, GemmModel, Model, packaged, predict_overhead_us
from lplb_triton.bench.advise.predict import GRID, find_break_even
from lplb_triton.bench.balance import Cell, make_placement
from lplb_triton.bench.measure.simulate import split_tokens
from lplb_triton.bench.objectives.plans import plan_batch
from lplb_triton.bench.types import Floats, Row
from lplb_triton.costs.time_cost import MOST_ACTIVE
from lplb_triton.traces.trace import Trace

__all__ = ["REFERENCES", "predict_saving"]

# Published models whose experts stand for large, middle and small ones where a trace doesn't say
# its own sizes.
REFERENCES = ("mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b")
# Batches that a prediction is made of.
MOST_BATCHES = 24
# Every batch is split as if it had so many tokens, so that rounding doesn't count.
SCALED_TOKENS = 10**8
# Tokens of a rank in small batches, for which plans by time are predicted, and batches of each.
SMALL, SMALL_BATCHES = (16, 64, 256), 2


def predict_saving(trace: Trace, cell: Cell, tolerance: float) -> Row:
    """Predict what balancing saves of a layer's time, for batches of many sizes.

    Parameters
    ----------
    trace
        As given to `lplb_triton.bench.balance.run`. Where its ``meta`` has the integers ``hidden``
        and ``inner``, the first sizes are its own; ``top_k`` of the ``meta`` is used for all.
    cell
        One of its results.
    tolerance
        Certified gap of the LPs.

    Returns
    -------
    dict
        ``grid`` (tokens of a rank), ``overhead_us`` (of each), ``tokens`` (of a rank in a recorded
        batch, None where ``top_k`` isn't known), ``source`` of the times, and ``sizes``: for each
        ``name``, ``hidden``, ``inner``, ``experts``, ``top_k``, ``net`` (part of EPLB's time that
        is saved after the overhead, of each size of the grid; all None where no batch has tokens),
        ``by_time`` (part of the token plan's time that a plan by time saves, of each of ``small``
        tokens of a rank; None where it can't be planned) and ``pays_from`` (tokens of a rank by the
        alternative: ``eplb`` or ``none``; None where it doesn't pay up to the end of the grid).
    """
    parts = _split_some(trace, cell, tolerance)
    overhead = [sum(predict_overhead_us(cell.ep, size).values()) for size in GRID]
    small = _draw_small(trace, cell)
    sizes, gemm = [], packaged(0, 0)
    for name, model in _list_models(trace).items():
        row = {"name": name, **model._asdict(), "net": [None] * len(GRID)}
        row["pays_from"] = {"eplb": None, "none": None}
        row["by_time"] = _predict_by_time(gemm, model, cell.ep, small, tolerance)
        if parts:
            times = {k: _predict_times(gemm, model, cell.ep, v) for k, v in parts.items()}
            saved = (times["eplb"] - times["lp"] - np.array(overhead)) / times["eplb"]
            row["net"] = [round(float(value), 5) for value in saved]
            row["pays_from"] = {
                k: find_break_even((times[k] - times["lp"]).tolist(), overhead)
                for k in ("eplb", "none")
            }
        sizes.append(row)
    top_k = _read_size(trace, "top_k")
    assigned = float(trace.totals().sum(2).mean())
    return {
        "grid": list(GRID),
        "overhead_us": [round(value, 2) for value in overhead],
        "tokens": None if top_k is None else assigned / top_k / cell.ep,
        "source": packaged(*next(iter(_list_models(trace).values()))[:2]).source,
        "small": list(SMALL),
        "sizes": sizes,
    }


def _draw_small(trace: Trace, cell: Cell) -> list[tuple[Placement, Floats]]:
    """List placements with the loads of a test batch of each, ``[experts]``, as parts of it."""
    totals = trace.totals()
    at = np.linspace(0, len(cell.results) - 1, min(SMALL_BATCHES, len(cell.results)))
    found = []
    for result in (cell.results[int(i)] for i in at.round()):
        loads = totals[result.stretch.split, result.layer].astype(np.float64)
        if loads.sum() > 0:
            found.append((result.placement, loads / loads.sum()))
    return found


def _predict_by_time(
    gemm: GemmModel,
    model: Model,
    ep: int,
    small: Sequence[tuple[Placement, Floats]],
    tolerance: float,
) -> list[float] | None:
    """Return the part of the token plan's time that plans by time save, of each size in `SMALL`."""
    slots = max((placement.slots_per_rank for placement, _ in small), default=0)
    if not small or max(p.group_size for p, _ in small) > TIME_MOST_RANKS or slots > MOST_ACTIVE:
        return None
    cost = TimeCost.for_model(model.hidden, model.inner, most_active=slots, model=gemm)
    saved = []
    for size in SMALL:
        rng, ratios = np.random.default_rng(size), []
        for placement, parts in small:
            counts = rng.multinomial(size * ep * model.top_k, parts).astype(np.int64)
            plans = plan_batch(placement, cost, counts, tolerance)
            ratios.append(float(plans["time"].us.max() / plans["tokens"].us.max()))
        saved.append(round(1 - float(np.mean(ratios)), 5))
    return saved


def _list_models(trace: Trace) -> dict[str, Model]:
    """Return sizes of layers by name: the trace's own, where it says them, and published ones."""
    found = {}
    hidden, inner, top_k = (_read_size(trace, name) for name in ("hidden", "inner", "top_k"))
    if hidden and inner and top_k:
        found["this model"] = Model(hidden, inner, trace.experts, top_k)
    for name in REFERENCES:
        like = MODELS[name]
        # A layer has the trace's experts, each as wide as those of the published model.
        found[name] = Model(like.hidden, like.inner, trace.experts, top_k or like.top_k)
    return found


def _read_size(trace: Trace, name: str) -> int | None:
    """Return a positive integer of the trace's description, if there is one."""
    value = trace.meta.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _split_some(trace: Trace, cell: Cell, tolerance: float) -> Mapping[str, Floats]:
    """Part of a batch's rows in each slot, ``[batches, ranks, slots]``, or nothing."""
    totals = trace.totals()
    found: dict[str, list[Floats]] = {"none": [], "eplb": [], "lp": []}
    each = max(1, MOST_BATCHES // len(cell.results))
    results = cell.results
    if len(results) > MOST_BATCHES:
        at = np.linspace(0, len(results) - 1, MOST_BATCHES).round().astype(int)
        results = tuple(results[i] for i in at)
    for result in results:
        part = result.stretch
        history = torch.from_numpy(totals[part.start : part.split, result.layer].sum(0)).double()
        ways: dict[str, tuple[Placement, str]] = {
            "none": (make_placement("none", history, cell.ep, 0), "even"),
            "eplb": (make_placement("eplb", history, cell.ep, cell.slots), "even"),
            "lp": (result.placement, "lplb"),
        }
        count = min(each, part.stop - part.split)
        for batch in np.linspace(part.split, part.stop - 1, count).round().astype(int):
            counts = torch.from_numpy(totals[batch, result.layer]).double()
            if float(counts.sum()) == 0:
                continue
            scaled = (counts * (SCALED_TOKENS / counts.sum())).round().long()
            for name, (placement, split) in ways.items():
                tokens = split_tokens(placement, scaled, split, tolerance)
                found[name].append(tokens.double().numpy() / SCALED_TOKENS)
    return {name: np.stack(each) for name, each in found.items()} if found["lp"] else {}


def _predict_times(gemm: GemmModel, model: Model, ep: int, parts: Floats) -> Floats:
    """Mean microseconds of the slowest rank's products, for each size of the grid."""
    rows = np.array(GRID, dtype=np.float64)[:, None, None, None] * (model.top_k * ep)
    times: Floats = gemm(model.hidden, model.inner, parts * rows).max(2).mean(1)
    return times
