"""Counts and loads of the wrong kind: refused at once, or reported where nobody may wait."""

import warnings

import numpy as np
import pytest
import torch

from lplb_triton import Balancer, Placement, Planner, Problem, Status, solve, topologies
from lplb_triton._backends.triton import TritonBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
EXPERTS = 8
PLACEMENT = Placement.from_phy2log([0, 1, 2, 3, 0, 4, 5, 6, 7, 1, 2, 0], 4)


def balancer_of(backend, device="cpu"):
    return Balancer(PLACEMENT, device=device, backend=backend)


def planner_of(backend, device="cpu"):
    return Planner(topologies.ring(4), 12, EXPERTS, 4, device=device, backend=backend)


def full(value, dtype=torch.int64):
    counts = torch.full((EXPERTS,), 5, dtype=dtype)
    counts[3] = value
    return counts


def counter(device="cpu"):
    return torch.zeros(1, dtype=torch.int64, device=device)


# Everything that takes counts by expert, by the name that it gives them.
TAKERS = {
    "Balancer.solve": ("counts", lambda backend, counts: balancer_of(backend).solve(counts)),
    "Balancer.sync": ("counts", lambda backend, counts: balancer_of(backend).sync(counts)),
    "Planner.solve_probs": (
        "workload",
        lambda backend, counts: planner_of(backend).solve_probs(counts, counter()),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (torch.full((EXPERTS,), 0.9), TypeError, "must be int32 or int64, got torch.float32"),
        (torch.ones(EXPERTS).bool(), TypeError, "must be int32 or int64, got torch.bool"),
        (torch.ones(EXPERTS).cfloat(), TypeError, "must be int32 or int64, got torch.complex64"),
        ([5] * EXPERTS, TypeError, "must be a torch.Tensor, got list"),
        (full(2**40), ValueError, r"must be in \[0, 2\*\*31\), got 5..1099511627776"),
        (full(2**31), ValueError, r"must be in \[0, 2\*\*31\), got 5..2147483648"),
        (full(-1, torch.int32), ValueError, r"must be in \[0, 2\*\*31\), got -1..5"),
        (torch.ones(3).int(), ValueError, "must have "),
        (full(5).to("meta"), ValueError, "is on meta, expected cpu"),
    ],
)
def test_counts_are_checked_at_once_on_a_cpu(backend, taker, counts, error, message):
    """On a CPU, counts of a wrong type, shape, device or range are refused by name."""
    name, call = TAKERS[taker]
    with pytest.raises(error, match=f"^{name} {message}"):
        call(backend, counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_counts_of_either_dtype(backend):
    """Counts up to 2**31 - 1 are solved alike in int32 and int64."""
    balancer = balancer_of(backend)
    solutions = [balancer.solve(full(2**31 - 1, dtype)) for dtype in (torch.int32, torch.int64)]
    for solution in solutions:
        solution.check()
        assert torch.equal(solution.shares, solutions[0].shares)
        # Expert 3 has one copy.
        assert float(solution.max_load[0]) == pytest.approx(2**31, rel=1e-6)
    workload = planner_of(backend).solve_probs(full(2**31 - 1).reshape(2, 4), counter())[1]
    assert float(workload.max()) == 1 and float(workload.min()) == pytest.approx(5 / 2**31)


# numpy's, of the interpreter: counts that are none make loads infinite.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
class TestReports:
    """What a kernel reports where the host doesn't look at values; on a CPU it is told not to."""

    @pytest.fixture(autouse=True)
    def _no_look(self, monkeypatch, device):
        """Make the kernels report bad values on a CPU too."""
        if device == "cpu":
            monkeypatch.setattr(TritonBackend, "checks_on_host", False)

    @pytest.mark.parametrize("bad", [2**40, 2**32, 2**31, -1, -(2**40)])
    def test_a_solve_is_invalid_and_the_next_call_raises(self, device, bad):
        """A solve of counts out of range is invalid, and the next call raises."""
        balancer, ids = balancer_of("triton", device), torch.zeros(3).long().to(device)
        solution = balancer.solve(full(bad).to(device))
        assert solution.status.tolist() == [Status.INVALID]
        assert float(solution.max_load) == float(solution.gap) == float("inf")
        held = torch.tensor(PLACEMENT.structure.mask).any(1)
        assert (solution.shares.double().sum(1).cpu()[held] == 1).all()
        assert int(balancer.certified) == 0 and int(balancer.solves) == 1
        for call in (lambda: balancer.run(ids), lambda: balancer.solve(full(5).to(device))):
            if device == "cuda":
                torch.cuda.synchronize()
            with pytest.raises(RuntimeError, match=r"^counts, .* outside \[0, 2\*\*31\)"):
                call()
            balancer.check()
            balancer.solve(full(bad).to(device))
        with pytest.raises(RuntimeError, match=r"^counts, .* outside \[0, 2\*\*31\)"):
            balancer.check()
        balancer.solve(full(5).to(device)).check()

    def test_one_report_takes_no_other_s_place(self, device):
        """A report about ids and one about counts are both raised, one after the other."""
        balancer = balancer_of("triton", device)
        balancer.solve(full(-1).to(device))
        if device == "cuda":
            torch.cuda.synchronize()
        balancer._backend.report_view.view(np.int32)[0], balancer._backend.report_view[1] = 1, 99
        with pytest.raises(RuntimeError, match=r"^idx held 99, outside \[-1, 8\)"):
            balancer.check()
        with pytest.raises(RuntimeError, match=r"^counts, "):
            balancer.check()
        balancer.check()

    @pytest.mark.parametrize("bad", [2**32, -5])
    def test_a_planner_counts_no_such_workload_as_certified(self, device, bad):
        """A planner does not count such a workload as certified, and its check raises."""
        planner, available = planner_of("triton", device), counter(device)
        weight, scaled = planner.solve_probs(full(bad).to(device), available)
        assert int(available) == 0
        assert bool(((weight >= 0) & (weight <= 1)).all()) and bool((scaled >= 0).all())
        with pytest.raises(RuntimeError, match="^counts, "):
            planner.check()

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda running, cumulative: running.zero_(), "running"),
            (lambda running, cumulative: running.neg_(), "running"),
            (lambda running, cumulative: cumulative.zero_(), "cumulative"),
            (lambda running, cumulative: cumulative.neg_(), "cumulative"),
            (lambda running, cumulative: cumulative.mul_(2), "cumulative"),
        ],
    )
    def test_select(self, device, change, what):
        """Select reports inconsistent tables, and still maps each id to a copy of its expert."""
        balancer = balancer_of("triton", device)
        ids = (torch.arange(40, device=device) % EXPERTS).reshape(10, 4)
        counts, running = balancer.count(ids)
        cumulative = balancer.cumulative_shares(balancer.solve(counts).shares)
        out = balancer.select(ids, cumulative, running)
        balancer.check()
        assert torch.equal(out, balancer.run(ids))
        change(running, cumulative)
        out = balancer.select(ids, cumulative, running)
        assert torch.equal(PLACEMENT.phy2log.to(device)[out.long()].long(), ids)
        with pytest.raises(RuntimeError, match=rf"^{what} \(of a Planner: .*\) .* call of select$"):
            balancer.check()
        balancer.check()

    def test_weights_that_are_no_numbers(self, device):
        """A weight that is NaN is reported by the planner's check."""
        planner = planner_of("triton", device)
        ids = torch.arange(40, device=device) % EXPERTS
        _, running = planner.count_workload(ids, 4)
        weight = torch.full((1, 4, 1), 0.5, device=device)
        weight[0, 2, 0] = float("nan")
        planner.weighted_select_target(ids, weight, running, 4)
        with pytest.raises(RuntimeError, match="^cumulative "):
            planner.check()


def test_sums_over_ranks_that_are_too_large():
    """Sums over the ranks that int32 can't hold are refused, and no solve is counted."""

    class TooMany:
        """Sums as an exchange leaves those that int32 doesn't hold."""

        ranks_per_node = 1

        def exchange(self, counts, version, total, gathered=None):
            total.fill_(-2)

    balancer = balancer_of("torch")
    balancer.communicator = TooMany()
    with pytest.raises(ValueError, match=r"^counts, summed over the ranks, must be below 2\*\*31$"):
        balancer.run(torch.zeros(3, dtype=torch.int64))
    assert int(balancer.certified) == int(balancer.solves) == 0


@pytest.mark.gpu
def test_looking_at_counts_waits_for_nothing():
    """Counts on a GPU are checked without making the host wait."""
    balancer, planner = balancer_of("triton", "cuda"), planner_of("triton", "cuda")
    wide, narrow = full(5).cuda(), full(5, torch.int32).cuda()
    available = counter("cuda")

    def calls():
        for counts in (wide, narrow):
            balancer.solve(balancer.sync(counts))
            planner.solve_probs(counts, available)

    calls()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # torch warns that this mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(available) == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r, c: (r * 0, c), ValueError, "running must end with the counts of idx"),
        (lambda r, c: (-r, c), ValueError, "running must end with the counts of idx"),
        (lambda r, c: (r.float(), c), ValueError, "running must be int32"),
        (lambda r, c: (r, c.float()), ValueError, "cumulative must be int32"),
        (lambda r, c: (r, c * 0), ValueError, "cumulative must rise from 0"),
        (lambda r, c: (r, -c), ValueError, "cumulative must rise from 0"),
        (lambda r, c: (r, c * 2), ValueError, "cumulative must rise from 0"),
    ],
)
def test_select_is_checked_at_once_on_a_cpu(backend, change, error, message):
    """On a CPU, select refuses inconsistent running counts and cumulative shares by name."""
    balancer = balancer_of(backend)
    ids = torch.arange(40) % EXPERTS
    counts, running = balancer.count(ids)
    cumulative = balancer.cumulative_shares(balancer.solve(counts).shares)
    running, cumulative = change(running, cumulative)
    with pytest.raises(error, match=f"^{message}"):
        balancer.select(ids, cumulative, running)


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ([1.0], TypeError, "shares must be a torch.Tensor, got list"),
        (torch.ones(1, 4, 4).int(), TypeError, "shares must be floating-point, got torch.int32"),
        (torch.ones(4, 4), ValueError, r"shares must have shape \[1, 4, 4\] on cpu, got \[4, 4\]"),
    ],
)
def test_shares(shares, error, message):
    """Shares of a wrong type, dtype or shape are refused by name."""
    with pytest.raises(error, match=f"^{message}"):
        balancer_of("torch").cumulative_shares(shares)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weighted_select_is_checked_at_once_on_a_cpu(backend):
    """On a CPU, weighted selection refuses wrong weights and workloads by name."""
    planner, ids = planner_of(backend), torch.arange(40) % EXPERTS
    running, weight = planner.count_workload(ids, 4)[1], torch.full((1, 4, 1), 0.5)
    out = planner.weighted_select_target(ids, weight, running, 4)
    assert torch.equal(planner.weighted_select_target(ids, weight, running.long(), 4), out)
    nan = torch.full_like(weight, float("nan"))
    for weights, rows, error, message in (
        (weight.long(), running, TypeError, "o_weight must be floating-point, got torch.int64"),
        (nan, running, ValueError, "o_weight must not be NaN"),
        ([0.5], running, TypeError, "o_weight must be a torch.Tensor, got list"),
        (weight, running.float(), TypeError, "local_workload_by_sm must be int32 or int64"),
        (weight, running.long() + 2**32, ValueError, r"local_workload_by_sm must be in \[0, 2"),
        (weight, running[:, :3], ValueError, "local_workload_by_sm must have shape"),
        (weight, running * 0, ValueError, "local_workload_by_sm must end with the counts of idx"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            planner.weighted_select_target(ids, weights, rows, 4)


@pytest.mark.parametrize("call", [PLACEMENT.problem, PLACEMENT.even_loads])
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (torch.ones(EXPERTS).bool(), TypeError, "must be integers or real numbers, got torch.bool"),
        (torch.ones(EXPERTS).cfloat(), TypeError, "must be integers or real numbers"),
        (torch.full((EXPERTS,), float("nan")), ValueError, "must be finite and non-negative"),
        (torch.full((EXPERTS,), float("inf")), ValueError, "must be finite and non-negative"),
        (full(-1), ValueError, "must be finite and non-negative"),
        ([1.0] * EXPERTS, TypeError, "must be a torch.Tensor, got list"),
    ],
)
def test_loads_of_a_placement(call, counts, error, message):
    """A placement refuses counts that are not finite, non-negative real numbers."""
    with pytest.raises(error, match=f"^counts {message}"):
        call(counts)


def test_loads_under_a_solution_of_other_programs():
    """Rank loads need a solution of as many programs as there are rows of counts."""
    solution = solve(PLACEMENT.problem(full(5)))
    assert PLACEMENT.rank_loads(full(5), solution).shape == (1, 4)
    for counts, given, error, message in (
        (full(5).expand(2, -1), solution, ValueError, r"solution must have shares \[2, 4, "),
        (full(5), solution.shares, TypeError, "solution must be a Solution, got Tensor"),
        (full(-1), solution, ValueError, "counts must be finite and non-negative"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            PLACEMENT.rank_loads(counts, given)


MASK = torch.ones(1, 2, 1, dtype=torch.bool)


@pytest.mark.parametrize("name", ["weights", "fixed"])
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.bool, TypeError), (torch.complex64, TypeError), (torch.float8_e4m3fn, TypeError)],
)
def test_loads_of_a_problem(name, dtype, error):
    """A problem refuses loads in bool, complex or float8 by name."""
    loads = {"weights": torch.ones(1, 1), "fixed": torch.ones(1, 2)}
    loads[name] = loads[name].to(dtype)
    with pytest.raises(error, match=f"^{name} must be integers or real numbers, got {dtype}$"):
        Problem(loads["weights"], loads["fixed"], MASK)


def test_loads_whose_sum_is_no_number():
    """Loads whose sum overflows float64 are refused."""
    huge = torch.tensor([[1.5e308]], dtype=torch.float64)
    with pytest.raises(ValueError, match="^weights and fixed must have finite sums$"):
        Problem(huge, torch.cat([huge, huge], 1), MASK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", [1e-300, 1e-50, 1e-40, 1e20, 1e40, 1e300])
def test_no_unit_of_load_is_too_small_or_too_large(backend, unit):
    """Programs are solved in any unit of load from 1e-300 to 1e300."""
    weights = torch.tensor([[4.0], [0.0], [1.0]], dtype=torch.float64) * unit
    fixed = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 9.0]], dtype=torch.float64) * unit
    solution = solve(Problem(weights, fixed, MASK).to(DEVICE), backend=backend)
    solution.check()
    assert (solution.max_load.cpu() / unit).tolist() == pytest.approx([3.5, 0, 9], rel=1e-3)
    assert (solution.lower_bound.cpu() / unit).tolist() == pytest.approx([3.5, 0, 9], rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_as_large_as_they_come(backend):
    """Integer loads of 2**62 are solved within the tolerance."""
    weights, fixed = torch.tensor([[2**62]]), torch.tensor([[2**62, 0]])
    solution = solve(Problem(weights, fixed, MASK).to(DEVICE), backend=backend)
    solution.check()
    assert float(solution.max_load) == pytest.approx(2.0**62, rel=1e-3)
