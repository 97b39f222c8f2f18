"""A simulation of expert parallelism on one GPU: every rank's expert products, timed for real.

The ranks of an EP group are simulated one after the other. Each gets the tokens that the recorded
batch, the placement and the balancing give it, slot by slot, and its grouped matrix products are
timed; the layer takes as long as its slowest rank. Communication, routing and the balancing itself
are left out, and so are the effects of GPUs on each other.

========  ======================================================================================
``none``  experts in order, as many on each rank, no replicas
``eplb``  EPLB's placement by the history, each expert's tokens split evenly over its copies
``lplb``  the same placement, tokens split by the LP of the batch
``even``  the ceiling: as many tokens on every rank and for every expert, no replicas
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
    """Tokens of every slot.

    Parameters
    ----------
    placement
        Where experts are.
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
    """Draw weights of SwiGLU experts, all alike: times don't depend on the values.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert.
    experts
        How many.
    device
        Where.

    Returns
    -------
    tuple of torch.Tensor
        bfloat16 ``[experts, hidden, 2 * inner]`` and ``[experts, inner, hidden]``.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        values = _normal((1, rows, columns), generator) / math.sqrt(rows)
        # Drawing gigabytes takes long.
        return values.to(device=device, dtype=torch.bfloat16).repeat(experts, 1, 1)

    return draw(hidden, 2 * inner), draw(inner, hidden)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw on the CPU in float32, whatever the user's defaults are."""
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
        What times a launch, and where.
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
    widest = trace.experts // ep + slots
    w_in, w_out = draw_experts(hidden, inner, widest, device)
    row_of_x = _normal((1, hidden), torch.Generator("cpu").manual_seed(0))
    row_of_x = row_of_x.to(device=device, dtype=torch.bfloat16)
    found: dict[str, list[tuple[float, float, float]]] = {balance: [] for balance in BALANCES}
    for layer, batch, first, split in chosen:
        history = totals[first:split, layer].sum(0)
        in_order = make_placement("none", history, ep, 0)
        replicated = make_placement("eplb", history, ep, slots)
        counts = totals[batch, layer].double()
        counts = (counts * (tokens * ep / counts.sum())).round().long()
        even = torch.full(
            (ep, trace.experts // ep), tokens * ep // trace.experts, dtype=torch.int64, device="cpu"
        )
        per_slot = {
            "none": split_tokens(in_order, counts, "none", tolerance),
            "eplb": split_tokens(replicated, counts, "eplb", tolerance),
            "lplb": split_tokens(replicated, counts, "lplb", tolerance),
            "even": even,
        }
        largest = max(int(table.sum(1).max()) for table in per_slot.values())
        x = row_of_x.expand(largest, hidden).contiguous()
        for balance, table in per_slot.items():
            ends = table.cumsum(1).to(torch.int32)
            n = table.shape[1]
            times = []
            # Every rank of an even split has the same to do.
            for rank in range(1 if balance == "even" else ep):
                rows = int(ends[rank, -1])
                if rows == 0:
                    times.append(0.0)
                    continue
                launch = partial(run_experts, x[:rows], w_in[:n], w_out[:n], ends[rank].to(device))
                launch()
                times.append(timer.time_call(launch, 1e3))
            load = table.sum(1).double()
            ratio = float(load.max() / load.mean())
            found[balance].append((max(times), sum(times) / len(times), ratio))
        if progress is not None:
            progress()
    row: dict[str, Any] = {"ep": ep, "slots": slots, "batches": len(chosen)}
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
