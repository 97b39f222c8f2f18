"""Balancers with either solver: plans, counters, errors, copies, groups and graphs."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from gloo import run_ranks
from helpers.balancers import DEVICE, check_answer, placement_of, random_ids

from lplb_triton import Balancer, Placement, SolveError, Status, solve
from lplb_triton._backends.interior_point import solve_counts
from lplb_triton._backends.triton import TritonBackend
from lplb_triton.testing.instances import shape_placement

SOLVERS = ["levelling", "interior_point"]
BACKENDS = ["torch", "triton"]
solvers = pytest.mark.parametrize("solver", SOLVERS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def make(placement=None, solver="interior_point", **settings):
    settings = {"device": DEVICE, "backend": "triton", "rank": 0, **settings}
    return Balancer(placement or placement_of(), solver=solver, **settings)


def skewed_counts(placement, seed=0):
    counts = np.random.default_rng(seed).lognormal(3, 1.5, placement.n_logical).astype(np.int32)
    return torch.from_numpy(counts).to(DEVICE)


SHAPES = ["cube", "torus:2x2", "eplb:16:2", "random:7:3"]


@pytest.mark.parametrize("shape", SHAPES)
def test_both_solvers_keep_the_tolerance(shape):
    """Both solvers certify every solve, and each one's bound is below the other's load."""
    placement = shape_placement(shape, np.random.default_rng(0))
    both = [make(placement, solver, tolerance=1e-4) for solver in SOLVERS]
    for seed in range(3):
        counts = skewed_counts(placement, seed)
        first, second = (balancer.solve(counts) for balancer in both)
        for solution in (first, second):
            solution.check()
            loads = placement.rank_loads(counts, solution).reshape(placement.n_group, -1).amax(1)
            assert torch.allclose(loads, solution.max_load.double(), rtol=1e-6)
        assert torch.allclose(first.max_load, second.max_load, rtol=2.1e-4)
        assert (first.lower_bound <= second.max_load).all()
        assert (second.lower_bound <= first.max_load).all()
        idx = random_ids(seed, placement.n_logical)
        for balancer in both:
            check_answer(balancer, idx, balancer.run(idx))
    for balancer in both:
        assert int(balancer.solves) == int(balancer.certified) == 6 * placement.n_group
        assert int(balancer.uncertified) == 0
        balancer.check(certified=True)


@pytest.mark.parametrize("shape", [*SHAPES, "eplb:8:0"])
def test_programs_are_those_of_the_placement(shape):
    """The interior-point solver on counts gives the solution of the placement's program."""
    if shape == "eplb:8:0":
        placement = placement_of(slots=0)
    else:
        placement = shape_placement(shape, np.random.default_rng(1))
    counts = skewed_counts(placement)
    balancer = make(placement)
    found = balancer.solve(counts)
    expected = solve(placement.problem(counts), backend="triton")
    for name in ("max_load", "lower_bound", "gap"):
        found_one, expected_one = getattr(found, name), getattr(expected, name)
        assert torch.allclose(found_one.double(), expected_one.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.iterations, expected.iterations)
    assert torch.allclose(found.shares, expected.shares, atol=1e-4)


def test_a_plan_is_no_worse_than_the_split_over_copies():
    """One expert with three copies on rank 0 and one on rank 1, which has other load."""
    placement = Placement(np.array([0, 0, 0, 1, 0, 2, 3, 4]), 2, n_logical=5)
    balancer = make(placement, tolerance=0.9)
    counts = torch.tensor([400, 0, 300, 0, 0], dtype=torch.int32, device=DEVICE)
    solution = balancer.solve(counts)
    assert float(solution.max_load) <= float(placement.even_loads(counts).max())
    tables = balancer._tables.views
    with_none = solve_counts(torch.zeros_like(counts), placement, tables, 1e-3, 40)
    assert with_none.status.tolist() == [Status.CERTIFIED]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@backends
@solvers
def test_run(solver, backend, dtype):
    """`run` gives the ids of its pieces for every solver and dtype, and counts its solves."""
    balancer = make(solver=solver, backend=backend, rank=1)
    balancer.warmup()
    assert int(balancer.solves) == int(balancer.certified) == 0
    for seed in range(2):
        idx = random_ids(seed, 64, dtype=dtype)
        out = balancer.run(idx)
        assert out.shape == idx.shape and out.dtype == dtype
        check_answer(balancer, idx, out)
        assert torch.equal(out, balancer.run(idx, n_sms=1))
        counts, running = balancer.count(idx)
        cumulative = balancer.cumulative_shares(balancer.solve(counts).shares)
        assert torch.equal(balancer.select(idx, cumulative, running), out)
    empty = torch.empty(0, 8, dtype=dtype, device=DEVICE)
    assert balancer.run(empty).shape == empty.shape
    own = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    balancer.run(idx, certified=own)
    assert (int(own), int(balancer.certified), int(balancer.solves)) == (1, 7, 8)
    balancer.check()


@backends
def test_replicated_tokens(backend):
    """With replicated quotas the interior-point solver gives right ids."""
    placement, idx = placement_of(), random_ids(0, 64)
    settings = {"solver": "interior_point", "device": DEVICE, "backend": backend}
    balancer = Balancer(placement, quotas="replicated", **settings)
    check_answer(balancer, idx, balancer.run(idx))


@backends
def test_another_placement_is_written_in_place(backend):
    """A new placement takes effect at the old tables' addresses."""
    balancer = make(placement_of(0), backend=backend)
    addresses = {name: view.data_ptr() for name, view in balancer._tables.views.items()}
    idx = random_ids(0, 64)
    balancer.run(idx)
    balancer.update_placement(placement_of(1))
    out = balancer.run(idx)
    check_answer(balancer, idx, out)
    assert torch.equal(out, make(placement_of(1), backend=backend).run(idx))
    assert addresses == {name: view.data_ptr() for name, view in balancer._tables.views.items()}


# numpy's, of the interpreter: counts that are none make loads infinite.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_counts_that_are_none_are_told_once(monkeypatch):
    """Invalid counts of the interior-point kernel are raised once, by the next call."""
    monkeypatch.setattr(TritonBackend, "checks_on_host", False)
    placement = shape_placement("torus:2x2", np.random.default_rng(0))
    balancer = make(placement)
    counts = skewed_counts(placement)
    counts[0] = -1
    solution = balancer.solve(counts)
    group = int(placement.structure.cell_group[0])
    expected = [Status.CERTIFIED] * placement.n_group
    expected[group] = Status.INVALID
    assert solution.status.tolist() == expected
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for call in (balancer.check, lambda: balancer.run(random_ids(0, placement.n_logical))):
        with pytest.raises(RuntimeError, match=r"^counts, .* outside \[0, 2\*\*31\)"):
            call()
        balancer.check(certified=True)
        balancer.solve(counts)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    assert int(balancer.uncertified) == 0


@backends
@solvers
def test_groups_above_the_tolerance_are_counted(solver, backend):
    """Uncertified groups are counted, and a check tells each of them once."""
    placement = shape_placement("random:7:3", np.random.default_rng(0))
    balancer = make(placement, solver, backend=backend, max_iterations=1)
    # Hardly above what is taken off the bound for round-off: rounded shares seldom keep that.
    balancer.tolerance = tolerance = 1e-12 if backend == "torch" else 9.6e-7
    drawn = (skewed_counts(placement, seed) for seed in range(30))
    counts = next(c for c in drawn if (balancer.solve(c).status == Status.GAP).any())
    balancer = make(placement, solver, backend=backend, max_iterations=1)
    balancer.tolerance = tolerance
    easy = torch.zeros_like(counts)
    balancer.check(certified=True)
    statuses = [balancer.solve(c).status for c in (counts, easy, counts)]
    above = sum(int((status == Status.GAP).sum()) for status in statuses)
    solved = 3 * placement.n_group
    assert above > 0
    assert int(balancer.uncertified) == above and int(balancer.solves) == solved
    assert int(balancer.certified) == solved - above
    balancer.check()
    twin = pickle.loads(pickle.dumps(balancer))
    for each in (balancer, twin, copy.deepcopy(balancer)):
        with pytest.raises(
            SolveError, match=rf"^{above} of {solved} groups .* {tolerance:g} since"
        ):
            each.check(certified=True)
        each.check(certified=True)
        each.solve(easy)
        each.solve(counts)
        again = f"^{above // 2} of {2 * placement.n_group} groups"
        with pytest.raises(SolveError, match=again):
            copy.deepcopy(each).check(certified=True)
        with pytest.raises(SolveError, match=again):
            each.check(certified=True)
    # Counters that the caller sets back begin anew.
    balancer.uncertified.zero_()
    balancer.solves.zero_()
    balancer.check(certified=True)
    balancer.solve(counts)
    with pytest.raises(SolveError, match=f"^{above // 2} of {placement.n_group} groups"):
        balancer.check(certified=True)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
@solvers
def test_copies_keep_the_solver(solver, way):
    """Copied and unpickled balancers keep their solver and their answers."""
    balancer = make(solver=solver)
    idx = random_ids(0, 64)
    expected = balancer.run(idx)
    twin = way(balancer)
    assert twin.solver == solver and f"solver={solver}" in repr(twin)
    assert torch.equal(twin.run(idx), expected)
    assert int(twin.uncertified) == int(balancer.uncertified) == 0


def wide(ranks, columns=None):
    slots = np.concatenate([np.arange(ranks), np.roll(np.arange(ranks), 1)]).reshape(2, ranks).T
    return Placement(slots.reshape(-1), ranks, n_logical=ranks, max_columns=columns)


def test_arguments_are_named():
    """An unknown solver or too large a placement is refused by name."""
    with pytest.raises(ValueError, match="^solver must be one of levelling, interior_point, got"):
        make(solver="simplex")
    large = r"^placement has 129 ranks in a group, solver 'interior_point' takes at most 128; use "
    with pytest.raises(ValueError, match=large + r"solver='levelling', or backend='torch'$"):
        make(wide(129))
    with pytest.raises(ValueError, match="^placement has 128 ranks and 257 columns, padded to "):
        make(wide(128, 257))
    assert make(wide(129), backend="torch").solver == "interior_point"
    assert make().solver == "interior_point" and Balancer(placement_of()).solver == "levelling"


def check_group(rank, group):
    placement = placement_of(ranks=2)
    idx = random_ids(rank, 64, device="cpu")
    interpreted = DEVICE == "cpu"
    for backend in BACKENDS if interpreted else BACKENDS[:1]:
        settings = {"device": "cpu", "backend": backend, "solver": "interior_point"}
        for quotas in ("local", "global"):
            with Balancer(placement, group=group, quotas=quotas, **settings) as balancer:
                balancer.warmup()
                assert int(balancer.traffic.sum()) == int(balancer.solves) == 0
                out = balancer.run(idx)
                assert torch.equal(placement.phy2log[out[out >= 0]].long(), idx[idx >= 0])
                loads = torch.bincount(out[out >= 0], minlength=placement.n_physical)
                torch.distributed.all_reduce(loads)
                by_rank = loads.reshape(2, -1).sum(1)
                counts = balancer.sync(balancer.count(idx)[0])
                assert int(by_rank.sum()) == int(counts.sum())
                best = float(solve(placement.problem(counts)).max_load)
                assert int(by_rank.max()) <= 1.002 * best + placement.slots_per_rank
                assert bool(balancer.traffic.any()) == (quotas == "global")
    with pytest.raises(ValueError, match="^placement, quotas and solver must be .* solver"):
        Balancer(placement, group=group, device="cpu", backend="torch", solver=SOLVERS[rank])


def test_ranks_over_gloo(tmp_path):
    """Two ranks share out tokens near the optimum, and must agree on the solver."""
    run_ranks(check_group, 2, tmp_path)


@pytest.mark.gpu
class TestOnAGpu:
    def test_graph_replayed_on_new_ids(self):
        """A graph gives right ids for new tokens and for a new placement."""
        balancer = make(device="cuda")
        balancer.warmup()
        static = random_ids(0, 64, (512, 8))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = balancer.run(static)
        for seed in range(1, 6):
            static.copy_(random_ids(seed, 64, (512, 8)))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, balancer.run(static))
            check_answer(balancer, static, out)
        balancer.update_placement(placement_of(1))
        graph.replay()
        check_answer(balancer, static, out)
        assert int(balancer.solves) == int(balancer.certified) == 11
        balancer.check(certified=True)

    def test_never_syncs(self):
        """Neither `run` nor `solve` waits for the GPU."""
        balancer = make(device="cuda")
        idx, counts = random_ids(0, 64), skewed_counts(balancer.placement)
        balancer.run(idx)
        balancer.solve(counts)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            # torch warns that this mode is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
            try:
                balancer.run(idx)
                balancer.solve(counts)
            finally:
                torch.cuda.set_sync_debug_mode("default")
