"""The simulation of hundreds of ranks: its loads, plans, sizes and tables."""

import json

import numpy as np
import pytest
import torch
from helpers.timers import FakeTimer

from lplb_triton import Placement, chain
from lplb_triton.bench import cli, scale, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.measure.timer import WrongAnswerError
from lplb_triton.bench.scale.plans import join_ranks
from lplb_triton.testing.verify import optima_of
from lplb_triton.traces import trace as traces


def test_trace_is_spread_over_more_ranks():
    """Loads of many ranks have the recorded tokens of each expert, and of each source."""
    recorded = traces.packaged()
    loads = scale.draw_loads("trace", 512, 512, 2, 8)
    assert loads.test.shape == (2, 512) and loads.by_node.shape == (2, 64, 512)
    torch.testing.assert_close(loads.by_node.sum(1), loads.test.double())
    # Two nodes of eight ranks stand for one of the 32 recorded sources.
    last = recorded.counts[-8:, :2].astype(np.int64).sum(0)
    by_source = loads.by_node[-1].reshape(32, 2, 2, 256).sum(1).numpy()
    np.testing.assert_allclose(by_source, last.transpose(1, 0, 2))
    folded = scale.draw_loads("trace", 16, 256, 2, 8)
    torch.testing.assert_close(folded.by_node.sum(1), folded.test.double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trace", 2048, 2048, 2, 8), "has 4 layers of 256 experts, which don't make up 2048"),
        (("trace", 16, 256, 7, 8), "batches must be at most 6"),
        (("zipf", 12, 12, 2, 8), "ranks_per_node must divide 12 ranks"),
        (("flat", 8, 8, 2, 8), "name must be one of trace, lognormal, zipf"),
    ],
)
def test_loads_that_cannot_be_made(arguments, message):
    """Loads that don't exist are refused by name."""
    with pytest.raises(ValueError, match=message):
        scale.draw_loads(*arguments)


@pytest.fixture
def loads():
    return scale.draw_loads("lognormal", 16, 64, 3, 4)


def test_plans_are_as_good_as_optima(loads):
    """One LP and LPs of groups reach the optima of HiGHS; two levels are no better than one LP."""
    mean = loads.test.sum(1).double() / 16
    one = chain(loads.history, 16, redundant_per_rank=2)
    for placement in (one, chain(loads.history, 16, redundant_per_rank=2, ranks_per_domain=4)):
        found = scale.plan_programs(placement, loads, 1e-3)
        optima = optima_of(placement.problem(loads.test)).reshape(3, -1).max(1)
        np.testing.assert_allclose(found.imbalance, optima / mean.numpy(), rtol=1.1e-3)
        assert 0 < found.gap <= 1e-3
        assert found.across_global <= found.across_local <= 1
    best = scale.plan_programs(one, loads, 1e-3).imbalance
    for group in (2, 4):
        levels = scale.plan_levels(one, group, loads, 1e-3).imbalance
        even = scale.plan_even(one, loads).imbalance
        for two, single, evenly in zip(levels, best, even, strict=True):
            assert single <= two * 1.001 and single <= evenly
        joined = join_ranks(one, group)
        assert joined.ep_size == 16 // group and torch.equal(joined.phy2log, one.phy2log)


def test_two_levels_of_one_rank_each_are_one_lp():
    """With groups of one rank, or one group of all ranks, two levels are the LP of all ranks."""
    loads = scale.draw_loads("zipf", 8, 16, 2, 4)
    placement = chain(loads.history, 8, redundant_per_rank=1)
    one = scale.plan_programs(placement, loads, 1e-4)
    for group in (1, 8):
        two = scale.plan_levels(placement, group, loads, 1e-4)
        np.testing.assert_allclose(two.imbalance, one.imbalance, rtol=2e-4)


def test_copies_in_the_own_node_keep_tokens_near():
    """Assignments that leave their node are those that its copies don't take."""
    placement = Placement.from_phy2log(torch.tensor([0, 1, 0, 1]), 2)
    by_node = torch.tensor([[[30.0, 0.0], [10.0, 40.0]]], dtype=torch.float64)
    loads = scale.ScaleLoads(torch.ones(2), by_node.sum(1).long(), by_node)
    found = scale.plan_even(placement, loads)
    assert found.imbalance == [1.0]
    # Every source sends half of its tokens to each node; or nodes keep 20 + 0 and 10 + 20.
    assert (found.across_local, found.across_global) == pytest.approx((0.5, 3 / 8))


def test_wire():
    """Bytes of counts are those of the messages; what refuses so many ranks is named."""
    rows = {(r["sync"], r["quotas"]): r for r in scale.count_wire_bytes(32, 256, 8)}
    assert rows["distributed", "any"]["sent"] == 31 * 260 * 4
    assert rows["symmetric", "any"]["across"] == 24 * 258 * 8
    local, exact = rows["hierarchical", "local"], rows["hierarchical", "global"]
    assert local["across"] == 3 * 260 * 4 and local["sent"] == local["across"] + 7 * 258 * 8
    assert exact["across"] == 3 * (4 + 8 * 256) * 4 and exact["node"] == 8 * exact["across"]
    refused = {
        r["sync"]: r["reason"] for r in scale.count_wire_bytes(256, 256, 256) if "sent" not in r
    }
    assert (
        "at most 128 ranks" in refused["symmetric"] and "several nodes" in refused["hierarchical"]
    )


def test_refusals():
    """Placements beyond the limits of the kernels are refused by name."""
    assert scale.explain_refusal(Placement.from_phy2log(np.arange(1024) % 512, 512)) is None
    reason = scale.explain_refusal(Placement.from_phy2log(np.arange(2048) % 1024, 1024))
    assert reason.startswith("placement has 1024 ranks in a group, backend 'triton' takes at most")


@pytest.mark.parametrize(
    ("time", "imbalance", "expected"),
    [
        (5.0, 1.1, ("below", 50.0)),
        (5.0, 0.9, ("always", None)),
        (10.0, 1.0, ("never", None)),
        (15.0, 0.9, ("above", 50.0)),
    ],
)
def test_break_even(time, imbalance, expected):
    """A plan that is faster to make and worse pays for small layers, and the other way round."""

    def row(us, mean):
        return {"us": {"median": us}, "imbalance": {"mean": mean}}

    verdict, layer_us = scale.find_break_even(row(10.0, 1.0), row(time, imbalance))
    assert (verdict, layer_us) == (expected[0], layer_us and pytest.approx(expected[1]))
    assert (layer_us is None) == (expected[1] is None)


def test_dry_run_with_times():
    """Plans of one LP and of groups are checked and timed."""
    options = scale.Options(ep=(16,), slots=(1,), groups=(4, 64), loads=("zipf",), experts=32)
    rows, left_out = scale.run(options, FakeTimer(), "cpu")
    assert [(row["plan"], row["group"]) for row in rows] == [
        ("even", 16), ("one", 16), ("group", 4), ("levels", 4)
    ]  # fmt: skip
    by_plan = {row["plan"]: row for row in rows}
    assert left_out == [] and by_plan["even"]["us"] is None
    # The n-th timed call takes n microseconds, and each of two plans has four batches.
    assert [by_plan[name]["us"]["median"] for name in ("one", "group")] == [2.5, 6.5]
    assert by_plan["levels"]["us"] is None
    grids = tables.make_scale_grids(
        {"options": {"loads": ["zipf"], "batches": 4, "ranks_per_node": 8}, "rows": rows,
         "wire": scale.count_wire_bytes(16, 32, 8), "left_out": left_out}
    )  # fmt: skip
    assert [line[4] for line in grids[-1].rows] == ["one LP", "LPs of 4"]


def test_a_wrong_plan_is_not_timed(loads, monkeypatch):
    """A plan whose bound contradicts the twin's is refused."""
    placement = chain(loads.history, 16, redundant_per_rank=1)
    other = chain(loads.history.flip(0), 16, redundant_per_rank=1)
    made = [scale.times._make(other, "cpu", 1e-3)]
    monkeypatch.setattr(scale.times, "_make", lambda *_: made[0])
    with pytest.raises(WrongAnswerError, match="batch 0: the largest load"):
        scale.time_plans(placement, loads.test, FakeTimer(), "cpu", 1e-3)


def test_command(monkeypatch, capsys):
    """The command prints quality, sizes and bytes without a GPU, and says what it left out."""
    arguments = "scale --ep 640 --experts 1280 --load trace,zipf --slots 1 --groups 64 --batches 1"
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main([*arguments.split(), "--json", "-"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert [row["plan"] for row in report["rows"]] == ["even", "one", "group", "levels"]
    assert all(row["us"] is None for row in report["rows"])
    assert report["left_out"][0]["load"] == "trace"
    assert "Left out: EP 640, 1 slots, trace: the packaged trace has" in shown.err
    assert "Refused on a GPU: placement has 640 ranks" in shown.err
    for wrong, message in (
        ("--ep 12", "--ranks-per-node: 8 must divide 12"),
        ("--ep 64 --experts 100", "--ep: 64 does not divide the 100 experts"),
        ("--ep 2048 --load trace", "don't make up 2048"),
        ("--time", "torch finds none"),
    ):
        assert cli.main(["scale", *wrong.split()]) == 2
        assert message in capsys.readouterr().err
