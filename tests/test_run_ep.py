"""lplb-bench ep: every section over gloo, its gates, its bounds, and its report."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gloo
import pytest
import torch

from lplb_triton import Balancer
from lplb_triton.bench import cli, run_ep
from lplb_triton.bench.ep import loads, processes, schedule, train
from lplb_triton.bench.ep.pipeline import make_placements
from lplb_triton.bench.ep.sizes import SIZES, Job
from lplb_triton.bench.ep.weights import FORMS
from lplb_triton.bench.measure.timer import WrongAnswerError

CPU = SIZES["cpu"]
LIVE_FORMS = {"live, messages", "live, spread", "lplb, spread"}


@pytest.fixture
def quick_start(monkeypatch):
    """Start processes in less time than the command does; other tests do as it does."""
    context = gloo.context()
    monkeypatch.setattr(processes.mp, "get_context", lambda kind: context)


@pytest.mark.slow
def test_every_section_on_a_cpu(quick_start, tmp_path, capsys):
    """All sections pass on two gloo ranks, and the report has their figures."""
    path, text = tmp_path / "ep.json", tmp_path / "ep.md"
    options = ["--device", "cpu", "--epochs", "200", "--replays", "1"]
    code = run_ep.main([*options, "--json", str(path), "--markdown", str(text)])
    report = json.loads(path.read_text())
    assert code == cli.OK, report["sections"]
    assert report["options"]["ranks"] == 2 and report["environment"]["torch"]
    sections = report["sections"]
    assert sections["verify:distributed"]["eager_wrong"] == 0
    assert sections["verify:distributed"]["graph_epochs"] >= 200
    assert "ranks [1] did not come" in sections["kill:distributed"]["error"]
    timed = sections["time:distributed"]
    for name in ("sum", "sum and gather", "all-reduce"):
        assert 0 < timed[name]["rank 0"]["median"] <= timed[name]["slowest"]["median"]

    found = sections["pipeline:distributed"]["placements"]
    assert list(found) == ["ring:2", "eplb:2:1", "eplb:2:2"]
    for shape in found.values():
        assert shape["without_sync_us"]["slowest"]["median"] > 0
        for quotas in ("local", "global"):
            row = shape[quotas]
            assert 1 <= row["over_bound"] < 1.1 and row["imbalance"]["max"] < 1.2
            assert row["run_us"]["slowest"]["p99"] >= row["run_us"]["rank 0"]["median"] > 0
            assert row["host_us"]["rank 0"]["median"] > 0
        assert shape["global"]["kept_on_rank"] > shape["local"]["kept_on_rank"]

    for redundant in ("1", "2"):
        row = sections[f"weights:{redundant}"]
        assert 0 < row["rows_out"] <= int(redundant) and row["home_bytes"] == 8 * 16 * 32 * 3 * 4
        assert set(row["forms"]) == set(FORMS)
        for form in row["forms"].values():
            assert form["weights"]["median"] > 0 and form["gradients"]["median"] > 0
    for routing in ("skewed", "learned", "even"):
        row = sections[f"train:{routing}"]
        runs = {run["balance"]: run for run in row["runs"]}
        assert list(runs) == (["none", "lplb"] if routing == "even" else ["none", "eplb", "lplb"])
        assert max(run["loss_difference"] for run in row["runs"]) <= CPU.parity
        assert all(0 < run["moe_ms"] < run["step_ms"] for run in row["runs"])
        assert runs["lplb"]["certified"] == 1.0
    assert sections["train:skewed"]["runs"][0]["imbalance"] >= train.SKEWED
    assert sections["train:skewed"]["runs"][2]["imbalance"] < 1.2
    assert 0 < sections["train:learned"]["reversed_difference"] <= CPU.parity
    assert sections["train:even"]["runs"][0]["imbalance"] == 1.0
    for routing, row in sections["live:layer"]["routings"].items():
        forms = row["forms"]
        assert set(forms) == {"none", "eplb", "lplb", "even ranks", "even", *LIVE_FORMS}
        assert all(form["us"]["median"] > 0 for form in forms.values())
        for name in LIVE_FORMS:
            if name.startswith("live"):
                assert max(forms[name]["imbalance"]) <= 1.04
                assert (forms[name]["pieces"] > 0) == (routing == "changing")
        assert (min(forms["lplb"]["imbalance"]) > 1.2) == (routing == "changing")

    printed, written = capsys.readouterr(), text.read_text()
    assert "Whole run with load sync" in printed.out and "train:even: done in" in printed.err
    assert f"torch {report['environment']['torch']}" in written
    assert "| eplb:2:2 | distributed | global |" in written
    assert "| train:skewed | done |" in written and "| 2 | Replicas |" in written


@pytest.mark.slow
def test_a_torus_of_four_ranks(quick_start, capsys):
    """The pipeline section on four ranks times a torus and EPLB with one and two slots."""
    options = "ep --device cpu --ranks 4 --sections pipeline --tokens 32 --replays 1 --json -"
    assert cli.main(options.split()) == cli.OK
    report = json.loads(capsys.readouterr().out)
    found = report["sections"]["pipeline:distributed"]["placements"]
    assert list(found) == ["torus:2x2", "eplb:4:1", "eplb:4:2"]


@pytest.mark.parametrize(
    ("ranks", "fixed", "redundant"), [(2, "ring:2", 1), (4, "torus:2x2", 2), (8, "cube", 2)]
)
def test_placements(ranks, fixed, redundant):
    """There is a fixed topology, and EPLB with one and two slots per rank."""
    made = make_placements(ranks)
    assert list(made) == [fixed, f"eplb:{ranks}:1", f"eplb:{ranks}:2"]
    for placement, slots in zip(made.values(), (redundant, 1, 2), strict=True):
        assert placement.ep_size == ranks and placement.n_logical == 256
        assert placement.slots_per_rank == 256 // ranks + slots


class AllRanks:
    """The balancers of both ranks in one process; ids are [rank, tokens, top_k]."""

    def __init__(self, change=lambda out: None):
        self.placement = make_placements(2)["eplb:2:2"]
        self.each = [Balancer(self.placement, rank=rank, device="cpu") for rank in range(2)]
        first = self.each[0]
        self.quotas, self.tolerance, self.device = first.quotas, first.tolerance, first.device
        self.solve, self.cumulative_shares = first.solve, first.cumulative_shares
        self.change = change

    def run(self, idx):
        counted = [b.count(ids) for b, ids in zip(self.each, idx, strict=True)]
        solution = self.solve(sum(counts for counts, _ in counted))
        cumulative = self.cumulative_shares(solution.shares)
        out = torch.stack(
            [
                balancer.select(ids, cumulative, running)
                for balancer, ids, (_, running) in zip(self.each, idx, counted, strict=True)
            ]
        )
        self.change(out)
        return out


def batch():
    return torch.stack([torch.randperm(256)[:8] for _ in range(400)]).view(2, 200, 8)


def loads_of(ranks):
    place = SimpleNamespace(ranks=2, gather=lambda ids: ids)
    return loads.check_loads(place, ranks, [batch()])


def test_the_gate_passes_what_is_right():
    """Ids that follow the LP pass the check of loads."""
    found = loads_of(AllRanks())
    assert found["batches"] == 1 and 0 < found["kept_on_rank"] < 1
    assert 1 <= found["over_bound"] <= found["imbalance"]["max"] * (1 + 1e-6)


def to_another_expert(out):
    out[1, 7, 3] = (out[1, 7, 3] + 1) % 260


def to_one_copy(out):
    placement = make_placements(2)["eplb:2:2"]
    tokens = torch.bincount(out.flatten(), minlength=placement.n_physical)
    pairs = placement.log2phy[placement.logcnt == 2].long()[:, :2]
    first, second = pairs[tokens[pairs].amin(1).argmax()]
    assert tokens[second] > 1
    out[out == second] = first


@pytest.mark.parametrize(
    ("change", "message"),
    [(to_another_expert, "don't map back"), (to_one_copy, "a token or more off its share")],
)
def test_the_gate_stops_wrong_ids(change, message):
    """Ids of another expert or off their shares by a token are a wrong answer."""
    with pytest.raises(WrongAnswerError, match=message):
        loads_of(AllRanks(change))


def test_the_gate_holds_loads_against_the_bound(monkeypatch):
    """Loads off the bound or off the certified load are refused."""
    right = loads.solve
    for factor in (0.5, 2.0):

        def wrong(problem, factor=factor):
            solution = right(problem)
            return replace(
                solution,
                max_load=factor * solution.max_load,
                lower_bound=factor * solution.lower_bound,
            )

        monkeypatch.setattr(loads, "solve", wrong)
        with pytest.raises(WrongAnswerError, match="largest load"):
            loads_of(AllRanks())


def job(tmp_path, **changes):
    training = {**CPU.training, "steps": 3, "skip": 1, **changes}
    sizes = replace(CPU, parity=-1.0, noise=0.0, training=training)
    return Job("train", "skewed", 2, "cpu", sizes, str(tmp_path))


@pytest.mark.slow
def test_a_section_that_fails_says_why(tmp_path):
    """Errors, dead processes and the time limit are reported."""
    for name in ("soft", "hard", "late"):
        (tmp_path / name).mkdir()
    # Figures stay where they are there.
    found = processes.run_section(job(tmp_path / "soft"), 120)
    assert "losses of lplb and none differ" in found["failed"] and len(found["runs"]) == 3
    found = processes.run_section(job(tmp_path / "hard", experts=5), 120)
    assert "ValueError: streams (2) and experts (5)" in found["failed"] and "runs" not in found
    found = processes.run_section(job(tmp_path / "late"), 0.1)
    assert "not done within 0.1 s" in found["failed"] and found["seconds"] < 30


def test_nothing_starts_without_time_left(capsys):
    """Without time left every section fails before it starts."""
    options = ["--device", "cpu", "--sections", "verify,kill", "--seconds", "1"]
    assert run_ep.main(options) == cli.FAILED
    printed = capsys.readouterr()
    assert "verify:distributed: failed: no time left" in printed.err
    assert "kill:distributed failed: no time left" in printed.out


def test_what_diverged_has_no_figure(tmp_path, monkeypatch):
    """An infinite figure becomes null in the report."""
    (tmp_path / "0.json").write_text(json.dumps({"reversed_difference": math.inf}))
    context = SimpleNamespace(
        Process=lambda **_: SimpleNamespace(start=lambda: None, exitcode=0, pid=None)
    )
    monkeypatch.setattr(processes.mp, "get_context", lambda kind: context)
    found = processes.run_section(Job("train", "even", 1, "cpu", CPU, str(tmp_path)), 9.0)
    assert found["reversed_difference"] is None
    json.dumps(found, allow_nan=False)


def test_a_run_that_is_cut_short_keeps_what_it_found(monkeypatch, tmp_path):
    """The file has the figures of the sections before an interrupt."""

    def section(job, seconds):
        if job.section == "kill":
            raise KeyboardInterrupt
        return {"seconds": 1.0, "failed": "on purpose"}

    monkeypatch.setattr(schedule, "run_section", section)
    path = tmp_path / "ep.json"
    run_ep.main(["--device", "cpu", "--sections", "time,kill", "--json", str(path)])
    found = json.loads(path.read_text())["sections"]
    assert found == {"time:distributed": {"seconds": 1.0, "failed": "on purpose"}}


def test_what_cannot_run_is_named(monkeypatch, tmp_path):
    """A section that the device or the files do not allow is skipped with its reason."""
    lines = []

    def skipped(device, sections, kinds):
        found = schedule.run_sections(
            2, device, CPU, sections=sections, kinds=kinds,
            after=lambda name, row: lines.append(f"{name}: {schedule.describe_outcome(row)}"),
        )  # fmt: skip
        return {name: row["skipped"] for name, row in found.items()}

    assert skipped("cpu", ("kill",), ("nvshmem",)) == {"kill:nvshmem": "needs GPUs"}
    found = skipped("cuda", ("kill",), ("distributed", "hierarchical"))
    assert "NCCL" in found["kill:distributed"] and "two domains" in found["kill:hierarchical"]
    monkeypatch.setattr(train, "EXAMPLES", tmp_path)
    assert "checkout" in skipped("cpu", ("train",), ())["train:even"]
    assert len(lines) == 6 and all(": skipped: " in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("late", [0.0, 0.5])
def test_ctrl_c_leaves_one_line_and_no_process(late):
    """A terminal sends it to every process of the command, also to those that only start."""
    command = [sys.executable, "-m", "lplb_triton.bench", "ep", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--sections", "time"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, cwd=Path(__file__).parents[1],
        # Started in the background, tests ignore it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 60
    # A helper of multiprocessing and both ranks.
    while len(started := children.read_text().split()) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(late)
    # The order in which they get it is anything.
    for pid in started:
        os.kill(int(pid), signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (cli.INTERRUPTED, "lplb-bench: interrupted\n")
    assert len(started) >= 3
    while any(Path(f"/proc/{pid}/exe").exists() for pid in started) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in started)


def test_interrupts_are_blocked_only_meanwhile():
    """SIGINT is delivered when the block ends, and the mask is restored."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), processes.blocked_interrupts():
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
            signal.raise_signal(signal.SIGINT)
            reached = True
    finally:
        signal.signal(signal.SIGINT, handler)
    assert reached and signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3"], "argument --ranks: expected at least 2, and a divisor of the 256"),
        (["--ranks", "1"], "argument --ranks"),
        (["--sections", "verify,all"], "argument --sections"),
        (["--kinds", "mpi"], "argument --kinds"),
        (["--epochs", "0"], "argument --epochs"),
        (["--seconds", "0"], "expected a positive number of seconds, got '0'"),
        (["--seconds", "soon"], "argument --seconds"),
        (["--json", "-", "--markdown", "-"], "stdout"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    """Wrong options end with the usage code and name the option."""
    try:
        code = run_ep.main(["--device", "cpu", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE
    assert message in capsys.readouterr().err


def test_a_gpu_is_needed(monkeypatch, capsys):
    """Without a GPU `lplb-bench ep` is refused as wrong usage."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["ep"]) == cli.USAGE
    assert "can only be timed on a GPU" in capsys.readouterr().err


@pytest.mark.multigpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["symmetric", "nvshmem", "distributed"])
def test_on_gpus(kind, tmp_path):
    """The verify, time, pipeline and kill sections pass on two GPUs."""
    if kind == "nvshmem":
        pytest.importorskip("nvshmem")
    path = tmp_path / "ep.json"
    code = run_ep.main(
        ["--ranks", "2", "--kinds", kind, "--sections", "verify,time,pipeline,kill"]
        + ["--epochs", "5000", "--replays", "10", "--json", str(path)]
    )
    assert code == cli.OK, path.read_text()
