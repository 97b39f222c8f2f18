"""lplb-bench live --times: what is checked before timing, the rows, and the command."""

import json

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer
from helpers.traces import make_trace

from lplb_triton import Balancer
from lplb_triton.bench import cli, live
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.live import times
from lplb_triton.bench.measure.timer import WrongAnswerError, compute_statistics
from lplb_triton.bench.workloads import Settings
from lplb_triton.traces import trace as traces

HOME = live.Options((4,), (1,), (live.read_base("home"),))
LINE = "live --times --workload rotating --experts 16 --batches 1 --ep 4 --base home --tokens 16"


def time_source(timer, options=HOME, batches=2):
    """Rows of one small workload."""
    sources = live.draw_workloads(["rotating"], Settings(4, 16, batches, 2048))
    return live.time_runs(lambda ep: sources, options, make_timing(timer))[0]


def make_timing(timer):
    return live.Timing(timer, torch.device("cpu"), 64)


def test_ids_are_drawn_by_the_counts():
    """Ids follow the counts of their batch, and the same seed draws them again."""
    counts = np.array([[0, 30, 10, 0], [5, 0, 0, 0]])
    ids = times.draw_ids(counts, 1000, np.random.default_rng(0))
    assert ids.shape == (2, 1000, 8) and ids.dtype == torch.int64
    share = torch.bincount(ids[0].flatten(), minlength=4) / ids[0].numel()
    assert share.tolist() == pytest.approx([0, 0.75, 0.25, 0], abs=0.03)
    assert not ids[1].any()
    assert ids.equal(times.draw_ids(counts, 1000, np.random.default_rng(0)))


def test_rows_keep_runs_apart():
    """Each run has the times of its own calls, in turn, and the plan those that follow."""
    (row,) = time_source(FakeTimer())
    assert (row["ep"], row["live"], row["base"]) == (4, 1, "home")
    assert (row["batches"], row["fetching"]) == (2, 2) and row["run_us"]["level"] is None
    for at, name in enumerate(live.RUNS):
        expected = compute_statistics([2 * at + 1, 2 * at + 2])
        assert row["run_us"]["fetch"][name] == expected
    assert row["plan_us"] == compute_statistics([7, 8])


def test_batches_that_fetch_are_apart():
    """Statistics of batches that fetch hold none of the others' times."""
    runs = {name: [1.0, 5.0, 3.0] for name in live.RUNS}
    row = times.summarize(times.Times([True, False, True], runs, [9.0, 9.0]))
    assert (row["batches"], row["fetching"]) == (3, 2)
    assert row["run_us"]["fetch"]["with"] == compute_statistics([1, 3])
    assert row["run_us"]["level"]["again"] == compute_statistics([5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p._replace(experts=p.experts * 0 - 1), "other experts than by the twin"),
        (lambda p: p._replace(max_load=p.max_load + 1), "the largest load is"),
        (lambda p: p._replace(loads=p.loads + 100), "rank loads miss the plan"),
    ],
)
def test_wrong_outcomes_are_not_timed(monkeypatch, change, message):
    """Where kernel and twin disagree, an error says so, and nothing has been timed."""
    plan, timer = times.plan_batch, FakeTimer()
    monkeypatch.setattr(times, "plan_batch", lambda *given: change(plan(*given)))
    with pytest.raises(WrongAnswerError, match=message):
        time_source(timer, batches=1)
    assert timer.calls == 0


def test_ids_of_other_experts_are_not_timed(monkeypatch):
    """Ids that are no copies of their experts are refused before anything is timed."""
    run, timer = Balancer.run, FakeTimer()

    def exchange(balancer, idx):
        out = run(balancer, idx)
        return out.roll(1, 0) if balancer.placement.live_per_rank else out

    monkeypatch.setattr(Balancer, "run", exchange)
    with pytest.raises(WrongAnswerError, match="batch 0: a physical id is no copy"):
        time_source(timer, batches=1)
    assert timer.calls == 0


def test_command_writes_times(tmp_path, monkeypatch, capsys):
    """The command times workload and trace, and its table shows the figures of its JSON file."""
    monkeypatch.chdir(tmp_path)
    traces.save("a.npz", make_trace(batches=2, layers=1, experts=16))
    monkeypatch.setattr(gpu, "start", lambda args: (torch.device("cpu"), FakeTimer()))
    line = [*LINE.split(), "--trace", "a.npz", "--json", "t.json", "--markdown", "-"]
    assert cli.main(line) == cli.OK
    report = json.loads((tmp_path / "t.json").read_text())
    (row,) = report["times"]
    assert report["rows"] == [] and row["batches"] == 2 and report["options"]["tokens"] == 16
    found = row["run_us"]["fetch"]["with"]
    cell = " / ".join(f"{found[name]:.1f}" for name in ("median", "p99", "max"))
    assert f"| {cell} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE, "TRITON_INTERPRET is set"),
        ("live --tokens 8", "argument --tokens: only with --times"),
        (f"{LINE} --above 3", "argument --above: with --times at most 2"),
    ],
)
def test_times_need_a_gpu(capsys, line, message):
    """Without a GPU, and with options that don't fit, nothing starts."""
    assert cli.main(line.split()) == cli.USAGE
    assert message in capsys.readouterr().err
