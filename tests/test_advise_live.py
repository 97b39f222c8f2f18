"""Advice on live slots: suggested rules, predictions, and memory."""

import json

import numpy as np
import pytest
from pages import ROOT

from lplb_triton.bench import advise, cli
from lplb_triton.bench.advise import GemmModel, Model
from lplb_triton.bench.advise.live import count_ports, count_transfers
from lplb_triton.bench.workloads import Settings, draw

SMALL = Model(hidden=64, inner=32, experts=32, top_k=4)
# A row takes about a microsecond, and weights take no time to read.
GEMM = GemmModel(1.0, 1e9, 8e3, 32e3, 0.0, 0.0, "", pairs=1)


def test_suggested_cost():
    """The cost is the time of a fetch over that of a token's products, whatever the expert."""
    assert advise.suggest_live_cost() == 1714
    # Three transfers for three times the products; two if weights are kept.
    assert advise.suggest_live_cost(training=True) == 1714
    assert advise.suggest_live_cost(training=True, keep=True) == 1143
    assert advise.suggest_live_cost(gigabytes_per_second=700, teraflops=600) == 857
    assert advise.suggest_live_cost(weight_bytes=0.5) == 429
    assert advise.suggest_live_cost(gigabytes_per_second=1e9) == 1
    assert [count_transfers(*flags) for flags in ((False,), (True,), (True, True))] == [1, 3, 2]
    for name in ("gigabytes_per_second", "teraflops", "weight_bytes"):
        for value in (0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
                advise.suggest_live_cost(**{name: value})


def test_suggested_threshold():
    """The threshold leaves out what no fetch is worth, and there is none in tiny batches."""
    assert advise.suggest_live_above(1714, 8192, 8) == 1.026
    assert advise.suggest_live_above(0, 1, 1) == 1.02
    assert advise.suggest_live_above(1714, 65536, 8) == 1.02
    assert advise.suggest_live_above(1714, 200, 8) is None


def test_ports():
    """The busiest rank's sent and received experts are counted apart."""
    experts = np.array([[4, -1], [0, 1], [0, -1]])
    homes = np.array([0, 0, 1, 1, 2, 2])
    assert count_ports(experts, homes) == (3, 2)
    assert count_ports(np.full((3, 2), -1), homes) == (0, 0)


def test_live_slots_pay_where_hot_experts_change():
    """With changing hot experts a fetch pays from some batch size on, for less the faster it is."""
    case = draw("rotating", Settings(8, 32, 4))
    arguments = (SMALL, GEMM, [case], 8, 4096, ("chain", 1), 1)
    slow, fast = (
        advise.advise_live(*arguments, gigabytes_per_second=rate, teraflops=1e-2)
        for rate in (1e-2, 1.0)
    )
    for found in (slow, fast):
        assert found["fetching"] == 1 and found["pieces"] > 1 and found["sent"] >= 1
        assert found["saving_us"] > 0 and found["break_even"] <= 4096
        layer = found["layer_us"]
        assert found["saving_us"] == pytest.approx(layer["static"] - layer["live"])
    assert fast["break_even"] <= slow["break_even"] and fast["cost"] < slow["cost"]
    piece_us = 6 * 64 * 32 / 1e3
    assert fast["fetch_us"] >= piece_us * max(fast["sent"], fast["received"]) - 1e-9
    never = advise.advise_live(*arguments, gigabytes_per_second=1e-9)
    assert never["above"] is None and never["pieces"] == 0 and never["break_even"] is None
    assert never["saving_us"] == 0


def test_bytes():
    """Live slots are counted once for all layers, static ones in each."""
    expert = 6 * 64 * 32
    assert advise.count_live_bytes(SMALL, 2, layers=10) == {
        "live": 2 * expert, "static": 20 * expert, "staged": None,
    }  # fmt: skip
    found = advise.count_live_bytes(SMALL, 1, layers=3, training=True, ep=8)
    assert found == {"live": 3 * expert, "static": 3 * expert, "staged": 12 * expert}


def test_the_table_of_bytes_in_the_docs():
    """The docs' memory of three models is what the function counts."""
    text = (ROOT / "docs" / "results" / "live-training.md").read_text()
    for key in ("deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b"):
        model, layers, _ = advise.PUBLISHED[key]
        sizes = [
            advise.count_live_bytes(model, 2, layers=layers, training=training, ep=64)
            for training in (False, True)
        ]
        expert = 6 * model.hidden * model.inner
        gib = [sizes[0]["live"], sizes[1]["live"], sizes[0]["static"], sizes[0]["staged"]]
        cells = " | ".join(f"{n / 2**30:.2f}" for n in gib)
        assert f"| {key} | {layers} | {expert / 2**20:.1f} | {cells} |" in text


def test_command(capsys):
    """The command has a table of live slots, at the given rate."""
    command = "advise --gemm table --ep 8 --experts 64 --slots 1 --live 1,2 --pull-rate 100"
    assert cli.main([*command.split(), "--json", "-"]) == cli.OK
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert [row["live"] for row in report["live"]] == [1, 2]
    assert report["live"][0]["cost"] == advise.suggest_live_cost(gigabytes_per_second=100)
    printed = " ".join(out.err.split())
    assert "live slots on top of the best static placement" in printed and "100 GB/s" in printed
    (row,) = [r for r in map(str.split, out.err.splitlines()) if r[:1] == ["live_cost"]]
    assert row[1:] == [str(row["cost"]) for row in report["live"]]
    assert cli.main(["advise", "--check", "--live", "1"]) == cli.USAGE
    assert "argument --live: --check" in capsys.readouterr().err


def test_no_cell_is_cut_at_80_columns(capsys, monkeypatch):
    """Every table, with the longest numbers that it may have, fits a pipe's 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    command = "advise --gemm table --ep 32 --tokens 65536 --live 1,2 --training --pull-rate 0.5"
    assert cli.main(command.split()) == cli.OK
    shown = capsys.readouterr().out
    assert "static MiB" in shown and "sent/received" in shown
    assert "\u2026" not in shown
