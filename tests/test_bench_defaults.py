"""What the benchmarks compute doesn't depend on torch's default device and dtype."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton import Placement
from lplb_triton.bench import advise, balance, placement, report, workloads
from lplb_triton.bench.measure.simulate import draw_experts, split_tokens
from lplb_triton.testing import verify

SETTINGS = workloads.Settings(ranks=4, experts=32, batches=2, tokens=64, seed=1)
IDS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1])


@contextmanager
def other_defaults():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def in_order():
    return balance.make_placement("none", torch.from_numpy(np.ones(8)), 4, 0).phy2log


def cases():
    found = placement.trace_cases(make_trace(), 0.5) + placement.synthetic_cases(16, (0,))
    return [tensor for case in found for tensor in (case.history, case.test)]


def drawn(name):
    case = workloads.draw(name, SETTINGS)
    return [case.history, case.test]


def balanced():
    (cell,) = balance.run(make_trace(batches=4, layers=1), balance.Options((8,), (2,), ("cube",)))
    return [torch.tensor(loads, device="cpu") for loads in cell.results[0].loads.values()]


def measured():
    (case,) = placement.synthetic_cases(16, (0,))
    found = [
        placement.measure(case, 4, 1, name, torch.device("cpu"), 2) for name in placement.METHODS
    ]
    values = [[row["even"], row["lp"], row["integer"]] for row in found]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def verified():
    (verdict,) = verify.verify(17, tolerances=(1e-3,))
    assert verdict.sound and verdict.instances == 17
    return torch.tensor(verdict.worst_gap, dtype=torch.float64, device="cpu")


def judged():
    test = torch.from_numpy(np.array([[[9, 8, 1, 1, 1, 1, 1, 1]]]))
    found = workloads.judge(Placement.from_phy2log(IDS, 2), test, 1e-3)
    return torch.tensor(list(found.values()), dtype=torch.float64, device="cpu")


def advised():
    model, gemm = advise.Model(64, 32, 32, 2), advise.packaged(64, 32)
    found = advise.advise(model, gemm, placement.synthetic_cases(32, (0,)), 4, 64, (1,))
    values = [row["saving_us"]["mean"] for row in found["rows"]]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def split(name):
    counts = torch.from_numpy(np.array([9, 8, 1, 1, 1, 1, 1, 1]))
    return split_tokens(Placement.from_phy2log(IDS, 2), counts, name, 1e-3)


def figures(compare, name):
    """Figures of what a report compares beside the combinations."""
    trace, options = make_trace(), balance.Options((8,), (1,))
    rows = compare(trace, balance.run(trace, options)[0], options)
    return [torch.tensor(row[name], dtype=torch.float64, device="cpu") for row in rows]


def saving():
    """Times that a report predicts."""
    trace = make_trace()
    found = report.predict_saving(trace, balance.run(trace, balance.Options((8,), (1,)))[0], 1e-3)
    nets = [size["net"] for size in found["sizes"]]
    return [torch.tensor(nets, dtype=torch.float64, device="cpu")]


CALLS = {
    "make_placement": in_order,
    "balance.run": balanced,
    "placement.measure": measured,
    "verify": verified,
    "judge": judged,
    "advise": advised,
    "split by the LP": lambda: split("lplb"),
    "split evenly": lambda: split("even"),
    "cases": cases,
    "changes": lambda: figures(balance.find_changes, "imbalance"),
    "batch sizes": lambda: figures(balance.compare_batch_sizes, "integer"),
    "saving": saving,
    "heat": lambda: [torch.tensor(report.heat(make_trace(), 0)["tokens"], device="cpu")],
    "draw_experts": lambda: draw_experts(8, 4, 2, "cpu"),
    "adversary": lambda: workloads.adversary(
        Placement.from_phy2log(IDS, 2), workloads.Settings(2, 8, 1, 64)
    ),
    **{f"draw {name}": lambda name=name: drawn(name) for name in workloads.WORKLOADS},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_the_same_whatever_the_defaults(call):
    """Results are the same, and on the CPU, under another default device and dtype."""
    expected = call()
    with other_defaults():
        found = call()
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    for want, got in zip(expected, found, strict=True):
        assert got.device.type == "cpu"
        assert torch.equal(got.double(), want.double())


def test_tables_of_peers():
    """The tables of edge balancing are the same under another default device and dtype."""
    pytest.importorskip("triton")
    from lplb_triton.bench import peers

    mask = torch.from_numpy(np.array([[True, False], [True, True], [False, True]]))
    expected = peers.EdgeBalancing(mask, "cpu")
    with other_defaults():
        ends = peers.find_copy_ranks(mask)
        assert peers.color_edges(*ends).tolist() == [0, 1]
        found = peers.EdgeBalancing(mask, "cpu")
    for want, got in zip(expected._tables, found._tables, strict=True):
        assert torch.equal(want, got) and got.dtype == torch.int32
