"""`lplb-bench place`, `python -m lplb_triton`, `--quiet` and shell completion."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton import Placement, TimeCost, chain, load_placements, place
from lplb_triton.bench import cli, placement
from lplb_triton.placement import by_time
from lplb_triton.traces import trace as traces

LINE = "place t.npz --ep 4 --slots 1 --device cpu -o p.json".split()


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A trace of two layers with a gap before its last eight batches, in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    steps = [0, 1, 2, 3, *range(100, 108)]
    made = make_trace(batches=12, layers=2, experts=16, steps=steps)
    traces.save("t.npz", made)
    return made


def test_placements_for_plans_by_time(trace, capsys, monkeypatch):
    """The methods by time take a cost and rows, and no others do."""
    monkeypatch.setattr(by_time, "SAMPLES", 2)
    cost = TimeCost.for_model(64, 32)
    cost.save("cost.json")
    options = ["--method", "home-time", "--cost", "cost.json", "--rows", "8"]
    assert cli.main([*LINE, *options, "--json", "-"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["rows_per_rank"] == 8
    expected = place(
        trace.loads(1)[4:8], 4, keep_home=True, objective="time", cost=cost, rows_per_rank=8
    )
    assert load_placements("p.json")[1] == expected
    for wrong, message in (
        (["--method", "time"], "argument --method: time needs --cost and --rows"),
        (["--rows", "8"], "argument --rows: only for the methods time and home-time"),
        (["--method", "time", "--cost", "t.npz", "--rows", "8"], "argument --cost: t.npz"),
    ):
        assert cli.main([*LINE, *wrong]) == cli.USAGE
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["eplb", "chain", "place", "home", "home-chain"])
def test_the_file_holds_what_the_method_makes_of_the_first_half(trace, capsys, method):
    """Each layer is placed by the first half since the gap, and judged by the second one."""
    trials = ["--trials", "5"] if method == "place" else []
    assert cli.main([*LINE, "--method", method, *trials, "--json", "-"]) == cli.OK
    report = json.loads(capsys.readouterr().out)
    found = load_placements("p.json")
    assert list(found) == [0, 1]
    for layer, row in zip(found, report["rows"], strict=True):
        history = trace.loads(layer)[4:8]
        keep_home = method.startswith("home")
        expected = {
            "eplb": lambda load: Placement.from_history(load, 4),
            "chain": lambda load: chain(load, 4),
            "place": lambda load: place(load, 4, trials=5),
            "home": lambda load: Placement.from_history(load, 4, keep_home=True),
            "home-chain": lambda load: chain(load, 4, keep_home=True),
        }[method](history)
        assert found[layer] == expected
        test = torch.from_numpy(trace.counts[8:, layer]).long()
        for name, made in ((method, found[layer]), ("eplb", Placement.from_history(history, 4))):
            excess = placement.judge(made, test, torch.device("cpu"))
            assert row["methods"][name] == {key: 1 + value for key, value in excess.items()}
        loads = test.sum(1).reshape(4, 4, 4).sum(2).double()
        assert row["in_order"] == pytest.approx(float((loads.amax(1) / loads.mean(1)).mean()))
        first = found[layer].phy2log.reshape(4, 5)[:, 0]
        assert not keep_home or torch.equal(first, torch.arange(0, 16, 4).int())
    assert report["placed_by_steps"] == [100, 103]
    assert report["batches"] == {"history": 4, "test": 4}


def test_layers_and_all_batches(trace, capsys):
    """`--layers` chooses layers, and `--all-batches` places by all since the gap for the file."""
    assert cli.main([*LINE, "--layers", "1", "--all-batches", "--markdown", "-"]) == cli.OK
    shown = capsys.readouterr().out
    assert Placement.load("p.json") == chain(trace.loads(1)[4:], 4)
    assert list(load_placements("p.json")) == [1]
    assert "| 1 | " in shown and "| all |" not in shown and "made from all of these" in shown
    note = json.loads(Path("p.json").read_text())["note"]
    assert note == "chain by steps 100 to 107 of t.npz: 4 ranks, 1 redundant slots on each"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep", "3"], "arguments --ep, --slots: EP size 3 does not divide the 16 experts; "
         "2, 4, 8, 16 would do"),
        (["--slots", "13"], "more than copies can fill (12)"),
        (["--layers", "0,2"], "argument --layers: the trace has layers 0 to 1, got 2"),
        (["--history", "4"], "argument --history: history must leave test batches"),
        (["--trials", "3"], "argument --trials: only for the methods place and home-place"),
        (["-o", "t.npz"], "argument --output would replace 't.npz'"),
        (["-o", "p.txt"], "argument --output: must end in .json, got 'p.txt'"),
        (["-o", "-"], "argument --output: give a path, not -"),
        (["--json", "p.json"], "argument --output and --json would both write"),
        (["--quiet", "--progress"], "argument --progress: not with --quiet"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(trace, tmp_path, capsys, options, message):
    """Options that don't fit the trace or each other are refused, and nothing is written."""
    assert cli.main([*LINE, *options]) == cli.USAGE
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    np.savez("zero.npz", counts=np.zeros((4, 16), dtype=int))
    assert cli.main(["place", "zero.npz", *LINE[2:]]) == cli.USAGE
    assert "no test batch of layer 0 has tokens" in capsys.readouterr().err
    np.savez("one.npz", counts=np.ones((1, 16), dtype=int))
    needed = "one.npz has 1 batch; at least 2 are needed, one to place by and one to balance"
    for line in (["place", "one.npz", *LINE[2:]], ["report", "one.npz", "--ep", "4"]):
        assert cli.main(line) == cli.USAGE
        assert needed in capsys.readouterr().err
    for command in ("place", "report"):
        assert cli.main([command, "l.npz", *(LINE[2:] if command == "place" else ())]) == cli.USAGE
        assert ": no such file: 'l.npz'" in (shown := capsys.readouterr().err)
        assert "path:" not in shown


def test_the_packaged_trace_has_a_name(trace, capsys):
    """`packaged` stands for the trace of the package where a command takes one."""
    line = ["place", "packaged", "--method", "eplb", *LINE[2:], "--layers", "0"]
    assert cli.main([*line, "--history", "2", "--json", "-"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["source"] == "packaged trace"
    recorded = traces.packaged()
    assert Placement.load("p.json").n_logical == recorded.experts
    line = "report packaged --ep 7 --device cpu"
    assert cli.main(line.split()) == cli.USAGE
    assert f"does not divide the {recorded.experts} experts" in capsys.readouterr().err


class Terminal:
    """Standard error that claims to be a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


def test_quiet_leaves_results_and_errors(trace, monkeypatch, capsys):
    """`--quiet` shows no progress on a terminal, but the tables, the files and errors."""
    shown = []
    for option in ([], ["--quiet"]):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert cli.main([*LINE, *option]) == cli.OK
        printed = capsys.readouterr().out
        assert "in order" in " ".join(printed.split()) and "placements: p.json" in printed
        shown.append(terminal.text)
    assert "layer 1" in shown[0] and shown[1] == ""
    assert cli.main([*LINE, "-q", "--ep", "3"]) == cli.USAGE
    assert "argument" in capsys.readouterr().err


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    """`python -m lplb_triton` is `lplb-bench`."""
    monkeypatch.setattr(sys, "argv", ["lplb_triton", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lplb_triton", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("lplb_triton ")


def test_completion_without_its_extra_says_what_to_install(monkeypatch, capsys):
    """Without shtab the option names the extra."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == cli.USAGE
    assert "pip install 'lplb_triton[completion]'" in capsys.readouterr().err


def test_completion_of_a_shell(tmp_path, capsys):
    """The printed script completes commands, options, choices and paths in bash."""
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == cli.OK
    script = capsys.readouterr().out
    words = {"pl": "place", "place --me": "--method", "place --method ho": "home-place"}
    for line, expected in words.items():
        typed = ["lplb-bench", *line.split()]
        call = f"COMP_WORDS=({' '.join(typed)}); COMP_CWORD={len(typed) - 1}; _shtab_lplb_bench"
        run = subprocess.run(
            ["bash", "-c", f'{script}\n{call}; echo "${{COMPREPLY[@]}}"'],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert expected in run.stdout.split(), (line, run)
    assert "_shtab_lplb_bench_place___output_COMPGEN=_shtab_compgen_files" in script
