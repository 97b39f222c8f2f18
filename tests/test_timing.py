"""Times: what can be checked without a GPU, and both commands on one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer

import lplb_triton
from lplb_triton import Balancer
from lplb_triton.bench import cli, tables
from lplb_triton.bench.commands import gpu, pipeline
from lplb_triton.bench.measure import cases, traffic
from lplb_triton.bench.measure import pipeline as pipeline_times
from lplb_triton.bench.measure import solve as solve_times
from lplb_triton.bench.measure.cases import Case
from lplb_triton.bench.measure.compare import (
    find_largest_violations,
    find_smallest_sweeps,
    time_peers,
)
from lplb_triton.bench.measure.first_call import time_first_calls
from lplb_triton.bench.measure.timer import GraphTimer, WrongAnswerError, compute_statistics
from lplb_triton.bench.measure.workload import PUBLISHED_FAMILIES, check_plan, draw_workload

SMALL = {"per_family": 1, "seed": 0}


@pytest.fixture(scope="module")
def workload():
    return draw_workload("ring:5", **SMALL)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Let the commands run on the CPU with a fake timer."""

    def start(args):
        return torch.device("cpu"), FakeTimer()

    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(pipeline, "measure_copy_bandwidth", lambda timer, device: 1e12)
    monkeypatch.setattr(
        pipeline, "time_first_calls", lambda shape: {"shape": shape, "cold_s": 2.0, "warm_s": 1.0}
    )


def test_statistics():
    """Statistics are numpy's percentiles, and the mean, median and largest value."""
    found = compute_statistics([3.0, 1.0, 2.0, 100.0])
    assert found["median"] == 2.5
    assert found["max"] == 100.0
    assert found["mean"] == 26.5
    assert found["p95"] == pytest.approx(np.percentile([1, 2, 3, 100], 95))
    assert found["p99"] == pytest.approx(np.percentile([1, 2, 3, 100], 99))


def test_workload(workload):
    """A workload has every published family with its optimum, and the same seed draws it again."""
    assert workload.families == list(PUBLISHED_FAMILIES)
    assert len(workload) == len(workload.optima) == len(workload.counts) == 6
    assert workload.highs_us > 0
    again = draw_workload("ring:5", **SMALL)
    assert torch.equal(again.counts, workload.counts)
    single = workload.single(2, "cpu")
    assert torch.equal(single.weights[0], workload.problem.weights[2].float())


def test_smallest_sweeps():
    """The fewest sweeps that suffice are found in at most 14 calls, or -1 if none do."""
    needed = np.array([0, 1, 7, 64, 65, 1000])
    asked = []

    def reached(sweeps):
        asked.append(sweeps)
        return sweeps >= needed

    assert find_smallest_sweeps(reached, 6, 64).tolist() == [0, 1, 7, 64, -1, -1]
    assert find_smallest_sweeps(reached, 6, 1).tolist() == [0, 1, -1, -1, -1, -1]
    assert find_smallest_sweeps(reached, 6, 1000).tolist() == needed.tolist()
    asked.clear()
    find_smallest_sweeps(reached, 6, 64)
    assert len(asked) <= 14


def test_solve_row(workload):
    """A row has each launch's median over three rounds, and the gaps and iterations."""
    timer, seen = FakeTimer(), []
    row = solve_times.time_solve(
        workload, timer, "cpu", tolerance=1e-3, progress=lambda: seen.append(None)
    )
    assert (row["ranks"], row["columns"], row["instances"]) == (5, 5, 6)
    # Of three rounds through six launches the second is the median.
    assert row["us"] == compute_statistics([7, 8, 9, 10, 11, 12])
    assert row["by_family_us"] == dict(zip(workload.families, [7, 8, 9, 10, 11, 12], strict=True))
    assert row["problem_us"] == compute_statistics([25, 26, 27, 28, 29, 30])
    assert row["rotated_us"] == 7.0
    assert 0 <= row["worst_gap"] <= 1e-3
    assert row["iterations"]["mean"] <= row["iterations"]["max"] <= 40
    assert len(seen) == 6


def test_a_disturbance_meets_a_launch_in_one_round_only(workload):
    """Several disturbed calls in a row do not change any launch's median."""

    class Disturbed(FakeTimer):
        def time_call(self, launch, about_us):
            super().time_call(launch, about_us)
            return 50.0 if 4 <= self.calls <= 8 else 2.0

    row = solve_times.time_solve(workload, Disturbed(), "cpu", tolerance=1e-3)
    assert row["us"]["max"] == 2


def test_nothing_is_timed_before_the_gate(workload, monkeypatch):
    """A wrong answer is reported with its instance before the timer is called."""
    solve = Balancer.solve

    def broken(self, counts, **kwargs):
        solution = solve(self, counts, **kwargs)
        return replace(solution, max_load=solution.max_load * 0.99)

    monkeypatch.setattr(Balancer, "solve", broken)
    timer = FakeTimer()
    with pytest.raises(WrongAnswerError, match=r"ring:5, instance 0 \(normal\): max_load"):
        solve_times.time_solve(workload, timer, "cpu", tolerance=1e-3)
    assert timer.calls == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, status=torch.ones_like(s.status)), "not certified"),
        (lambda s: replace(s, shares=s.shares + 0.1), "out of range or where no copy is"),
        (lambda s: replace(s, shares=s.shares * 0.9), "do not add up to 1"),
        (lambda s: replace(s, max_load=s.max_load * 1.01), "is not that of the plan"),
        (lambda s: replace(s, lower_bound=s.lower_bound * 1.01), "is outside"),
        (lambda s: replace(s, lower_bound=s.lower_bound * 0.99), "wider than the tolerance"),
    ],
)
def test_gate(workload, change, message):
    """A plan passes the gate, and each way to be wrong is refused with its reason."""
    problem = workload.single(1, "cpu")
    problem = lplb_triton.Problem(problem.weights.double(), problem.fixed.double(), problem.mask)
    solution = lplb_triton.solve(problem)
    check_plan(problem, solution, workload.optima[1], "it")
    with pytest.raises(WrongAnswerError, match=f"^it: .*{message}"):
        check_plan(problem, change(solution), workload.optima[1], "it")


def test_groups_row():
    """A row has the times of groups solved together and of the slowest one alone."""
    row = solve_times.time_groups(FakeTimer(), "cpu", tolerance=1e-3, per_family=1, n_group=2)
    assert (row["groups"], row["batches"]) == (2, 6)
    # Three rounds of six launches together, then of twelve alone; of two the last is the slowest.
    assert row["together_us"] == compute_statistics([7, 8, 9, 10, 11, 12])
    assert row["slowest_alone_us"] == compute_statistics([32, 34, 36, 38, 40, 42])


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not interpreted")
def test_peer_row(workload):
    """A row has the times and failures of both peers, and no times of lplb on a CPU."""
    row = time_peers(workload, FakeTimer(), "cpu", tolerance=1e-3, max_sweeps=32)
    affine, edge = row["affine_scaling"], row["edge_balancing"]
    assert affine["us"]["max"] == 12
    assert 0 <= affine["infeasible"] + affine["inexact"] <= 6
    assert edge["not_reached"] == 0
    assert 0 <= edge["sweeps"]["median"] <= edge["sweeps"]["max"] <= 32
    assert (edge["us"]["max"], edge["alike_us"]["max"]) == (30, 48)
    assert "not timed" in row["lplb"]


def test_peers_of_other_placements():
    """Peers that need two copies per expert say so for other placements."""
    several = draw_workload("random:4:3", **SMALL)
    row = time_peers(several, FakeTimer(), "cpu", tolerance=1e-3)
    for name in ("affine_scaling", "edge_balancing", "lplb"):
        assert "two copies" in row[name]


def test_violations_of_the_standard_form(workload):
    """An even split violates nothing, and each broken constraint is measured."""
    columns, ranks = 5, 5
    x = torch.zeros(6, 2 * columns + ranks + 2, dtype=torch.float64)
    x[:, : 2 * columns] = 0.5
    first = lplb_triton.bench.peers.find_copy_ranks(workload.problem.mask[0])[0]
    assert (first >= 0).all()
    unit = torch.maximum(workload.problem.weights.amax(1), workload.problem.fixed.amax(1))
    even = workload.placement.even_loads(workload.counts) / unit.unsqueeze(1)
    x[:, 2 * columns + ranks] = even.amax(1)
    x[:, 2 * columns : 2 * columns + ranks] = even.amax(1, keepdim=True) - even
    np.testing.assert_allclose(find_largest_violations(workload, x), 0, atol=1e-12)
    x[0, 0] += 0.25
    x[1, 2 * columns] = -0.5
    x[2, -1] = torch.nan
    assert (find_largest_violations(workload, x) > [0.2, 0.4, 1e9, -1, -1, -1]).all()
    assert find_largest_violations(workload, x)[3:] == pytest.approx(0, abs=1e-12)


def test_pipeline_row():
    """A row has the bytes a run must move and the time that they take at the bandwidth."""
    row = pipeline_times.time_run(
        "cube", 24, FakeTimer(), "cpu", tolerance=1e-3, bandwidth=1e9, per_family=1
    )
    assert (row["ranks"], row["experts"], row["tokens"]) == (8, 256, 24)
    assert row["bytes"] == 3 * 24 * 8 * 8
    assert row["floor_us"] == pytest.approx(row["bytes"] / 1e3)
    assert row["host_us"] > 0
    assert row["iterations"]["max"] == 0  # Levelling alone is enough on a cube.
    assert row["allocations_per_call"] is None


def test_routed_batches():
    """Routed tokens have eight different experts, and families differ in their spread."""
    batches = pipeline_times.draw_routed_batches(32, 64, 2, 1)
    assert len(batches) == 12
    assert all(idx.shape == (32, 8) and idx.dtype == torch.int64 for idx in batches)
    assert all(len(set(token.tolist())) == 8 for idx in batches for token in idx)
    spread = [torch.bincount(idx.flatten(), minlength=64).float().std() for idx in batches]
    assert min(spread[6:8]) > max(spread[:2])  # one hot expert or a Zipf law, and nearly even


def test_ids_are_checked():
    """Ids of another expert, of padding, or with wrong rank loads are refused."""
    rng = np.random.default_rng(0)
    placement = pipeline_times.make_pipeline_placement("cube", rng)
    balancer = Balancer(placement, device="cpu")
    idx = torch.from_numpy(rng.integers(-1, 256, (64, 8)))
    counts, _ = balancer.count(idx)
    solution, out = balancer.solve(counts), balancer.run(idx)
    pipeline_times.check_ids(placement, idx, out, solution)
    wrong = out.clone()
    wrong[idx == 3] = out[idx == 4][0]
    with pytest.raises(WrongAnswerError, match="no copy"):
        pipeline_times.check_ids(placement, idx, wrong, solution)
    with pytest.raises(WrongAnswerError, match="-1"):
        pipeline_times.check_ids(placement, idx, out.clamp(min=0), solution)
    heavy = torch.full((4096, 8), int(placement.phy2log[0]))
    counts, _ = balancer.count(heavy)
    with pytest.raises(WrongAnswerError, match="rank loads"):
        pipeline_times.check_ids(placement, heavy, torch.zeros_like(heavy), balancer.solve(counts))


@pytest.mark.slow
def test_first_call_in_fresh_processes():
    """First calls are timed in new processes, and one that fails raises."""
    row = time_first_calls("cube", "cpu")
    assert row["cold_s"] > 0 and row["warm_s"] > 0
    with pytest.raises(RuntimeError, match="first call of nothing"):
        time_first_calls("nothing", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not interpreted")
def test_solve_command(fake_gpu, tmp_path, capsys):
    """`solve` writes a row for each shape as JSON and as Markdown."""
    common = ["solve", "--no-traffic", "--shapes", "ring:5,random:4:3", "--per-family", "1"]
    report_path, text_path = tmp_path / "solve.json", tmp_path / "solve.md"
    assert cli.main([*common, "--json", str(report_path), "--markdown", str(text_path)]) == cli.OK
    shown = capsys.readouterr().out
    assert "affine scaling" in shown and "ring:5" in shown
    report = json.loads(report_path.read_text())
    assert [row["shape"] for row in report["rows"]] == ["ring:5", "random:4:3"]
    assert report["groups"] is None
    assert report["options"]["families"] == list(PUBLISHED_FAMILIES)
    assert set(report["environment"]) >= {"gpu", "driver", "torch", "triton"}
    text = text_path.read_text()
    assert "| ring:5 | 5 | 5 | 9.5 |" in text
    assert "two copies" in text


def test_solve_command_without_peers(fake_gpu, capsys):
    """`solve --no-peers` leaves peers out and times groups of a cube."""
    arguments = ["solve", "--no-traffic", "--shapes", "cube", "--per-family", "1", "--no-peers"]
    assert cli.main([*arguments, "--json", "-"]) == cli.OK
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["peers"] is None
    assert report["groups"]["groups"] == 8
    assert "Groups of cube" in captured.err


def test_pipeline_command(fake_gpu, capsys):
    """`pipeline` prints a line for each number of tokens and one for first calls."""
    arguments = ["pipeline", "--shapes", "cube", "--tokens", "16,32", "--no-traffic"]
    arguments += ["--markdown", "-"]
    assert cli.main(arguments) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith("| cube")] == [
        ["| cube", "16"],
        ["| cube", "32"],
        ["| cube", "2.00"],
    ]
    assert cli.main([*arguments[:-2], "--no-first-call", "--json", "-"]) == cli.OK
    report = json.loads(capsys.readouterr().out)
    assert report["first_calls"] == [] and report["traffic"] is None
    assert report["bandwidth"] == 1e12


def small_runs(monkeypatch):
    """One case of real traffic, two batches of a layer."""
    monkeypatch.setattr(cases, "RUN_CASES", (Case(256, 8, "eplb", 1),))
    monkeypatch.setattr(cases, "RUN_BATCHES", 2)
    return ["pipeline", "--shapes", "cube", "--tokens", "16", "--no-first-call"]


def test_pipeline_on_a_trace(fake_gpu, monkeypatch, capsys):
    """`pipeline` times whole runs and solves on every layer of the packaged trace."""
    arguments = small_runs(monkeypatch)
    assert cli.main([*arguments, "--json", "-"]) == cli.OK
    captured = capsys.readouterr()
    assert "Whole run on a recorded trace" in captured.err
    report = json.loads(captured.out)
    found = report["traffic"]
    assert found["tokens"] == 1024 and len(found["rows"]) == 4
    (run,), (solved,) = found["pooled"], found["solve"]
    assert (run["batches"], solved["batches"]) == (8, 8)
    # Of each layer the timer's first two calls are runs, the next two solves.
    assert sorted(us for row in found["rows"] for us in row["times_us"]) == [
        *(1, 2, 5, 6, 9, 10, 13, 14)
    ]
    assert solved["us"]["max"] == 16
    (grid,) = [g for g in tables.make_pipeline_grids(report) if "trace" in g.title]
    assert grid.rows[0][0] == "256/8 eplb+1" and grid.rows[0][2] == "8"


def test_uncertified_runs_fail_the_command(fake_gpu, monkeypatch, capsys):
    """`pipeline` fails if batches of a trace are not certified."""
    check = traffic.check_plans

    def admit(prepared, device, tolerance):
        return replace(check(prepared, device, tolerance), uncertified=2)

    monkeypatch.setattr(traffic, "check_plans", admit)
    assert cli.main(small_runs(monkeypatch)) == cli.FAILED
    assert "8 batches were not certified within 0.001" in capsys.readouterr().err


def test_a_wrong_answer_ends_a_command(fake_gpu, monkeypatch, capsys):
    """A wrong answer makes `solve` and `pipeline` fail without times."""

    def refuse(*args, **kwargs):
        raise WrongAnswerError("so and so")

    monkeypatch.setattr(solve_times, "check_plan", refuse)
    monkeypatch.setattr(pipeline_times, "check_ids", refuse)
    for command in (
        ["solve", "--no-traffic", "--shapes", "ring:5", "--per-family", "1"],
        ["pipeline", "--shapes", "cube", "--tokens", "16", "--no-traffic"],
    ):
        assert cli.main(command) == cli.FAILED
        assert "not timed: so and so" in capsys.readouterr().err


def test_more_than_one_allocation_is_reported(fake_gpu, monkeypatch, capsys):
    """`pipeline` fails if a run allocates memory twice."""

    def time_run(*args, **kwargs):
        return {**row, "allocations_per_call": 2.0}

    row = pipeline_times.time_run(
        "cube", 16, FakeTimer(), "cpu", tolerance=1e-3, bandwidth=1e9, per_family=1
    )
    monkeypatch.setattr(pipeline, "time_run", time_run)
    arguments = ["pipeline", "--shapes", "cube", "--tokens", "16", "--no-traffic"]
    assert cli.main(arguments) == cli.FAILED
    assert "allocates 2 times per call" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve", "--shapes", "cube,nowhere"], "nowhere"),
        (["solve", "--shapes", "eplb:8"], "eplb:RANKS:SLOTS"),
        (["solve", "--shapes", "eplb:0:1"], "at least one rank"),
        (["solve", "--per-family", "0"], "--per-family"),
        (["solve", "--tolerance", "1e-9"], "--tolerance"),
        (["pipeline", "--shapes", "eplb:24:1"], "eplb:24:1"),
        (["pipeline", "--tokens", "0"], "--tokens"),
        (["pipeline", "--json", "-", "--markdown", "-"], "stdout"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    """A wrong option is refused as wrong usage, and the message says what is wrong."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE
    assert message in capsys.readouterr().err


def test_a_gpu_is_needed(monkeypatch, capsys):
    """Timing commands are refused without a GPU and with interpreted kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("solve", "pipeline"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert cli.main([command]) == cli.USAGE
        assert "can only be timed on a GPU" in capsys.readouterr().err
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert cli.main([command]) == cli.USAGE
        assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_markdown():
    """A grid becomes a Markdown table with its title and notes."""
    grid = tables.Grid("Title", ("name", "us"), [("a", "1.0"), ("b", "2.0")], ("A note.",))
    assert tables.markdown([grid]) == (
        "### Title\n\n| name | us |\n| --- | --- |\n| a | 1.0 |\n| b | 2.0 |\n\nA note.\n"
    )


@pytest.mark.gpu
def test_graph_timer():
    """A graph's time per call is plausible, and the timer survives a launch that raises."""
    timer = GraphTimer(torch.device("cuda"))
    x = torch.zeros(1 << 20, device="cuda")
    x.add_(1)
    one = timer.time_call(lambda: x.add_(1), 5.0)
    many = timer.time_rotation([lambda: x.add_(1)] * 20)
    assert 0.2 < one < 200
    assert many == pytest.approx(one, rel=1.0)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="on purpose"):
        timer.time_call(lambda: _fail(x), 5.0)
    assert timer.time_call(lambda: x.add_(1), 5.0) > 0


def _fail(x):
    x.add_(1)
    raise ValueError("on purpose")


@pytest.mark.gpu
def test_solve_on_a_gpu(capsys):
    """Times of `solve` and both peers on a GPU are plausible."""
    arguments = [
        "solve",
        "--no-traffic",
        "--shapes",
        "ring:8,cube,eplb:32:1",
        "--per-family",
        "1",
        "--json",
        "-",
    ]
    assert cli.main(arguments) == cli.OK
    report = json.loads(capsys.readouterr().out)
    for row in report["rows"]:
        assert 0.5 < row["us"]["median"] <= row["us"]["p99"] <= row["us"]["max"] < 1e5
    for peers in report["peers"][:2]:
        assert peers["affine_scaling"]["us"]["median"] > 0.5
        assert peers["edge_balancing"]["us"]["median"] > 0.5
    assert isinstance(report["peers"][2]["affine_scaling"], str)


@pytest.mark.gpu
def test_pipeline_on_a_gpu(capsys):
    """A run on a GPU allocates once and takes longer than its memory traffic."""
    arguments = ["pipeline", "--shapes", "cube", "--tokens", "128", "--no-first-call"]
    assert cli.main([*arguments, "--json", "-"]) == cli.OK
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert row["allocations_per_call"] == 1
    assert 0 < row["floor_us"] < row["run_us"]["median"]
    assert report["bandwidth"] > 1e10
