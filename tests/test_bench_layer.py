"""The layer that the section live times: routing, checks, and what is refused."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from helpers.timers import FakeTimer

from lplb_triton import Placement, solve
from lplb_triton.bench import advise, cli
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.ep.layer import run, sizes
from lplb_triton.bench.ep.layer.forms import Form
from lplb_triton.bench.ep.layer.routing import (
    draw_batches,
    draw_even_batch,
    draw_popularity,
    find_hot_experts,
    level_ranks,
)
from lplb_triton.bench.ep.sizes import SIZES, Job
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure import simulate_live as simulation
from lplb_triton.bench.tables.layer import make_layer_grids

CPU = torch.device("cpu")
LAYER = dataclasses.replace(sizes.LAYER_SIZES["cuda"], tokens=512, hidden=16, batches=3)


def draw(routing):
    """Draw the batches of two ranks, and make the placement that they are drawn for."""
    history = draw_popularity(LAYER, routing)
    placement = Placement.from_history(
        history, 2, redundant_per_rank=LAYER.redundant, keep_home=True
    )
    ranks = [draw_batches(LAYER, routing, placement, r, torch.float32, CPU) for r in range(2)]
    return placement, ranks


def test_hot_experts_change_and_defeat_static_copies():
    """In each batch three other experts without copies get 60 % of the tokens or more each."""
    placement, ranks = draw("changing")
    seen = []
    for number, batches in enumerate(zip(*ranks, strict=True)):
        hot = find_hot_experts(placement, LAYER, number)
        seen += hot.tolist()
        assert (placement.logcnt[hot] == 1).all()
        home = placement.log2phy[hot, 0] // placement.slots_per_rank
        assert (home == number % 2).all()
        for batch in batches:
            chosen = (batch.ids[:, :, None] == hot).any(1).double().mean(0)
            assert chosen.min() >= 0.6
            assert all(len(set(row)) == LAYER.top_k for row in batch.ids.tolist())
        counts = sum(torch.bincount(b.ids.flatten(), minlength=256) for b in batches)
        largest = float(solve(placement.problem(counts)).max_load.max())
        assert 1.2 <= largest * 2 / float(counts.sum()) <= 1.3
    assert len(set(seen)) == len(seen) == 9


def test_steady_routing_is_levelled_by_static_copies():
    """Static copies level steady loads to within live_above; even routing is even."""
    placement, ranks = draw("steady")
    for batches in zip(*ranks, strict=True):
        counts = sum(torch.bincount(b.ids.flatten(), minlength=256) for b in batches)
        largest = float(solve(placement.problem(counts)).max_load.max())
        assert largest * 2 / float(counts.sum()) <= LAYER.above
    even = draw_even_batch(LAYER, 0, torch.float32, CPU)
    assert torch.bincount(even.ids.flatten()).tolist() == [16] * 256


def test_experts_are_renumbered_for_even_ranks():
    """Ranks get as many experts and nearly equal loads, and every number is given once."""
    counts = draw("changing")[1][0][0].ids.flatten().bincount(minlength=256)
    number = level_ranks(counts, 2)
    assert number.sort().values.tolist() == list(range(256))
    loads = torch.zeros(256).scatter_(0, number, counts.float()).view(2, 128).sum(1)
    assert loads.max() <= 1.03 * loads.mean()
    assert counts.view(2, 128).sum(1).max() >= 1.2 * loads.mean()


class Broken(Form):
    """A form whose weights are slightly wrong."""

    def finish(self):
        """Return weights that are one percent too large."""
        ((w_in, w_out),) = super().finish()
        return [(w_in, w_out * 1.01)]


@pytest.fixture
def worker(tmp_path):
    """The only rank of a section, in this process."""
    tiny = dataclasses.replace(SIZES["cpu"].layer, experts=8, tokens=16, rounds=1, redundant=0)
    chosen = dataclasses.replace(SIZES["cpu"], layer=tiny)
    yield Worker(Job("live", "layer", 1, "cpu", chosen, str(tmp_path)), 0)
    dist.destroy_process_group()


def test_a_wrong_form_is_not_timed(worker, monkeypatch):
    """A form whose outputs differ from those of none is named, and has no times."""

    def make_forms(worker, sizes, placement, originals):
        in_order = Placement(torch.arange(8), 1)
        return {
            "none": lambda: Form(worker, in_order, originals),
            "off": lambda: Broken(worker, in_order, originals),
        }

    monkeypatch.setattr(run, "make_forms", make_forms)
    row = run.measure_layer(worker, "layer")
    assert "changing, off is wrong: output is 1.0e-02 off" in row["failed"]
    for figures in row["routings"].values():
        assert "us" not in figures["forms"]["off"] and figures["forms"]["none"]["us"]["median"] > 0
        assert max(figures["reversed_errors"].values()) <= run.TOLERANCE[torch.float32]
    options = {"device": "cpu", "replays": 1}
    times, errors = make_layer_grids({"layer": row}, options)
    assert [line[1] for line in times.rows[:3]] == ["none", "even ranks", "even"]
    assert [line[-1] for line in errors.rows[:3]] == ["right", "WRONG", ""]


def test_simulation(monkeypatch, tmp_path, capsys):
    """The command times the busiest ranks, and adds fetches at the rate of the JSON file."""
    small = advise.Model(hidden=64, inner=32, experts=32, top_k=4)
    monkeypatch.setitem(advise.MODELS, "gpt-oss-120b", small)
    monkeypatch.setattr(gpu, "start", lambda args: (CPU, FakeTimer()))
    monkeypatch.setattr(simulation, "time_rank", lambda rows, *rest: 10.0 + sum(rows) / 1e3)
    monkeypatch.setattr(simulation, "suggest_live_cost", lambda **rates: 0)
    form = {"fetch_gb_s": {"median": 0.5}}
    routings = {"changing": {"forms": {"live, symmetric": form}}}
    pulls = tmp_path / "ep.json"
    pulls.write_text(json.dumps({"sections": {"live:layer": {"routings": routings}}}))
    command = f"simulate-live --pulls {pulls} --model gpt-oss-120b --ep 8 --tokens 4096,64"
    assert cli.main(f"{command} --workload rotating --training --json -".split()) == cli.OK
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report["options"]["pull_rate"] == 0.5 and "SIMULATION" not in out.out
    ((found),) = report["rows"]
    assert [row["tokens"] for row in found["rows"]] == [64, 4096]
    for row in found["rows"]:
        assert row["imbalance"]["live"] < row["imbalance"]["lplb"] < row["imbalance"]["none"]
        for way in ("none", "lplb"):
            assert row["us"][way] == row["products_us"][way]
        assert row["us"]["live"] == pytest.approx(row["products_us"]["live"] + row["fetch_us"])
        assert row["fetch_us"] > 0 and row["sent"] >= row["received"] == 1
        # Three times the forward products of a rank with the mean load, and more.
        assert row["products_us"]["live"] >= 3 * (10 + row["tokens"] * 4 / 1e3) - 1e-6
    assert "Simulation" in out.err
    pulls.write_text('{"sections": {}}')
    assert cli.main(command.split()) == cli.USAGE
    assert "has no rate of 'live, symmetric'" in capsys.readouterr().err


def test_break_even_of_a_simulation():
    """Live slots break even from the least size from which on they are always faster."""
    rows = [
        {"tokens": n, "us": {"live": live, "lplb": 2.0}} for n, live in ((1, 1), (2, 3), (4, 1))
    ]
    assert simulation.find_break_even(rows) == 4
    assert simulation.find_break_even(rows[:2]) is None
