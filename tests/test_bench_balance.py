"""lplb-bench balance: numbers, files and exit codes."""

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
from PIL import Image
from scipy.optimize import linprog

from lplb_triton import Status, place
from lplb_triton.bench import balance, cli, output, plots, tables
from lplb_triton.bench.commands import balance as command_balance
from lplb_triton.placement import placing
from lplb_triton.traces import trace as traces

TOLERANCE = 1e-3
VARIANTS = ("none", "reordered", "even", "lp", "integer")


@pytest.fixture
def trace_path(tmp_path):
    path = tmp_path / "counts.npz"
    traces.save(path, make_trace())
    return path


def command(trace_path, out, *more):
    return ["balance", "--trace", str(trace_path), "--device", "cpu", "--out", str(out), *more]


def exact_optimum(placement, counts):
    """Solve one batch's min-max LP over slots with HiGHS; rank of slot p is p // slots_per_rank."""
    slots, ranks = placement.n_physical, placement.ep_size
    expert = placement.phy2log.numpy()
    rank = placement.rank_of_slot.numpy()
    of_expert = np.zeros((placement.n_logical, slots + 1))
    of_expert[expert, np.arange(slots)] = 1
    of_rank = np.zeros((ranks, slots + 1))
    of_rank[rank, np.arange(slots)] = 1
    of_rank[:, -1] = -1
    cost = np.r_[np.zeros(slots), 1.0]
    done = linprog(cost, of_rank, np.zeros(ranks), of_expert, counts, bounds=(0, None))
    assert done.status == 0
    return done.fun


def test_writing_to_what_is_no_file(tmp_path):
    """A pipe stays a pipe and a link a link: replaced, /dev/null would be gone for everybody."""
    pipe, link, file = (tmp_path / name for name in ("pipe", "link", "file"))
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        output.write(pipe, b"one")
        assert os.read(reader, 10) == b"one" and pipe.is_fifo()
    finally:
        os.close(reader)
    link.symlink_to(file)
    output.write(link, b"two")
    output.write(link, b"three")
    assert link.is_symlink() and file.read_bytes() == b"three"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_report(trace_path, tmp_path, capsys):
    """The command writes figures, a picture and a report, and its figures are consistent."""
    out = tmp_path / "out"
    assert cli.main(command(trace_path, out, "--ep", "8", "--slots", "1,2")) == 0
    shown = capsys.readouterr().out
    assert "split" in shown and "12 of 12" in shown and "CPU" in shown

    assert sorted(path.name for path in out.iterdir()) == [
        "balance.json",
        "balance.png",
        "report.html",
    ]
    with Image.open(out / "balance.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 400
        colors = {pixel for _, pixel in image.convert("RGB").getcolors(maxcolors=1 << 20)}
    assert {(0x00, 0x67, 0xAB), (0xC8, 0x4F, 0x00), (0x87, 0x8E, 0x98)} <= colors

    report = json.loads((out / "balance.json").read_text())
    assert report["options"]["ep"] == [8]
    assert report["options"]["backend"] == "torch"
    assert report["trace"]["meta"]["made"] == "up"
    assert report["trace"]["stretches"] == [{"history": [0, 6], "test": [6, 12], "steps": [0, 11]}]
    assert report["environment"]["torch"] == torch.__version__.partition("+")[0] or (
        report["environment"]["torch"] == torch.__version__
    )
    assert report["environment"]["cpu_count"] == os.cpu_count()
    assert [(cell["ep"], cell["slots"]) for cell in report["cells"]] == [(8, 1), (8, 2)]
    for cell in report["cells"]:
        means = {name: cell["imbalance"][name]["mean"] for name in VARIANTS}
        for name in VARIANTS:
            stats = cell["imbalance"][name]
            assert 1 <= stats["mean"] <= stats["p95"] * 1.5
            assert stats["p95"] <= stats["max"]
        assert means["lp"] < means["even"] < means["none"]
        assert means["lp"] < means["reordered"] < means["none"]
        lps = cell["lps"]
        assert lps["count"] == lps["certified"] == 12
        assert 0 <= lps["max_gap"] <= TOLERANCE
        assert 1 <= lps["max_iterations"] <= 40
        assert lps["median_us_per_lp"] > 0
        assert "not the GPU kernel's time" in lps["time_is"]
        assert [layer["layer"] for layer in cell["by_layer"]] == [0, 1]
        assert {len(layer["imbalance"]["lp"]) for layer in cell["by_layer"]} == {6}
        assert len(cell["example"]["loads"]["lp"]) == 8
        sums = [sum(cell["example"]["loads"][name]) for name in VARIANTS]
        assert sums == pytest.approx([sums[0]] * 5, rel=1e-6)
    one, two = (cell["imbalance"]["lp"]["mean"] for cell in report["cells"])
    assert two < one


@pytest.mark.parametrize(
    ("name", "ep", "slots"),
    [
        ("eplb", 8, 1),
        ("chain", 8, 1),
        ("eplb", 4, 2),
        ("cube", 8, 2),
        ("ring:4", 8, 1),
        ("torus:2x4", 8, 2),
    ],
)
def test_cell_against_exact_optimum(name, ep, slots):
    """The bounds and the LP's loads of a cell enclose HiGHS's optimum within the tolerance."""
    trace = make_trace(batches=8)
    options = balance.Options((ep,), (slots,), (name,), history=5, tolerance=TOLERANCE)
    (cell,) = balance.run(trace, options)
    assert cell.reason is None
    assert cell.all_certified
    totals = trace.totals()
    for result in cell.results:
        history = torch.from_numpy(totals[:5, result.layer].sum(0)).double()
        placement = balance.make_placement(name, history, ep, slots)
        assert placement.n_physical == 32 + ep * slots
        for at, counts in enumerate(totals[5:, result.layer]):
            best = exact_optimum(placement, counts)
            largest = {variant: result.loads[variant][at].max() for variant in VARIANTS}
            assert result.bound[at] <= best * (1 + 1e-6)
            assert best <= largest["lp"] * (1 + 1e-6)
            assert largest["lp"] <= best * (1 + TOLERANCE) / (1 - TOLERANCE) + 1e-6
            assert largest["lp"] <= largest["even"] * (1 + TOLERANCE)
            for variant in VARIANTS:
                assert result.loads[variant][at].sum() == pytest.approx(counts.sum(), rel=1e-6)
    assert (cell.bound() <= cell.imbalance("lp") * (1 + 1e-6)).all()
    assert (cell.bound() >= 1 - 1e-6).all()


def test_place_sees_every_batch_of_the_history(monkeypatch):
    """`place` is given every batch of the history, not their mean."""
    monkeypatch.setattr(placing, "CPU_EFFORT", (32, 100))
    trace = make_trace(batches=40, layers=1, experts=64)
    (cell,) = balance.run(trace, balance.Options((8,), (1,), ("place",)))
    history = torch.from_numpy(trace.totals()[:20, 0])
    expected, by_mean = (place(load, 8) for load in (history, history.double().mean(0)))
    assert cell.all_certified
    assert torch.equal(cell.results[0].placement.phy2log, expected.phy2log)
    assert not torch.equal(expected.phy2log, by_mean.phy2log)
    (cell,) = balance.run(trace, balance.Options((5,), (1,), ("place",)))
    assert "EP size 5 does not divide" in cell.reason


@pytest.mark.parametrize("name", ["eplb", "chain", "place"])
def test_too_many_slots_are_impossible(name):
    """More redundant slots than copies can fill make a cell impossible, with the reason."""
    (cell,) = balance.run(make_trace(batches=4, layers=1), balance.Options((4,), (25,), (name,)))
    assert cell.reason == "25 redundant slots on 4 ranks are more than copies can fill"


def test_refused_in_the_command(tmp_path, capsys):
    """Counts of 1e10 wrapped around silently, and 2**62 was a traceback."""
    for largest in (10**10, 2**62):
        np.savez(tmp_path / "own.npz", counts=np.full((4, 8), largest))
        for name in ("balance", "placement", "advise"):
            command = [name, "--trace", str(tmp_path / "own.npz"), "--ep", "4"]
            command += ["--model", "mixtral-8x7b"] if name == "advise" else ["--device", "cpu"]
            assert cli.main(command) == cli.USAGE
            assert f"got {largest} or more for expert 0 of layer 0" in capsys.readouterr().err


def test_stretches():
    """A gap between steps or a step back begins a stretch with a history of its own."""
    steps = np.r_[0:10, 100:104, 50:52].astype(np.int64)
    cut = balance.find_stretches(steps, 0.5)
    assert [(s.start, s.split, s.stop) for s in cut] == [(0, 5, 10), (10, 12, 14), (14, 15, 16)]
    assert [s.split - s.start for s in balance.find_stretches(steps, 1)] == [1, 1, 1]
    # Every third step recorded is no gap.
    assert len(balance.find_stretches(np.arange(0, 30, 3), 0.25)) == 1
    for history in (2, 0, 1.0, 0.0, -0.5):
        with pytest.raises(ValueError, match="history"):
            balance.find_stretches(steps, history)
    with pytest.raises(ValueError, match="history"):
        balance.find_stretches(np.zeros(1, dtype=np.int64), 0.5)


def test_each_stretch_has_its_own_history():
    """Each stretch is planned from its own history, as if it were a trace of its own."""
    early, late = make_trace(batches=6, seed=1), make_trace(batches=6, seed=2)
    steps = np.r_[0:6, 100:106]
    both = traces.Trace(np.concatenate([early.counts, late.counts]), steps.astype(np.int64))
    options = balance.Options((8,), (2,))
    (cell,) = balance.run(both, options)
    parts = [balance.run(part, options)[0].imbalance("lp") for part in (early, late)]
    np.testing.assert_allclose(cell.imbalance("lp"), np.concatenate(parts, axis=1))
    worst = cell.worst()
    assert worst.loads["even"].max() / worst.loads["even"].mean() == pytest.approx(
        cell.imbalance("even").max()
    )
    assert both.totals()[worst.batch, worst.layer].sum() == pytest.approx(
        worst.loads["even"].sum(), rel=1e-9
    )


def test_batches_without_tokens():
    """A batch without tokens is certified, and its imbalance and bound are 1."""
    trace = make_trace(batches=6)
    trace.counts[4] = 0
    (cell,) = balance.run(trace, balance.Options((8,), (1,)))
    assert cell.all_certified
    for variant in VARIANTS:
        np.testing.assert_array_equal(cell.imbalance(variant)[:, 1], 1.0)
    np.testing.assert_array_equal(cell.bound()[:, 1], 1.0)


def test_not_applicable_cells(trace_path, tmp_path, capsys):
    """Impossible combinations are shown as n/a with the reason, and the others run."""
    out = tmp_path / "out"
    args = ("--ep", "4,5,8", "--placement", "cube,eplb", "--slots", "1,2")
    assert cli.main(command(trace_path, out, *args)) == 0
    shown = capsys.readouterr().out
    assert "n/a" in shown
    assert "cube needs a positive multiple of 2 redundant slots per rank, got 1" in shown
    report = json.loads((out / "balance.json").read_text())
    found = {(c["ep"], c["placement"], c["slots"]): c["applicable"] for c in report["cells"]}
    assert {key for key, applicable in found.items() if applicable} == {
        (4, "eplb", 1), (4, "eplb", 2), (8, "eplb", 1), (8, "eplb", 2), (8, "cube", 2)
    }  # fmt: skip
    assert len(found) == 12
    assert all("5 does not divide" in c["reason"] for c in report["cells"] if c["ep"] == 5)


def test_no_replicas(trace_path, tmp_path, capsys):
    """Without redundant slots there is no LP, and its imbalance is the placement's."""
    out = tmp_path / "out"
    args = ("--ep", "8", "--placement", "none,eplb", "--slots", "0")
    assert cli.main(command(trace_path, out, *args)) == 0
    assert "no LP" in capsys.readouterr().out
    none, reordered = json.loads((out / "balance.json").read_text())["cells"]
    assert none["lps"]["count"] == reordered["lps"]["count"] == 0
    assert none["lps"]["median_us_per_lp"] is None
    assert none["imbalance"]["lp"] == none["imbalance"]["none"]
    assert reordered["imbalance"]["lp"] == reordered["imbalance"]["reordered"]


def test_json_to_stdout(trace_path, tmp_path, capsys, monkeypatch):
    """With --json -, stdout has the JSON alone, stderr the tables, and no file is written."""
    monkeypatch.chdir(tmp_path)
    args = ["balance", "--trace", str(trace_path), "--device", "cpu", "--ep", "8", "--json", "-"]
    assert cli.main([*args, "--layers", "1", "--history", "9"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["options"]["layers"] == [1]
    assert report["trace"]["stretches"][0]["history"] == [0, 9]
    assert "Certificates" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.npz"]


def test_json_elsewhere(trace_path, tmp_path):
    """--json writes the figures to its own path, in a new folder, instead of --out."""
    path = tmp_path / "new" / "figures.json"
    assert cli.main(command(trace_path, tmp_path / "out", "--ep", "8", "--json", str(path))) == 0
    assert json.loads(path.read_text())["command"] == "balance"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["balance.png", "report.html"]
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


def test_failed_certificate_is_exit_code_1(trace_path, tmp_path, capsys, monkeypatch):
    """A gap above the tolerance is exit code 1, and the figures are still written."""
    monkeypatch.setattr(command_balance, "DEFAULT_MAX_ITERATIONS", 1)
    out = tmp_path / "out"
    args = ("--ep", "8", "--slots", "2", "--tolerance", "1e-5")
    assert cli.main(command(trace_path, out, *args)) == 1
    assert "not certified within 1e-05" in capsys.readouterr().err
    lps = json.loads((out / "balance.json").read_text())["cells"][0]["lps"]
    assert lps["certified"] < lps["count"]
    assert lps["max_gap"] > 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ep", "5"), "EP size 5 does not divide the 32 experts; 2, 4, 8, 16, 32 would do"),
        (("--ep", "4", "--placement", "cube"), "cube has groups of 8 ranks"),
        (("--ep", "8", "--placement", "cube", "--slots", "1"), "multiple of 2"),
        (("--ep", "8", "--slots", "100"), "redundant slots"),
        (("--ep", "8", "--layers", "0-2"), "argument --layers"),
        (("--ep", "8", "--history", "12"), "argument --history"),
        (("--ep", "8", "--out", "counts.npz"), "cannot make the folder"),
    ],
)
def test_impossible_requests_are_exit_code_2(
    trace_path, tmp_path, capsys, monkeypatch, options, message
):
    """A request that can't be met is exit code 2, with the reason and no figures."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(trace_path, "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "balance.json").exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--ep", "0"), "--ep"),
        (("--ep", "8,x"), "--ep"),
        (("--slots", "-1"), "--slots"),
        (("--placement", "cub"), "--placement"),
        (("--placement", "torus:4"), "--placement"),
        (("--history", "1.5"), "--history"),
        (("--history", "0"), "--history"),
        (("--history", "nan"), "--history"),
        (("--tolerance", "0"), "--tolerance"),
        (("--tolerance", "nan"), "--tolerance"),
        (("--layers", "3-1"), "--layers"),
        (("--layers", "a"), "--layers"),
        (("--device", "tpu"), "--device"),
        (("--backend", "numpy"), "--backend"),
    ],
)
def test_wrong_options_are_exit_code_2(trace_path, tmp_path, capsys, options, name):
    """A wrong value is exit code 2 with its option's name, and no folder is made."""
    with pytest.raises(SystemExit) as stop:
        cli.main(command(trace_path, tmp_path / "out", *options))
    assert stop.value.code == 2
    assert f"argument {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_traces_are_exit_code_2(tmp_path, capsys):
    """A trace that is missing or unreadable is exit code 2 with the file's name."""
    assert cli.main(command(tmp_path / "missing.npz", tmp_path / "out")) == 2
    assert "missing.npz" in capsys.readouterr().err
    (tmp_path / "bad.npz").write_bytes(b"nothing of the kind")
    assert cli.main(command(tmp_path / "bad.npz", tmp_path / "out")) == 2
    assert "bad.npz" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_exit_code_2(trace_path, tmp_path, capsys):
    """`--device cuda` without a GPU is exit code 2 with the option's name."""
    args = ["balance", "--trace", str(trace_path), "--device", "cuda", "--out", str(tmp_path / "o")]
    assert cli.main(args) == 2
    assert "argument --device" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_missing_extra_names_it(trace_path, tmp_path, capsys, monkeypatch, module):
    """A package that is not installed is named with the extra that brings it."""
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(command(trace_path, tmp_path / "out", "--ep", "8")) == 2
    error = capsys.readouterr().err
    assert module in error
    assert "pip install 'lplb_triton[bench]'" in error


def test_interrupt_leaves_no_file(trace_path, tmp_path, capsys, monkeypatch):
    """An interrupt while a file is written is exit code 130 and leaves no file."""
    out = tmp_path / "out"

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(output.os, "replace", interrupted)
    assert cli.main(command(trace_path, out, "--ep", "8")) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_picture_needs_results():
    """A picture of cells without results is refused by the argument's name."""
    with pytest.raises(ValueError, match="cells"):
        plots.balance_png([balance.Cell(8, 1, "cube", reason="no")], title="none")


def test_picture_is_repeatable():
    """The same cells give the same picture, byte for byte."""
    cells = balance.run(make_trace(batches=4), balance.Options((4,), (1,)))
    first, second = (plots.balance_png(cells, title="twice") for _ in range(2))
    assert first == second
    with Image.open(io.BytesIO(first)) as image:
        assert image.format == "PNG"


def test_tables_show_every_figure(capsys):
    """The table shows the mean, 95th percentile and maximum of every variant."""
    cells = balance.run(make_trace(batches=6), balance.Options((4,), (1, 2)))
    target = tables.console()
    tables.show_balance(target, cells, title="a [title]", time_label="of something")
    shown = capsys.readouterr().out
    assert "a [title]" in shown
    for cell in cells:
        assert cell.all_certified
        assert (cell.status() == Status.CERTIFIED).all()
        for variant in VARIANTS:
            values = cell.imbalance(variant)
            for figure in (values.mean(), np.percentile(values, 95), values.max()):
                assert f"{figure:.3f}" in shown


def test_module_runs_as_a_command():
    """The package runs as a module, and its help shows an example."""
    done = subprocess.run(
        [sys.executable, "-m", "lplb_triton.bench", "balance", "--help"],
        capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lplb-bench balance --ep 8,16,32,64" in done.stdout


@pytest.mark.gpu
def test_kernel_on_a_gpu(trace_path, tmp_path):
    """On a GPU, the command solves with the Triton backend and names the GPU."""
    out = tmp_path / "out"
    args = ["balance", "--trace", str(trace_path), "--device", "cuda", "--out", str(out)]
    assert cli.main([*args, "--ep", "8"]) == 0
    report = json.loads((out / "balance.json").read_text())
    assert report["options"]["backend"] == "triton"
    assert report["environment"]["gpu"]


def test_the_default_ranks_are_named_where_they_do_not_fit(tmp_path, capsys, monkeypatch):
    """Where the default of 32 ranks doesn't divide the experts, the message says what would."""
    monkeypatch.chdir(tmp_path)
    np.savez("t.npz", counts=np.ones((4, 16), dtype=int))
    assert cli.main(["report", "t.npz", "--device", "cpu"]) == cli.USAGE
    message = "argument --ep: EP size 32 (the default) does not divide the 16 experts; 2, 4, 8, 16"
    assert message in capsys.readouterr().err
