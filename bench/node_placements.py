"""Compare placements by the tokens that leave their node; no printing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import Placement, chain, place
from lplb_triton.bench.balance import find_stretches
from lplb_triton.bench.near_plans import (
    LocalityTwin,
    count_node_pairs,
    draw_token_ids,
)
from lplb_triton.placement.near_plans import NearPlans
from lplb_triton.traces.trace import Trace

__all__ = [
    "METHODS",
    "SLACKS",
    "TIMED",
    "make",
    "measure_case",
    "run",
    "split_cases",
    "sum_sources",
]

# Load above the optimum that a plan may take to keep tokens near, as a part of it.
SLACKS = (0.0, 0.01, 0.02)
# Methods without and with a price on traffic; "home" leaves experts at home.
METHODS = (
    *("eplb", "chain", "home-chain", "hottest"),
    *("node-chain", "node-home-chain", "node-place", "node-home-place"),
)
# Methods whose plans are timed.
TIMED = ("chain", "node-chain")

Ints = NDArray[np.int64]


def split_cases(
    trace: Trace, history: float | int, layers: Sequence[int] | None, every: int
) -> list[tuple[str, Ints, Ints]]:
    """Cut a trace into cases: a name, history and test, ``[batches, sources, E]`` each.

    Parameters
    ----------
    trace, history, layers
        As for `lplb_triton.bench.placement.trace_cases`.
    every
        Of the test batches, one in so many is kept.

    Raises
    ------
    ValueError
        If a layer isn't there, or a case has no tokens to judge by.
    """
    found = []
    if layers is not None and max(layers) >= trace.layers:
        raise ValueError(f"the trace has layers 0 to {trace.layers - 1}, got {max(layers)}")
    for layer in range(trace.layers) if layers is None else layers:
        counts = trace.counts[:, layer].astype(np.int64)
        for part in find_stretches(trace.steps, history):
            name = f"layer {layer}, batches {part.start}-{part.stop - 1}"
            test = counts[part.split : part.stop : every]
            test = test[test.sum((1, 2)) > 0]
            if not len(test):
                raise ValueError(f"{name}: no test batch has tokens")
            found.append((name, counts[part.start : part.split], test))
    return found


def sum_sources(counts: Ints, n_nodes: int) -> Ints:
    """Add up the recorded sources of each node, ``[batches, nodes, E]``."""
    batches, sources, experts = counts.shape
    if sources % n_nodes:
        raise ValueError(f"{sources} recorded sources can't be divided among {n_nodes} nodes")
    summed: Ints = counts.reshape(batches, n_nodes, sources // n_nodes, experts).sum(2)
    return summed


def make(
    method: str,
    history: Ints,
    ep: int,
    slots: int,
    ranks_per_node: int,
    price: float | None = None,
    trials: int | None = None,
) -> Placement:
    """Make a placement from history ``[batches, sources, E]`` by one of `METHODS`."""
    by_source = torch.from_numpy(history)
    load = by_source.sum(1)
    if method == "eplb":
        return Placement.from_history(load, ep, redundant_per_rank=slots)
    if method == "hottest":
        return _fill_with_hottest(history, ep, slots, ranks_per_node)
    keep_home = "home" in method
    if not method.startswith("node"):
        return chain(load, ep, redundant_per_rank=slots, keep_home=keep_home)
    nodes: dict[str, Any] = {"ranks_per_node": ranks_per_node, "traffic_price": price}
    common: dict[str, Any] = {"redundant_per_rank": slots, "keep_home": keep_home, **nodes}
    if method.endswith("place"):
        return place(by_source, ep, trials=trials, **common)
    return chain(by_source, ep, **common)


def _fill_with_hottest(history: Ints, ep: int, slots: int, ranks_per_node: int) -> Placement:
    """Leave experts at home, and fill the slots of every node with its hottest foreign experts.

    Each goes to the least loaded rank of the node with a free slot.
    """
    experts = history.shape[2]
    n_nodes, n_local = ep // ranks_per_node, experts // ep
    demand = sum_sources(history, n_nodes).sum(0)
    load = demand.sum(0).reshape(ep, n_local).sum(1).astype(np.float64)
    rows = [list(range(rank * n_local, (rank + 1) * n_local)) for rank in range(ep)]
    home = np.arange(experts) // (n_local * ranks_per_node)
    for node in range(n_nodes):
        order = np.argsort(-demand[node], kind="stable")
        ranks = range(node * ranks_per_node, (node + 1) * ranks_per_node)
        for expert in order[home[order] != node][: slots * ranks_per_node]:
            free = [rank for rank in ranks if len(rows[rank]) < n_local + slots]
            rank = min(free, key=load.__getitem__)
            rows[rank].append(int(expert))
            load[rank] += demand[node, expert]
    return Placement.from_phy2log(np.array(rows).reshape(-1), ep)


def measure_case(
    placement: Placement, test: Ints, ranks_per_node: int, top_k: int, seed: int = 0
) -> dict[str, float]:
    """Judge a placement by test batches ``[batches, sources, E]``.

    Returns
    -------
    dict
        Means over the batches: ``imbalance`` of the LP's optimum; the parts of the assignments
        that leave their node, ``local`` and ``own`` by that plan with local quotas and with the
        own node first, ``slack 0``, ``slack 0.01`` and so on by the plan that keeps most near with
        so much more load, and ``balancer`` by that of ``Balancer(locality="node")``, whose largest
        load is ``balancer_imbalance``; ``pairs``, other nodes that a token is sent to by the plan
        with 1%, its ids drawn by `draw_token_ids`, and ``pairs_local`` by the LP's plan with local
        quotas.
    """
    rng = np.random.default_rng(seed)
    n_nodes = placement.ep_size // ranks_per_node
    plans, twin = NearPlans(placement, ranks_per_node), LocalityTwin(placement, ranks_per_node)
    found: dict[str, list[float]] = {}
    for by_source, counts in zip(test, sum_sources(test, n_nodes), strict=True):
        least, plan = plans.balance(counts)
        values = {
            "imbalance": least / (counts.sum() / placement.ep_size),
            "local": plans.measure_far(counts, plan, own_first=False),
            "own": plans.measure_far(counts, plan),
        }
        judged = twin.plan(counts)
        values["balancer"] = judged.far
        values["balancer_imbalance"] = judged.max_load / (counts.sum() / placement.ep_size)
        near = plan
        for slack in SLACKS:
            # HiGHS accepts loads that exceed a limit by 1e-7.
            far, kept = plans.keep_near(counts, least * (1 + max(slack, 1e-6)))
            values[f"slack {slack:g}"] = far
            near = kept if slack == SLACKS[1] else near
        values["pairs"] = _count_pairs(by_source, plans.divide_tokens(counts, near), top_k, rng)
        alike = plans.divide_alike(counts, plan)
        values["pairs_local"] = _count_pairs(by_source, alike, top_k, rng)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(value)) for name, value in found.items()}


def _count_pairs(
    by_source: Ints, sent: NDArray[np.float64], top_k: int, rng: np.random.Generator
) -> float:
    """Count the other nodes that a token is sent to, in the mean over the tokens of a batch.

    ``sent`` ``[nodes, E, nodes]`` is the part of a node's tokens by target.
    """
    per_node = len(by_source) // len(sent)
    pairs = tokens = 0
    for source, counts in enumerate(by_source):
        ids = draw_token_ids(counts, top_k, rng)
        node = source // per_node
        pairs += count_node_pairs(ids, node, sent[node], rng)
        tokens += len(ids)
    return pairs / max(1, tokens)


def run(
    cases: Sequence[tuple[str, Ints, Ints]],
    ep: Sequence[int],
    slots: Sequence[int],
    ranks_per_node: int,
    top_k: int,
    price: float | None = None,
    trials: int | None = None,
    progress: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Compare all methods on all cases.

    Parameters
    ----------
    cases
        What `split_cases` returned.
    ep, slots
        Ranks, and redundant slots on each.
    ranks_per_node
        Divides each number of ranks into at least two nodes.
    top_k
        Experts of a token.
    price, trials
        Of `lplb_triton.chain` and `lplb_triton.place`; ``None`` for their defaults.
    progress
        Called once for each case of each combination.

    Returns
    -------
    list of dict
        ``ep``, ``slots``, ``cases`` (names) and ``methods``: by method, what `measure_case`
        returns and ``seconds`` to make the placement, one value for each case.
    """
    rows: list[dict[str, Any]] = []
    for n_ranks in ep:
        for spare in slots:
            found: dict[str, dict[str, list[float]]] = {}
            for _, history, test in cases:
                for method in METHODS:
                    begin = time.perf_counter()
                    placement = make(method, history, n_ranks, spare, ranks_per_node, price, trials)
                    seconds = time.perf_counter() - begin
                    values = measure_case(placement, test, ranks_per_node, top_k)
                    for name, value in {**values, "seconds": seconds}.items():
                        found.setdefault(method, {}).setdefault(name, []).append(value)
                if progress is not None:
                    progress()
            names = [name for name, _, _ in cases]
            rows.append({"ep": n_ranks, "slots": spare, "cases": names, "methods": found})
    return rows
