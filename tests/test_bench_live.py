"""lplb-bench live: bases, ways, the figures of a row, targets, and the command."""

import json

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton.bench import cli, live, peers
from lplb_triton.bench.balance import find_stretches
from lplb_triton.bench.live import compare, plans
from lplb_triton.bench.workloads import Settings
from lplb_triton.reference.live import LiveCase
from lplb_triton.traces import trace as traces

HOME = live.read_base("home")
CHAIN = live.read_base("chain:1")


def draw_source(name="rotating", ranks=8):
    (source,) = live.draw_workloads([name], Settings(ranks, 32, 3, 2048))
    return source


def totals(source):
    return source.cases[0].test.sum(1).numpy()


@pytest.mark.parametrize("text", ["home", "chain:2", "eplb:1", "place:12"])
def test_bases_are_written_as_they_are_read(text):
    """A base placement's name gives its kind and slots, and is what it is printed as."""
    assert str(live.read_base(text)) == text


@pytest.mark.parametrize("text", ["", "chain", "chain:", "chain:0", "home:1", "ring:2", "eplb:x"])
def test_wrong_bases_are_refused(text):
    """What is no base placement is refused with the text itself."""
    with pytest.raises(ValueError, match="base must"):
        live.read_base(text)


def test_a_trace_is_cut_like_any_other():
    """A trace's cases have its history and some test batches, the first and the last among them."""
    trace = make_trace(batches=12, layers=2)
    source = live.take_trace(trace, "made up", 0.5, [1], 3)
    (case,) = source.cases
    (part,) = find_stretches(trace.steps, 0.5)
    test = torch.from_numpy(trace.counts[part.split :, 1])
    assert case.history.equal(torch.from_numpy(trace.counts[: part.split, 1].sum(1)))
    assert case.test.equal(test[[0, 2, 5]]) and source.experts == 32
    whole = live.take_trace(trace, "made up", 0.5)
    assert [len(case.test) for case in whole.cases] == [6, 6]


def test_static_plans_are_those_of_the_lp():
    """Loads in whole tokens are those of the LP's plan, and at home those of experts in order."""
    source = draw_source()
    counts = totals(source)
    home = live.make_static_plan(HOME, source.cases[0].history, counts, 8)
    assert home.find_loads(1).tolist() == counts[1].reshape(8, -1).sum(1).tolist()
    assert home.max_load.tolist() == counts.reshape(3, 8, -1).sum(2).max(1).tolist()
    plan = live.make_static_plan(CHAIN, source.cases[0].history, counts, 8)
    loads = np.stack([plan.find_loads(batch) for batch in range(3)])
    assert loads.sum(1).tolist() == counts.sum(1).tolist()
    # Each copy is rounded by less than a token, and a rank has five.
    assert np.abs(loads.max(1) - plan.max_load).max() < 5
    mean = counts.sum(1) / 8
    assert plan.find_imbalance() == pytest.approx(loads.max(1) / mean)


def test_a_row_holds_the_figures_of_its_plans():
    """Imbalance, pieces and copies that leave a rank are those of each batch's plan."""
    source = draw_source()
    counts = totals(source)
    options = live.Options((8,), (1,), (HOME,))
    (row,), left_out = live.run(lambda ep: [source], options)
    assert left_out == [] and (row["ep"], row["live"], row["base"]) == (8, 1, "home")
    (found,) = row["sources"]
    assert found == {**row["all"], "name": "rotating"} and found["batches"] == 3
    static = live.make_static_plan(HOME, source.cases[0].history, counts, 8)
    plans_of = [live.plan_batch(LiveCase(8, 1, 1.02), static, batch) for batch in range(3)]
    mean = counts.sum(1) / 8
    ratio = [plan.loads.max() / m for plan, m in zip(plans_of, mean, strict=True)]
    assert found["imbalance"]["live"]["mean"] == pytest.approx(np.mean(ratio))
    assert found["imbalance"]["live"]["max"] == pytest.approx(max(ratio))
    held = [plan.experts[plan.experts >= 0] for plan in plans_of]
    assert found["live"]["pieces"] == pytest.approx(sum(map(len, held)) / 24)
    leaving = [np.bincount(experts // 4).max() for experts in held]
    assert found["live"]["leaving"] == {"mean": np.mean(leaving), "max": max(leaving)}
    less = np.maximum(np.array(ratio) - 1 / mean, 1)
    assert found["live"]["less_a_token"]["mean"] == pytest.approx(less.mean())
    assert found["live"]["fetching"] == 1.0 and found["live"]["wrong"] == 0
    theirs = [peers.plan_replicas(one, 8, 1) for one in counts]
    expected = np.mean([plan.loads.max() / m for plan, m in zip(theirs, mean, strict=True)])
    assert found["imbalance"]["published"]["mean"] == pytest.approx(expected)
    pieces = sum(len(plan.replicas) for plan in theirs) / 24
    assert found["published"]["pieces"] == pytest.approx(pieces)
    assert found["imbalance"]["base"] == found["imbalance"]["none"]
    assert found["imbalance"]["eplb"] == found["imbalance"]["eplb_1"]


def test_static_ways_have_as_many_slots():
    """EPLB and chain get the base's slots and the live ones; what can't be laid out is null."""
    source = draw_source()
    (row,), _ = live.run(lambda ep: [source], live.Options((8,), (2,), (CHAIN,)))
    counts, history = totals(source), source.cases[0].history
    for way, text in (("eplb", "eplb:3"), ("chain", "chain:3"), ("eplb_1", "eplb:1")):
        plan = live.make_static_plan(live.read_base(text), history, counts, 8)
        mean = row["all"]["imbalance"][way]["mean"]
        assert mean == pytest.approx(plan.find_imbalance().mean())
    # On two ranks each of eight experts has at most one further copy: four slots a rank.
    (small,) = live.draw_workloads(["zipf"], Settings(2, 8, 2, 256))
    bases = (live.read_base("chain:4"), live.read_base("chain:5"))
    (row,), left_out = live.run(lambda ep: [small], live.Options((2,), (1,), bases))
    assert row["all"]["imbalance"]["chain"] is None and row["base"] == "chain:4"
    assert row["all"]["imbalance"]["base"] is not None
    assert [entry["base"] for entry in left_out] == ["chain:5"]
    assert "more than copies can fill" in left_out[0]["reason"]


def test_wrong_plans_are_counted(monkeypatch):
    """Plans that lose tokens, raise the load or copy an expert twice are wrong."""
    source = draw_source()
    static = live.make_static_plan(HOME, source.cases[0].history, totals(source), 8)
    right = live.plan_batch(LiveCase(8, 2, 1.02), static, 0)
    assert compare.is_right(right, static, 0)
    lost = right.loads.copy()
    lost[0] -= 1
    higher = static.find_loads(0)
    higher[higher.argmax()] += 1
    higher[higher.argmin()] -= 1
    at_home, twice = right.experts.copy(), right.experts.copy()
    at_home[0] = [0, -1]
    twice[7] = [0, 0]
    for wrong in (
        right._replace(loads=lost),
        right._replace(loads=higher),
        right._replace(experts=at_home),
        right._replace(experts=twice),
    ):
        assert not compare.is_right(wrong, static, 0)
    monkeypatch.setattr(compare, "plan_batch", lambda *_: right._replace(loads=lost))
    (row,), _ = live.run(lambda ep: [source], live.Options((8,), (2,), (HOME,)))
    assert row["all"]["live"]["wrong"] == 3


def make_row(ep, slots, base, mean=1.0, most=1.0, fetching=0.0, names=()):
    """A row with what targets are held against."""
    found = {
        "imbalance": {"live": {"mean": mean, "max": most}},
        "live": {"less_a_token": {"mean": mean - 0.01, "max": most}, "fetching": fetching},
    }
    sources = [{**found, "name": name} for name in names]
    return {"ep": ep, "live": slots, "base": base, "all": found, "sources": sources}


def test_targets_are_held_against_figures():
    """Each target is held against the figure that it names, and others make no row."""
    rows = [
        make_row(16, 1, "home", mean=1.0219, most=1.071),
        make_row(8, 1, "home", mean=9.0),
        make_row(8, 2, "home", mean=1.022, most=1.15),
        make_row(32, 1, "chain:2", mean=1.03, fetching=0.06, names=("burst", "zipf", "uniform")),
        make_row(16, 1, "chain:2", mean=9.0, names=("burst",)),
        make_row(32, 1, "eplb:2", mean=9.0, names=("burst",)),
    ]
    found = live.judge_targets(rows)
    shown = [(row["ep"], row["what"], round(row["figure"], 4), row["holds"]) for row in found]
    assert shown == [
        (16, "mean of all", 1.0219, True),
        (16, "max of all", 1.071, False),
        (8, "mean of all", 1.022, False),
        (8, "max of all", 1.15, True),
        (32, "mean of burst", 1.03, False),
        (32, "fetch, zipf", 0.06, False),
    ]
    less = [row["less_a_token"] for row in found]
    assert less[:2] == pytest.approx([1.0119, 1.071]) and less[4:] == [None, None]


def test_command_writes_every_output(tmp_path, monkeypatch, capsys):
    """The command compares workloads and traces, leaves out what doesn't fit, writes its files."""
    monkeypatch.chdir(tmp_path)
    traces.save("a.npz", make_trace(batches=6, layers=2))
    traces.save("b.npz", make_trace(batches=6, layers=1, experts=12))
    line = "live --trace a.npz --trace b.npz --workload rotating,zipf --experts 32 --batches 2"
    assert cli.main([*line.split(), "--ep", "4,8", "--json", "l.json", "--markdown", "-"]) == cli.OK
    report = json.loads((tmp_path / "l.json").read_text())
    assert [(row["ep"], row["base"]) for row in report["rows"]] == [
        (ep, base) for ep in (4, 8) for base in ("home", "chain:2")
    ]
    names = [[source["name"] for source in row["sources"]] for row in report["rows"]]
    assert (
        names == [["rotating", "zipf", "a.npz", "b.npz"]] * 2 + [["rotating", "zipf", "a.npz"]] * 2
    )
    assert {(row["ep"], row["source"]) for row in report["left_out"]} == {(8, "b.npz")}
    assert [row["all"]["batches"] for row in report["rows"]] == [10, 10, 8, 8]
    printed = capsys.readouterr().out
    assert "| rotating | p95 | " in printed and "n/a: b.npz, EP 8, home: EP size 8" in printed
    live_of = report["rows"][0]["all"]["imbalance"]["live"]
    for statistic, value in live_of.items():
        assert f"| all | {statistic} | " in printed and f"{value:.3f} |\n" in printed
    assert [row["what"] for row in report["targets"]] == ["mean of rotating", "fetch, zipf"]
    for row in report["targets"]:
        assert f"| {row['what']} | {row['ep']} | 1 | chain:2 |" in printed
    # Other rules than those of the targets.
    assert cli.main([*line.split(), "--ep", "4", "--cost", "9", "--json", "-"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["targets"] == []


def test_a_wrong_plan_fails_the_command(monkeypatch, capsys):
    """The exit code says that a plan was wrong, and a line says what is meant."""
    plan = plans.plan_batch

    def lose(case, static, batch):
        found = plan(case, static, batch)
        return found._replace(loads=found.loads - 1)

    monkeypatch.setattr(compare, "plan_batch", lose)
    line = "live --workload uniform --experts 32 --batches 1 --ep 4 --base home"
    monkeypatch.setattr(traces, "packaged", make_trace)
    assert cli.main([*line.split(), "--layers", "0", "--json", "-"]) == cli.FAILED
    assert "2 plans lose tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workload none,zipf", "argument --workload: none stands alone"),
        ("--workload adversarial", "argument --workload"),
        ("--workload none --experts 32 --seed 1", "arguments --experts, --seed: only for"),
        ("--experts 36 --ep 8", "argument --ep: 8 does not divide the 36"),
        ("--experts 4 --ep 4", "experts must be at least 8"),
        ("--domain 3 --ep 4", "argument --domain: 3 does not divide EP size 4"),
        ("--base chain", "argument --base"),
        ("--live 3", "argument --live"),
        ("--above 0.9", "argument --above"),
        ("--layers 99", "--layers"),
        ("--trace missing.npz", "argument --trace"),
        ("--workload none --ep 3", "arguments --ep, --base: EP size 3 does not divide"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, capsys, arguments, message):
    """Options that are wrong, don't fit or have no effect are refused by name before any work."""
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["live", *arguments.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE and message in capsys.readouterr().err
