"""Predict whether balancing pays for a model, a batch size and a load; no printing.

The time of a layer is that of the expert products of its slowest rank. torch's grouped product for
Hopper GPUs works on tiles of the output, each computed by a pair of SMs; all pairs together
compute one *wave* of tiles, and a last wave costs as much when it isn't full. With ``waves`` from
the rows of every expert, padded to whole tiles, a rank takes

    base + for both products: norm(waves * depth * step, weights of active experts / bandwidth)
         + activations / bandwidth

where ``depth`` is the length of the sum (``hidden``, then ``inner``) and ``norm(a, b)`` is
``(a^4 + b^4)^(1/4)``, the larger of the two, and somewhat more where they are close. Tiles are
256 x 256, or 128 x 128 if the rank's experts have 128 rows or fewer on average; each has a
``step``. The four numbers are fitted to measured times: of this machine's GPU, or of `TABLE`.
Everything made from them is a prediction. Communication, routing and attention are left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.bench.measure.simulate import run_experts, slot_tokens
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.placement import Case
from lplb_triton.bench.placement import make as make_placement
from lplb_triton.placement import Placement

__all__ = [
    "MODELS",
    "GemmModel",
    "Model",
    "Point",
    "advise",
    "check_row",
    "fit",
    "measure",
    "overhead_us",
    "packaged",
    "possible_slots",
]

Floats = NDArray[np.float64]
# Of torch's kernels: average rows of a rank's experts up to which tiles are narrow, and the sides
# of a pair's tile.
FEW_ROWS, NARROW, WIDE = 128, 128, 256
# Pairs of SMs of an H100.
PAIRS = 66
NORM = 4
# Rest after a measurement, in its own time.
REST = 2.0
# Forward and backward products take three times the forward's.
TRAINING = 3
# Bytes of a weight, and of an expert's three matrices: 6 * hidden * inner.
BYTES, MATRICES = 2, 3
# Values of width inner that the activation moves for a row: silu reads and writes, the product
# reads two and writes.
MOVED = 5
# Measured: one H100 80GB HBM3, torch 2.11, bfloat16, both grouped products of one rank with nine
# experts, microseconds. By total rows: split evenly, geometrically (1/2, 1/4, ..), all to one.
TABLE: dict[tuple[int, int], dict[int, tuple[float, float, float]]] = {
    (7168, 2048): {
        256: (332, 329, 68.0),
        1024: (330, 400, 212),
        4096: (635, 683, 548),
        16384: (2286, 2223, 2497),
    },
    (2048, 768): {
        256: (58.2, 60.0, 30.9),
        1024: (61.8, 72.7, 46.2),
        4096: (112, 115, 96.7),
        16384: (344, 321, 355),
    },
}
TABLE_EXPERTS = 9
# Measured on one H100 (docs/benchmarks.md): median run without sync by ranks, for TOKENS tokens of
# 256 experts, top-8, microseconds. Sync: what it adds to a run of two H100s over NVLink.
TOKENS = (128, 4096, 16384)
RUN_US = {8: (6.9, 8.0, 14.0), 32: (8.9, 10.3, 18.5), 64: (12.6, 13.5, 22.2)}
SYNC_US = 4.6
GRID = tuple(2**k for k in range(4, 18))
BATCHES = 12
# Rows to fit to, up to those of a rank with CALIBRATION_TOKENS.
CALIBRATION_ROWS, CALIBRATION_TOKENS = (256, 1024, 4096, 16384, 65536), 8192


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


class Point(NamedTuple):
    """A measured time: microseconds of a rank whose experts have ``rows``."""

    hidden: int
    inner: int
    rows: list[int]
    us: float


class _Work(NamedTuple):
    """What ranks have to do: ``[...]``, and ``[..., 2]`` for the two products."""

    narrow: NDArray[np.bool_]
    depth: Floats  # of the sums, times waves
    read: Floats  # bytes of weights
    moved: Floats  # bytes of the activation


def _work(hidden: int, inner: int, rows: Floats, pairs: int) -> _Work:
    total = rows.sum(-1)
    narrow = total // rows.shape[-1] <= FEW_ROWS
    side = np.where(narrow, NARROW, WIDE)
    tiles = np.ceil(rows / side[..., None]).sum(-1)
    depth, read = [], []
    for length, columns in ((hidden, 2 * inner), (inner, hidden)):
        depth.append(np.ceil(tiles * np.ceil(columns / side) / pairs) * length)
        read.append((rows > 0).sum(-1) * float(BYTES * length * columns))
    return _Work(narrow, np.stack(depth, -1), np.stack(read, -1), total * (MOVED * BYTES * inner))


@dataclass(frozen=True)
class GemmModel:
    """Time of one rank's expert products; see the head of this file.

    Attributes
    ----------
    base
        Microseconds.
    bandwidth
        Bytes a microsecond.
    narrow, wide
        Nanoseconds that a wave of tiles of 128 x 128 or 256 x 256 takes for a step of the sum.
    error, worst
        Of the fit: root mean square and largest relative difference from measured times.
    source
        What it was fitted to.
    pairs
        Of SMs.
    """

    base: float
    bandwidth: float
    narrow: float
    wide: float
    error: float
    worst: float
    source: str
    pairs: int = PAIRS

    def __call__(self, hidden: int, inner: int, rows: Floats) -> Floats:
        """Microseconds of ranks whose experts have ``rows`` ``[..., experts]`` tokens."""
        times = self._times(_work(hidden, inner, rows, self.pairs))
        return np.where(rows.sum(-1) > 0, times, 0.0)

    def _times(self, work: _Work) -> Floats:
        compute = work.depth * np.where(work.narrow, self.narrow, self.wide)[..., None] / 1e3
        products = (compute**NORM + (work.read / self.bandwidth) ** NORM) ** (1 / NORM)
        times: Floats = self.base + products.sum(-1) + work.moved / self.bandwidth
        return times


def _splits(total: int, experts: int) -> list[list[int]]:
    """Rows by expert: evenly, geometrically, all to one."""
    even = [total // experts + (i < total % experts) for i in range(experts)]
    halves = [total >> (i + 1) for i in range(experts)]
    halves[-1] += total - sum(halves)
    return [even, halves, [total] + [0] * (experts - 1)]


def fit(points: Sequence[Point], source: str, pairs: int = PAIRS) -> GemmModel:
    """Fit a model to measured times, by the logarithm of their quotient.

    Parameters
    ----------
    points
        Measured; sizes of experts may differ.
    source
        Kept in the model.
    pairs
        Pairs of SMs.

    Returns
    -------
    GemmModel
    """
    from scipy.optimize import minimize  # slow to import, needed here only

    each = [_work(p.hidden, p.inner, np.array(p.rows, dtype=np.float64), pairs) for p in points]
    work = _Work(*(np.stack(part) for part in zip(*each, strict=True)))
    measured = np.array([p.us for p in points])

    def model(logs: Floats, error: float = 0.0, worst: float = 0.0) -> GemmModel:
        base, bandwidth, narrow, wide = (float(v) for v in np.exp(logs))
        return GemmModel(base, bandwidth, narrow, wide, error, worst, source, pairs)

    def cost(logs: Floats) -> float:
        return float((np.log(model(logs)._times(work) / measured) ** 2).sum())

    # Starts around the speed of the fastest measurements.
    step = 1e3 * measured / work.depth.sum(-1)
    least = float(step.min())
    narrow, wide = (float(step[k].min()) if k.any() else least for k in (work.narrow, ~work.narrow))
    best = min(
        (
            minimize(
                cost,
                np.log([part * measured.min(), (work.read.sum(-1) / measured).max(), narrow, wide]),
                method="Nelder-Mead",
                options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-4, "fatol": 1e-8},
            )
            for part in (0.1, 0.5)
        ),
        key=lambda found: float(found.fun),
    )
    off = np.abs(model(best.x)._times(work) / measured - 1)
    return model(best.x, float(np.sqrt((off**2).mean())), float(off.max()))


def packaged(hidden: int, inner: int) -> GemmModel:
    """Model of one H100, fitted to all of `TABLE`.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert; the model is the same for all, its ``source`` says if they were
        measured.

    Returns
    -------
    GemmModel
    """
    points = [
        Point(*size, rows, time)
        for size, lines in TABLE.items()
        for total, times in lines.items()
        for rows, time in zip(_splits(total, TABLE_EXPERTS), times, strict=True)
    ]
    source = "packaged table: one H100 80GB HBM3, torch 2.11, experts 7168x2048 and 2048x768"
    if (hidden, inner) not in TABLE:
        source += "; this size was not measured"
    return fit(points, source)


def measure(
    model: Model,
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
    name: str,
    pairs: int = PAIRS,
) -> tuple[GemmModel, list[Point]]:
    """Time a rank's products on a GPU and fit a model to them.

    Parameters
    ----------
    model
        Sizes.
    weights
        Of all experts of a rank, by `lplb_triton.bench.measure.simulate.draw_experts`.
    timer, device
        What times a launch, and where.
    name
        Of the device.
    pairs
        Pairs of SMs it has.

    Returns
    -------
    tuple of GemmModel and list of Point
        The model, and what it was fitted to.
    """
    points = [
        Point(model.hidden, model.inner, rows, _time_rank(rows, weights, timer, device))
        for total in CALIBRATION_ROWS
        if total <= CALIBRATION_TOKENS * model.top_k
        for rows in _splits(total, len(weights[0]))
    ]
    return fit(points, f"measured on this {name}", pairs), points


def _time_rank(
    rows: Sequence[int],
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
) -> float:
    """Microseconds of one rank's products, measured, with a rest behind.

    At its power limit a GPU slows down, and without the rest what ran before would tell.
    """
    ends = torch.tensor(rows, dtype=torch.int64, device="cpu").cumsum(0).to(torch.int32)
    total = int(ends[-1])
    if total == 0:
        return 0.0
    w_in, w_out = weights
    x = torch.randn(1, w_in.shape[1], dtype=torch.float32, device=device).to(torch.bfloat16)
    x = x.expand(total, -1).contiguous()
    launch = partial(run_experts, x, w_in, w_out, ends.to(device))
    begun = time.perf_counter()
    launch()
    # The start of a graph doesn't show beside work of half a millisecond (at 600 TFLOP/s).
    if total * 2 * (w_in[0].numel() + w_out[0].numel()) > 3e11:
        took = timer.rotation([launch])
    else:
        took = timer.per_call(launch, 100.0)
    time.sleep(REST * (time.perf_counter() - begun))
    return took


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


def possible_slots(model: Model, ep: int, slots: Sequence[int]) -> tuple[int, ...]:
    """Return those of ``slots`` that copies can fill: a rank holds an expert once."""
    return tuple(s for s in slots if 1 <= s <= model.experts - model.experts // ep)


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


def _slowest(gemm: GemmModel, model: Model, parts: Floats, rows: int) -> Floats:
    """Microseconds of the slowest rank of each batch."""
    slowest: Floats = gemm(model.hidden, model.inner, parts * rows).max(1)
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
        never pays up to 131,072; bytes of ``replica_bytes`` per rank and layer. ``pays`` is
        ``"yes"``, ``"no"`` or ``"uncertain"``; ``best``, the ``placement`` and ``slots`` of the
        row with the fewest slots within half a percent of the fastest layer; and
        ``recommended``, the same, or None where balancing doesn't pay.

    Raises
    ------
    ValueError
        If sizes don't fit, or a number of slots can't be laid out.
    """
    if model.experts % ep:
        raise ValueError(f"ep must divide the {model.experts} experts, got {ep}")
    if any(case.history.shape[1] != model.experts for case in cases):
        raise ValueError(f"cases must have the model's {model.experts} experts")
    if not slots or len(possible_slots(model, ep, slots)) < len(slots):
        raise ValueError(f"slots must be in [1, {model.experts - model.experts // ep}] for EP {ep}")
    times = TRAINING if training else 1
    cpu = torch.device("cpu")

    def parts(kind: str, spare: int, split: str) -> Floats:
        found = []
        for case in cases:
            if kind == "in_order":
                placement = Placement.from_phy2log(
                    np.arange(model.experts), ep, n_logical=model.experts
                )
            else:
                placement = make_placement(kind, case.history, ep, spare, cpu, None)
            found.append(_parts(placement, case, split, tolerance))
        return np.concatenate(found)

    in_order = parts("in_order", 0, "even")
    rows = []
    for spare in slots:
        even = parts("eplb", spare, "even")
        for kind in ("eplb", "chain"):
            lp = parts(kind, spare, "lplb")
            curve = [
                _saving(gemm, model, even, lp, size * model.top_k * ep, times) for size in GRID
            ]
            costs = [sum(overhead_us(ep, size).values()) for size in GRID]
            now = _saving(gemm, model, even, lp, tokens * model.top_k * ep, times)
            overhead = overhead_us(ep, tokens)
            total = tokens * model.top_k * ep
            rows.append(
                {
                    "placement": kind,
                    "slots": spare,
                    "layer_us": {
                        name: times * float(_slowest(gemm, model, p, total).mean())
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


def _saving(
    gemm: GemmModel, model: Model, even: Floats, lp: Floats, rows: int, times: int
) -> dict[str, float]:
    saved = times * (_slowest(gemm, model, even, rows) - _slowest(gemm, model, lp, rows))
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


def check_row(
    name: str,
    model: Model,
    gemm: GemmModel,
    case: Case,
    ep: int,
    tokens: int,
    weights: tuple[torch.Tensor, torch.Tensor],
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
    weights
        Of all experts of a rank, the slot included.
    timer, device
        What times a launch, and where.

    Returns
    -------
    dict
        ``model``, ``ep``, ``tokens``; by ``even`` and ``lp``: ``measured_us`` of the slowest rank,
        ``predicted_us``, their relative ``error``, and ``rows`` by expert and ``us`` of all
        ``ranks``.
    """
    placement = make_placement("eplb", case.history, ep, 1, torch.device("cpu"), None)
    counts = case.test[0].sum(0).double()
    counts = (counts * (tokens * model.top_k * ep / counts.sum())).round().long()
    row: dict[str, Any] = {"model": name, "ep": ep, "tokens": tokens}
    for split, balance in (("even", "even"), ("lp", "lplb")):
        rows = slot_tokens(placement, counts, balance, 1e-3)
        ranks = [
            {"rows": rank, "us": _time_rank(rank, weights, timer, device)} for rank in rows.tolist()
        ]
        measured = max(rank["us"] for rank in ranks)
        predicted = float(gemm(model.hidden, model.inner, rows.double().numpy()).max())
        row[split] = {
            "measured_us": measured,
            "predicted_us": predicted,
            "error": predicted / measured - 1,
            "ranks": ranks,
        }
    return row
