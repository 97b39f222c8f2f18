"""Advice: the model of a rank's time, break-even, recommendation, and the command."""

import json

import numpy as np
import pytest
import torch
from test_bench_balance import make_trace
from test_timing import FakeTimer

from lplb_triton.bench import advise, cli, placement
from lplb_triton.bench import trace as traces
from lplb_triton.bench.advise import GemmModel, Model

SMALL = Model(hidden=64, inner=32, experts=32, top_k=2)


def exact(**changes):
    values = {"floor": 20, "base": 10, "bandwidth": 6 * 64 * 32 / 5, "rate": 1e7}
    return GemmModel(64 * 32, **{**values, "error": 0.0, "worst": 0.0, "source": "", **changes})


def test_the_model_by_hand():
    model = exact()
    tile = 128 * 6 * 64 * 32 / 1e7
    rows = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 128 * 64, 129 * 64]], dtype=float)
    expected = [0, 20, 10 + 15, 10 + 64 * tile + np.ceil(129 / 2) * tile]
    np.testing.assert_allclose(model(rows), expected)
    assert model(np.array([128.0 * 64])) == pytest.approx(10 + 64 * tile)


def test_a_fit_finds_what_times_were_made_with():
    truth = exact()
    rows = [r for n in (64, 1024, 16384, 2**17) for r in advise._splits(n, 4)]
    times = [float(truth(r)) for r in rows]
    found = advise.fit(64, 32, rows, times, "here")
    assert found.worst < 0.02 and found.source == "here"
    other = np.array([3000.0, 5.0, 700.0, 0.0])
    assert found(other) == pytest.approx(float(truth(other)), rel=0.05)
    for split in rows:
        assert split.sum() in (64, 1024, 16384, 2**17) and len(split) == 4


def test_the_packaged_table():
    for (hidden, inner), lines in advise.TABLE.items():
        model = advise.packaged(hidden, inner)
        assert model.error < 0.1 and model.worst < 0.2 and "H100" in model.source
        assert "not measured" not in model.source
        for total, times in lines.items():
            for rows, time in zip(advise._splits(total, 9), times, strict=True):
                assert model(rows) == pytest.approx(time, rel=0.2)
    between, beyond = advise.packaged(4096, 1536), advise.packaged(4096, 14336)
    assert "interpolated" in between.source and "outside" in beyond.source
    assert beyond.rate == pytest.approx(advise.packaged(7168, 2048).rate)


def test_overheads(monkeypatch):
    monkeypatch.setattr(advise, "SYNC_US", 6.0)
    monkeypatch.setattr(advise, "RUN_US", {8: (9.0, 10.0, 16.0), 32: (15.0, 17.0, 25.0)})
    assert advise.overhead_us(8, 4096) == pytest.approx({"sync": 6.0, "run": 10.0})
    assert advise.overhead_us(64, 128)["run"] == pytest.approx(2 * 15.0)
    assert advise.overhead_us(8, 32768)["run"] == pytest.approx(2 * 16.0)
    assert 9.0 < advise.overhead_us(16, 1000)["run"] < 17.0


@pytest.mark.parametrize(
    ("saving", "expected"), [([1, 3, 1, 3, 3], 3), ([3] * 5, 0), ([3, 3, 3, 3, 1], None)]
)
def test_break_even(monkeypatch, saving, expected):
    monkeypatch.setattr(advise, "GRID", tuple(range(5)))
    assert advise._break_even(saving, [2] * 5) == expected


def case(seed=0):
    (found,) = placement.synthetic_cases(32, (seed,))
    return found


def test_advice():
    slow = exact(rate=1e6)
    found = advise.advise(SMALL, slow, [case()], 8, 2**14, (1, 2, 4))
    assert [(r["placement"], r["slots"]) for r in found["rows"]] == [
        (kind, n) for n in (1, 2, 4) for kind in ("eplb", "chain")
    ]
    for row in found["rows"]:
        layer, saving = row["layer_us"], row["saving_us"]
        assert layer["lp"] < layer["even"] < layer["in_order"]
        assert saving["low"] <= saving["mean"] <= saving["high"]
        assert saving["mean"] == pytest.approx(layer["even"] - layer["lp"])
        cost = sum(row["overhead_us"].values())
        assert row["net_us"]["mean"] == pytest.approx(saving["mean"] - cost)
        assert row["imbalance"]["lp"] < row["imbalance"]["even"]
        assert row["replica_bytes"] == row["slots"] * 6 * 64 * 32
    assert found["recommended"]["placement"] == "chain" and found["pays"] == "yes"
    trained = advise.advise(SMALL, slow, [case()], 8, 2**14, (1,), training=True)
    assert trained["rows"][0]["saving_us"]["mean"] == pytest.approx(
        3 * found["rows"][0]["saving_us"]["mean"]
    )
    tiny = advise.advise(SMALL, exact(), [case()], 8, 16, (1,))
    assert tiny["pays"] == "no"
    assert all(r["break_even"]["mean"] in (None, *advise.GRID) for r in tiny["rows"])
    wide = advise.advise(SMALL, exact(rate=1e6, worst=0.5), [case()], 8, 2**14, (1,))
    assert wide["rows"][0]["saving_us"]["low"] < found["rows"][0]["saving_us"]["low"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"ep": 5}, "ep must divide"), ({"slots": (40,)}, "slots must be in"),
     ({"model": SMALL._replace(experts=64)}, "cases must have")],
)  # fmt: skip
def test_wrong_sizes(changes, match):
    arguments = {"model": SMALL, "ep": 8, "slots": (1,), **changes}
    model, ep, slots = (arguments[name] for name in ("model", "ep", "slots"))
    with pytest.raises(ValueError, match=match):
        advise.advise(model, exact(), [case()], ep, 64, slots)


def test_dry_run_of_the_measurements(monkeypatch):
    monkeypatch.setattr(advise, "CALIBRATION_ROWS", (16, 64))
    model = advise.measure(SMALL, 3, FakeTimer(), "cpu", "dry run")
    assert model.source == "measured on this dry run"
    row = advise.check_row("small", SMALL, exact(), case(), 8, 16, FakeTimer(), "cpu")
    assert row["even"]["measured_us"] == 8 and row["lp"]["measured_us"] == 16
    assert row["lp"]["error"] == pytest.approx(row["lp"]["predicted_us"] / 16 - 1)


def test_command(tmp_path, capsys):
    path = tmp_path / "advice.json"
    common = "advise --gemm table --ep 8 --experts 64".split()
    assert cli.main([*common, "--json", str(path), "--markdown", "-"]) == cli.OK
    report, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert report["options"]["model"] == {"hidden": 7168, "inner": 2048, "experts": 64, "top_k": 8}
    assert len(report["rows"]) == 4
    for text in ("Predicted, not measured", "an assumption", "Recommended: chain", "break-even"):
        assert text in shown
    traces.save(tmp_path / "t.npz", make_trace())
    from_trace = ["advise", "--gemm", "table", "--trace", str(tmp_path / "t.npz"), "--top-k", "2"]
    assert cli.main([*from_trace, "--json", "-"]) == cli.OK
    report = json.loads(capsys.readouterr().out)
    assert report["options"]["model"]["experts"] == 32 and report["options"]["loads"] == "t.npz"
    assert cli.main([*from_trace, "--experts", "64"]) == cli.USAGE
    assert cli.main([*common, "--ep", "7"]) == cli.USAGE
    assert "ep must divide" in capsys.readouterr().err


def test_command_check(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_start_timed", lambda args: (torch.device("cpu"), FakeTimer()))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    machine = {"gpu": None, "cpu": "c", "torch_threads": 1, "torch": "t"}
    monkeypatch.setattr(cli, "_environment", lambda device: machine)
    monkeypatch.setattr(advise, "MODELS", {"small": SMALL})
    monkeypatch.setattr(advise, "CALIBRATION_ROWS", (16, 64))
    monkeypatch.setattr(cli, "CHECK_TOKENS", (16, 32))
    assert cli.main(["advise", "--check", "--json", "-"]) == cli.FAILED
    out = capsys.readouterr()
    assert len(json.loads(out.out)["rows"]) == 2 and "of 4 predictions" in out.err
    monkeypatch.setattr(cli, "CHECK_ERROR", 1e9)
    assert cli.main(["advise", "--check"]) == cli.OK


@pytest.mark.gpu
def test_measured_on_a_gpu(capsys):
    arguments = "advise --gemm gpu --hidden 1024 --inner 512 --experts 64 --json -"
    assert cli.main(arguments.split()) == cli.OK
    report = json.loads(capsys.readouterr().out)
    assert report["gemm"]["source"].startswith("measured on this") and report["gemm"]["worst"] < 0.5


@pytest.mark.parametrize("command", ["advise", "record", "report", "workloads"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"lplb-bench {command} " in capsys.readouterr().out
