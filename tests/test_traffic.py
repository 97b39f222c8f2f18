"""Real traffic: what is drawn and cut, cases, gates, and the times of batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer
from helpers.traces import make_trace

from lplb_triton import Balancer, Status
from lplb_triton.bench import cli
from lplb_triton.bench.commands import gpu, solve
from lplb_triton.bench.measure import preparation, traffic
from lplb_triton.bench.measure.cases import CASES, Case, combine_sizes
from lplb_triton.bench.measure.loads import draw_load_sets, split_trace
from lplb_triton.bench.measure.preparation import prepare, prepare_all
from lplb_triton.bench.measure.timer import GraphTimer, WrongAnswerError, compute_statistics
from lplb_triton.bench.tables.solve import make_traffic_grids
from lplb_triton.traces import trace as traces

SMALL = ["solve", "--no-families", "--ep", "4", "--experts", "16", "--slots", "1"]
SMALL += ["--batches", "2", "--processes", "1"]


@pytest.fixture
def fake_gpu(monkeypatch):
    """Let the command run on the CPU with a fake timer."""
    monkeypatch.setattr(gpu, "start", lambda args: (torch.device("cpu"), FakeTimer()))


@pytest.fixture(scope="module")
def prepared():
    return prepare(Case(16, 4, "eplb", 1), draw_load_sets(16, 3, 0)[0])


def expected(loads):
    return loads.history[0] / loads.history[0].sum() * loads.batches[0].sum()


def test_drawn_loads():
    """Eleven load sets are drawn, of equal size, and the same seed draws them again."""
    found = draw_load_sets(256, 5, 7)
    assert [each.kind for each in found] == ["jitter"] * 9 + ["rotating", "burst"]
    assert len({each.name for each in found}) == 11
    for each, again in zip(found, draw_load_sets(256, 5, 7), strict=True):
        assert each.batches.dtype == torch.int32 and each.batches.shape == (5, 256)
        assert (each.batches.sum(1) == 32768 * 8).all()
        assert torch.equal(each.batches, again.batches)
    assert not torch.equal(found[0].batches, draw_load_sets(256, 5, 8)[0].batches)


def test_spread_of_the_jitter_families():
    """Popularity and jitter of a family have the spread that its name says."""
    for each in draw_load_sets(512, 4, 0)[:9]:
        sigma, spread = (float(part.split()[-1]) for part in each.name.split(","))
        popularity = each.history[0].log()
        assert float(popularity.std()) == pytest.approx(sigma, rel=0.15)
        # Of experts with few tokens the logarithm is the multinomial draw's as well.
        common = each.history[0] > 300
        ratio = (each.batches[:, common].double() / each.history[0, common]).log()
        assert float(ratio.std(1).mean()) == pytest.approx(spread, rel=0.2)


def test_rotating_and_burst():
    """Rotating loads shift by three experts a batch, and a burst raises three experts."""
    rotating, burst = draw_load_sets(64, 4, 0)[-2:]
    for at, batch in enumerate(rotating.batches):
        wanted = torch.roll(expected(rotating), 3 * at)
        assert float((batch - wanted).abs().max()) < 6 * float(wanted.max()) ** 0.5
    for batch in burst.batches:
        ratio = batch / expected(burst)
        assert int((ratio > 2.5 * ratio.median()).sum()) == 3


def test_recorded_loads():
    """Each layer's history is the first half of a trace, and its batches are the rest."""
    trace = make_trace(batches=9, layers=2)
    totals = trace.totals()
    for layer, loads in enumerate(split_trace(trace, "it")):
        assert (loads.kind, loads.name) == ("it", f"layer {layer}")
        np.testing.assert_array_equal(loads.history, totals[:4, layer])
        np.testing.assert_array_equal(loads.batches, totals[4:, layer])
    few = split_trace(trace, "it", 2)[1]
    np.testing.assert_array_equal(few.batches, totals[[4, 8], 1])
    assert len(split_trace(trace, "it", 99)[0].batches) == 5
    with pytest.raises(ValueError, match="one batch"):
        split_trace(make_trace(batches=1, layers=1), "it")


def test_default_cases():
    """Default cases are distinct and possible, and cover all slots and numbers of experts."""
    assert len(set(CASES)) == len(CASES) <= 24
    assert [str(case) for case in CASES if case.explain_impossible()] == []
    assert {case.slots for case in CASES} == {1, 2, 4}
    assert {case.experts for case in CASES} == {128, 256, 288, 384, 512}


def test_product():
    """A product of sizes has all possible cases, and tells why others are left out."""
    cases, left_out = combine_sizes(None, (64, 72), ("eplb", "cube"), (1, 2))
    assert [(c.experts, c.ep, c.placement, c.slots) for c in cases] == [
        (256, 64, "eplb", 1),
        (256, 64, "eplb", 2),
        (256, 64, "cube", 2),
        (288, 72, "eplb", 1),
        (288, 72, "eplb", 2),
        (288, 72, "cube", 2),
    ]
    assert [case.slots for case, _ in left_out] == [1, 1]
    assert "multiple of 2 redundant slots" in left_out[0][1]
    assert "does not divide" in Case(100, 64, "place", 1).explain_impossible()


def test_prepared_optima(prepared):
    """Prepared optima are between the mean load and its double, and all solves are certified."""
    checked = traffic.check_plans(prepared, "cpu", 1e-3)
    assert prepared.optima.shape == (3, 1)
    mean = 32768 * 8 / 4
    assert (prepared.optima >= mean * (1 - 1e-9)).all() and (prepared.optima < 2 * mean).all()
    assert checked.uncertified == 0 and 0 <= checked.worst_gap <= 1e-3
    assert len(checked.iterations) == 3


def test_every_group_is_checked():
    """A wrong optimum of any one group is found and named."""
    case = Case(64, 16, "cube", 2)
    one = prepare(case, draw_load_sets(64, 2, 0)[0])
    assert one.optima.shape == (2, 2)
    assert traffic.check_plans(one, "cpu", 1e-3).uncertified == 0
    one.optima[1, 1] *= 1.01
    with pytest.raises(WrongAnswerError, match="EP 16, cube, 2 slots.*batch 1, group 1: op"):
        traffic.check_plans(one, "cpu", 1e-3)


def altered(monkeypatch, change):
    solve = Balancer.solve

    def changed(self, counts, **kwargs):
        return change(solve(self, counts, **kwargs))

    monkeypatch.setattr(Balancer, "solve", changed)


def admit(solution):
    """A plan that says its gap is wide."""
    return replace(solution, status=torch.full_like(solution.status, Status.GAP))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, lower_bound=s.lower_bound * 0.9),
        lambda s: admit(replace(s, max_load=s.max_load * 0.99)),
        lambda s: admit(replace(s, lower_bound=s.lower_bound * 1.01)),
        lambda s: admit(replace(s, lower_bound=s.lower_bound * torch.nan)),
        lambda s: replace(s, status=torch.full_like(s.status, Status.INVALID)),
    ],
)
def test_wrong_answers(prepared, monkeypatch, change):
    """Every wrong bound, load or status is reported with its batch and group."""
    altered(monkeypatch, change)
    with pytest.raises(WrongAnswerError, match="sigma 0.5, jitter 0.2, batch 0, group 0"):
        traffic.check_plans(prepared, "cpu", 1e-3)


def test_admitted_gaps_are_counted(prepared, monkeypatch):
    """A plan that admits its gap is counted as uncertified."""
    altered(monkeypatch, lambda s: admit(replace(s, lower_bound=s.lower_bound * 0.9)))
    assert traffic.check_plans(prepared, "cpu", 1e-3).uncertified == 3


def test_a_batch_is_timed_with_its_own_counts(prepared, monkeypatch):
    """Each batch is solved with its own counts when it is timed."""
    seen = []
    monkeypatch.setattr(
        traffic, "make_solver", lambda balancer: lambda counts: seen.append(counts.clone())
    )
    row = traffic.time_solves(traffic.check_plans(prepared, "cpu", 1e-3), FakeTimer())
    assert torch.equal(torch.stack(seen), prepared.loads.batches)
    assert row["times_us"] == [1, 2, 3]
    assert (row["us"]["median"], row["us"]["max"], row["batches"]) == (2, 3, 3)


def test_pooled():
    """Rows of one kind are pooled, with the times of each number of steps."""
    sizes = {"experts": 8, "ep": 2, "placement": "eplb", "slots": 1, "worst_gap": 0.1}
    common = {**sizes, "uncertified": 1}
    rows = [
        {**common, "kind": "a", "times_us": [1.0, 2.0], "iterations": [0, 1]},
        {**common, "kind": "b", "times_us": [9.0], "iterations": [2]},
        {**common, "kind": "a", "times_us": [3.0, 4.0], "iterations": [3, 7], "worst_gap": 0.2},
    ]
    first, second = traffic.pool_rows(rows)
    assert (first["kind"], first["load_sets"], first["batches"]) == ("a", 2, 4)
    assert first["us"] == compute_statistics([1, 2, 3, 4])
    assert first["steps"] == {"0": 0.25, "1": 0.25, "2": 0, "3+": 0.5}
    assert first["steps_us"] == {"0": 1, "1": 2, "2": None, "3+": 3.5}
    assert (first["worst_gap"], first["uncertified"]) == (0.2, 2)
    assert second["steps"] == {"0": 0, "1": 0, "2": 1, "3+": 0}


def test_table_of_stages():
    """The table has each stage's percentage of batches, and no time where there are none."""
    found = {"experts": 256, "ep": 64, "placement": "eplb", "slots": 2, "kind": "jitter"}
    us = compute_statistics([5.0])
    found |= {"batches": 400, "us": us, "worst_gap": 9e-4, "uncertified": 0}
    found["steps"] = {"0": 0.7, "1": 0.2975, "2": 0.0025, "3+": 0}
    found["steps_us"] = {"0": 4.04, "1": 9.0, "2": 12.5, "3+": None}
    _, stages, certificates = make_traffic_grids({"pooled": [found], "left_out": [], "most": None})
    assert stages.header[2:] == ("0 steps", "us", "1 step", "us", "2 steps", "us", "3+ steps", "us")
    assert stages.rows == [
        ("256/64 eplb+2", "jitter", "70%", "4.0", "30%", "9.0", "0.2%", "12.5", "0%", "")
    ]
    assert certificates.rows == [("256/64 eplb+2", "jitter", "9.0e-04", "0")]


def test_whole_runs(prepared, monkeypatch):
    """Runs are timed on ids with the batch's counts, and wrong ids are refused."""
    checked, seen = traffic.check_plans(prepared, "cpu", 1e-3), []
    run = Balancer.run

    def watched(self, idx):
        seen.append(idx.clone())
        return run(self, idx)

    monkeypatch.setattr(Balancer, "run", watched)
    row = traffic.time_runs(checked, FakeTimer(), 0)
    assert row["times_us"] == [1, 2, 3] and row["us"]["median"] == 2
    assert row["iterations"] == checked.iterations
    # Once to be checked, once to be timed.
    assert len(seen) == 6
    for index, counts in enumerate(prepared.loads.batches):
        assert torch.equal(torch.bincount(seen[index].flatten(), minlength=16).int(), counts)
        assert torch.equal(seen[index], seen[index + 3])

    def wrong(self, idx):
        return run(self, idx).roll(1, 0)

    monkeypatch.setattr(Balancer, "run", wrong)
    with pytest.raises(WrongAnswerError, match="no copy"):
        traffic.time_runs(checked, FakeTimer(), 0)


@pytest.mark.slow
def test_processes_prepare_the_same():
    """Two processes prepare the same placements, optima and batches as one."""
    case = Case(16, 4, "place", 1)
    jobs = [(case, loads) for loads in draw_load_sets(16, 2, 0)[:3]]
    with (
        prepare_all(jobs, 5, 2) as several,
        prepare_all(jobs, 5, 1) as one,
    ):
        for here, there in zip(one, several, strict=True):
            assert here.placement == there.placement
            np.testing.assert_array_equal(here.optima, there.optima)
            assert torch.equal(here.loads.batches, there.loads.batches)


def test_command(fake_gpu, tmp_path, capsys):
    """The command times own and drawn traffic, and lists the cases it leaves out."""
    traces.save(tmp_path / "mine.npz", make_trace(batches=6, layers=2))
    report_path, text_path = tmp_path / "o.json", tmp_path / "o.md"
    arguments = [*SMALL, "--placement", "eplb,chain,cube", "--trace", str(tmp_path / "mine.npz")]
    arguments[arguments.index("16")] = "16,32"
    files = ["--json", str(report_path), "--markdown", str(text_path)]
    assert cli.main([*arguments, *files]) == cli.OK
    assert "recorded traces" in capsys.readouterr().out
    report = json.loads(report_path.read_text())
    found = report["traffic"]
    assert report["rows"] == [] and report["peers"] is None
    assert {row["case"] for row in found["left_out"]} == {
        f"{n} experts, EP 4, cube, 1 slot" for n in (16, 32)
    }
    own = [row for row in found["rows"] if row["kind"] == "mine.npz"]
    assert [(row["experts"], row["placement"], row["loads"]) for row in own] == [
        (32, placement, f"layer {layer}") for placement in ("eplb", "chain") for layer in (0, 1)
    ]
    kinds = ["mine.npz", "jitter", "rotating", "burst"]
    assert [row["kind"] for row in found["pooled"]] == 2 * kinds[1:] + 2 * kinds
    text = text_path.read_text()
    assert text.index("recorded traces") < text.index("drawn traffic")
    assert "| 16/4 eplb+1 | jitter | 18 |" in text
    assert "Left out: 16 experts, EP 4, cube, 1 slot" in text


def test_real_traffic_comes_first(fake_gpu, capsys):
    """Tables of traffic come before those of load families."""
    arguments = [each for each in SMALL if each != "--no-families"]
    arguments += ["--shapes", "ring:5", "--per-family", "1", "--no-peers", "--markdown", "-"]
    assert cli.main(arguments) == cli.OK
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("###")]
    assert titles == [
        "### Solve on drawn traffic, microseconds",
        "### Stages of the solve on real traffic",
        "### Certificates on real traffic",
        "### Solve, microseconds",
        "### Certificates, and HiGHS on the CPU",
        "### Solve by load family, median microseconds",
    ]


def test_uncertified_batches_fail_the_command(fake_gpu, monkeypatch, capsys):
    """The command fails if batches are not certified, and counts them."""
    altered(monkeypatch, admit)
    assert cli.main(SMALL) == cli.FAILED
    assert "22 batches were not certified within 0.001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-traffic", "--no-families"], "nothing is left"),
        (["--no-traffic", "--ep", "8", "--trials", "3"], "arguments --ep, --trials: not with"),
        (["--no-families", "--peers"], "argument --peers: not with --no-families"),
        (["--ep", "7", "--experts", "16"], "EP size 7 does not divide the 16 experts"),
        (["--placement", "none"], "argument --placement: none has no copies"),
        (["--experts", "16", "--ep", "4", "--no-drawn"], "argument --no-drawn: none of the cases"),
        (["--trace", "t.npz", "--experts", "512"], "argument --trace: none of the cases has the"),
        (["--trace", "t.npz", "--trace", "./t.npz"], "argument --trace: two files are named t.npz"),
        (["--trace", "one.npz"], "argument --trace: one.npz has one batch"),
        (["--trace", "t.npz", "--json", "./t.npz"], "argument --json would replace"),
        (["--trace", "missing.npz"], "argument --trace"),
        (["--slots", "0"], "argument --slots"),
    ],
)
def test_refused_before_any_work(fake_gpu, tmp_path, monkeypatch, capsys, arguments, message):
    """Options that do not fit together are refused before anything is prepared."""
    monkeypatch.chdir(tmp_path)
    traces.save(tmp_path / "t.npz", make_trace(batches=4, layers=1))
    traces.save(tmp_path / "one.npz", make_trace(batches=1, layers=1))
    monkeypatch.setattr(preparation, "prepare", None)
    try:
        code = cli.main(["solve", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE
    assert message in capsys.readouterr().err


def test_default_subset(fake_gpu, monkeypatch):
    """Without options every default case gets all its loads."""
    chosen = []

    def time_traffic(args, plan, device, timer):
        chosen.append(plan)
        raise WrongAnswerError("on purpose")

    monkeypatch.setattr(solve, "_time_traffic", time_traffic)
    assert cli.main(["solve"]) == cli.FAILED
    (plan,) = chosen
    assert list(dict.fromkeys(case for case, _ in plan.jobs)) == list(CASES)
    assert plan.left_out == []
    for case in CASES:
        loads = [each for other, each in plan.jobs if other == case]
        assert len(loads) == 11 + 4 * (case.experts == 256)
        assert {len(each.batches) for each in loads} <= {12, 100}


@pytest.mark.gpu
def test_batches_on_a_gpu():
    """Each batch is copied and timed once on a GPU."""
    timer = GraphTimer(torch.device("cuda"))
    counts = torch.zeros(1, dtype=torch.int32, device="cuda")
    seen = torch.zeros(3, dtype=torch.int32, device="cuda")
    batches = torch.arange(3, dtype=torch.int32, device="cuda").unsqueeze(1)

    def launch():
        seen.index_fill_(0, counts.long(), 1)

    launch()
    seen.zero_()
    times = timer.time_batches(launch, counts, batches)
    assert len(times) == 3 and all(0.2 < us < 1000 for us in times)
    assert seen.tolist() == [1, 1, 1]


@pytest.mark.gpu
def test_command_on_a_gpu(capsys):
    """Times of drawn and recorded loads on a GPU are plausible."""
    arguments = ["solve", "--no-families", "--ep", "8", "--slots", "1", "--batches", "2"]
    assert cli.main([*arguments, "--json", "-"]) == cli.OK
    rows = json.loads(capsys.readouterr().out)["traffic"]["rows"]
    assert len(rows) == 15
    assert all(0.5 < us < 1e5 for row in rows for us in row["times_us"])
