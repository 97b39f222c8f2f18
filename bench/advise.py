"""Predict whether balancing pays for a model, a batch size and a load; no printing.

The time of a layer is that of the expert products of its slowest rank. A rank's time is modelled as

    max(floor, base + sum over active experts of max(weights / bandwidth, padded work / rate))

with the expert's rows padded to whole tiles of 128: small batches read weights, large ones compute.
The four numbers are fitted to measured times: on this machine's GPU, or else to `TABLE`. Everything
made from them is a prediction. Communication, routing and attention are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from lplb_triton.bench.placement import Case
from lplb_triton.bench.placement import make as make_placement
from lplb_triton.bench.simulate import draw_experts, run_experts, slot_tokens
from lplb_triton.bench.timing import Timer
from lplb_triton.placement import Placement

__all__ = [
    "MODELS",
    "GemmModel",
    "Model",
    "advise",
    "check_row",
    "fit",
    "measure",
    "overhead_us",
    "packaged",
]

Floats = NDArray[np.float64]
TILE = 128
# Forward and backward products take three times the forward's.
TRAINING = 3
# Bytes of a weight, and of an expert's three matrices: 6 * hidden * inner.
BYTES, MATRICES = 2, 3
# Measured: one H100 80GB HBM3, torch 2.11, bfloat16, both grouped products of one rank with nine
# experts, microseconds. By total rows: split evenly, geometrically (1/2, 1/4, ..), all to one.
TABLE = {
    (7168, 2048): {
        256: (333, 329, 96),
        1024: (339, 440, 223),
        4096: (655, 833, 570),
        16384: (2543, 2866, 2657),
        32768: (4883, 5156, 5332),
    },
    (2048, 768): {
        256: (91, 93, 91),
        1024: (88, 86, 69),
        4096: (123, 146, 105),
        16384: (355, 370, 367),
        32768: (671, 718, 748),
    },
}
TABLE_EXPERTS = 9
# Measured on one H100 (docs/benchmarks.md): median run without sync by ranks, for TOKENS tokens of
# 256 experts, top-8, microseconds. Sync: a P2P kernel on two H100 over NVLink.
TOKENS = (128, 4096, 16384)
RUN_US = {8: (8.7, 9.5, 15.7), 32: (13.4, 14.5, 23.1), 64: (34.8, 36.7, 45.1)}
SYNC_US = 6.4
GRID = tuple(2**k for k in range(4, 18))
BATCHES = 12
CALIBRATION_ROWS = (256, 1024, 4096, 16384, 65536)


class Model(NamedTuple):
    """Sizes of a mixture-of-experts layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


# As in the models' published configurations.
MODELS = {
    "deepseek-v3": Model(7168, 2048, 256, 8),
    "qwen3-235b-a22b": Model(4096, 1536, 128, 8),
    "mixtral-8x7b": Model(4096, 14336, 8, 2),
}


@dataclass(frozen=True)
class GemmModel:
    """Time of one rank's expert products.

    Attributes
    ----------
    expert
        ``hidden * inner``.
    floor, base
        Microseconds.
    bandwidth
        Bytes a microsecond.
    rate
        Floating-point operations a microsecond.
    error, worst
        Of the fit: root mean square and largest relative difference from measured times.
    source
        What it was fitted to.
    """

    expert: float
    floor: float
    base: float
    bandwidth: float
    rate: float
    error: float
    worst: float
    source: str

    def __call__(self, rows: Floats) -> Floats:
        """Microseconds of ranks whose experts have ``rows`` ``[..., experts]`` tokens."""
        read = MATRICES * BYTES * self.expert / self.bandwidth
        padded = np.ceil(rows / TILE) * TILE
        each = np.maximum(read, padded * 2 * MATRICES * self.expert / self.rate)
        total = np.where(rows > 0, each, 0.0).sum(-1)
        return np.where(total > 0, np.maximum(self.floor, self.base + total), 0.0)


def _splits(total: int, experts: int) -> list[Floats]:
    """Rows by expert: evenly, geometrically, all to one."""
    even = np.full(experts, total // experts)
    even[: total % experts] += 1
    halves = np.array([total >> (i + 1) for i in range(experts)])
    halves[-1] += total - halves.sum()
    one = np.zeros(experts, dtype=np.int64)
    one[0] = total
    return [split.astype(np.float64) for split in (even, halves, one)]


def fit(
    hidden: int, inner: int, rows: Sequence[Floats], times: Sequence[float], source: str
) -> GemmModel:
    """Fit a model to measured times, by the logarithm of their quotient.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert.
    rows
        Rows by expert of each measurement.
    times
        Microseconds.
    source
        Kept in the model.

    Returns
    -------
    GemmModel
    """
    table, measured = np.stack(rows), np.asarray(times, dtype=np.float64)

    def model(logs: Floats, error: float = 0.0, worst: float = 0.0) -> GemmModel:
        floor, base, bandwidth, rate = (float(v) for v in np.exp(logs))
        return GemmModel(hidden * inner, floor, base, bandwidth, rate, error, worst, source)

    def cost(logs: Floats) -> float:
        return float((np.log(model(logs)(table) / measured) ** 2).sum())

    # Starts around the speed of the slowest and the fastest measurement.
    work = 2 * MATRICES * hidden * inner * table.sum(1)
    read = MATRICES * BYTES * hidden * inner * (table > 0).sum(1)
    least = float(measured.min())
    best = min(
        (
            minimize(
                cost,
                np.log([least, part * least, (read / measured).max(), (work / measured).max()]),
                method="Nelder-Mead",
                options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-4, "fatol": 1e-8},
            )
            for part in (0.1, 0.5)
        ),
        key=lambda found: float(found.fun),
    )
    off = np.abs(model(best.x)(table) / measured - 1)
    return model(best.x, float(np.sqrt((off**2).mean())), float(off.max()))


def packaged(hidden: int, inner: int) -> GemmModel:
    """Model of one H100 from `TABLE`.

    Between its two sizes of experts the numbers are interpolated by the logarithm of
    ``hidden * inner``; beyond them those of the nearer size are taken.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert.

    Returns
    -------
    GemmModel
    """
    found = []
    for (h, i), lines in TABLE.items():
        rows = [split for total in lines for split in _splits(total, TABLE_EXPERTS)]
        times = [time for line in lines.values() for time in line]
        found.append(fit(h, i, rows, times, ""))
    large, small = found
    at = math.log(hidden * inner / small.expert) / math.log(large.expert / small.expert)
    part = min(max(at, 0.0), 1.0)

    def between(name: str) -> float:
        low, high = getattr(small, name), getattr(large, name)
        return float(low ** (1 - part) * high**part)

    source = "packaged table: one H100 80GB HBM3, torch 2.11, experts 7168x2048 and 2048x768"
    if (hidden, inner) not in TABLE:
        source += "; interpolated for this size, not measured" if 0 <= at <= 1 else (
            "; outside these sizes, speeds of the nearer one, not measured"
        )  # fmt: skip
    return GemmModel(
        hidden * inner,
        between("floor"),
        between("base"),
        between("bandwidth"),
        between("rate"),
        max(m.error for m in found),
        max(m.worst for m in found),
        source,
    )


def measure(
    model: Model, experts: int, timer: Timer, device: torch.device | str, name: str
) -> GemmModel:
    """Time a rank's products on a GPU and fit a model to them.

    Parameters
    ----------
    model
        Sizes.
    experts
        Experts of a rank.
    timer, device
        What times a launch, and where.
    name
        Of the device.

    Returns
    -------
    GemmModel
    """
    weights = draw_experts(model.hidden, model.inner, experts, device)
    rows = [split for total in CALIBRATION_ROWS for split in _splits(total, experts)]
    times = [_time_rank(split, weights, timer, device) for split in rows]
    return fit(model.hidden, model.inner, rows, times, f"measured on this {name}")


def _time_rank(
    rows: Floats,
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
) -> float:
    """Microseconds of one rank's products, measured."""
    ends = torch.from_numpy(rows.astype(np.int64).cumsum()).to(torch.int32)
    total = int(ends[-1])
    if total == 0:
        return 0.0
    x = torch.randn(1, weights[0].shape[1], device=device).to(torch.bfloat16)
    x = x.expand(total, -1).contiguous()
    launch = partial(run_experts, x, *weights, ends.to(device))
    launch()
    return timer.per_call(launch, 1e3)


def overhead_us(ep: int, tokens: int) -> dict[str, float]:
    """Time of ``run`` from figures measured on H100s; see the head of this file.

    Parameters
    ----------
    ep
        Ranks; between the measured sizes interpolated, beyond 64 in proportion to ``ep``.
    tokens
        Of a rank; beyond 16,384 in proportion.

    Returns
    -------
    dict
        ``sync``, and ``run`` for the rest, in microseconds.
    """
    by_ranks = [float(np.interp(tokens, TOKENS, times)) for times in RUN_US.values()]
    run = float(np.interp(ep, list(RUN_US), by_ranks))
    return {
        "sync": SYNC_US,
        "run": run * max(1.0, ep / max(RUN_US)) * max(1.0, tokens / TOKENS[-1]),
    }


def _parts(placement: Placement, case: Case, split: str, tolerance: float) -> Floats:
    """Part of a batch's rows in each slot, ``[batches, ranks, slots]``."""
    chosen = np.linspace(0, len(case.test) - 1, min(BATCHES, len(case.test))).round().astype(int)
    found = []
    for counts in case.test[chosen].sum(1).double():
        if float(counts.sum()) > 0:
            # Enough tokens for rounding not to matter; the parts hold for every batch size.
            scaled = (counts * (1e8 / counts.sum())).round().long()
            found.append(slot_tokens(placement, scaled, split, tolerance).double().numpy() / 1e8)
    if not found:
        raise ValueError("no test batch has tokens")
    return np.stack(found)


def _slowest(gemm: GemmModel, parts: Floats, rows: int) -> Floats:
    """Microseconds of the slowest rank of each batch."""
    slowest: Floats = gemm(parts * rows).max(1)
    return slowest


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
        never pays up to 131,072; bytes of ``replica_bytes`` per rank and layer. And
        ``recommended``, a row's ``placement`` and ``slots``, with ``pays``.

    Raises
    ------
    ValueError
        If sizes don't fit, or no number of slots can be laid out.
    """
    if model.experts % ep:
        raise ValueError(f"ep must divide the {model.experts} experts, got {ep}")
    if any(case.history.shape[1] != model.experts for case in cases):
        raise ValueError(f"cases must have the model's {model.experts} experts")
    possible = [s for s in slots if 1 <= s <= model.experts - model.experts // ep]
    if not possible:
        raise ValueError(f"slots must be in [1, {model.experts - model.experts // ep}] for EP {ep}")
    times = TRAINING if training else 1
    cpu = torch.device("cpu")

    def parts(kind: str, spare: int, split: str) -> Floats:
        found = []
        for case in cases:
            if kind == "in_order":
                placement = Placement.from_phy2log(
                    torch.arange(model.experts), ep, n_logical=model.experts
                )
            else:
                placement = make_placement(kind, case.history, ep, spare, cpu, None)
            found.append(_parts(placement, case, split, tolerance))
        return np.concatenate(found)

    in_order = parts("in_order", 0, "even")
    rows = []
    for spare in possible:
        even = parts("eplb", spare, "even")
        for kind in ("eplb", "chain"):
            lp = parts(kind, spare, "lplb")
            curve = [_saving(gemm, even, lp, size * model.top_k * ep, times) for size in GRID]
            costs = [sum(overhead_us(ep, size).values()) for size in GRID]
            now = _saving(gemm, even, lp, tokens * model.top_k * ep, times)
            overhead = overhead_us(ep, tokens)
            total = tokens * model.top_k * ep
            rows.append(
                {
                    "placement": kind,
                    "slots": spare,
                    "layer_us": {
                        name: times * float(_slowest(gemm, p, total).mean())
                        for name, p in (("in_order", in_order), ("even", even), ("lp", lp))
                    },
                    "imbalance": {
                        name: float((p.sum(2).max(1) / p.sum(2).mean(1)).mean())
                        for name, p in (("in_order", in_order), ("even", even), ("lp", lp))
                    },
                    "saving_us": now,
                    "overhead_us": overhead,
                    "net_us": {k: v - sum(overhead.values()) for k, v in now.items()},
                    "break_even": {
                        k: _break_even([point[k] for point in curve], costs) for k in now
                    },
                    "replica_bytes": spare * MATRICES * BYTES * model.hidden * model.inner,
                }
            )
    return {"rows": rows, **_recommend(rows)}


def _saving(gemm: GemmModel, even: Floats, lp: Floats, rows: int, times: int) -> dict[str, float]:
    saved = times * (_slowest(gemm, even, rows) - _slowest(gemm, lp, rows))
    low, high = (float(v) for v in np.percentile(saved, (10, 90)))
    worst = gemm.worst
    return {
        "mean": float(saved.mean()),
        "low": low - worst * abs(low),
        "high": high + worst * abs(high),
    }


def _break_even(saving: Sequence[float], cost: Sequence[float]) -> int | None:
    """Return the least size of `GRID` from which on every larger one pays."""
    found = None
    for size, saved, spent in reversed(list(zip(GRID, saving, cost, strict=True))):
        if saved <= spent:
            break
        found = size
    return found


def _recommend(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Choose the fewest slots whose layer is within half a percent of the fastest."""
    fastest = min(row["layer_us"]["lp"] for row in rows)
    near = [row for row in rows if row["layer_us"]["lp"] <= 1.005 * fastest]
    best = min(near, key=lambda row: (row["slots"], row["layer_us"]["lp"]))
    net = best["net_us"]
    pays = "yes" if net["low"] > 0 else "no" if net["high"] <= 0 else "uncertain"
    if pays != "no" and net["mean"] <= 0:
        pays = "uncertain"
    return {
        "recommended": {"placement": best["placement"], "slots": best["slots"]},
        "pays": pays,
    }


def check_row(
    name: str,
    model: Model,
    gemm: GemmModel,
    case: Case,
    ep: int,
    tokens: int,
    timer: Timer,
    device: torch.device | str,
) -> dict[str, Any]:
    """Hold a prediction against measured times: EPLB's placement, one slot, one batch, both splits.

    Parameters
    ----------
    name, model
        Which.
    gemm
        What predicts.
    case
        Loads.
    ep, tokens
        Ranks, and tokens of each.
    timer, device
        What times a launch, and where.

    Returns
    -------
    dict
        ``model``, ``ep``, ``tokens``; by ``even`` and ``lp``: ``measured_us`` of the slowest rank,
        ``predicted_us`` and their relative ``error``.
    """
    placement = make_placement("eplb", case.history, ep, 1, torch.device("cpu"), None)
    weights = draw_experts(model.hidden, model.inner, placement.slots_per_rank, device)
    counts = case.test[0].sum(0).double()
    counts = (counts * (tokens * model.top_k * ep / counts.sum())).round().long()
    row: dict[str, Any] = {"model": name, "ep": ep, "tokens": tokens}
    for split, balance in (("even", "even"), ("lp", "lplb")):
        rows = slot_tokens(placement, counts, balance, 1e-3).double().numpy()
        measured = max(_time_rank(rank, weights, timer, device) for rank in rows)
        predicted = float(gemm(rows).max())
        row[split] = {
            "measured_us": measured,
            "predicted_us": predicted,
            "error": predicted / measured - 1,
        }
    return row
