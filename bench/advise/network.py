"""Price dispatch and combine where ranks span nodes, against what imbalance costs.

A token's row goes once to each node that holds some of its experts, as DeepEP sends it, and from
there to its ranks over the node's own links. The combine sends as many rows back. How many nodes a
token goes to is predicted from counts as if its experts were drawn independently. Both paths work
at once, so the slower of them counts; neither is taken to overlap with expert products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lplb_triton._layout import NEAR_MOST_RANKS
from lplb_triton._locality import explain_near_limits
from lplb_triton.bench.advise.models import BYTES, Model
from lplb_triton.bench.balance import spread_sources
from lplb_triton.bench.measure.simulate import split_tokens
from lplb_triton.bench.near_plans import LocalityTwin
from lplb_triton.bench.placement import Case, make_by_history
from lplb_triton.bench.scale import count_wire_bytes
from lplb_triton.bench.types import Floats, Row
from lplb_triton.costs.gemm import GemmModel
from lplb_triton.placement import Placement

__all__ = [
    "NETWORK_GIGABYTES_PER_SECOND",
    "NODE_GIGABYTES_PER_SECOND",
    "Network",
    "advise_network",
    "choose_network_row",
    "count_pairs",
    "move_between_nodes",
]

# What rates of a rank are taken to be unless given: over NVLink, and over a port of 400 Gbit/s.
NODE_GIGABYTES_PER_SECOND, NETWORK_GIGABYTES_PER_SECOND = 350.0, 50.0
# Products of both passes take three times those of the forward pass, dispatch and combine twice.
TRAINING_PRODUCTS, TRAINING_ROWS = 3, 2
# Placements: EPLB's, a chain, and one with a price on tokens that leave their node.
PRICED = "priced"
KINDS = ("eplb", "chain", PRICED)
_WAYS = (*((kind, quotas) for kind in KINDS for quotas in ("local", "global")), (PRICED, "near"))
# Microseconds that a near plan adds to a run on one H200, by the ranks up to which it does; see
# docs/results/placement-nodes.md.
NEAR_US = ((16, 18.0), (32, 10.0), (NEAR_MOST_RANKS, 15.0))
# Batches of each case, and how many tokens each is scaled to.
BATCHES, WHOLE = 4, 10**8
# Rows are worth a difference of half a percent.
NEAR = 1.005


class Network(NamedTuple):
    """Nodes and their links.

    Attributes
    ----------
    ranks_per_node
        Consecutive ranks of a node; divides the ranks into several nodes.
    node_rate, network_rate
        Gigabytes per second that a rank sends, and receives, within its node and across nodes.
    """

    ranks_per_node: int
    node_rate: float = NODE_GIGABYTES_PER_SECOND
    network_rate: float = NETWORK_GIGABYTES_PER_SECOND


class _Batch(NamedTuple):
    """Parts of all assignments of a batch."""

    sent: Floats
    """``[nodes, experts]`` by the node that sends them."""
    taken: Floats
    """``[ranks, experts]`` by the rank that takes them."""
    rows: Floats
    """``[ranks, slots]`` by slot."""


def advise_network(
    model: Model,
    gemm: GemmModel,
    cases: Sequence[Case],
    ep: int,
    tokens: int,
    slots: Sequence[int],
    network: Network,
    *,
    training: bool = False,
    tolerance: float = 1e-3,
) -> list[Row]:
    """Predict products, and dispatch and combine, of placements and quotas.

    Parameters
    ----------
    model, gemm, cases, ep, tokens, slots
        As `lplb_triton.bench.advise.advise` takes them. The cases' sources are spread evenly over
        the nodes, in order; a single source sends as much from each.
    network
        Nodes and rates.
    training
        Count the backward pass too.
    tolerance
        Certified gap of the LPs.

    Returns
    -------
    list of dict
        Means over the batches, by ``placement`` (`KINDS`), ``slots`` and ``quotas`` (``"even"`` for
        EPLB's copies that share evenly, ``"near"`` for exact ones by the plan of
        ``locality="node"``): ``across``, the part of the assignments that leave their node;
        ``nodes``, other nodes that a token is sent to; ``across_us`` and ``within_us`` of the
        busiest node's ranks, ``network_us``, the larger of both for each batch; ``counts_us``, to
        gather the counts across nodes; ``plan_us``, of the near plan; ``layer_us``, products of the
        slowest rank; ``waiting_us``, the part of these that a perfect balance would save;
        ``total_us``, network, counts, plan and layer.

    Raises
    ------
    ValueError
        If the ranks don't make up several nodes.
    """
    size = network.ranks_per_node
    if ep % size or not 1 <= size < ep:
        raise ValueError(f"ranks_per_node must divide {ep} ranks into several nodes, got {size}")
    counts_us = _price_counts(ep, model.experts, network)
    made: dict[tuple[str, int], list[Placement]] = {}
    divided: dict[tuple[str, int, str], list[_Batch]] = {}
    rows = []
    for kind, quotas, spare in (
        *(("eplb", "even", spare) for spare in slots),
        *((*way, spare) for spare in slots for way in _WAYS),
    ):
        if quotas == "near" and explain_near_limits(ep, model.experts // ep + spare) is not None:
            continue
        if (kind, spare) not in made:
            made[kind, spare] = [_place(case, ep, spare, kind, size) for case in cases]
        split = quotas if quotas in ("even", "near") else "lplb"
        if (kind, spare, split) not in divided:
            batches = _split_cases(cases, made[kind, spare], split, tolerance, size)
            divided[kind, spare, split] = list(batches)
        found = divided[kind, spare, split]
        exact = "global" if quotas == "near" else "local" if quotas == "even" else quotas
        rows.append(_predict(model, gemm, tokens, network, found, exact, training))
        rows[-1] |= {"placement": kind, "slots": spare, "quotas": quotas}
        rows[-1]["counts_us"] = 0.0 if quotas == "even" else counts_us[exact]
        near_us = next((us for most, us in NEAR_US if ep <= most), 0.0)
        rows[-1]["plan_us"] = near_us if quotas == "near" else 0.0
    for row in rows:
        parts = ("layer_us", "network_us", "counts_us", "plan_us")
        row["total_us"] = sum(row[part] for part in parts)
    return rows


def _price_counts(ep: int, experts: int, network: Network) -> dict[str, float]:
    """Microseconds that the counts of a batch take across nodes, by quotas."""
    found = {}
    for row in count_wire_bytes(ep, experts, network.ranks_per_node):
        by_nodes = network.ranks_per_node > 1
        if row["sync"] == ("hierarchical" if by_nodes else "distributed"):
            for quotas in ("local", "global") if row["quotas"] == "any" else (row["quotas"],):
                found[quotas] = row["across"] / network.network_rate / 1e3
    return found


def _place(case: Case, ep: int, spare: int, kind: str, ranks_per_node: int) -> Placement:
    """Place experts by a case's history, for `PRICED` by source."""
    device = torch.device("cpu")
    if kind != PRICED:
        return make_by_history(kind, case.history, ep, spare, device, None)
    nodes = ep // ranks_per_node
    by_source = case.history[:, None] if case.by_source is None else case.by_source
    spread = np.stack([spread_sources(one, nodes) for one in by_source.double().numpy()])
    price = {"ranks_per_node": ranks_per_node, "traffic_price": None}
    return make_by_history(
        "chain", torch.from_numpy(spread), ep, spare, device, None, nodes=price
    )  # fmt: skip


def _split_cases(
    cases: Sequence[Case],
    placements: Sequence[Placement],
    split: str,
    tolerance: float,
    ranks_per_node: int,
) -> Iterator[_Batch]:
    """Divide a few batches of each case by its placement: ``"even"``, ``"lplb"`` or ``"near"``."""
    for case, placement in zip(cases, placements, strict=True):
        n_nodes = placement.ep_size // ranks_per_node
        twin = LocalityTwin(placement, ranks_per_node) if split == "near" else None
        chosen = np.linspace(0, len(case.test) - 1, min(BATCHES, len(case.test))).round()
        for by_source in case.test[torch.from_numpy(chosen.astype(np.int64))].double():
            total = float(by_source.sum())
            if total == 0:
                continue
            sent = spread_sources(by_source.numpy() / total, n_nodes)
            if twin is not None:
                rows = twin.divide((sent * WHOLE).round().astype(np.int64)) / WHOLE
            else:
                counts = (by_source.sum(0) * (WHOLE / total)).round().long()
                rows = split_tokens(placement, counts, split, tolerance).double().numpy() / WHOLE
            yield _Batch(sent, _sum_by_rank(placement, rows), rows)


def _sum_by_rank(placement: Placement, rows: Floats) -> Floats:
    """Sum what slots take by rank and expert, ``[ranks, experts]``."""
    taken = np.zeros((placement.ep_size, placement.n_logical))
    held = placement.phy2log.long().numpy().reshape(placement.ep_size, -1)
    np.add.at(taken, (np.arange(placement.ep_size)[:, None], held), rows)
    return taken


def move_between_nodes(sent: Floats, taken: Floats, quotas: str) -> Floats:
    """Divide what nodes send over the nodes that take it.

    Parameters
    ----------
    sent, taken
        ``[nodes, experts]``, with the same sums by expert.
    quotas
        ``"local"``: every node divides its tokens of an expert as all of them are divided.
        ``"global"``: a node's copies take its own tokens first, and the rest is divided as what is
        left of the copies.

    Returns
    -------
    numpy.ndarray
        ``[nodes, nodes]``, from the node of the row to that of the column.
    """
    kept = np.minimum(sent, taken) if quotas == "global" else np.zeros_like(sent)
    rest, wanted = sent - kept, taken - kept
    total = wanted.sum(0)
    shares = np.divide(wanted, total, out=np.zeros_like(wanted), where=total > 0)
    flows: Floats = rest @ shares.T + np.diag(kept.sum(1))
    return flows


def count_pairs(flows: Floats, top_k: int) -> Floats:
    """Predict distinct pairs of a token and a node from assignments, if experts are independent.

    Parameters
    ----------
    flows
        ``[sources, nodes]`` assignments, in any unit.
    top_k
        Assignments of a token.

    Returns
    -------
    numpy.ndarray
        Of the same shape and in the same unit; at most the assignments.
    """
    total = flows.sum(1, keepdims=True)
    part = np.divide(flows, total, out=np.zeros_like(flows), where=total > 0)
    pairs: Floats = total / top_k * (1 - (1 - part) ** top_k)
    return pairs


def _predict(
    model: Model,
    gemm: GemmModel,
    tokens: int,
    network: Network,
    batches: Sequence[_Batch],
    quotas: str,
    training: bool,
) -> dict[str, Any]:
    """Predict the figures of one placement, means over the batches."""
    ep = len(batches[0].taken)
    nodes = ep // network.ranks_per_node
    assignments = float(tokens * model.top_k * ep)
    # A row goes there and its result comes back.
    row_kilobytes = 2 * BYTES * model.hidden / 1e3
    passes = TRAINING_ROWS if training else 1
    found: dict[str, list[float]] = {}
    for batch in batches:
        taken = batch.taken.reshape(nodes, network.ranks_per_node, -1).sum(1)
        flows = move_between_nodes(batch.sent, taken, quotas)
        pairs = assignments * count_pairs(flows, model.top_k)
        np.fill_diagonal(pairs, 0)
        busiest = max(pairs.sum(0).max(), pairs.sum(1).max()) / network.ranks_per_node
        across_us = passes * row_kilobytes * busiest / network.network_rate
        most = assignments * batch.taken.sum(1).max()
        within_us = passes * row_kilobytes * most / network.node_rate
        products = gemm(model.hidden, model.inner, batch.rows * assignments)
        products = products * (TRAINING_PRODUCTS if training else 1)
        values = {
            "across": 1 - float(np.trace(flows) / flows.sum()),
            "nodes": float(pairs.sum()) / (tokens * ep),
            "across_us": float(across_us),
            "within_us": float(within_us),
            "network_us": float(max(across_us, within_us)),
            "layer_us": float(products.max()),
            "waiting_us": float(products.max() - products.mean()),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def choose_network_row(rows: Sequence[Row]) -> Row:
    """Choose the fewest slots whose total is within half a percent of the least.

    A near plan, which live slots and plans by time exclude, is chosen only if it gains more.

    Parameters
    ----------
    rows
        From `advise_network`; EPLB's even split is no choice.

    Returns
    -------
    dict
        One of the rows.
    """
    rows = [row for row in rows if row["quotas"] != "even"]
    plain = [row for row in rows if row["quotas"] != "near"]
    least = min(row["total_us"] for row in plain)
    if NEAR * min(row["total_us"] for row in rows) < least:
        plain, least = rows, min(row["total_us"] for row in rows)
    close = [row for row in plain if row["total_us"] <= NEAR * least]
    return min(close, key=lambda row: (row["slots"], row["total_us"]))
