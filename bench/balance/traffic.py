"""Count what stays on a rank, stays on its node, and leaves it, under local and global quotas."""

from __future__ import annotations

import numpy as np
import torch

from lplb_triton import Placement, solve
from lplb_triton.bench.balance.changes import share_programs, take_parts
from lplb_triton.bench.balance.placements import make_placement
from lplb_triton.bench.balance.replay import Options
from lplb_triton.bench.balance.results import Cell
from lplb_triton.bench.types import Floats, Row
from lplb_triton.traces.trace import Trace

__all__ = [
    "RANKS_PER_NODE",
    "divide_assignments",
    "expand_shares",
    "find_traffic",
    "spread_sources",
]

# Ranks of a node unless another number is given.
RANKS_PER_NODE = 8


def find_traffic(
    trace: Trace, cell: Cell, options: Options, ranks_per_node: int = RANKS_PER_NODE
) -> Row | None:
    """Count the assignments kept on rank and node, and sent across, before and after balancing.

    Parameters
    ----------
    trace, options
        As given to `lplb_triton.bench.balance.run`.
    cell
        One of its results.
    ranks_per_node
        Consecutive ranks of a node; where they don't divide the ranks, all are on one node.

    Returns
    -------
    dict or None
        ``ranks_per_node``, ``nodes`` (how many there are), and ``rows`` with parts of all
        assignments, means over at most about 128 batches: ``way`` (``"home"``, experts in order
        without copies; ``"local"`` and ``"global"``, the LP with these quotas), ``rank``, ``node``
        (another rank of it) and ``across``. None where the trace has one source only, so that
        nobody knows who sends what.
    """
    if trace.sources < 2:
        return None
    size = ranks_per_node if cell.ep % ranks_per_node == 0 else cell.ep
    found: dict[str, list[tuple[float, float, float]]] = {"home": [], "local": [], "global": []}
    for part in take_parts(trace, cell, per_part=share_programs(cell)):
        home = make_placement("none", part.history, cell.ep, 0)
        plans = _solve_parts(part.placement, part.counts.sum(1), options)
        at_home = expand_shares(home, None)
        for plan, by_source in zip(plans, part.counts.numpy(), strict=True):
            sent = spread_sources(by_source.astype(np.float64), cell.ep)
            if not sent.any():
                continue
            found["home"].append(divide_assignments(sent, at_home, "local", size))
            for quotas in ("local", "global"):
                found[quotas].append(divide_assignments(sent, plan, quotas, size))
    if not found["home"]:
        return None
    rows = []
    for way, values in found.items():
        rank, node, across = (float(value) for value in np.mean(values, axis=0))
        rows.append({"way": way, "rank": rank, "node": node, "across": across})
    return {"ranks_per_node": size, "nodes": cell.ep // size, "rows": rows}


def _solve_parts(placement: Placement, totals: torch.Tensor, options: Options) -> list[Floats]:
    """Solve batches; return the part of an expert's tokens that a rank takes in each."""
    if placement.n_copies == placement.n_logical:
        return [expand_shares(placement, None)] * len(totals)
    solution = solve(
        placement.problem(totals.to(options.device)),
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
        backend=options.backend,
    )
    shares = solution.shares.cpu().double()
    shares = shares.reshape(len(totals), placement.n_group, placement.group_size, -1)
    return [expand_shares(placement, one) for one in shares]


def expand_shares(placement: Placement, shares: torch.Tensor | None) -> Floats:
    """Spread shares by column over experts.

    Parameters
    ----------
    placement
        Where experts are.
    shares
        ``[n_group, group_size, max_columns]`` on the CPU; None where no expert has copies on
        several ranks.

    Returns
    -------
    numpy.ndarray
        ``[ep_size, n_logical]`` float64, the part of an expert's tokens that a rank takes.
    """
    structure = placement.structure
    held = placement.phy2log.long().numpy().reshape(placement.ep_size, -1)
    parts = np.zeros((placement.n_group, placement.group_size, placement.n_logical))
    by_rank = parts.reshape(placement.ep_size, -1)
    by_rank[np.arange(placement.ep_size)[:, None], held] = 1.0
    if shares is not None:
        of = np.flatnonzero(structure.column_of >= 0)
        group, column = structure.cell_group[of], structure.column_of[of]
        parts[group, :, of] = shares.double().numpy()[group, :, column]
    return by_rank


def spread_sources(by_source: Floats, places: int) -> Floats:
    """Spread what sources send over ranks or nodes, in order.

    Parameters
    ----------
    by_source
        ``[sources, experts]``. Sources and places divide the same interval evenly.
    places
        Number of ranks or nodes.

    Returns
    -------
    numpy.ndarray
        ``[places, experts]``.
    """
    ends = np.linspace(0, len(by_source), places + 1)
    first = np.arange(len(by_source))
    parts = np.minimum(ends[1:, None], first + 1) - np.maximum(ends[:-1, None], first)
    spread: Floats = parts.clip(min=0) @ by_source
    return spread


def divide_assignments(
    sent: Floats, parts: Floats, quotas: str, ranks_per_node: int
) -> tuple[float, float, float]:
    """Divide assignments into those kept on the rank, kept on the node, and sent across.

    Parameters
    ----------
    sent
        ``[ranks, experts]``, by the rank that sends them, some in all.
    parts
        ``[ranks, experts]``, the part of an expert's tokens that a rank takes.
    quotas
        ``"local"``: every rank divides its own tokens by these parts. ``"global"``: ranks, then
        nodes, keep what their copies take.
    ranks_per_node
        Consecutive ranks of a node.

    Returns
    -------
    tuple of float
        Parts of all assignments, which add up to 1.
    """
    sent_by_node = sent.reshape(-1, ranks_per_node, sent.shape[1]).sum(1)
    by_node = parts.reshape(-1, ranks_per_node, parts.shape[1]).sum(1)
    total = sent.sum(0)
    if quotas == "local":
        rank, node = (sent * parts).sum(), (sent_by_node * by_node).sum()
    else:
        rank = np.minimum(sent, parts * total).sum()
        node = np.minimum(sent_by_node, by_node * total).sum()
    everything = total.sum()
    return (
        float(rank / everything),
        float((node - rank) / everything),
        float(1 - node / everything),
    )
