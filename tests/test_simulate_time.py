"""lplb-bench simulate-time: batches, plans, which ranks are timed, sums, and the command."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer

from lplb_triton import TimeCost
from lplb_triton.bench import advise, cli, objectives
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.tables import make_simulate_time_grids
from lplb_triton.costs.gemm import PACKAGED

SIZES = advise.MODELS["gpt-oss-120b"]
COST = TimeCost.for_model(SIZES.hidden, SIZES.inner)
GRID = objectives.Grid(
    ("gpt-oss-120b", "kimi-k2"), (8, 128), (1, 2), (16, 256), ("home-chain",), batches=2
)


class ClockTimer:
    """Times launches by the clock of the CPU."""

    def time_rotation(self, launches):
        begin = time.perf_counter()
        for launch in launches:
            launch()
        return 1e6 * (time.perf_counter() - begin) / len(launches)


@pytest.fixture(scope="module")
def drawn():
    """Batches of the grid and what was left out."""
    return objectives.draw_batches(GRID)


@pytest.fixture(scope="module")
def planned(drawn):
    """A batch at EP 8 with two slots and 16 tokens, and its plans."""
    wanted = ("gpt-oss-120b", 8, 2, 16)
    batch = next(b for b in drawn[0] if (b.name, b.ep, b.slots, b.tokens) == wanted)
    return batch, objectives.plan_batch(batch.place(COST), COST, batch.count())


def model_time(rows, about_us=None):
    """Predict a rank's time by the packaged model."""
    return float(PACKAGED(SIZES.hidden, SIZES.inner, np.array(rows, dtype=float)))


def test_batches_are_a_sample_of_the_grid(drawn):
    """First batches come before second ones, and what can't be laid out is named."""
    batches, left_out = drawn
    # kimi-k2 has more experts than the trace.
    assert len(batches) == 2 * (4 * 2 * 2 + 4 * 2)
    half = len(batches) // 2
    assert {b.number for b in batches[:half]} == {0} and {b.number for b in batches[half:]} == {1}
    assert len(set(batches)) == len(batches)
    assert [one["reason"] for one in left_out] == [
        "the packaged trace has 256 experts, not 384"
    ] * 4


def test_counts_are_those_of_all_ranks(drawn):
    """A batch has every token's experts, and the same ones for every number of slots."""
    for batch in drawn[0][:8]:
        counts = batch.count()
        assert counts.shape == (batch.model.experts,)
        assert counts.sum() == batch.tokens * batch.ep * batch.model.top_k
    two = next(b for b in drawn[0] if b.slots == 2)
    assert (dataclasses.replace(two, slots=1).count() == two.count()).all()


def test_every_way_computes_every_token(planned):
    """All ways have the tokens of every expert, and by time no rank takes longer than by tokens."""
    batch, plans = planned
    counts = batch.count()
    expert = batch.place(COST).phy2log.numpy()
    for way in ("even", "tokens", "time"):
        assert plans[way].rows.shape == (8, 18)
        found = np.bincount(expert, plans[way].rows.reshape(-1), batch.model.experts)
        assert (found == counts).all()
    assert (plans["none"].rows.reshape(-1) == counts).all() and plans["none"].rows.shape == (8, 16)
    smooth = [COST.predict(plans[way].rows, smoothed=True).max() for way in ("time", "tokens")]
    assert smooth[0] <= smooth[1]
    picked = objectives.choose_way(plans)
    assert plans[picked].us.max() == min(plans[w].us.max() for w in ("none", "even", "tokens"))


def test_ranks_near_the_slowest_are_timed():
    """Ranks within 15% are timed, the slowest first, equal ones once; of long ones two."""
    rows = np.array([[5, 0], [3, 2], [2, 3], [4, 1], [0, 1]])
    plan = objectives.WayPlan(rows, np.array([100, 90, 90, 86, 20], dtype=np.float32))
    assert objectives.select_ranks(plan, 6) == ([0, 1, 3], 0)
    assert objectives.select_ranks(plan, 2) == ([0, 1], 1)
    assert objectives.select_ranks(plan._replace(us=plan.us * 100), 6) == ([0, 1], 1)


def test_of_a_way_that_is_far_behind_one_rank_is_timed():
    """The way that is predicted to take twice as long has one rank timed, and the others all."""
    rows = np.array([[5, 0], [3, 2], [4, 1]])
    us = np.array([100, 95, 90], dtype=np.float32)
    plans = {"none": objectives.WayPlan(rows, 2 * us), "time": objectives.WayPlan(rows, us)}
    assert objectives.choose_ranks(plans, 3) == {"none": ([0], 2), "time": ([0, 1, 2], 0)}


def test_long_ranks_take_two_rounds():
    """Ranks of some milliseconds are timed twice, and the mean counts."""
    plan = objectives.WayPlan(np.array([[5, 1]]), np.array([5000], dtype=np.float32))
    taken = iter((5000.0, 5200.0))
    found = objectives.time_plans({"time": plan}, lambda rows, about: next(taken), rounds=5)
    assert found == {"time": 5100.0}


def test_ways_are_timed_in_turn(planned):
    """Times come round by round, each round through all ways, and the slowest rank counts."""
    asked = []

    def time_rows(rows, about_us):
        asked.append(rows)
        return model_time(rows) * (1.1 if len(asked) == 1 else 1)

    found = objectives.time_plans(planned[1], time_rows, most=2, rounds=3)
    assert len(asked) % 3 == 0 and len(set(asked)) == len(asked) // 3
    # The first of 3 times is off, and the median is not.
    for way, plan in planned[1].items():
        assert found[way] == pytest.approx(float(plan.us.max()), rel=1e-3)


def test_sums_of_rows(planned):
    """Ratios are of measured times where there are any, and errors of predictions are signed."""
    batch, plans = planned
    measured = {"none": 100.0, "even": 200.0, "tokens": 160.0, "time": 80.0}
    row = objectives.make_row(batch, plans, measured, 6)
    found = objectives.summarize_rows([row, {**row, "tokens": 4096}])
    assert found["basis"] == "measured" and len(found["table"]) == 2
    every = found["sums"]["all"]
    assert every["over_tokens"] == {"none": 0.625, "even": 1.25, "tokens": 1.0, "time": 0.5}
    assert every["over_best"] == every["worst_over_best"] == pytest.approx(0.8)
    assert every["wins"] == {"none": 0, "even": 0, "tokens": 0, "time": 2}
    assert every["over_picked"] == pytest.approx(80 / measured[row["picked"]])
    assert {"16 tokens, EP 8", "4,096+ tokens", "all, home-chain"} <= set(found["sums"])
    off = float(plans["time"].us.max()) / 80 - 1
    assert found["errors"]["time"]["bias"] == pytest.approx(off)
    options = {**dict.fromkeys(("loads", "placements", "models"), ()), "ranks": 6, "rounds": 3}
    report = {"summary": found, "options": options, "not_begun": 0, "left_out": [], "rows": []}
    winners = make_simulate_time_grids(report)[1]
    assert winners.rows == [("16", "time -20.0%"), ("4096", "time -20.0%")]
    predicted = objectives.summarize_rows([objectives.make_row(batch, plans, None, 6)])
    assert predicted["basis"] == "predicted" and predicted["errors"] is None


def test_a_rank_is_timed_with_weights_that_change():
    """Launches of a graph take turns through sets of weights; long ones run once."""
    timer = FakeTimer()
    timed = advise.RankTimer(16, 8, 3, timer, "cpu")
    timed._sets = 2
    timed._w_in, timed._w_out = (w.repeat(2, 1, 1) for w in (timed._w_in, timed._w_out))
    seen = []
    timer.time_rotation = lambda launches: seen.append(launches) or 5.0
    assert timed([4, 0, 2], 100.0) == 5.0 and timed([0, 0]) == 0.0
    (launches,) = seen
    assert len(launches) == 5
    first, second = (launch.args[1] for launch in launches[:2])
    assert len(first) == 3 and first.data_ptr() == launches[2].args[1].data_ptr()
    assert second.data_ptr() - first.data_ptr() == 3 * 16 * 16 * 2
    assert launches[0]().shape == (6, 16)
    timed._flops_by_row = 1e12
    assert timed([4, 0, 2]) == 5.0 and len(seen[1]) == 1


def test_the_command_measures(monkeypatch, capsys):
    """The command calibrates, times every way and reports errors of its predictions."""
    small = advise.Model(16, 8, 8, 2)
    monkeypatch.setitem(advise.MODELS, "mixtral-8x7b", small)
    monkeypatch.setattr(gpu, "start", lambda args: (torch.device("cpu"), ClockTimer()))
    line = "simulate-time --model mixtral-8x7b --ep 4 --slots 1 --tokens 16,64 --loads skewed"
    options = "--placement home-chain --rounds 1 --ranks 1 --json -"
    assert cli.main([*line.split(), *options.split()]) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert [row["tokens"] for row in report["rows"]] == [16, 64]
    for row in report["rows"]:
        assert all(way["measured_us"] > 0 and way["timed"] == 1 for way in row["ways"].values())
    assert report["summary"]["basis"] == "measured" and report["not_begun"] == 0
    (fit,) = report["costs"]
    assert fit["experts"] == 3 and all(point["us"] > 0 for point in fit["points"])
    assert "Predicted against measured" in out.err and "Every batch" in out.err


def test_the_command_predicts_without_a_gpu(capsys):
    """With --predict nothing is measured, and options of timing are refused."""
    line = "simulate-time --predict --model gpt-oss-120b,kimi-k2 --ep 32 --slots 1 --tokens 16"
    assert cli.main([*line.split(), "--placement", "home-chain"]) == 0
    out = capsys.readouterr().out
    assert "Simulation, predicted" in out and "n/a: kimi-k2" in out and "measured us" not in out
    assert cli.main([*line.split(), "--rounds", "2"]) == 2
    assert "argument --rounds: not with --predict" in capsys.readouterr().err


def test_a_limit_in_seconds_is_said(monkeypatch, capsys):
    """Batches that were not begun in time are counted, and a run without any is refused."""
    monkeypatch.setattr(gpu, "start", lambda args: (torch.device("cpu"), ClockTimer()))
    monkeypatch.setitem(advise.MODELS, "mixtral-8x7b", advise.Model(16, 8, 8, 2))
    line = "simulate-time --model mixtral-8x7b --ep 4 --slots 1 --seconds 1e-9"
    assert cli.main(line.split()) == 2
    assert "argument --seconds: calibration took longer" in capsys.readouterr().err


def test_runs_are_timed_by_both_objectives(monkeypatch, capsys):
    """With --runs, whole runs are timed by tokens, by time and by tokens again."""
    monkeypatch.setattr(gpu, "start", lambda args: (torch.device("cpu"), FakeTimer()))
    monkeypatch.setitem(advise.MODELS, "mixtral-8x7b", advise.Model(16, 8, 8, 2))
    line = "simulate-time --runs --model mixtral-8x7b --ep 4 --slots 1 --tokens 16 --loads skewed"
    assert cli.main([*line.split(), "--placement", "home-chain", "--batches", "2", "--json=-"]) == 0
    out = capsys.readouterr()
    (row,) = json.loads(out.out)["rows"]
    assert [row["us"][name]["median"] for name in objectives.RUNS] == [1.5, 3.5, 5.5]
    assert "Balancer.run by tokens and by time" in out.err
    assert cli.main([*line.split(), "--seconds", "3"]) == 2
    assert "argument --seconds: not with --runs" in capsys.readouterr().err
