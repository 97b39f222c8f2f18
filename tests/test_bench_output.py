"""Files come before printing, and output that can't be written ends a command quietly."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton import SolveError
from lplb_triton.bench import cli, output, tables, workloads
from lplb_triton.bench.commands import balance as command_balance
from lplb_triton.testing import verify
from lplb_triton.traces import trace as traces

BALANCE = "balance --trace t.npz --device cpu --ep 4 --slots 1 --out o".split()
FILES = ["balance.json", "balance.png", "report.html"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    traces.save(tmp_path / "t.npz", make_trace(batches=4, layers=1))
    return tmp_path


class Broken(io.StringIO):
    """A stream that takes so many characters, and then fails at a write or a flush."""

    def __init__(self, number, room=0, at="write"):
        super().__init__()
        self.number, self.room, self.at = number, room, at

    def write(self, text):
        if self.at == "write" and len(text) > self.room:
            raise OSError(self.number, os.strerror(self.number))
        self.room -= len(text)
        return super().write(text)

    def flush(self):
        if self.at == "flush":
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("at", ["write", "flush"])
@pytest.mark.parametrize("room", [0, 200])
def test_a_closed_pipe_ends_quietly_with_every_file(folder, capsys, monkeypatch, room, at):
    """A closed pipe is exit code 141 without a message, and every file is written."""
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE, room, at))
    assert cli.main(BALANCE) == cli.CLOSED == 141
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in (folder / "o").iterdir()) == FILES


def test_a_failed_check_counts_more_than_a_closed_pipe(folder, capsys, monkeypatch):
    """A failed check decides the exit code even if stdout is a closed pipe."""
    monkeypatch.setattr(command_balance, "DEFAULT_MAX_ITERATIONS", 1)
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    assert cli.main([*BALANCE, "--tolerance", "1e-5"]) == cli.FAILED
    assert "not certified" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [None, Broken(errno.ENOSPC), Broken(errno.ENOSPC, at="flush")])
def test_a_full_disk_or_a_closed_stdout_is_told(folder, capsys, monkeypatch, stream):
    """A full or closed stdout is an error with the reason, and every file is written."""
    monkeypatch.setattr(sys, "stdout", stream)
    number = errno.EBADF if stream is None else errno.ENOSPC
    for command in (BALANCE, ["record", "t.npz"], [*BALANCE, "--json", "-"]):
        assert cli.main(command) == cli.USAGE
        expected = f"lplb-bench: error: cannot write to stdout: {os.strerror(number)}\n"
        assert capsys.readouterr().err.endswith(expected)
    assert sorted(path.name for path in (folder / "o").iterdir()) == FILES


def test_help_into_a_closed_pipe(capsys, monkeypatch):
    """Help into a closed pipe or onto a full disk ends with the exit code of either."""
    for number, code in ((errno.EPIPE, cli.CLOSED), (errno.ENOSPC, cli.USAGE)):
        monkeypatch.setattr(sys, "stdout", Broken(number, at="flush"))
        with pytest.raises(SystemExit) as stop:
            cli.main(["balance", "--help"])
        assert stop.value.code == code


def test_stderr_that_cannot_be_written_changes_nothing(folder, monkeypatch):
    """A stderr that can't be written changes no exit code."""
    for stream in (Broken(errno.ENOSPC), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main([*BALANCE, "--progress"]) == cli.OK
        assert cli.main(["record", "missing.npz"]) == cli.USAGE


def test_a_file_that_cannot_be_written_loses_nothing_else(folder, capsys):
    """A file that can't be written is exit code 2, and all other output is there."""
    assert cli.main([*BALANCE, "--json", "/dev/full"]) == cli.USAGE
    printed = capsys.readouterr()
    assert "Certificates" in printed.out and "report: o/report.html" in printed.out
    assert printed.err == "lplb-bench: error: cannot write /dev/full: No space left on device\n"
    assert sorted(path.name for path in (folder / "o").iterdir()) == FILES[1:]
    line = "workloads --workload uniform --placement eplb --ep 4 --experts 32 --batches 1"
    assert cli.main([*line.split(), "--markdown", "/dev/full", "--json", "w.json"]) == cli.USAGE
    assert "mean imbalance" in capsys.readouterr().out
    assert json.loads((folder / "w.json").read_text())["rows"]


def test_files_are_written_before_anything_is_printed(folder, monkeypatch):
    """Every file of a command is written before its table is printed."""
    there = []

    def show(*args, **kwargs):
        there.append(sorted(path.name for path in folder.rglob("*") if path.suffix != ".npz"))

    monkeypatch.setattr(tables, "show_balance", show)
    monkeypatch.setattr(tables, "show_grids", show)
    monkeypatch.setattr(tables, "show_verdicts", show)
    assert cli.main(BALANCE) == cli.OK
    common = "--workload uniform --placement eplb --ep 4 --experts 32 --batches 1".split()
    assert cli.main(["workloads", *common, "--json", "w.json", "--markdown", "w.md"]) == cli.OK
    assert cli.main("verify --device cpu --instances 1 --no-traffic --out v".split()) == cli.OK
    assert there[0] == sorted([*FILES, "o"])
    assert set(there[1]) - set(there[0]) == {"w.json", "w.md"}
    assert set(there[2]) - set(there[1]) == {"v", "verify.json"}


def test_names_that_a_terminal_cannot_show(folder, capsys, monkeypatch):
    """File names that can't be encoded are shown with replaced characters."""
    name = os.fsdecode(b"half \xff $x$_{ [bold].npz")
    traces.save(folder / name, make_trace(batches=4, layers=1))
    for encoding in ("ascii", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["balance", "--trace", name, *BALANCE[3:]]) == cli.OK
        assert cli.main(["record", name]) == cli.OK
        stream.flush()
        shown = stream.buffer.getvalue().decode(encoding)
        assert "half ? $x$_{ [bold].npz: 32 experts" in shown and "half \\udcff $x$" in shown
    assert "half ? $x$_{" in (folder / "o" / "report.html").read_text(encoding="utf-8")


def test_errors_of_the_solver_are_a_failed_check(folder, capsys, monkeypatch):
    """An error of the solver ends a command with the exit code of a failed check."""
    line = "workloads --workload uniform --placement eplb --ep 4 --experts 32 --batches 1".split()
    for error in (SolveError("gap 1e-2"), verify.NoOptimumError("no optimum")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(workloads, "run", fail)
        assert cli.main(line) == cli.FAILED
        assert capsys.readouterr().err == f"lplb-bench: failed: {error}\n"


def test_memory_that_is_not_there(folder, capsys, monkeypatch):
    """A lack of memory is told in one line, and other runtime errors are raised."""

    def numpy_fails(*args, **kwargs):
        np.zeros(2**50)

    def torch_fails(*args, **kwargs):
        torch.zeros(2**50)

    line = "workloads --workload uniform --placement eplb --ep 4 --experts 32 --batches 1".split()
    for fail in (numpy_fails, torch_fails):
        monkeypatch.setattr(workloads, "run", fail)
        assert cli.main(line) == cli.USAGE
        assert "error: not enough memory for these sizes" in capsys.readouterr().err

    def bug(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(workloads, "run", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(line)


def test_ctrl_c_while_options_are_read(capsys, monkeypatch):
    """An interrupt while options are read is exit code 130."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.argparse.ArgumentParser, "parse_args", interrupted)
    assert cli.main(["balance"]) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == "lplb-bench: interrupted\n"


def test_devices_need_no_writable_folder(monkeypatch):
    """A device needs no writable folder, but must be writable itself."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/dev" and real(path, mode))
    output.check_files([("--json", "/dev/null"), ("--markdown", None)])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path in ("/dev/null", "x.json"):
        with pytest.raises(output.UsageError, match="argument --json: .* may not be written"):
            output.check_files([("--json", path)])


@pytest.mark.slow
def test_in_a_real_pipe(folder):
    """As a shell does it: ``lplb-bench balance | head -1`` and ``> /dev/full``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "lplb_triton.bench", *BALANCE]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, timeout=120, check=False, **run)
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.CLOSED, "")
    assert sorted(path.name for path in (folder / "o").iterdir()) == FILES
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, timeout=120, check=False, **run)
    assert done.returncode == cli.USAGE
    assert done.stderr == ("lplb-bench: error: cannot write to stdout: No space left on device\n")
