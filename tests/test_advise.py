"""Advice: the model of a rank's time, break-even, recommendation, and the command."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer
from helpers.traces import make_trace

from lplb_triton.bench import advise, cli, machine, placement
from lplb_triton.bench.advise import GemmModel, Model, Point, gpu_times, overhead, table
from lplb_triton.bench.advise import predict as prediction
from lplb_triton.bench.commands import advise as command
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.measure.simulate import draw_experts
from lplb_triton.traces import trace as traces

SMALL = Model(hidden=64, inner=32, experts=32, top_k=2)


def exact(**changes):
    values = {"base": 20, "bandwidth": 1e4, "narrow": 20, "wide": 60, "pairs": 4}
    return GemmModel(**{**values, "error": 0.0, "worst": 0.0, "source": "", **changes})


# Rows cost much more than weights.
SLOW = exact(narrow=1e3, wide=4e3, pairs=1)


def predict(model, rows, hidden=64, inner=32):
    return model(hidden, inner, np.array(rows, dtype=float))


def test_the_model_by_hand():
    """Predicted times are those worked out by hand for tiles, reads and both together."""
    # Reading takes next to no time here, so that waves are what is left.
    fast = exact(bandwidth=1e12)
    # Columns: 2 * 512 and 512, so 8 and 4 narrow tiles, 4 and 2 wide ones; depths 512 and 512.
    step = 512 / 1e3
    rows = [[0, 0], [1, 0], [128, 128], [129, 127], [129, 129], [256, 2], [513, 0]]
    waves = [0, 2 + 1, 4 + 2, 6 + 3, 2 + 1, 2 + 1, 3 + 2]
    speed = [20, 20, 20, 20, 60, 60, 60]
    expected = [n and 20 + n * step * s for n, s in zip(waves, speed, strict=True)]
    np.testing.assert_allclose(predict(fast, rows, 512, 512), expected, rtol=1e-6)
    # And waves none: weights of active experts, and five values of an activation for each row.
    read = exact(narrow=1e-6, wide=1e-6)
    expected = 20 + (2 * 6 * 64 * 32 + 30 * 2 * 5 * 32) / 1e4
    assert predict(read, [10, 0, 20]) == pytest.approx(expected)
    # Both alike: more than either, less than their sum.
    both = exact(base=0, bandwidth=2 * 64 * 64 / 5, narrow=1e3 * 5 / 64, wide=1e9)
    first = 5 * 2**0.25
    second = ((32 * 5 / 64) ** 4 + (5 / 2) ** 4) ** 0.25
    assert predict(both, [1]) == pytest.approx(first + second + 10 * 32 / both.bandwidth)


def test_a_fit_finds_what_times_were_made_with():
    """A fit to the times of a known model predicts that model's times to within 5 %."""
    truth = exact(bandwidth=300.0)
    points = [
        Point(hidden, 32, rows, float(predict(truth, rows, hidden)))
        for hidden in (64, 256)
        for n in (64, 256, 1024, 16384, 2**17)
        for rows in table.split_rows(n, 4)
    ]
    found = advise.fit(points, "here", truth.pairs)
    assert found.worst < 0.02 and found.source == "here" and found.pairs == truth.pairs
    other = [3000, 5, 700, 0]
    assert predict(found, other) == pytest.approx(float(predict(truth, other)), rel=0.05)
    for point in points:
        assert sum(point.rows) in (64, 256, 1024, 16384, 2**17) and len(point.rows) == 4


# Measured as the table was, with 2 experts of 4096 x 14336, which it does not hold.
OTHER_SIZE = {
    (64, 64): 297, (128, 128): 301, (129, 129): 383, (256, 256): 394, (257, 257): 556,
    (512, 512): 573, (513, 513): 916, (1024, 1024): 1106, (2048, 2048): 2181, (369, 291): 608,
    (394, 199): 500, (1574, 795): 1692,
}  # fmt: skip


def test_the_packaged_table():
    """The packaged model is near the times of its table and of a size that it was not fitted to."""
    for (hidden, inner), lines in table.TABLE.items():
        model = advise.packaged(hidden, inner)
        assert model.error < 0.08 and model.worst < 0.18 and "H100" in model.source
        assert "not measured" not in model.source
        for total, times in lines.items():
            for rows, time in zip(table.split_rows(total, 9), times, strict=True):
                assert predict(model, rows, hidden, inner) == pytest.approx(time, rel=0.18)
    other = advise.packaged(4096, 14336)
    assert "not measured" in other.source and other.wide == model.wide
    for rows, time in OTHER_SIZE.items():
        assert predict(other, rows, 4096, 14336) == pytest.approx(time, rel=0.18)


def test_overheads(monkeypatch):
    """Overheads are interpolated between measured sizes, and in proportion beyond them."""
    monkeypatch.setattr(overhead, "SYNC_US", 6.0)
    monkeypatch.setattr(overhead, "RUN_US", {8: (9.0, 10.0, 16.0), 32: (15.0, 17.0, 25.0)})
    assert advise.predict_overhead_us(8, 4096) == pytest.approx({"sync": 6.0, "run": 10.0})
    assert advise.predict_overhead_us(64, 128)["run"] == pytest.approx(2 * 15.0)
    assert advise.predict_overhead_us(8, 32768)["run"] == pytest.approx(2 * 16.0)
    assert 9.0 < advise.predict_overhead_us(16, 1000)["run"] < 17.0


@pytest.mark.parametrize(
    ("saving", "expected"), [([1, 3, 1, 3, 3], 3), ([3] * 5, 0), ([3, 3, 3, 3, 1], None)]
)
def test_break_even(monkeypatch, saving, expected):
    """The break-even size is the least from which on every larger one pays."""
    monkeypatch.setattr(prediction, "GRID", tuple(range(5)))
    assert prediction.find_break_even(saving, [2] * 5) == expected


def case(seed=0):
    (found,) = placement.synthetic_cases(32, (seed,))
    return found


def test_advice():
    """Rows, savings and the recommendation of a small layer agree with each other."""
    slow = SLOW
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
    assert all(r["break_even"]["mean"] in (None, *prediction.GRID) for r in tiny["rows"])
    wide = advise.advise(SMALL, dataclasses.replace(SLOW, worst=0.5), [case()], 8, 2**14, (1,))
    assert wide["rows"][0]["saving_us"]["low"] < found["rows"][0]["saving_us"]["low"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"ep": 5}, "ep must divide"), ({"slots": (40,)}, "slots must be in"),
     ({"slots": (1, 40)}, "slots must be in"), ({"slots": ()}, "slots must be in"),
     ({"model": SMALL._replace(experts=64)}, "cases must have")],
)  # fmt: skip
def test_wrong_sizes(changes, match):
    """Sizes that do not fit each other are refused by name."""
    arguments = {"model": SMALL, "ep": 8, "slots": (1,), **changes}
    model, ep, slots = (arguments[name] for name in ("model", "ep", "slots"))
    with pytest.raises(ValueError, match=match):
        advise.advise(model, exact(), [case()], ep, 64, slots)


def test_dry_run_of_the_measurements(monkeypatch):
    """Calibration and check measure the rows that they report."""
    monkeypatch.setattr(gpu_times, "CALIBRATION_ROWS", (16, 64, 128))
    monkeypatch.setattr(gpu_times, "CALIBRATION_TOKENS", 32)
    weights = draw_experts(SMALL.hidden, SMALL.inner, 5, "cpu")
    model, points = advise.measure(SMALL, weights, FakeTimer(), "cpu", "dry run")
    assert model.source == "measured on this dry run"
    assert [sum(p.rows) for p in points] == [16] * 3 + [64] * 3
    assert [p.us for p in points] == [1, 2, 3, 4, 5, 6] and points[0].rows == [4, 3, 3, 3, 3]
    assert advise.fit(points, model.source) == model
    row = advise.compare_times("small", SMALL, exact(), case(), 8, 16, weights, FakeTimer(), "cpu")
    assert row["even"]["measured_us"] == 8 and row["lp"]["measured_us"] == 16
    assert row["lp"]["error"] == pytest.approx(row["lp"]["predicted_us"] / 16 - 1)
    for k, split in enumerate(("even", "lp")):
        ranks = row[split]["ranks"]
        # Counts are rounded expert by expert.
        assert abs(sum(sum(rank["rows"]) for rank in ranks) - 16 * 2 * 8) < 8
        assert [rank["us"] for rank in ranks] == [8 * k + n for n in range(1, 9)]


def test_long_launches_are_timed_one_by_one(monkeypatch):
    """Long launches are not put into a graph."""
    launched = []
    monkeypatch.setattr(gpu_times, "run_experts", lambda x, *rest: launched.append(len(x)))
    # A thousand million columns, all the same number.
    weights = torch.zeros(2, 8, 1).expand(2, 8, 10**9), torch.zeros(2, 1, 8)
    assert gpu_times.time_rank([10, 0], weights, FakeTimer(), "cpu") == 1.0
    assert gpu_times.time_rank([10, 20], weights, FakeTimer(), "cpu") == 7.0
    assert launched == [10, 10, 30, 30]
    assert gpu_times.time_rank([0, 0], weights, FakeTimer(), "cpu") == 0.0


def test_command(tmp_path, capsys):
    """The command takes sizes from options or a trace, and refuses ones that do not fit."""
    path = tmp_path / "advice.json"
    common = "advise --gemm table --ep 8 --experts 64".split()
    assert cli.main([*common, "--json", str(path), "--markdown", "-"]) == cli.OK
    report, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert report["options"]["model"] == {"hidden": 7168, "inner": 2048, "experts": 64, "top_k": 8}
    assert len(report["rows"]) == 4
    for text in ("Predicted, not measured", "an assumption", "Recommended: ", "break-even"):
        assert text in shown
    traces.save(tmp_path / "t.npz", make_trace())
    from_trace = ["advise", "--gemm", "table", "--trace", str(tmp_path / "t.npz"), "--top-k", "2"]
    from_trace += ["--hidden", "4096", "--inner", "1536", "--ep", "8"]
    assert cli.main([*from_trace, "--json", "-"]) == cli.OK
    report = json.loads(capsys.readouterr().out)
    assert report["options"]["model"]["experts"] == 32 and report["options"]["loads"] == "t.npz"
    assert cli.main([*from_trace, "--experts", "64"]) == cli.USAGE
    assert cli.main([*common, "--ep", "7"]) == cli.USAGE
    assert "argument --ep: 7 does not divide" in capsys.readouterr().err


@pytest.fixture
def recorded(tmp_path):
    """Traces of 32 and 256 experts, the latter with top_k in its meta, and one with all sizes."""
    traces.save(tmp_path / "t.npz", make_trace(batches=6, layers=1))
    wide = make_trace(batches=6, layers=1, experts=256)
    traces.save(tmp_path / "k.npz", traces.Trace(wide.counts, wide.steps, {"top_k": 4}))
    sizes = {"top_k": 4, "hidden": 128, "inner": 96}
    traces.save(tmp_path / "s.npz", traces.Trace(wide.counts, wide.steps, sizes))
    return {name: str(tmp_path / name) for name in ("t.npz", "k.npz", "s.npz")}


SIZES = ["--hidden", "64", "--inner", "32"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t.npz", [], "argument --trace: t.npz doesn't say all sizes of its layers; give --hidden, "
         "--inner, --top-k, or --model or --hf-config"),
        ("t.npz", ["--top-k", "2"], "give --hidden, --inner, or --model"),
        ("k.npz", ["--hidden", "64"], "give --inner, or --model or --hf-config"),
        ("t.npz", ["--model", "deepseek-v3"], "argument --model: deepseek-v3 has experts 256, the "
         "trace t.npz 32; give --experts 32 to take the rest"),
        ("k.npz", ["--model", "deepseek-v3"], "argument --model: deepseek-v3 has top_k 8, the "
         "trace k.npz 4; give --top-k 4"),
        ("t.npz", [*SIZES, "--top-k", "2", "--experts", "64"],
         "argument --experts: the trace t.npz has experts 32"),
        ("k.npz", [*SIZES, "--top-k", "8"], "argument --top-k: the trace k.npz has top_k 4"),
        ("s.npz", ["--model", "deepseek-v3"], "has top_k 8, the trace s.npz 4; give --top-k 4"),
        ("t.npz", [*SIZES, "--top-k", "500"], "a token can't have 500 of 32 experts"),
    ],
)  # fmt: skip
def test_sizes_are_never_mixed_silently(recorded, capsys, name, options, message):
    """Sizes that are missing or contradict the trace are refused by their options' names."""
    base = ["advise", "--gemm", "table", "--ep", "8", "--slots", "1"]
    assert cli.main([*base, "--trace", recorded[name], *options]) == cli.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "sources", "model"),
    [
        (None, [], ["deepseek-v3"] * 4, (7168, 2048, 256, 8)),
        (None, ["--top-k", "4"], ["deepseek-v3"] * 3 + ["--top-k"], (7168, 2048, 256, 4)),
        ("t.npz", [*SIZES, "--top-k", "2"], ["--hidden", "--inner", "t.npz", "--top-k"],
         (64, 32, 32, 2)),
        ("k.npz", SIZES, ["--hidden", "--inner", "k.npz", "k.npz"], (64, 32, 256, 4)),
        ("t.npz", ["--model", "mixtral-8x7b", "--experts", "32"],
         ["mixtral-8x7b", "mixtral-8x7b", "--experts", "mixtral-8x7b"], (4096, 14336, 32, 2)),
        ("k.npz", ["--model", "deepseek-v3", "--top-k", "4"],
         ["deepseek-v3", "deepseek-v3", "k.npz", "--top-k"], (7168, 2048, 256, 4)),
        ("s.npz", [], ["s.npz"] * 4, (128, 96, 256, 4)),
        ("s.npz", ["--hidden", "64"], ["--hidden", "s.npz", "s.npz", "s.npz"], (64, 96, 256, 4)),
        ("s.npz", ["--model", "deepseek-v3", "--top-k", "4"],
         ["deepseek-v3", "deepseek-v3", "s.npz", "--top-k"], (7168, 2048, 256, 4)),
    ],
)  # fmt: skip
def test_it_says_where_sizes_come_from(recorded, capsys, name, options, sources, model):
    """The report and stderr tell which option, model or trace each size comes from."""
    base = ["advise", "--gemm", "table", "--ep", "8", "--slots", "1", "--json", "-"]
    trace = [] if name is None else ["--trace", recorded[name]]
    assert cli.main([*base, *trace, *options]) == cli.OK
    printed = capsys.readouterr()
    found = json.loads(printed.out)["options"]
    assert tuple(found["model"].values()) == model
    assert list(found["sizes_from"].values()) == sources
    for field, source in zip(command.FIELDS, sources, strict=True):
        assert f"{field} from {source}" in printed.err


def test_nothing_is_recommended_where_it_does_not_pay(capsys):
    """Nothing is recommended where the cost exceeds the saving."""
    small = "advise --gemm table --ep 8 --experts 64 --slots 1 --markdown - --tokens"
    assert cli.main([*small.split(), "16"]) == cli.OK
    shown = capsys.readouterr().out
    assert "It does not pay here: nothing is recommended" in shown
    assert "Recommended" not in shown and "Least is lost by " in shown
    assert cli.main([*small.split(), "16384"]) == cli.OK
    assert "It pays here. Recommended: " in capsys.readouterr().out


def test_what_is_recommended():
    """A placement is recommended unless the whole range of its net saving is negative."""
    low = {"mean": -3.0, "low": -4.0, "high": -1.0}
    row = {"placement": "eplb", "slots": 1, "layer_us": {"lp": 9.0}, "net_us": low}
    best = {"placement": "eplb", "slots": 1}
    assert prediction.recommend([row]) == {"best": best, "recommended": None, "pays": "no"}
    row["net_us"] = {"mean": -1.0, "low": -4.0, "high": 1.0}
    assert prediction.recommend([row]) == {"best": best, "recommended": best, "pays": "uncertain"}


def test_command_check(monkeypatch, capsys):
    """--check fails if a prediction is too far off, and reports its fits."""
    monkeypatch.setattr(gpu, "start", lambda args: (torch.device("cpu"), FakeTimer()))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    found = {"gpu": None, "cpu": "c", "torch_threads": 1, "torch": "t"}
    monkeypatch.setattr(machine, "environment", lambda device: found)
    monkeypatch.setattr(machine, "pairs", lambda: 4)
    monkeypatch.setattr(advise, "MODELS", {"small": SMALL})
    monkeypatch.setattr(command, "CHECK_MODELS", ("small",))
    monkeypatch.setattr(gpu_times, "CALIBRATION_ROWS", (16, 64))
    monkeypatch.setattr(command, "CHECK_TOKENS", (16, 32))
    assert cli.main(["advise", "--check", "--json", "-"]) == cli.FAILED
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert len(report["rows"]) == 2 and "of 4 predictions" in out.err
    points = [Point(**point) for point in report["fits"]["small"]["points"]]
    again = advise.fit(points, "measured on this none", 4)
    assert dataclasses.asdict(again) == report["fits"]["small"]["gemm"]
    monkeypatch.setattr(command, "CHECK_ERROR", 1e9)
    assert cli.main(["advise", "--check"]) == cli.OK


@pytest.mark.gpu
def test_measured_on_a_gpu(capsys):
    """With --gemm gpu, the model is fitted to times that are measured on this GPU."""
    arguments = "advise --gemm gpu --hidden 1024 --inner 512 --experts 64 --json -"
    assert cli.main(arguments.split()) == cli.OK
    report = json.loads(capsys.readouterr().out)
    assert report["gemm"]["source"].startswith("measured on this") and report["gemm"]["worst"] < 0.5


@pytest.mark.parametrize("command", ["advise", "record", "report", "workloads"])
def test_help_has_an_example(command, capsys):
    """The help of each of these commands shows an example of the command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"lplb-bench {command} " in capsys.readouterr().out
