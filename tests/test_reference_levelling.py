"""The reference of levelling against an exact solver, and what every answer keeps."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.levelling import (
    DOUBLE,
    SHAPES,
    check_sound,
    draw_mask,
    draw_problem,
    draw_sets,
    find_no_bound,
    hold,
    jitter_batches,
    largest_load,
    one_column,
    record_stages,
    solve,
    wide_columns,
)

from lplb_triton import Placement, Problem, Status, chain
from lplb_triton.reference import as_plan, levelling


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_highs(shape, spread, dtype):
    problem = draw_problem(shape, seed=SHAPES.index(shape), spread=spread)
    solution = solve(problem, dtype=dtype)
    check_sound(problem, solution)
    assert solution.status.tolist() == [Status.CERTIFIED] * problem.n_instances
    assert float(solution.gap[0]) == 0 and int(solution.iterations[0]) == 0


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", [Placement.from_history, chain], ids=["eplb", "chain"])
@pytest.mark.parametrize("ep", [8, 16, 32])
def test_batches_that_change(ep, kind, slots):
    for seed in range(3):
        history, counts = jitter_batches(ep, seed)
        problem = kind(history.float(), ep, redundant_per_rank=slots).problem(counts)
        solution = solve(problem)
        assert solution.status.tolist() == [Status.CERTIFIED] * len(counts)
        # Sweeps are enough for most.
        assert float(solution.iterations.double().mean()) < 0.5
    check_sound(problem, solution)


@pytest.mark.parametrize("fewest", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_tight_tolerances_on_few_ranks(seed, fewest):
    rng = np.random.default_rng(seed)
    mask = hold(8, draw_sets(rng, 8, 16, fewest, 4))
    weights, fixed = rng.lognormal(0, 1, (8, 16)), rng.lognormal(0, 0.6, (8, 8))
    problem = Problem(*map(torch.from_numpy, (weights, fixed, mask)))
    solution = solve(problem, tolerance=1e-6)
    assert solution.status.tolist() == [Status.CERTIFIED] * 8
    check_sound(problem, solution)


def test_iterations_are_steps_by_potentials():
    # The even split of a path is level but for the fixed loads, in one instance a gentle slope.
    mask = torch.from_numpy(draw_mask("path", None))
    fixed = torch.full((2, 33), 100.0)
    fixed[:, [0, -1]] += 500
    fixed[0] += torch.arange(33)
    solution = solve(Problem(torch.full((2, 32), 1000.0), fixed, mask))
    assert solution.iterations.tolist() == [1, 0]
    assert solution.status.tolist() == [Status.CERTIFIED] * 2


def test_order_of_sweeps_cuts_and_steps(monkeypatch):
    # Ranks 0 and 1 are above the mean for good, and no cut says so: every sweep is steady.
    calls = record_stages(monkeypatch, cut_bound=find_no_bound)
    assert solve(one_column(1.0, [0, 0, 0]), max_iterations=6).iterations.tolist() == [6]
    # Looked for after sweeps 1, 2, 3, 5, 8, 12 and the last.
    later = "scscScSScSSSc"
    assert "".join(calls) == later + "SSSSc" * 2 + ("p" + later) * 3 + ("P" + later) * 3


def test_the_first_run_ends_after_256_classes(monkeypatch):
    # Columns on the same two ranks have a class each: 15 sweeps of 18 are the first to be as many.
    calls = record_stages(monkeypatch, cut_bound=find_no_bound)
    mask = torch.from_numpy(hold(3, [(0, 1)] * 18))
    solve(Problem(torch.ones(1, 18), torch.zeros(1, 3), mask), max_iterations=1)
    assert "".join(calls) == "scscScSScSSScSSSScSSSc" + "pscscScSScSSSc"


@pytest.mark.parametrize(("part", "steady"), [(0.49, True), (0.51, False)])
def test_when_the_largest_load_is_steady(monkeypatch, part, steady):
    aim = 0.98e-3

    def sweep(graph, x, load, _):
        return x, load / (1 + part * aim)

    calls = record_stages(monkeypatch, sweep=sweep, cut_bound=find_no_bound)
    solve(one_column(1.0, [0, 0, 0]), max_iterations=1)
    expected = "scscScSScSSSc" + "SSSSc" * 2 + "pscscScSScSSSc"
    if not steady:
        expected = "scs" + "S" * 14 + "c" + "pscs" + "S" * 6 + "c"
    assert "".join(calls) == expected


def test_nothing_is_done_once_the_gap_is_reached(monkeypatch):
    calls = record_stages(monkeypatch)
    solve(one_column(4.0, [1, 1]))
    assert calls == []
    solve(one_column(4.0, [1, 2]))
    assert "".join(calls) == "s"
    calls.clear()
    # The first cut says that ranks 0 and 1 can't be below 2.
    solve(one_column(4.0, [0, 0, 0]))
    assert "".join(calls) == "sc"

    def level(graph, x, load, *others):
        return x, load.mean(1, keepdim=True).expand_as(load)

    calls = record_stages(monkeypatch, cut_bound=find_no_bound, step=level)
    assert solve(one_column(4.0, [0, 0, 0])).iterations.tolist() == [1]
    assert calls[-1] == "p"


def test_the_plan_before_the_first_step_is_taken_if_the_end_is_worse(monkeypatch):
    sweeps = []
    sweep = levelling.sweep

    def sweep_once(graph, x, load, part):
        sweeps.append(part)
        return sweep(graph, x, load, 0.25) if len(sweeps) == 1 else (x, load)

    def move_all(graph, x, load, w, fixed, search):
        x = torch.stack((torch.zeros_like(w), w), 2)
        return x, fixed + graph.sum_by_rank(x)

    record_stages(monkeypatch, sweep=sweep_once, cut_bound=find_no_bound, step=move_all)
    # Even splits have loads 2, 3 and 5.8, 2; the sweep makes them 2.25, 2.75 and 4.85, 2.95; the
    # step 0, 5 and 3.8, 4. No bound is found for the ranks with the column.
    solution = solve(one_column(4.0, [0, 1, 0], [3.8, 0, 0]), max_iterations=1)
    assert solution.iterations.tolist() == [1, 1]
    torch.testing.assert_close(solution.max_load, torch.tensor([2.75, 4.0], dtype=DOUBLE))


def test_too_few_steps_leave_a_true_gap():
    problem = draw_problem("5 to 60 copies", seed=SHAPES.index("5 to 60 copies"), spread=3.0)
    enough = solve(problem, tolerance=1e-4)
    solution = solve(problem, tolerance=1e-4, max_iterations=1)
    check_sound(problem, solution)
    assert int(enough.iterations.max()) > 1 == int(solution.iterations.max())
    assert bool(((solution.status == Status.GAP) == (enough.iterations > 1)).all())


@pytest.mark.parametrize("seed", [184, 446])
def test_no_answer_is_worse_than_the_even_split_or_the_start(seed):
    problem = wide_columns(seed)
    even = problem.mask / problem.mask.sum(1, keepdim=True)
    allowed = largest_load(problem, even) * (1 + 64 / 2**24)
    best = solve(problem, 1e-5)
    hurried = solve(problem, 1e-5, max_iterations=1)
    assert bool((hurried.max_load <= allowed).all())
    assert bool((hurried.max_load > best.max_load * (1 + 64 / 2**24)).any())
    start = best.shares.double()
    started = Problem(problem.weights, problem.fixed, problem.mask, start)
    again = solve(started, 1e-5, max_iterations=1)
    assert bool((again.max_load <= best.max_load * (1 + 64 / 2**24)).all())


def test_the_even_split_is_taken_if_it_is_better(monkeypatch):
    def pile_up(graph, x, load, part):
        x = torch.stack((x.sum(2), torch.zeros_like(x[:, :, 0])), 2)
        return x, load

    record_stages(monkeypatch, sweep=pile_up)
    solution = solve(one_column(4.0, [0, 1, 0]), max_iterations=1)
    assert solution.max_load.tolist() == [3] and solution.shares[0, :, 0].tolist() == [0.5, 0.5, 0]


def test_a_start_is_divided_by_its_sums():
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    start = torch.tensor([[[3.0], [1.0]]]) / 8
    problem = Problem(torch.tensor([[4.0]]), torch.tensor([[1.0, 3.0]]), mask, start)
    solution = solve(problem)
    assert float(solution.max_load[0]) == 4
    assert torch.equal(as_plan(start, mask, start), solution.shares)


def test_masks_that_differ():
    problems = [draw_problem("pairs", seed) for seed in range(3)]
    masks = torch.cat([p.mask.expand(5, -1, -1) for p in problems])
    weights, fixed = (torch.cat([getattr(p, n) for p in problems]) for n in ("weights", "fixed"))
    mixed = torch.randperm(15)
    solution = solve(Problem(weights[mixed], fixed[mixed], masks[mixed]))
    alone = [solve(problem) for problem in problems]
    for name in ("shares", "max_load", "lower_bound", "iterations", "status"):
        expected = torch.cat([getattr(s, name) for s in alone])[mixed]
        torch.testing.assert_close(getattr(solution, name), expected, rtol=1e-6, atol=1e-6)


def test_an_instance_does_not_depend_on_its_batch():
    problem = draw_problem("few copies", seed=3, spread=1.5, batch=8)
    together = solve(problem)
    for i in range(8):
        alone = solve(Problem(problem.weights[i : i + 1], problem.fixed[i : i + 1], problem.mask))
        torch.testing.assert_close(alone.shares[0], together.shares[i], rtol=0, atol=1e-6)
        assert int(alone.iterations[0]) == int(together.iterations[i])


def test_any_unit_of_load():
    problem = draw_problem("few copies", seed=1)
    expected = solve(problem)
    for unit in (2.0**-40, 2.0**60):
        scaled = Problem(problem.weights * unit, problem.fixed * unit, problem.mask)
        solution = solve(scaled)
        assert torch.equal(solution.shares, expected.shares)
        assert torch.equal(solution.lower_bound, expected.lower_bound * unit)


def test_invalid_instances(monkeypatch):
    # As on a GPU, where values aren't looked at when a problem is made.
    monkeypatch.setattr(Problem, "validate", lambda self: None)
    problem = draw_problem("few copies", seed=2, batch=6)
    weights, fixed = problem.weights.clone(), problem.fixed.clone()
    weights[2, 0], weights[3, 1], fixed[4, 2] = -1.0, torch.nan, torch.inf
    solution = solve(Problem(weights, fixed, problem.mask))
    expected = [Status.CERTIFIED] * 2 + [Status.INVALID] * 3 + [Status.CERTIFIED]
    assert solution.status.tolist() == expected
    assert solution.max_load[2:5].tolist() == solution.gap[2:5].tolist() == [torch.inf] * 3
    assert solution.lower_bound[2:5].tolist() == [0.0] * 3
    unheld = problem.mask.clone()
    unheld[:, :, 0] = False
    weights = problem.weights.clone()
    weights[:, 0] = torch.tensor([0.0, 1, 0, 1, 1, 0])
    solution = solve(Problem(weights, problem.fixed, unheld))
    assert (solution.status == Status.INVALID).tolist() == (weights[:, 0] > 0).tolist()


def test_a_batch_of_nothing():
    problem = draw_problem("pairs")
    none = Problem(problem.weights[:0], problem.fixed[:0], problem.mask)
    assert solve(none).shares.shape == (0, 16, 32)


def test_columns_without_tokens_are_split_evenly():
    problem = draw_problem("few copies", seed=4)
    solution = solve(problem)
    even = problem.mask / problem.mask.sum(1, keepdim=True)
    empty = (problem.weights == 0).unsqueeze(1).expand_as(solution.shares)
    off = (solution.shares - even).abs()[empty]
    assert float(off.max()) < 2**-23


def test_settings_of_torch_make_no_difference():
    problem = draw_problem("few copies", seed=6)
    expected = solve(problem)
    weights = problem.weights.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(Problem(weights, problem.fixed, problem.mask))
    assert torch.equal(solution.shares, expected.shares) and not solution.max_load.requires_grad
    with torch.inference_mode():
        assert torch.equal(solve(problem).shares, expected.shares)


def test_needs_no_triton():
    code = "import sys, lplb_triton.reference.levelling; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
