"""What a report says of tokens kept on their rank and node, before and after balancing."""

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton import Placement, chain, reference, solve
from lplb_triton.bench import balance
from lplb_triton.bench.report import traffic
from lplb_triton.traces import trace as traces

OPTIONS = balance.Options((8,), (1,), ("chain",))


def make_sources(sources=8):
    """A small trace whose sources have experts of their own that they prefer."""
    counts = make_trace().counts.astype(np.int64)
    batches, layers, _, experts = counts.shape
    rng = np.random.default_rng(1)
    drawn = rng.poisson(counts.sum(2, keepdims=True) / 8 * rng.lognormal(0, 1, (sources, experts)))
    counts = drawn.reshape(batches, layers, sources, experts).astype(np.uint16)
    return traces.Trace(counts, np.arange(batches))


def test_parts_by_hand():
    """Local quotas send every rank's tokens alike; global ones keep what own copies take."""
    # Expert 0 on ranks 0 and 2, expert 1 on ranks 1 and 3; nodes of two ranks.
    parts = np.array([[0.5, 0.0], [0.0, 0.5], [0.5, 0.0], [0.0, 0.5]])
    sent = np.array([[6.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    assert balance.divide_assignments(sent, parts, "local", 2) == (5 / 16, 3 / 16, 0.5)
    # Rank 0 keeps four, rank 3 keeps four; both nodes keep no more, since that is all they take.
    assert balance.divide_assignments(sent, parts, "global", 2) == (0.5, 0.0, 0.5)
    assert balance.divide_assignments(sent, parts, "global", 4) == (0.5, 0.5, 0.0)


def test_parts_are_those_of_exact_quotas():
    """Parts of global quotas are those of the twin that divides them, within its rounding."""
    load = torch.arange(1.0, 17.0)
    placement = chain(load, 8, redundant_per_rank=2)
    rng = np.random.default_rng(0)
    rates = load.numpy() * 200 * rng.lognormal(0, 0.5, (8, 16))
    counts = torch.from_numpy(rng.poisson(rates))
    solution = solve(placement.problem(counts.sum(0)))
    s = placement.structure
    start, cell, index, times, slot = (
        torch.tensor(table)
        for table in (s.copy_start, s.copy_cell, s.copy_index, s.copy_multiplicity, s.copy_slot)
    )
    cumulative = reference.cumulative_shares(solution.shares, cell, index, times, start)
    holder = slot.long() // placement.slots_per_rank
    _, kept = reference.divide_quotas(counts, cumulative, start, holder, 4)
    rank, node, total = kept.sum(0).tolist()
    found = balance.divide_assignments(
        counts.double().numpy(), balance.expand_shares(placement, solution.shares), "global", 4
    )
    assert found == pytest.approx((rank / total, (node - rank) / total, 1 - node / total), abs=1e-3)


def test_traffic_of_a_trace():
    """Nothing is known without sources; with them global quotas keep the most."""
    merged = traces.Trace(make_trace().counts.sum(2, keepdims=True, dtype=np.uint16), np.arange(12))
    assert balance.find_traffic(merged, balance.run(merged, OPTIONS)[0], OPTIONS) is None
    trace = make_sources()
    (cell,) = balance.run(trace, OPTIONS)
    found = balance.find_traffic(trace, cell, OPTIONS, 4)
    rows = {row["way"]: row for row in found["rows"]}
    assert found["ranks_per_node"] == 4 and list(rows) == ["home", "local", "global"]
    for row in rows.values():
        assert row["rank"] + row["node"] + row["across"] == pytest.approx(1)
    assert rows["global"]["across"] < rows["local"]["across"]
    assert rows["global"]["rank"] > rows["local"]["rank"]
    # Experts at home: what a node sends to the experts of its own ranks, by the counts alone.
    (part,) = {result.stretch for result in cell.results}
    counts = trace.counts[part.split : part.stop].astype(np.float64)
    batches, layers, _, experts = counts.shape
    by_node = counts.reshape(batches, layers, 2, 4, 2, experts // 2).sum((3, 5))
    own = np.einsum("blnn->bl", by_node) / by_node.sum((2, 3))
    assert rows["home"]["across"] == pytest.approx(1 - own.mean(), abs=1e-6)
    # Nodes that don't divide the ranks are one.
    alone = balance.find_traffic(trace, cell, OPTIONS, 3)
    assert (alone["ranks_per_node"], alone["nodes"], found["nodes"]) == (8, 1, 2)
    assert alone["rows"][0]["across"] == pytest.approx(0)
    page = traffic.show_traffic(found)
    assert f"{100 * rows['global']['across']:.1f}% across" in page and "Nodes of 4" in page
    assert "advise --trace FILE --ranks-per-node 4" in page
    # `lplb-bench advise` refuses a single node.
    page = traffic.show_traffic(alone)
    assert "All 8 ranks on one node" in page and "lplb-bench advise" not in page


def test_shares_by_expert():
    """Experts on one rank are that rank's alone, with one and with several copies there."""
    placement = Placement.from_phy2log(torch.tensor([0, 0, 1, 2]), 2)
    np.testing.assert_array_equal(balance.expand_shares(placement, None), [[1, 0, 0], [0, 1, 1]])
