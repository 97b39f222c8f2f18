"""Options of every subcommand: wrong values and ones without effect are refused by name."""

import argparse
import inspect
import json
import re

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer
from helpers.traces import make_trace

from lplb_triton import Placement, chain, place
from lplb_triton.bench import balance, cli, options, output, workloads
from lplb_triton.bench.commands import gpu, pipeline
from lplb_triton.bench.ep import schedule
from lplb_triton.traces import trace as traces

# Command lines that end well, quickly, each in a folder that has t.npz.
BASE = {
    "balance": "balance --trace t.npz --device cpu --ep 4 --slots 1 --out o",
    "report": "report t.npz --device cpu --ep 4 --slots 1 --out o",
    "verify": "verify --device cpu --instances 1 --no-traffic",
    "solve": "solve --shapes ring:2 --per-family 1 --no-peers --ep 4 --slots 1 --experts 8 "
    "--batches 1 --processes 1",
    "pipeline": "pipeline --shapes cube --tokens 8 --no-first-call --no-traffic",
    "simulate": "simulate --ep 8 --slots 1 --rows 64 --hidden 8 --inner 8",
    "simulate-time": "simulate-time --model gpt-oss-120b --ep 32 --slots 1 --tokens 8 --rounds 1",
    "simulate-live": "simulate-live --pull-rate 300 --model gpt-oss-120b --ep 8 --tokens 64",
    "ep": "ep --device cpu --sections time,pipeline",
    "place": "place t.npz --ep 4 --slots 1 --device cpu --method home-place --trials 1 -o p.json",
    "placement": "placement --synthetic 8 --seeds 0 --ep 4 --slots 1 --device cpu --trials 1",
    "nodes": "nodes --trace t.npz --ep 4 --slots 1 --ranks-per-node 2 --top-k 2 --trials 1",
    "live": "live --trace t.npz --workload uniform --experts 32 --batches 1 --ep 4 --base home",
    "workloads": "workloads --workload uniform --placement place --ep 4 --slots 1 --experts 32 "
    "--batches 1",
    "frameworks": "frameworks --framework megatron --device cpu",
    "record": "record t.npz",
    "completion": "completion bash",
    "scale": "scale --ep 8 --slots 1 --groups 4 --load zipf --experts 16 --batches 1 --no-time",
    "calibrate": "calibrate --hidden 8 --inner 8 --slots 2 -o c.json",
    "advise": "advise --gemm table --ep 8 --experts 32 --slots 1",
}
# What no option takes: neither a number in any range, nor a name, nor a file or its folder.
NEVER = ("", "x,", "no/such/../\x7f", "nan", "inf", "1e400", "9" * 5000)
NUMBERS = (*NEVER, "-1", "x", "1,,2", "0x10")
PATHS = ("", ".", "t.npz/x", "/proc/no/such", "a" * 5000)
FILES = ("--json", "--markdown", "--png", "--merge", "--output")


def subcommands():
    parser = cli._parser()
    (sub,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return sub.choices


def valued(kind):
    """Every option of every command whose values are numbers, choices or paths."""
    found = []
    for name, sub in subcommands().items():
        for action in sub._actions:
            if not action.option_strings or action.nargs == 0:
                continue
            option = action.option_strings[0]
            path = option in (*FILES, "--out", "--trace", "--published", "--hf-config", "--cost")
            if path == (kind == "paths"):
                found.append(pytest.param(name, option, id=f"{name}{option}"))
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a trace; kernels are timed by a fake timer on the CPU."""
    monkeypatch.chdir(tmp_path)
    traces.save(tmp_path / "t.npz", make_trace(batches=4, layers=1))

    def start(args):
        output.check_files([("--json", args.json), ("--markdown", args.markdown)])
        return torch.device("cpu"), FakeTimer()

    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(pipeline, "measure_copy_bandwidth", lambda timer, device: 1e12)
    monkeypatch.setattr(
        schedule, "run_section", lambda job, seconds: {"seconds": 1.0, "failed": "-"}
    )
    return tmp_path


def call(arguments, capsys):
    """Exit code and last line of standard error."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err.strip().splitlines()[-1:]


@pytest.mark.parametrize(("name", "option"), valued("numbers"))
def test_wrong_values_are_refused_by_name(folder, capsys, name, option):
    """A value that an option does not take is refused by the option's name."""
    text = "--progress" if option == "--progress" else option
    for value in NEVER if option in ("--seconds", "--moves") else NUMBERS:
        code, last = call([*BASE[name].split(), f"{option}={value}"], capsys)
        assert code == cli.USAGE, value
        assert text in last[0] and last[0].startswith("lplb-bench"), value
    assert sorted(path.name for path in folder.iterdir()) == ["t.npz"]


@pytest.mark.parametrize(("name", "option"), valued("paths"))
def test_wrong_paths_are_refused_by_name(folder, capsys, name, option):
    """A path that can't be used is refused by its option's name, and no file is left."""
    base = BASE[name].split()
    if name == "placement" and option == "--trace":
        base = ["placement", "--device", "cpu", "--ep", "4"]
    if name == "advise" and option == "--trace":
        base = ["advise", "--gemm", "table", "--model", "deepseek-v3"]
    for value in PATHS:
        if option == "--out" and value in ("", "."):
            continue  # The folder that is there.
        code, last = call([*base, f"{option}={value}"], capsys)
        assert code == cli.USAGE, value
        # A merge is refused before its path is looked at: the trace is not a recorder's.
        assert option in last[0] or option == "--merge", (value, last)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["t.npz"]


@pytest.mark.parametrize("value", ["missing.npz", ".", "t.npz/x", "a" * 5000, "e.json"])
@pytest.mark.parametrize("name", ["report", "record"])
def test_wrong_files(folder, capsys, name, value):
    """`report` and `record` refuse files that are missing or hold no trace."""
    (folder / "e.json").write_text("[[")
    code, last = call([name, value], capsys)
    assert code == cli.USAGE and last[0].startswith("lplb-bench: error: ")
    assert name == "record" or "argument FILE" in last[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("verify --seed -1", "argument --seed"),
        ("workloads --seed -1", "argument --seed"),
        ("solve --seed -1", "argument --seed"),
        ("solve --shapes eplb:100000000:1", "at most 4096 ranks"),
        ("solve --shapes ring:100000000", "more than 4096 ranks"),
        ("balance --placement torus:99999x99999", "more than 4096 ranks"),
        ("verify --instances 100000000000", "argument --instances"),
        ("verify --most-ranks 4", "argument --most-ranks: no placement has fewer than 8 ranks"),
        ("placement --synthetic 1000000000", "argument --synthetic"),
        ("ep --device cpu --ranks 32", "argument --ranks: on a cpu at most 16, got 32"),
        # One file for two things, or over what is read.
        ("advise --json a --markdown a", "--markdown and --json would both write"),
        ("balance --json o/balance.png --out o", "--json and --out would both write"),
        ("placement --json a --png ./a", "--png and --json would both write"),
        ("balance --trace t.npz --json ./t.npz", "argument --json would replace"),
        ("placement --png -", "argument --png"),
        ("verify --out o --json v.json", "arguments --out and --json"),
        ("report t.npz --json r.json", "argument --json: needs --out"),
        # Options that would have no effect.
        (
            "verify --no-traffic --batches 2 --most-ranks 8",
            "arguments --batches, --most-ranks: not",
        ),
        ("placement --seeds 0-3", "argument --seeds: only with --synthetic"),
        ("placement --synthetic 8 --history 3 --layers 0", "arguments --history, --layers: not"),
        ("workloads --placement eplb --trials 3", "argument --trials: only for the placement"),
        ("advise --history 3", "argument --history: only with --trace"),
        ("advise --check --model mixtral-8x7b --tokens 9", "arguments --model, --tokens: --check"),
        ("advise --check --training", "argument --training: --check"),
        ("ep --device cpu --sections train --epochs 3", "argument --epochs: only for the sections"),
        ("ep --device cpu --sections train --kinds nvshmem", "argument --kinds: only for"),
        ("ep --device cpu --sections verify --replays 3", "argument --replays: only for"),
        ("ep --device cpu --sections verify --layer live=1", "argument --layer: only for"),
        ("ep --device cpu --sections live --layer depth=1", "expected each of tokens, hidden"),
        ("ep --device cpu --sections live --layer live=3", "argument --layer: live must be at"),
        ("ep --device cpu --sections live --live-transport symmetric", "symmetric needs GPUs"),
        ("simulate-live", "one of the arguments --pulls --pull-rate is required"),
        ("simulate-live --pulls t.npz", "argument --pulls: t.npz can't be read"),
        ("simulate-live --pull-rate 1 --base chain:128 --ep 8", "argument --base: qwen3-235b"),
        # Sizes that don't fit each other.
        ("advise --top-k 500 --experts 64", "argument --top-k: a token can't have 500 of 64"),
        ("advise --experts 8 --ep 8 --slots 8", "argument --slots: expected some in [1, 7]"),
        ("placement --synthetic 8 --ep 3", "EP size 3 does not divide the 8 experts"),
        ("placement --synthetic 12 --ep 3 --moves 0", "argument --ep: 3 does not divide the 256"),
        ("workloads --experts 4 --ep 4 --workload zipf", "experts must be at least 8"),
        ("workloads --batches 1000 --ep 8 --workload replay", "batches must be at most"),
        ("simulate --ep 1", "argument --slots"),
    ],
)
def test_refused_before_any_work(folder, capsys, arguments, message):
    """Options that conflict, don't fit or have no effect are refused before any work."""
    code, last = call(arguments.split(), capsys)
    assert code == cli.USAGE and message in last[0]
    assert [path.name for path in folder.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(
    "option",
    ["--ep=16", "--slots=1", "--history=3", "--layers=0", "--placement=none", "--device=cpu"]
    + ["--backend=torch", "--tolerance=1e-3", "--json=x.json", "--progress", "--no-progress"]
    + ["--ranks-per-node=4"],
)
def test_a_report_is_only_laid_out(folder, capsys, option):
    """A saved report takes none of the options that would need a new run."""
    assert cli.main(BASE["balance"].split()) == cli.OK
    before = (folder / "o" / "report.html").read_bytes()
    code, last = call(["report", "o/balance.json", option], capsys)
    name = option.split("=")[0].replace("--no-", "--")
    expected = f"error: argument {name}: o/balance.json is a report, which is only laid out"
    assert code == cli.USAGE and last == [f"lplb-bench: {expected}"]
    assert (folder / "o" / "report.html").read_bytes() == before
    assert cli.main(["report", "o/balance.json"]) == cli.OK
    with pytest.raises(SystemExit):
        cli.main(["report", "t.npz", "--no-report"])


def test_defaults_are_the_same_everywhere():
    """One EP size, slots and history for all commands but `scale`, which is about many ranks."""
    expected = {"--ep": "32", "--slots": "1,2", "--history": "0.5", "--tolerance": "0.001"}
    shown = {name: set() for name in expected}
    for name, sub in subcommands().items():
        for action in sub._actions:
            if action.required or (name, action.dest) == ("scale", "ep"):
                continue
            for option in set(action.option_strings) & set(expected):
                help_text = action.help % {"default": action.default}
                shown[option].add(help_text.split("(default ")[1].split(")")[0].split(", or")[0])
    assert {name: [value] for name, value in expected.items()} == {
        name: sorted(values) for name, values in shown.items()
    }


def test_defaults_of_calls_are_those_of_commands():
    """Calls have the same default numbers of slots and ranks as commands."""
    calls = (chain, place, Placement.from_history)
    slots = [inspect.signature(call).parameters["redundant_per_rank"].default for call in calls]
    assert slots == [1, 1, 1]
    load = torch.from_numpy(np.arange(1.0, 9.0))
    assert Placement.from_history(load, 4).n_physical == 12 == chain(load, 4).n_physical
    assert (balance.Options().ep, balance.Options().slots) == (options.EP, options.SLOTS)
    assert inspect.signature(workloads.run).parameters["slots"].default == options.SLOTS


def test_defaults_of_what_is_left_out(folder, capsys):
    """Options left out take their defaults, but `advise` no more ranks than experts."""
    np.savez(folder / "wide.npz", counts=np.ones((4, 64), dtype=int))
    common = ["--trace", "wide.npz", "--device", "cpu", "--json", "-"]
    assert cli.main(["balance", *common]) == cli.OK
    options = json.loads(capsys.readouterr().out)["options"]
    assert (options["ep"], options["slots"], options["history"]) == ([32], [1, 2], 0.5)
    assert cli.main(["placement", *common, "--trials", "1"]) == cli.OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["ep"], row["slots"]) for row in rows] == [(32, 1), (32, 2)]
    assert cli.main(["advise", "--gemm", "table", "--model", "mixtral-8x7b", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    # Eight experts can't be on 32 ranks.
    assert report["options"]["ep"] == 8 and report["options"]["slots"] == [1, 2]


def test_workloads_take_several_numbers_of_slots(folder, capsys):
    """Workloads run `eplb` with each number of slots, and `none` once without slots."""
    line = "workloads --workload uniform --placement none,eplb --ep 4 --experts 32 --batches 1"
    assert cli.main([*line.split(), "--json", "-"]) == cli.OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["placement"], row["slots"]) for row in rows] == [
        ("none", 0),
        ("eplb", 1),
        ("eplb", 2),
    ]


def test_what_cannot_be_laid_out_is_named(folder, capsys):
    """Sizes for which there is no placement are listed as left out, with the reason."""
    line = "placement --synthetic 8 --seeds 0 --ep 4,3 --slots 1,7 --device cpu --trials 1 --json -"
    assert cli.main(line.split()) == cli.OK
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert [(row["ep"], row["slots"]) for row in report["rows"]] == [(4, 1)]
    assert [(row["ep"], row["slots"]) for row in report["left_out"]] == [(4, 7), (3, 1), (3, 7)]
    assert "n/a: EP 3, 1 slots: EP size 3 does not divide the 8 experts" in printed.err
    line = "advise --gemm table --experts 2 --top-k 1 --ep 2 --slots 1,2 --markdown -"
    assert cli.main(line.split()) == cli.OK
    assert "n/a: 2 slots are more than copies can fill" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(BASE))
def test_help_shows_the_examples_of_one_command(name, capsys):
    """The help of a command has examples of that command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    called = r"(?:^ *lplb-bench|^ *torchrun .* -m lplb_triton\.bench) ([\w-]+)"
    examples = re.findall(called, text.split("examples:")[1], re.MULTILINE)
    # A trace that was merged is for another command.
    assert name in examples and set(examples) <= {name, "balance" if name == "record" else name}
