"""The price of dispatch and combine in `advise`: flows, pairs, rows and the command."""

import json

import numpy as np
import pytest
import torch

from lplb_triton import _locality
from lplb_triton.bench import advise, cli, placement
from lplb_triton.bench.advise.models import Model
from lplb_triton.bench.advise.network import count_pairs, move_between_nodes
from lplb_triton.bench.balance import spread_sources
from lplb_triton.costs.gemm import GemmModel

GEMM = GemmModel(
    base=1, bandwidth=1e4, narrow=20, wide=60, pairs=4, error=0.0, worst=0.0, source=""
)
SMALL = Model(hidden=64, inner=32, experts=32, top_k=2)


def test_sources_are_spread_over_nodes():
    """Sources and nodes divide the same interval, whichever are more."""
    four = np.arange(8.0).reshape(4, 2)
    np.testing.assert_allclose(spread_sources(four, 2), [[2, 4], [10, 12]])
    np.testing.assert_allclose(spread_sources(four[:1], 4), np.repeat(four[:1] / 4, 4, axis=0))
    assert spread_sources(four, 3).sum() == pytest.approx(four.sum())


def test_flows_between_nodes():
    """Local quotas divide every node's tokens alike; global ones keep what own copies take."""
    sent, taken = np.array([[6.0, 0.0], [2.0, 4.0]]), np.array([[4.0, 3.0], [4.0, 1.0]])
    np.testing.assert_allclose(move_between_nodes(sent, taken, "local"), [[3, 3], [1 + 3, 1 + 1]])
    # Node 0 keeps 4 and sends 2; node 1 keeps 2 + 1 and sends 3.
    np.testing.assert_allclose(move_between_nodes(sent, taken, "global"), [[4, 2], [3, 3]])


def test_pairs_of_tokens_and_nodes():
    """Pairs of independent experts match those of drawn tokens, and one expert a token is one."""
    flows = np.array([[30.0, 50.0, 20.0], [0.0, 0.0, 7.0]])
    np.testing.assert_allclose(count_pairs(flows, 1), flows)
    rng = np.random.default_rng(0)
    drawn = rng.choice(3, size=(20_000, 4), p=flows[0] / 100)
    seen = np.array([(drawn == node).any(1).mean() for node in range(3)]) * 25
    np.testing.assert_allclose(count_pairs(flows, 4)[0], seen, rtol=0.02)
    assert count_pairs(flows, 4)[1].tolist() == [0, 0, 7 / 4]


def test_prices():
    """Rates scale the times, training doubles rows, and the sum is that of its parts."""
    cases = placement.synthetic_cases(32, (0,))

    def price(network, **more):
        return advise.advise_network(SMALL, GEMM, cases, 8, 256, (1,), network, **more)

    rows = price(advise.Network(4, 100.0, 10.0))
    names = [(row["placement"], row["quotas"]) for row in rows]
    assert names == [
        *[("eplb", "even"), ("eplb", "local"), ("eplb", "global")],
        *[("chain", "local"), ("chain", "global")],
        *[("priced", "local"), ("priced", "global"), ("priced", "near")],
    ]
    # Half of what is sent leaves its node, and a token with two experts has less than one pair.
    assert rows[0]["across"] == pytest.approx(0.5) and 0.7 < rows[0]["nodes"] < 0.8
    for row in rows:
        assert row["network_us"] >= max(row["across_us"], row["within_us"])
        parts = row["layer_us"] + row["network_us"] + row["counts_us"] + row["plan_us"]
        assert row["total_us"] == pytest.approx(parts)
        assert (row["plan_us"] > 0) == (row["quotas"] == "near")
    for local, exact in (rows[3:5], rows[5:7]):
        assert exact["across"] < local["across"] and exact["layer_us"] == local["layer_us"]
        assert exact["counts_us"] > local["counts_us"]
    chained, priced, near = rows[4], rows[6], rows[7]
    assert near["across"] <= priced["across"] < chained["across"]
    assert near["waiting_us"] <= 0.011 * near["layer_us"] + priced["waiting_us"]
    fast = price(advise.Network(4, 100.0, 20.0), training=True)
    for row, twice in zip(rows, fast, strict=True):
        # Twice the rows at twice the rate.
        assert twice["across_us"] == pytest.approx(row["across_us"])
        assert twice["within_us"] == pytest.approx(2 * row["within_us"])
        assert twice["layer_us"] == pytest.approx(3 * row["layer_us"])
    for size in (3, 8):
        with pytest.raises(ValueError, match="must divide 8 ranks into several nodes"):
            price(advise.Network(size))
    assert price(advise.Network(1))[0]["across"] == pytest.approx(7 / 8)


def test_a_history_by_source_is_priced_by_source():
    """Where nodes want different experts, a placement by source keeps more than one without."""
    rng = np.random.default_rng(0)
    rates = rng.lognormal(0, 1.5, (2, 32))
    counts = torch.from_numpy(rng.poisson(50 * rates, (12, 2, 32)))
    found = []
    for by_source in (None, counts[:8]):
        case = placement.Case("two nodes", counts[:8].sum(1), counts[8:], by_source)
        rows = advise.advise_network(
            SMALL, GEMM, (case,), 8, 256, (2,), advise.Network(4, 100.0, 10.0)
        )
        found.append(rows[-2]["across"])
    assert found[1] < found[0] - 0.02


def test_slow_networks_are_worth_a_near_plan():
    """Where rows take long, what the near plan keeps is worth its time, and the choice says so."""
    cases = placement.synthetic_cases(32, (0,))
    for rate, many in ((1e-3, True), (1e6, False)):
        rows = advise.advise_network(SMALL, GEMM, cases, 8, 256, (1,), advise.Network(4, 1e6, rate))
        by_way = {(row["placement"], row["quotas"]): row["total_us"] for row in rows}
        near, exact = by_way["priced", "near"], by_way["priced", "global"]
        assert (near < exact) == many


def test_choice_between_rows():
    """The choice has the fewest slots within half a percent, and is never the even split."""

    def row(slots, total, quotas="global"):
        return {"slots": slots, "total_us": total, "quotas": quotas}

    rows = [row(1, 90.0, "even"), row(1, 100.4), row(1, 100.3, "local"), row(2, 100.0)]
    assert advise.choose_network_row(rows) is rows[2]
    assert advise.choose_network_row([*rows, row(2, 99.0)])["total_us"] == 99.0
    # A near plan has to gain more than half a percent.
    assert advise.choose_network_row([*rows, row(1, 99.6, "near")]) is rows[2]
    assert advise.choose_network_row([*rows, row(1, 99.4, "near")])["quotas"] == "near"


def test_no_near_plan_where_the_balancer_takes_none(monkeypatch):
    """Beyond the ranks or slots that near plans take there is no row of them."""
    cases = placement.synthetic_cases(32, (0,))
    for name, most, there in (("RANKS", 8, True), ("RANKS", 7, False), ("SLOTS", 4, False)):
        with monkeypatch.context() as patch:
            patch.setattr(_locality, f"NEAR_MOST_{name}", most)
            rows = advise.advise_network(SMALL, GEMM, cases, 8, 1, (1,), advise.Network(4))
        assert ("near" in {row["quotas"] for row in rows}) == there


def test_tables_fit_a_terminal(capsys, monkeypatch):
    """No cell of the network's table is cut at 80 columns."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "80")
    line = "advise --model deepseek-v3 --ep 32 --ranks-per-node 8 --slots 2 --tokens 4096"
    assert cli.main(line.split()) == 0
    shown = capsys.readouterr()
    table = (shown.out + shown.err).split("dispatch and combine across nodes")[1]
    assert "priced" in table and "…" not in table.split("Nodes of 8 ranks")[0]


def test_command(capsys, monkeypatch):
    """The command recommends by the sum where nodes are given, and refuses rates without them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = "advise --ep 8 --experts 32 --slots 1".split()
    nodes = ["--ranks-per-node", "4", "--network-bandwidth", "25"]
    assert cli.main([*base, *nodes, "--json", "-"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["best"]["quotas"] == report["network"]["best"]["quotas"]
    assert "350 GB/s within and 25 GB/s across nodes" in shown.err
    assert "Least in all: " in shown.err and "stands below" in shown.err
    assert cli.main([*base, "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["network"] is None and "across nodes" not in shown.err
    for wrong, message in (
        ("--node-bandwidth 3", "argument --node-bandwidth: only with --ranks-per-node"),
        ("--ranks-per-node 8", "argument --ranks-per-node: 8 ranks don't make up several"),
        ("--check --ranks-per-node 4", "argument --ranks-per-node: --check has"),
    ):
        arguments = ["advise", *wrong.split()] if "--check" in wrong else [*base, *wrong.split()]
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
