"""Simulate expert parallelism on one GPU by timing the expert products of every rank.

The ranks of an EP group are simulated one after the other. Each slot gets the tokens that the
recorded batch, the placement and the balancing give it, and the grouped matrix products of the rank
are timed; the layer takes as long as its slowest rank. Communication, routing, the balancing itself
and the effects of GPUs on each other are left out.

========  ======================================================================================
``none``  experts in order, the same number on each rank, no replicas
``eplb``  EPLB's placement by the history, each expert's tokens split evenly over its copies
``lplb``  the same placement, tokens split by the LP of the batch
``even``  the upper limit: the same number of tokens for every expert, no replicas
========  ======================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lplb_triton import Placement, reference, solve
from lplb_triton.bench.balance import check_tokens, find_stretches, make_placement
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.solution import SHARE_BITS
from lplb_triton.traces.trace import Trace

__all__ = [
    "BALANCES",
    "choose_batches",
    "draw_experts",
    "run_experts",
    "simulate_ep_size",
    "split_tokens",
]

BALANCES = ("none", "eplb", "lplb", "even")


def choose_batches(trace: Trace, per_stretch: int) -> list[tuple[int, int, int, int]]:
    """Choose test batches, evenly spread over the second half of each stretch of the trace.

    Parameters
    ----------
    trace
        Recorded counts.
    per_stretch
        Batches of each layer in each stretch.

    Returns
    -------
    list of (layer, batch, start, split)
        Placements are made from the batches from ``start`` to ``split``.
    """
    chosen = []
    for part in find_stretches(trace.steps, 0.5):
        tested = np.linspace(part.split, part.stop - 1, per_stretch).round().astype(int)
        for layer in range(trace.layers):
            chosen += [(layer, int(batch), part.start, part.split) for batch in tested]
    return chosen


def split_tokens(
    placement: Placement, counts: torch.Tensor, balance: str, tolerance: float
) -> torch.Tensor:
    """Split the tokens of a batch over the slots.

    Parameters
    ----------
    placement
        Slots of every expert.
    counts
        ``[n_logical]`` int64, tokens of each expert.
    balance
        ``lplb``: split by the LP; anything else: evenly over the copies.
    tolerance
        Certified gap of the LP.

    Returns
    -------
    torch.Tensor
        ``[ep_size, slots_per_rank]`` int64; they add up to the counts.

    Raises
    ------
    TypeError, ValueError
        If ``counts`` holds anything but integers from 0 to `lplb_triton.traces.trace.MOST_TOKENS`.
    SolveError
        If the LP isn't certified.
    """
    check_tokens("counts", counts)
    s = placement.structure
    start = torch.tensor(s.copy_start, device="cpu")
    copies = placement.logcnt.long()
    if balance == "lplb":
        solution = solve(placement.problem(counts), tolerance=tolerance, backend="torch")
        solution.check()
        tables = (s.copy_cell, s.copy_index, s.copy_multiplicity, s.copy_start)
        cumulative = reference.cumulative_shares(
            solution.shares, *(torch.tensor(table, device="cpu") for table in tables)
        )
    else:
        number = torch.arange(placement.n_physical, device="cpu")
        number -= start[:-1].repeat_interleave(copies)
        cumulative = (number + 1 << SHARE_BITS) // copies.repeat_interleave(copies)
    tokens = torch.zeros(placement.n_physical, dtype=torch.int64, device="cpu")
    slot = torch.tensor(s.copy_slot, device="cpu").long()
    tokens[slot] = reference.copy_quotas(counts, cumulative, start, 0)
    return tokens.reshape(placement.ep_size, -1)


def draw_experts(
    hidden: int, inner: int, experts: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw weights of SwiGLU experts, the same for all, since times don't depend on the values.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert.
    experts
        Number of experts.
    device
        Device of the weights.

    Returns
    -------
    tuple of torch.Tensor
        bfloat16 ``[experts, hidden, 2 * inner]`` and ``[experts, inner, hidden]``.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        values = _normal((1, rows, columns), generator) / math.sqrt(rows)
        # One expert is drawn and repeated: drawing gigabytes takes long.
        return values.to(device=device, dtype=torch.bfloat16).repeat(experts, 1, 1)

    return draw(hidden, 2 * inner), draw(inner, hidden)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw on the CPU in float32, whatever torch's default device and dtype are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def run_experts(
    x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Compute both grouped products of SwiGLU experts.

    Parameters
    ----------
    x
        ``[rows, hidden]`` bfloat16, by expert.
    w_in, w_out
        As `draw_experts` makes them.
    ends
        ``[experts]`` int32, where each expert's rows end.

    Returns
    -------
    torch.Tensor
        ``[rows, hidden]``.
    """
    matmul = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    gate, value = matmul(x, w_in, offs=ends).chunk(2, dim=-1)
    hidden: torch.Tensor = functional.silu(gate) * value
    product: torch.Tensor = matmul(hidden, w_out, offs=ends)
    return product


def simulate_ep_size(
    trace: Trace,
    ep: int,
    timer: Timer,
    device: torch.device | str,
    *,
    slots: int = 1,
    tokens: int = 16384,
    hidden: int = 2048,
    inner: int = 768,
    per_stretch: int = 1,
    tolerance: float = 1e-3,
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Simulate one EP size.

    Parameters
    ----------
    trace
        Recorded counts; each batch is scaled to ``tokens`` per rank.
    ep
        Number of ranks.
    timer, device
        Timer of the launches, and the device that they run on.
    slots
        Redundant slots per rank, for ``eplb`` and ``lplb``.
    tokens
        Rows that a rank's experts have on average: tokens of a rank times ``top_k``.
    hidden, inner
        Sizes of the experts; products are in bfloat16.
    per_stretch
        Test batches of each layer in each stretch of the trace.
    tolerance
        Certified gap of the LPs.
    progress
        Called after each batch.

    Returns
    -------
    dict
        ``ep``, ``slots``, ``batches`` and, by balance, ``slowest_us`` (median over the batches
        of the slowest rank's time), ``mean_us`` (the same of the ranks' mean time), ``imbalance``
        (median of largest over mean tokens) and ``over_even`` (median over the batches of the
        slowest rank's time divided by that of ``even``).

    Raises
    ------
    ValueError
        If ``ep`` doesn't divide the experts.
    """
    totals = torch.from_numpy(trace.totals())
    chosen = choose_batches(trace, per_stretch)
    weights = draw_experts(hidden, inner, trace.experts // ep + slots, device)
    row_of_x = _normal((1, hidden), torch.Generator("cpu").manual_seed(0))
    row_of_x = row_of_x.to(device=device, dtype=torch.bfloat16)
    found: dict[str, list[tuple[float, float, float]]] = {balance: [] for balance in BALANCES}
    for layer, batch, first, split in chosen:
        history = totals[first:split, layer].sum(0)
        counts = totals[batch, layer].double()
        counts = (counts * (tokens * ep / counts.sum())).round().long()
        per_slot = _split_by_balance(history, counts, ep, slots, tolerance)
        per_slot["even"] = torch.full(
            (ep, trace.experts // ep), tokens * ep // trace.experts, dtype=torch.int64, device="cpu"
        )
        largest = max(int(table.sum(1).max()) for table in per_slot.values())
        x = row_of_x.expand(largest, hidden).contiguous()
        for balance, table in per_slot.items():
            # Every rank of an even split has the same work, so one is enough.
            times = _time_ranks(table[:1] if balance == "even" else table, x, weights, timer)
            load = table.sum(1).double()
            ratio = float(load.max() / load.mean())
            found[balance].append((max(times), sum(times) / len(times), ratio))
        if progress is not None:
            progress()
    return {"ep": ep, "slots": slots, "batches": len(chosen), **_summarize(found)}


def _split_by_balance(
    history: torch.Tensor, counts: torch.Tensor, ep: int, slots: int, tolerance: float
) -> dict[str, torch.Tensor]:
    """Split a batch by each of ``none``, ``eplb`` and ``lplb``, as `split_tokens` does."""
    in_order = make_placement("none", history, ep, 0)
    replicated = make_placement("eplb", history, ep, slots)
    return {
        "none": split_tokens(in_order, counts, "none", tolerance),
        "eplb": split_tokens(replicated, counts, "eplb", tolerance),
        "lplb": split_tokens(replicated, counts, "lplb", tolerance),
    }


def _time_ranks(
    table: torch.Tensor, x: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], timer: Timer
) -> list[float]:
    """Time the products of each rank, in microseconds.

    ``table`` ``[ranks, slots]`` has the rows of every slot, ``x`` at least as many rows as a rank.
    """
    ends = table.cumsum(1).to(torch.int32)
    w_in, w_out = (weight[: table.shape[1]] for weight in weights)
    times = []
    for rank_ends in ends:
        rows = int(rank_ends[-1])
        if rows == 0:
            times.append(0.0)
            continue
        launch = partial(run_experts, x[:rows], w_in, w_out, rank_ends.to(x.device))
        launch()
        times.append(timer.time_call(launch, 1e3))
    return times


def _summarize(found: dict[str, list[tuple[float, float, float]]]) -> dict[str, dict[str, float]]:
    """Take medians over the batches of slowest time, mean time and imbalance, by balance."""
    row = {}
    ceiling = np.array(found["even"])[:, 0]
    for balance, values in found.items():
        figures = np.array(values)
        slowest, mean, imbalance = np.median(figures, axis=0)
        row[balance] = {
            "slowest_us": float(slowest),
            "mean_us": float(mean),
            "imbalance": float(imbalance),
            "over_even": float(np.median(figures[:, 0] / ceiling)),
        }
    return row
