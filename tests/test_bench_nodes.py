"""`lplb-bench nodes`: plans that keep tokens near, simulated tokens, the command and its table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer
from helpers.traces import make_trace

from lplb_triton import Placement, chain, load_placements
from lplb_triton.bench import cli, near_times, node_placements
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.measure.timer import compute_statistics
from lplb_triton.bench.near_plans import count_node_pairs, draw_token_ids
from lplb_triton.placement.near_plans import NearPlans
from lplb_triton.reference import near_tables
from lplb_triton.testing.verify import highs_optimum
from lplb_triton.traces import trace as traces

LINE = "nodes --trace t.npz --ep 4 --slots 1 --ranks-per-node 2 --top-k 4 --trials 5".split()


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A small trace of one layer in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    made = make_trace(batches=8, layers=1, experts=16)
    traces.save("t.npz", made)
    return made


def test_plans_level_the_loads_and_keep_tokens_near():
    """The least load is the program's optimum; a larger limit keeps no fewer tokens near."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(40 * rng.lognormal(0, 1, (2, 16)))
    placement = chain(_tensor(counts.sum(0)), 8, redundant_per_rank=1)
    plans = NearPlans(placement, 4)
    problem = placement.problem(_tensor(counts.sum(0)))
    parts = [part.double().numpy()[0] for part in (problem.weights, problem.fixed)]
    least, plan = plans.balance(counts)
    assert least == pytest.approx(highs_optimum(*parts, problem.mask.numpy()[0]), rel=1e-6)
    held = np.zeros((16, 2), dtype=bool)
    held[placement.phy2log.numpy(), placement.rank_of_slot.numpy() // 4] = True
    lacking = (counts.T * ~held).sum() / counts.sum()
    found = []
    for slack in (1e-6, 0.02, 0.2, 10.0):
        far, near = plans.keep_near(counts, least * (1 + slack))
        loads = np.zeros(8)
        np.add.at(loads, plans.rank_of_single, counts.sum(0)[plans.single])
        np.add.at(loads, plans.cell_rank, near)
        assert loads.max() <= least * (1 + slack) * (1 + 1e-6)
        assert loads.sum() == pytest.approx(counts.sum())
        sent = plans.divide_tokens(counts, near)
        own = sum((counts[node] * sent[node, :, node]).sum() for node in range(2))
        assert far == pytest.approx(1 - own / counts.sum())
        found.append(far)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(lacking)
    assert plans.measure_far(counts, plan) >= found[0] - 1e-9
    alike = plans.divide_alike(counts, plan)
    own = sum((counts[node] * alike[node, :, node]).sum() for node in range(2))
    assert plans.measure_far(counts, plan, own_first=False) == pytest.approx(1 - own / counts.sum())


def _tensor(values):
    return torch.from_numpy(np.asarray(values)).double()


def test_a_placement_without_copies():
    """Without copies nothing can be planned, and tokens go where their experts are."""
    counts = np.array([[4, 1, 0, 3], [2, 2, 2, 2]])
    plans = NearPlans(Placement.from_phy2log(np.arange(4), 4), 2)
    least, plan = plans.balance(counts)
    assert least == 6 and len(plan) == 0
    far, _ = plans.keep_near(counts, least)
    assert far == plans.measure_far(counts, plan) == pytest.approx((0 + 3 + 2 + 2) / 16)


def test_drawn_tokens_have_the_recorded_counts():
    """Every expert is drawn as often as counted, and never twice for a token."""
    rng = np.random.default_rng(1)
    counts = np.array([5, 3, 0, 6, 4, 6])
    ids = draw_token_ids(counts, 4, rng)
    assert ids.shape == (6, 4)
    assert np.bincount(ids.reshape(-1), minlength=6).tolist() == counts.tolist()
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert (draw_token_ids(np.array([1, 1, 1]), 2, rng) == -1).sum() == 1


def test_pairs_of_tokens_and_nodes():
    """A token counts once for each other node that gets one of its experts."""
    ids = np.array([[0, 1], [1, 2], [2, -1]])
    sent = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
    rng = np.random.default_rng(0)
    assert count_node_pairs(ids, 0, sent, rng) == 3
    assert count_node_pairs(ids, 1, sent, rng) == 1
    assert count_node_pairs(ids, 2, sent, rng) == 4


def test_command_compares_the_methods(trace, capsys):
    """A line for each method; a price on traffic keeps more tokens near than the same without."""
    assert cli.main([*LINE, "--json", "a.json", "--markdown", "-", "-q"]) == cli.OK
    shown = capsys.readouterr().out
    report = json.loads(Path("a.json").read_text())
    (row,) = report["rows"]
    assert list(row["methods"]) == list(node_placements.METHODS)
    mean = {name: {k: np.mean(v) for k, v in of.items()} for name, of in row["methods"].items()}
    for values in mean.values():
        order = ["slack 0.02", "slack 0.01", "slack 0", "own"]
        parts = [values[name] for name in order]
        assert parts == sorted(parts) and values["imbalance"] >= 1
        assert 0 <= values["pairs"] <= 1
        assert values["slack 0.02"] - 1e-3 <= values["balancer"] <= values["own"] + 0.05
        assert values["balancer_imbalance"] <= 1.011 * values["imbalance"]
    assert mean["node-chain"]["slack 0.01"] < mean["chain"]["slack 0.01"]
    line = f"| 4 | 1 | chain, priced | {mean['node-chain']['imbalance']:.4f} | "
    assert sum(each.startswith(line) for each in shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks-per-node", "3"], "argument --ranks-per-node: must divide 4 ranks into several"),
        (["--ranks-per-node", "4"], "argument --ranks-per-node: must divide 4 ranks into several"),
        (["--ep", "16", "--ranks-per-node", "2"], "4 recorded sources can't be divided among 8"),
        (["--ep", "3"], "arguments --ep, --slots: EP size 3 does not divide"),
        (["--top-k", "17"], "argument --top-k: a token has 1 to 16 experts, got 17"),
        (["--tokens", "8"], "argument --tokens: only with --times"),
        (["--times"], "argument --trials: not with --times"),
        (["--layers", "1"], "the trace has layers 0 to 0, got 1"),
    ],
)
def test_wrong_use(trace, capsys, options, message):
    """Sizes that don't fit the trace or each other are refused."""
    assert cli.main([*LINE, *options]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_highest_price(trace, capsys):
    """Prices that `chain` and `place` refuse are refused by the option's name."""
    place = "place t.npz --ep 4 --slots 1 -o p.json --ranks-per-node 2".split()
    for line in (LINE, place):
        with pytest.raises(SystemExit):
            cli.main([*line, "--traffic-price", "1e7"])
        assert "argument --traffic-price: must be at most 1e+06" in capsys.readouterr().err


def test_place_writes_placements_for_nodes(trace, capsys):
    """`lplb-bench place` takes the ranks of a node and the price, and counts by source."""
    line = "place t.npz --ep 4 --slots 1 --device cpu -o p.json --ranks-per-node 2".split()
    history = _tensor(trace.counts[:4, 0])
    for price in ([], ["--traffic-price", "9"]):
        assert cli.main([*line, *price, "--method", "home-chain", "-q"]) == cli.OK
        value = float(price[1]) if price else None
        options = {"keep_home": True, "ranks_per_node": 2, "traffic_price": value}
        assert load_placements("p.json")[0] == chain(history, 4, **options)
    assert cli.main([*line, "--traffic-price", "9", "--json", "p2.json", "-q"]) == cli.OK
    (row,) = json.loads(Path("p2.json").read_text())["rows"]
    for of in row["methods"].values():
        assert 0 < of["far"] <= of["far_by_lp"] < 1
    assert row["methods"]["chain"]["far"] < row["methods"]["eplb"]["far"]
    capsys.readouterr()
    assert cli.main([*line, "--markdown", "-", "-q"]) == cli.OK
    assert f"| 0 | {row['methods']['eplb']['far_by_lp']:.3f} |" in capsys.readouterr().out
    everything = [*line, "--all-batches", "-q"]
    assert cli.main(everything) == cli.OK
    expected = chain(_tensor(trace.counts[:, 0]), 4, ranks_per_node=2)
    assert load_placements("p.json")[0] == expected
    for wrong, message in (
        (["--method", "eplb"], "argument --ranks-per-node: only for the methods of chain"),
        (["--ranks-per-node", "3"], "argument --ranks-per-node: must divide the 4 ranks"),
        (["--ranks-per-node", "1", "--ep", "8"], "4 sources can't be divided among 8 nodes"),
    ):
        assert cli.main([*line, *wrong]) == cli.USAGE
        assert message in capsys.readouterr().err
    assert cli.main([*line[:-2], "--traffic-price", "2"]) == cli.USAGE
    assert "argument --traffic-price: only with --ranks-per-node" in capsys.readouterr().err


@pytest.fixture
def no_gpu(monkeypatch):
    """Time on the CPU, by a timer that counts calls; plans make few steps."""
    timer = FakeTimer()
    monkeypatch.setattr(gpu, "start", lambda _: (torch.device("cpu"), timer))
    monkeypatch.setattr(near_tables, "STEPS_OF_FEW", 4)


def test_times_of_runs(trace, no_gpu, capsys, monkeypatch):
    """Runs without and with near plans are timed in turn, for each number of tokens."""
    monkeypatch.setattr(node_placements, "TIMED", ("node-chain",))
    line = [*LINE[:-2], "--times", "--tokens", "16,8", "--batches", "1", "-q"]
    assert cli.main([*line, "--json", "a.json", "--markdown", "-"]) == cli.OK
    shown = capsys.readouterr().out
    rows = json.loads(Path("a.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [16, 8]
    for number, row in enumerate(rows):
        assert (row["method"], row["batches"]) == ("node-chain", 1)
        for at, name in enumerate(near_times.RUNS):
            assert row["us"][name] == compute_statistics([1 + 3 * number + at])
        assert row["nearer"] == 1 and 0 < row["saved"] < 1
    # With is timed one call after without and one before again.
    assert sum(each.rstrip(" |").endswith("| 0.0") for each in shown.splitlines()) == 2


def test_wrong_near_plans_are_not_timed(trace, no_gpu, capsys, monkeypatch):
    """Shares unlike the twin's end the command."""
    monkeypatch.setattr(near_times, "write_near_shares", lambda *_: None)
    line = [*LINE[:-2], "--times", "--tokens", "16", "--batches", "1", "-q"]
    assert cli.main(line) != cli.OK
    assert "shares of the near plan are not the twin's" in capsys.readouterr().err


def test_nodes_without_tokens_have_those_of_all_nodes():
    """Every rank has its tokens, in proportion to its node's counts or else to all."""
    by_node = np.array([[0, 0, 0], [3, 0, 1]])
    drawn = near_times._draw_counts(by_node, 2, 400, np.random.default_rng(0))
    assert drawn.sum(1).tolist() == [400] * 4 and (drawn[:, 1] == 0).all()
    assert (abs(drawn[:, 0] - 300) < 60).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ep 1024", "takes up to 512 ranks in a group and 1023 slots a rank, got 1024 and 2"),
        ("--ep 512 --tokens 1048576", "assignments of all ranks, at most 2147483647"),
    ],
)
def test_what_no_near_plan_takes_is_refused(options, message, tmp_path, monkeypatch, capsys):
    """Too many ranks or assignments are refused by the options' names before anything is timed."""
    monkeypatch.chdir(tmp_path)
    traces.save("t.npz", make_trace(batches=4, layers=1, experts=1024))
    line = "nodes --times --trace t.npz --slots 1 --ranks-per-node 256 --top-k 8".split()
    assert cli.main([*line, *options.split()]) == cli.USAGE
    assert message in capsys.readouterr().err
