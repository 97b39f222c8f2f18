"""The simulation of many ranks on one device: token counts, and a dry run on the CPU."""

import json

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer

from lplb_triton import Placement
from lplb_triton.bench import cli, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.measure.simulate import (
    BALANCES,
    choose_batches,
    simulate_ep_size,
    split_tokens,
)
from lplb_triton.traces.trace import Trace


@pytest.fixture
def trace():
    rng = np.random.default_rng(0)
    popular = rng.lognormal(0, 1, (1, 2, 1, 16))
    counts = rng.poisson(popular * rng.lognormal(0, 0.3, (12, 2, 1, 16)) * 50)
    steps = np.array([*range(6), *range(100, 106)])
    return Trace(counts=counts.astype(np.uint16), steps=steps)


def test_chosen_batches_are_after_their_history(trace):
    """Each stretch's chosen batches come after the batches of its history."""
    chosen = choose_batches(trace, 2)
    assert chosen[:4] == [(0, 3, 0, 3), (0, 5, 0, 3), (1, 3, 0, 3), (1, 5, 0, 3)]
    assert chosen[4:6] == [(0, 9, 6, 9), (0, 11, 6, 9)]


def test_slot_tokens_add_up_and_the_lp_levels_ranks():
    """Slot tokens add up to the counts, and the LP's largest rank is below EPLB's."""
    rng = np.random.default_rng(1)
    load = torch.from_numpy(rng.lognormal(0, 1.2, 32))
    placement = Placement.from_history(load, 4, redundant_per_rank=2)
    counts = (load * torch.from_numpy(rng.lognormal(0, 0.4, 32)) * 1000).long()
    slots = placement.phy2log.long()
    found = {}
    for balance in ("eplb", "lplb"):
        table = split_tokens(placement, counts, balance, 1e-3)
        assert table.shape == (4, 10)
        by_expert = torch.zeros(32, dtype=torch.int64).index_add(0, slots, table.flatten())
        assert torch.equal(by_expert, counts)
        found[balance] = table.sum(1)
    even = placement.even_loads(counts)[0]
    assert (found["eplb"] - even).abs().max() <= placement.slots_per_rank
    assert found["lplb"].max() < found["eplb"].max()


def test_dry_run(trace):
    """A row has the slowest rank's times and the imbalance of every balance."""
    seen = []
    row = simulate_ep_size(
        trace, 4, FakeTimer(), "cpu", tokens=64, hidden=16, inner=8, per_stretch=1,
        progress=lambda: seen.append(None),
    )  # fmt: skip
    assert (row["ep"], row["slots"], row["batches"]) == (4, 1, 4) and len(seen) == 4
    # The timer counts its calls: 4 + 4 + 4 + 1 per batch, so the last of four is the slowest.
    slowest = [row[name]["slowest_us"] for name in BALANCES]
    assert slowest == [4 + 19.5, 8 + 19.5, 12 + 19.5, 13 + 19.5]
    assert row["even"]["imbalance"] == row["even"]["over_even"] == 1.0
    assert row["none"]["imbalance"] > row["eplb"]["imbalance"] > row["lplb"]["imbalance"] >= 1
    (grid,) = tables.make_simulate_grids(
        {"options": {"tokens": 64, "hidden": 16, "inner": 8}, "rows": [row]}
    )
    assert len(grid.rows) == 4 and "simulation" in grid.notes[0]


def test_command(monkeypatch, capsys):
    """The command reports a row for each EP size and refuses one that does not divide."""
    monkeypatch.setattr(gpu, "start", lambda args: (torch.device("cpu"), FakeTimer()))
    arguments = "simulate --ep 8 --slots 1 --tokens 256 --hidden 16 --inner 8 --json -"
    assert cli.main(arguments.split()) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report["rows"][0]["ep"] == 8 and report["rows"][0]["batches"] == 8
    assert "Simulation" in out.err
    assert cli.main(["simulate", "--ep", "7"]) == 2
    assert "--ep: 7 does not divide" in capsys.readouterr().err
