"""The LP: twin and kernel against HiGHS, certificates, and every degenerate case."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lplb_triton import Problem, SolveError, Status, solve
from lplb_triton.testing.instances import FAMILIES, SHAPES, corpus, draw_loads, shape_placement
from lplb_triton.testing.verify import highs_optimum, verify

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["torch", "triton"]
ONE = 1 << 24


def make(weights, fixed, copies, device=DEVICE):
    """Problem of one instance; ``copies[c]`` lists the ranks of column c."""
    mask = torch.zeros(1, len(fixed), len(weights), dtype=torch.bool)
    for column, ranks in enumerate(copies):
        mask[0, ranks, column] = True
    return Problem(
        torch.tensor([weights], dtype=torch.float64, device=device),
        torch.tensor([fixed], dtype=torch.float64, device=device),
        mask.to(device),
    )


def assert_sound(problem, solution, tolerance):
    """Feasibility, certificate and optimum of every instance, from first principles."""
    shares = solution.shares.double().cpu()
    weights, fixed = problem.weights.double().cpu(), problem.fixed.double().cpu()
    mask = problem.mask.cpu().expand(len(weights), -1, -1)
    assert (shares[~mask] == 0).all() and (shares >= 0).all()
    assert torch.equal(shares * ONE, (shares * ONE).round())
    assert (shares.sum(1)[mask.any(1)] == 1).all()
    loads = (fixed + (weights[:, None] * shares).sum(2)).amax(1)
    torch.testing.assert_close(loads, solution.max_load.double().cpu(), rtol=1e-6, atol=0)
    for i in range(len(weights)):
        optimum = highs_optimum(weights[i].numpy(), fixed[i].numpy(), mask[i].numpy())
        assert float(solution.lower_bound[i]) <= optimum * (1 + 1e-6)
        assert optimum <= float(solution.max_load[i]) * (1 + 1e-6)
    assert (solution.gap <= tolerance).all()
    assert (solution.status == Status.CERTIFIED).all()
    solution.check()


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twin_against_highs(dtype, tolerance):
    """The twin's plans of drawn programs are sound, and almost all are certified."""
    (verdict,) = verify(340, seed=1, tolerances=(tolerance,), dtype=dtype)
    assert verdict.sound and verdict.instances >= 340
    assert verdict.not_certified <= (0 if tolerance == 1e-3 else 0.001 * verdict.instances)
    assert verdict.max_iterations <= (12 if verdict.not_certified == 0 else 40)


SMALL = ["ring:8", "cube", "hypercube", "ring:5", "torus:3x4", "eplb:2:1", "random:7:3"]


@pytest.mark.parametrize("shape", SMALL if not GPU else SHAPES)
def test_kernel_against_highs(shape):
    """The kernel certifies every load family within bounds that HiGHS confirms."""
    rng = np.random.default_rng(5)
    placement = shape_placement(shape, rng)
    rows = [draw_loads(family, rng, placement.n_logical) for family in FAMILIES]
    problem = placement.problem(torch.stack(rows).to(DEVICE))
    for tolerance in (1e-3, 1e-4):
        assert_sound(problem, solve(problem, tolerance=tolerance, backend="triton"), tolerance)


@pytest.mark.gpu
def test_kernel_on_the_whole_corpus():
    """The kernel on a GPU is sound on 2040 programs, and certifies all within 1e-3."""
    for verdict in verify(2040, seed=0, device="cuda", backend="triton"):
        assert verdict.sound
        assert verdict.not_certified <= (0 if verdict.tolerance == 1e-3 else 2)


@pytest.mark.parametrize("backend", BACKENDS)
class TestDegenerate:
    def test_no_load_at_all(self, backend):
        """A program without load is solved with load and gap 0 and no steps."""
        solution = solve(make([0, 0], [0, 0, 0], [[0, 1], [1, 2]]), backend=backend)
        assert solution.gap.tolist() == [0.0] and solution.max_load.tolist() == [0.0]
        assert solution.iterations.tolist() == [0]
        solution.check()

    def test_one_rank(self, backend):
        """One rank has all of the load."""
        problem = make([5, 7], [3], [[0], [0]])
        solution = solve(problem, backend=backend)
        assert_sound(problem, solution, 1e-3)
        assert float(solution.max_load[0]) == 15

    def test_no_columns(self, backend):
        """A program without columns has its largest fixed load."""
        problem = make([], [3, 9, 1], [])
        solution = solve(problem, backend=backend)
        assert solution.shares.shape == (1, 3, 0)
        assert float(solution.max_load[0]) == 9 and float(solution.gap[0]) <= 1e-3

    def test_no_instances(self, backend):
        """A batch without instances has no loads."""
        mask = torch.ones(1, 2, 1, dtype=torch.bool, device=DEVICE)
        empty = torch.zeros(0, 1, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
        assert solve(Problem(*empty, mask), backend=backend).max_load.shape == (0,)

    def test_hot_column(self, backend):
        """A column that outweighs all others is levelled over its ranks."""
        problem = make([1e6, 1, 1], [10, 20, 30, 40], [[0, 1, 2], [1, 3], [2, 3]])
        assert_sound(problem, solve(problem, backend=backend), 1e-3)

    def test_column_on_every_rank(self, backend):
        """A column on all ranks fills up those below the largest fixed load."""
        problem = make([100], [1, 2, 3, 4, 5, 60], [list(range(6))])
        solution = solve(problem, backend=backend)
        assert_sound(problem, solution, 1e-3)
        assert float(solution.max_load[0]) <= 60 * (1 + 1e-3)

    def test_zero_and_feather_weights(self, backend):
        """Columns of weight 0 or 1e-9 do not disturb a program."""
        problem = make([0, 1e-9, 500, 0], [9, 1, 4], [[0, 1], [1, 2], [0, 2], [0, 1, 2]])
        for tolerance in (1e-3, 1e-4):
            assert_sound(problem, solve(problem, tolerance=tolerance, backend=backend), tolerance)

    def test_column_with_one_copy_is_fixed(self, backend):
        """A column with a single copy loads its rank in full."""
        problem = make([50, 10], [0, 0], [[0], [0, 1]])
        solution = solve(problem, backend=backend)
        assert_sound(problem, solution, 1e-3)
        assert float(solution.max_load[0]) == pytest.approx(50, rel=1e-3)

    def test_padding_column(self, backend):
        """A column without copies has no shares, and the others are levelled."""
        problem = make([50, 0], [0, 10], [[0, 1], []])
        solution = solve(problem, backend=backend)
        assert (solution.shares[:, :, 1] == 0).all()
        assert float(solution.max_load[0]) == pytest.approx(30, rel=1e-3)

    def test_already_balanced(self, backend):
        """A program that is level when split evenly needs no steps."""
        problem = make([4, 4, 4], [2, 2, 2], [[0, 1], [1, 2], [2, 0]])
        solution = solve(problem, backend=backend)
        assert float(solution.max_load[0]) == pytest.approx(6, rel=1e-6)
        assert solution.iterations.tolist() == [0]

    @pytest.mark.parametrize("scale", [1e-36, 1e-12, 1.0, 1e12])
    def test_unit_of_load_does_not_matter(self, backend, scale):
        """Loads in units from 1e-36 to 1e12 are solved to the tolerance."""
        problem = make([7 * scale, 5 * scale], [scale, 0, 3 * scale], [[0, 1], [1, 2]])
        solution = solve(problem, backend=backend)
        assert_sound(problem, solution, 1e-3)

    def test_the_allowance_for_round_off_is_aimed_at_too(self, backend):
        """A gap as small as the allowance for round-off is certified."""
        problem = make([2], [1 + 3.8e-5, 1], [[0, 1]])
        solution = solve(problem, tolerance=1e-5, backend=backend)
        assert solution.status.tolist() == [Status.CERTIFIED]

    def test_iteration_bound_leaves_a_feasible_honest_plan(self, backend):
        """A plan cut short is feasible, has status GAP, and fails its check."""
        rng = np.random.default_rng(0)
        placement = shape_placement("cube", rng)
        problem = placement.problem(draw_loads("lognormal", rng, placement.n_logical).to(DEVICE))
        solution = solve(problem, tolerance=1e-5, max_iterations=1, backend=backend)
        assert solution.status.tolist() == [Status.GAP]
        assert 1e-5 < float(solution.gap[0]) < 1
        assert (solution.shares.double().sum(1) == 1).all()
        with pytest.raises(SolveError, match="instance 0: GAP"):
            solution.check()


def test_interpreted_or_compiled_agrees_with_twin():
    """The kernel's loads are the twin's to within both tolerances."""
    for instance in itertools.islice(corpus(34, seed=3), 4):
        there = instance.problem.to(DEVICE)
        a = solve(instance.problem, tolerance=1e-4, backend="torch")
        b = solve(there, tolerance=1e-4, backend="triton")
        torch.testing.assert_close(
            a.max_load, b.max_load.double().cpu(), rtol=2e-4, atol=0, msg=instance.shape
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_mix_statuses(backend):
    """Instances of one batch that need levelling or have no load are solved together."""
    mask = torch.ones(1, 2, 1, dtype=torch.bool, device=DEVICE)
    weights = torch.tensor([[4.0], [0.0], [8.0]], device=DEVICE)
    fixed = torch.tensor([[1.0, 3.0], [0.0, 0.0], [0.0, 0.0]], device=DEVICE)
    solution = solve(Problem(weights, fixed, mask), backend=backend)
    torch.testing.assert_close(
        solution.max_load.double().cpu(), torch.tensor([4.0, 0.0, 4.0]).double(), rtol=1e-3, atol=0
    )


@pytest.mark.gpu
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_values_on_a_gpu_become_invalid(value):
    """A bad value on a GPU makes only its own instance INVALID."""
    for backend in BACKENDS:
        problem = Problem(
            torch.tensor([[value], [6.0]], device="cuda"),
            torch.ones(2, 2, device="cuda"),
            torch.ones(1, 2, 1, dtype=torch.bool, device="cuda"),
        )
        solution = solve(problem, backend=backend)
        assert solution.status.tolist() == [Status.INVALID, Status.CERTIFIED]
        assert math.isinf(float(solution.gap[0]))
        with pytest.raises(SolveError, match="INVALID"):
            solution.check()


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 10))
def test_relabelling_ranks_relabels_the_answer(seed, ranks, columns):
    """Another order of ranks leaves the load the same, and HiGHS confirms it."""
    rng = np.random.default_rng(seed)
    mask = rng.random((1, ranks, columns)) < 0.5
    mask[0, rng.integers(ranks, size=columns), np.arange(columns)] = True
    weights = np.floor(rng.lognormal(0, 1, (1, columns)) * 1000)
    fixed = np.floor(rng.lognormal(0, 1, (1, ranks)) * 1000)
    order = rng.permutation(ranks)
    a = solve(Problem(*map(torch.from_numpy, (weights, fixed, mask))), tolerance=1e-6)
    b = solve(
        Problem(*map(torch.from_numpy, (weights, fixed[:, order], mask[:, order]))), tolerance=1e-6
    )
    torch.testing.assert_close(a.max_load, b.max_load, rtol=3e-6, atol=0)
    optimum = highs_optimum(weights[0], fixed[0], mask[0])
    assert float(a.lower_bound[0]) <= optimum * (1 + 1e-9) + 1e-9
    assert float(a.max_load[0]) >= optimum * (1 - 1e-9)


class TestArguments:
    good = (torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 3, 2, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("position", "value", "error", "name"),
        [
            (0, [1.0], TypeError, "weights"),
            (0, torch.ones(2), ValueError, "weights"),
            (1, torch.ones(2, 3), ValueError, "fixed"),
            (1, torch.ones(1, 0), ValueError, "fixed"),
            (2, torch.ones(1, 3, 2), TypeError, "mask"),
            (2, torch.ones(1, 2, 3, dtype=torch.bool), ValueError, "mask"),
            (2, torch.zeros(1, 3, 2, dtype=torch.bool), ValueError, "mask"),
            (0, torch.tensor([[1.0, -1.0]]), ValueError, "weights"),
            (1, torch.tensor([[1.0, math.nan, 0.0]]), ValueError, "fixed"),
        ],
    )
    def test_problem(self, position, value, error, name):
        """A problem's wrong argument is refused by name."""
        arguments = list(self.good)
        arguments[position] = value
        with pytest.raises(error, match=f"^{name}"):
            Problem(*arguments)

    @pytest.mark.parametrize(
        ("kwargs", "name"),
        [
            ({"tolerance": 0}, "tolerance"),
            ({"tolerance": math.nan}, "tolerance"),
            ({"tolerance": 1e-7, "dtype": torch.float32}, "tolerance"),
            ({"max_iterations": 0}, "max_iterations"),
            ({"backend": "cuda"}, "backend"),
            ({"dtype": torch.float16}, "dtype"),
            ({"backend": "triton", "dtype": torch.float64}, "dtype"),
        ],
    )
    def test_solve(self, kwargs, name):
        """A wrong option of `solve` is refused by name."""
        problem = Problem(*(t.to(DEVICE) for t in self.good))
        kwargs = {"backend": "torch", **kwargs}
        with pytest.raises(ValueError, match=f"^{name}"):
            solve(problem, **kwargs)

    def test_solve_wants_a_problem(self):
        """`solve` refuses by name what is not a `Problem`."""
        with pytest.raises(TypeError, match="^problem"):
            solve(torch.ones(3))
