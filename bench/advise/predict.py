"""Predict the times of a layer, and recommend a placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lplb_triton.bench.advise.models import BYTES, MATRICES, Model
from lplb_triton.bench.advise.overhead import predict_overhead_us
from lplb_triton.bench.measure.simulate import split_tokens
from lplb_triton.bench.placement import Case, make_by_history
from lplb_triton.bench.types import Floats
from lplb_triton.costs.gemm import GemmModel
from lplb_triton.placement import Placement

__all__ = ["GRID", "advise", "find_break_even", "select_slots", "recommend"]

# Forward and backward products take three times the forward's.
TRAINING = 3
GRID = tuple(2**k for k in range(4, 18))
BATCHES = 12


def select_slots(model: Model, ep: int, slots: Sequence[int]) -> tuple[int, ...]:
    """Return those of ``slots`` that copies can fill: a rank holds an expert once."""
    return tuple(s for s in slots if 1 <= s <= model.experts - model.experts // ep)


def advise(
    model: Model,
    gemm: GemmModel,
    cases: Sequence[Case],
    ep: int,
    tokens: int,
    slots: Sequence[int],
    *,
    training: bool = False,
    tolerance: float = 1e-3,
) -> dict[str, Any]:
    """Predict times of a layer, and recommend a placement.

    Parameters
    ----------
    model
        Sizes; its experts must be those of the cases.
    gemm
        Time of a rank's products.
    cases
        Loads: placements are made from their history, and judged by their test batches.
    ep, tokens
        Ranks, and tokens of each of them in a batch.
    slots
        Redundant slots per rank to compare.
    training
        Count the backward pass too, as twice the forward's products.
    tolerance
        Certified gap of the LPs.

    Returns
    -------
    dict
        ``rows``, one for each placement and number of slots: ``layer_us`` by ``in_order`` (no
        copies), ``even`` (EPLB with as many slots, split evenly) and ``lp``; ``saving_us`` of
        ``lp`` over ``even``: ``mean``, ``low`` and ``high`` (10th and 90th percentile of the
        batches, less and more by the worst error of the fit); ``net_us`` after ``overhead_us``;
        ``break_even`` tokens per rank by ``mean``, ``low`` and ``high`` saving, None where it
        never pays up to 131,072; bytes of ``replica_bytes`` per rank and layer. ``pays`` is
        ``"yes"``, ``"no"`` or ``"uncertain"``; ``best``, the ``placement`` and ``slots`` of the
        row with the fewest slots within half a percent of the fastest layer; and
        ``recommended``, the same, or None where balancing doesn't pay.

    Raises
    ------
    ValueError
        If sizes don't fit, or a number of slots can't be laid out.
    """
    _check_sizes(model, cases, ep, slots)
    layer = _Layer(model, gemm, ep, TRAINING if training else 1)
    in_order = _place_and_split(layer, cases, "in_order", 0, "even", tolerance)
    rows = []
    for spare in slots:
        even = _place_and_split(layer, cases, "eplb", spare, "even", tolerance)
        for kind in ("eplb", "chain"):
            lp = _place_and_split(layer, cases, kind, spare, "lplb", tolerance)
            parts = {"in_order": in_order, "even": even, "lp": lp}
            rows.append(
                {"placement": kind, "slots": spare, **_predict_row(layer, parts, tokens, spare)}
            )
    return {"rows": rows, **recommend(rows)}


def _check_sizes(model: Model, cases: Sequence[Case], ep: int, slots: Sequence[int]) -> None:
    if model.experts % ep:
        raise ValueError(f"ep must divide the {model.experts} experts, got {ep}")
    if any(case.history.shape[1] != model.experts for case in cases):
        raise ValueError(f"cases must have the model's {model.experts} experts")
    if not slots or len(select_slots(model, ep, slots)) < len(slots):
        raise ValueError(f"slots must be in [1, {model.experts - model.experts // ep}] for EP {ep}")


@dataclass(frozen=True)
class _Layer:
    """A layer on its ranks.

    Attributes
    ----------
    model
        Sizes.
    gemm
        Time of a rank's products.
    ep
        Ranks.
    work
        Products of a batch, in forward passes.
    """

    model: Model
    gemm: GemmModel
    ep: int
    work: int

    def slowest_us(self, parts: Floats, tokens: int) -> Floats:
        """Forward microseconds of each batch's slowest rank, for so many tokens per rank."""
        rows = tokens * self.model.top_k * self.ep
        slowest: Floats = self.gemm(self.model.hidden, self.model.inner, parts * rows).max(1)
        return slowest

    def saving_us(self, parts: Mapping[str, Floats], tokens: int) -> dict[str, float]:
        """Microseconds that ``lp`` saves over ``even``, for so many tokens per rank."""
        even, lp = (self.slowest_us(parts[split], tokens) for split in ("even", "lp"))
        saved = self.work * (even - lp)
        low, high = (float(v) for v in np.percentile(saved, (10, 90)))
        worst = self.gemm.worst
        return {
            "mean": float(saved.mean()),
            "low": low - worst * abs(low),
            "high": high + worst * abs(high),
        }


def _place_and_split(
    layer: _Layer, cases: Sequence[Case], kind: str, spare: int, split: str, tolerance: float
) -> Floats:
    """Part of each batch's rows in each slot, ``[batches of all cases, ranks, slots]``."""
    experts, found = layer.model.experts, []
    for case in cases:
        if kind == "in_order":
            placement = Placement.from_phy2log(np.arange(experts), layer.ep, n_logical=experts)
        else:
            placement = make_by_history(
                kind, case.history, layer.ep, spare, torch.device("cpu"), None
            )
        found.append(_split_batches(placement, case, split, tolerance))
    return np.concatenate(found)


def _predict_row(
    layer: _Layer, parts: Mapping[str, Floats], tokens: int, spare: int
) -> dict[str, Any]:
    """Predict the figures of one placement; ``parts`` by ``in_order``, ``even`` and ``lp``."""
    model = layer.model
    curve = [layer.saving_us(parts, size) for size in GRID]
    costs = [sum(predict_overhead_us(layer.ep, size).values()) for size in GRID]
    saving, overhead = layer.saving_us(parts, tokens), predict_overhead_us(layer.ep, tokens)
    return {
        "layer_us": {
            name: layer.work * float(layer.slowest_us(p, tokens).mean())
            for name, p in parts.items()
        },
        "imbalance": {
            name: float((p.sum(2).max(1) / p.sum(2).mean(1)).mean()) for name, p in parts.items()
        },
        "saving_us": saving,
        "overhead_us": overhead,
        "net_us": {k: v - sum(overhead.values()) for k, v in saving.items()},
        "break_even": {k: find_break_even([point[k] for point in curve], costs) for k in saving},
        "replica_bytes": spare * MATRICES * BYTES * model.hidden * model.inner,
    }


def _split_batches(placement: Placement, case: Case, split: str, tolerance: float) -> Floats:
    """Part of a batch's rows in each slot, ``[batches, ranks, slots]``."""
    chosen = np.linspace(0, len(case.test) - 1, min(BATCHES, len(case.test))).round().astype(int)
    found = []
    for counts in case.test[chosen].sum(1).double():
        if float(counts.sum()) > 0:
            # With so many tokens rounding is negligible, and the parts apply to every batch size.
            scaled = (counts * (1e8 / counts.sum())).round().long()
            found.append(split_tokens(placement, scaled, split, tolerance).double().numpy() / 1e8)
    if not found:
        raise ValueError("no test batch has tokens")
    return np.stack(found)


def find_break_even(saving: Sequence[float], cost: Sequence[float]) -> int | None:
    """Return the least size of `GRID` from which on every larger one pays."""
    found = None
    for size, saved, spent in reversed(list(zip(GRID, saving, cost, strict=True))):
        if saved <= spent:
            break
        found = size
    return found


def recommend(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Choose the fewest slots whose layer is within half a percent of the fastest, if it pays."""
    fastest = min(row["layer_us"]["lp"] for row in rows)
    near = [row for row in rows if row["layer_us"]["lp"] <= 1.005 * fastest]
    best = min(near, key=lambda row: (row["slots"], row["layer_us"]["lp"]))
    net = best["net_us"]
    pays = "yes" if net["low"] > 0 else "no" if net["high"] <= 0 else "uncertain"
    if pays != "no" and net["mean"] <= 0:
        pays = "uncertain"
    chosen = {"placement": best["placement"], "slots": best["slots"]}
    return {"best": chosen, "recommended": None if pays == "no" else chosen, "pays": pays}
