"""What is shown while a command works: which part of how many, and since when."""

import io
import re
import sys

import pytest
from helpers.traces import make_trace

from lplb_triton.bench import cli
from lplb_triton.bench.progress import progress
from lplb_triton.traces import trace as traces

PARTS = [("one", 2), ("[two]", 1), ("three", 3)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def walk(show):
    with progress(PARTS, show) as advance:
        for _ in range(6):
            advance()


def test_lines_of_what_is_no_terminal(capsys):
    """Where stderr is no terminal, each part is shown once, on a line with its number."""
    walk(True)
    lines = capsys.readouterr().err.splitlines()
    shown = [re.fullmatch(r"lplb-bench: \d+ s, (.*)", line).group(1) for line in lines]
    assert shown == ["1 of 3: one", "2 of 3: [two]", "3 of 3: three"]


@pytest.mark.parametrize(("show", "stream"), [(None, io.StringIO), (False, Terminal)])
def test_nothing_unless_asked(monkeypatch, show, stream):
    """Progress is silent by default where stderr is no terminal, and if turned off."""
    monkeypatch.setattr(sys, "stderr", stream())
    walk(show)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("show", [None, True])
def test_a_bar_on_a_terminal(monkeypatch, show):
    """A terminal gets a bar with the part's name and the elapsed time."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    walk(show)
    shown = sys.stderr.getvalue()
    assert "3 of 3: three" in shown and "0:00:0" in shown


def test_nothing_to_do():
    """Progress over no parts raises nothing."""
    with progress([], True):
        pass


def test_commands_name_their_combinations(tmp_path, capsys):
    """With --progress, commands show each combination by its number and name."""
    traces.save(tmp_path / "t.npz", make_trace(batches=4))
    common = ["--device", "cpu", "--json", "-", "--progress"]
    trace = ["--trace", str(tmp_path / "t.npz")]
    balance = ["balance", *trace, "--ep", "4,5", "--slots", "1,2", "--placement", "eplb,none"]
    assert cli.main([*balance, *common]) == cli.OK
    lines = capsys.readouterr().err.splitlines()
    shown = [line.partition(" s, ")[2] for line in lines if line.startswith("lplb-bench: ")]
    assert shown == [
        f"{number} of 6: EP {ep}, {name}"
        for number, (ep, name) in enumerate(
            ((ep, name) for ep in (4, 5) for name in ("eplb, 1 slots", "eplb, 2 slots", "none")), 1
        )
    ]
    verify = ["verify", "--instances", "1", *common]
    assert cli.main([*verify, "--no-traffic"]) == cli.OK
    assert "17 of 17: random:32:4" in capsys.readouterr().err
    assert cli.main([*verify, "--batches", "1", "--most-ranks", "8"]) == cli.OK
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" s, ")[2] for line in lines if "copies" in line or "EP 8" in line] == [
        "18 of 23: 256 experts, EP 8, eplb, 1 slot",
        "19 of 23: 256 experts, EP 8, chain, 2 slots",
        "20 of 23: 256 experts, EP 8, place, 1 slot",
        "21 of 23: 5 to 8 copies on 8 ranks",
        "23 of 23: no copies on 8 ranks",
    ]
    placement = ["placement", *trace, "--ep", "4,5", "--slots", "1,2", "--trials", "1"]
    assert cli.main([*placement, *common]) == cli.OK
    assert "2 of 2: EP 4, 2 slots" in capsys.readouterr().err
    workloads = "workloads --workload uniform,zipf --placement eplb --ep 4 --experts 32"
    assert cli.main([*workloads.split(), "--batches", "1", *common[2:]]) == cli.OK
    assert "2 of 2: EP 4, zipf" in capsys.readouterr().err
    assert cli.main([*balance, *common[:-1]]) == cli.OK
    assert " of 6: " not in capsys.readouterr().err
