"""Instances, reference solves and checks for tests of levelling."""

import numpy as np
import torch

from lplb_triton import Placement, Problem, Status
from lplb_triton.reference import levelling
from lplb_triton.testing.instances import shape_placement
from lplb_triton.testing.verify import highs_optimum

DOUBLE = torch.float64


STEPS = 16


# Relative error of HiGHS.
SLACK = 1e-7


def hold(ranks, sets):
    """Mask [1, ranks, len(sets)] of columns that lie on these sets of ranks."""
    mask = np.zeros((1, ranks, len(sets)), dtype=np.bool_)
    for column, held in enumerate(sets):
        mask[0, list(held), column] = True
    return mask


def draw_sets(rng, ranks, n, fewest, most):
    """Draw n sets of ``fewest`` to ``most`` ranks out of a list of ranks."""
    sizes = rng.integers(fewest, most + 1, n)
    return [rng.choice(ranks, size, replace=False) for size in sizes]


def draw_mask(shape, rng):
    """Mask [1, G, C] of a named shape."""
    if shape == "pairs":
        return hold(16, draw_sets(rng, 16, 32, 2, 2))
    if shape == "path":
        return hold(33, [(i, i + 1) for i in range(32)])
    if shape == "few copies":
        return hold(16, draw_sets(rng, 16, 24, 1, 4))
    if shape == "2 to 60 copies":
        return hold(64, draw_sets(rng, 64, 40, 2, 60))
    if shape == "5 to 60 copies":
        return hold(61, draw_sets(rng, 61, 6, 5, 60))
    if shape == "disconnected":
        # The last rank holds nothing.
        parts = draw_sets(rng, np.arange(7), 9, 2, 3), draw_sets(rng, np.arange(7, 18), 12, 2, 6)
        return hold(19, sum(parts, []))
    if shape == "one column":
        return hold(5, [(0, 2, 4)])
    if shape == "one copy each":
        return hold(4, [(0,), (1,), (1,), (3,)])
    if shape == "one rank":
        return hold(1, [(0,), (0,)])
    assert shape == "no columns"
    return hold(6, [])


SHAPES = (
    "pairs",
    "path",
    "few copies",
    "2 to 60 copies",
    "5 to 60 copies",
    "disconnected",
    "one column",
    "one copy each",
    "one rank",
    "no columns",
)


def draw_problem(shape, seed=0, spread=1.0, batch=5):
    """Random loads on a shape; the first instance has no tokens, the second no fixed load."""
    rng = np.random.default_rng(seed)
    mask = draw_mask(shape, rng)
    _, ranks, columns = mask.shape
    weights = 1000 * mask.sum(1) * rng.lognormal(0, spread, (batch, columns))
    weights *= rng.random(weights.shape) < 0.9
    fixed = 1000 * rng.lognormal(0, 0.3, (batch, ranks))
    weights[0], fixed[:2] = 0, 0
    return Problem(*map(torch.from_numpy, (weights, fixed, mask)))


def solve(problem, tolerance=1e-3, max_iterations=STEPS, dtype=DOUBLE):
    return levelling.solve(problem, tolerance, max_iterations, dtype)


def check_sound(problem, solution):
    """Every plan is feasible, its load true, and HiGHS's optimum between bound and load."""
    mask = problem.mask.expand(problem.n_instances, -1, -1)
    shares, weights = solution.shares.double(), problem.weights.double()
    assert bool((shares >= 0).all()) and bool((shares[~mask] == 0).all())
    assert torch.equal(shares.sum(1), mask.any(1).double())
    peak = (problem.fixed.double() + (weights.unsqueeze(1) * shares).sum(2)).amax(1)
    torch.testing.assert_close(solution.max_load, peak, rtol=1e-12, atol=0)
    for i in range(problem.n_instances):
        loads = (t[i].double().numpy() for t in (weights, problem.fixed))
        optimum = highs_optimum(*loads, mask[i].numpy())
        assert float(solution.lower_bound[i]) <= optimum * (1 + SLACK)
        assert optimum <= float(solution.max_load[i]) * (1 + SLACK)
    gap = (peak - solution.lower_bound) / peak.clamp(min=1e-300)
    torch.testing.assert_close(solution.gap, torch.where(peak > 0, gap, 0.0), rtol=0, atol=1e-12)
    certified = solution.status == Status.CERTIFIED
    assert torch.equal(certified, solution.gap <= solution.tolerance)


def jitter_batches(ep, seed):
    """History and batches of a lognormal popularity that changes from batch to batch."""
    rng = np.random.default_rng(seed)
    popularity = rng.lognormal(0, 0.8, 128)
    drift = popularity * rng.lognormal(0, rng.choice([0.2, 0.3, 0.5]), (16, 128))
    counts = [rng.multinomial(262144, row / row.sum()) for row in drift]
    return torch.from_numpy(popularity), torch.from_numpy(np.array(counts, dtype=np.int32))


def record_stages(monkeypatch, **changed):
    """Put a letter for each call of a stage into a list; some stages are changed.

    Sweeps are s or, relaxed, S; looks for a bound are c; steps are p or, with a search, P.
    """
    calls = []
    letters = {
        "sweep": lambda args: {0.5: "s", 0.75: "S"}[args[-1]],
        "cut_bound": lambda args: "c",
        "step": lambda args: "P" if args[-1] else "p",
    }
    for name, letter in letters.items():
        stage = changed.get(name, getattr(levelling, name))

        def recorded(*args, letter=letter, stage=stage):
            calls.append(letter(args))
            return stage(*args)

        monkeypatch.setattr(levelling, name, recorded)
    return calls


def find_no_bound(graph, load, *others):
    return torch.zeros_like(load[:, 0])


def one_column(weight, *fixed):
    """Problem of a column on the first two ranks, with fixed loads by instance."""
    fixed = torch.tensor(fixed, dtype=DOUBLE)
    weights = torch.full((len(fixed), 1), weight, dtype=DOUBLE)
    return Problem(weights, fixed, torch.from_numpy(hold(fixed.shape[1], [(0, 1)])))


def wide_columns(seed):
    """Loads of 64 ranks with eight columns of 5 to 60 copies each."""
    rng = np.random.default_rng(seed)
    mask = hold(64, draw_sets(rng, 64, 8, 5, 60))
    weights = 1000 * rng.lognormal(0, 1.5, (64, 8)) * mask.sum(1)
    fixed = 1000 * rng.lognormal(0, 0.6, (64, 64))
    return Problem(*map(torch.from_numpy, (weights, fixed, mask)))


def largest_load(problem, plan):
    return (problem.fixed + (problem.weights.unsqueeze(1) * plan).sum(2)).amax(1)


def stage(shape, seed=0, batch=5):
    """Graph of a shape with tokens, fixed loads and a random plan: graph, x, load, w, fixed."""
    rng = np.random.default_rng(seed)
    graph = levelling.build_graph(torch.from_numpy(draw_mask(shape, rng))[0])
    w = torch.from_numpy(rng.lognormal(0, 1, (batch, len(graph.columns))))
    fixed = torch.from_numpy(rng.lognormal(0, 0.3, (batch, graph.n_ranks)))
    parts = torch.from_numpy(rng.lognormal(0, 2, (batch, *graph.real.shape)))
    parts *= torch.from_numpy(rng.random(parts.shape) < 0.7) * graph.real
    parts[:, :, 0] += 1e-3
    x = parts * (w / parts.sum(2)).unsqueeze(2)
    return graph, x, fixed + graph.sum_by_rank(x), w, fixed


def random_cells(graph, seed, batch=3):
    """Some cells of each instance, none of the padding."""
    drawn = np.random.default_rng(seed).random((batch, *graph.real.shape)) < 0.5
    return torch.from_numpy(drawn) & graph.real


def check_plan(graph, x, load, w, fixed):
    """The plan is one, and its loads are these."""
    assert bool((x >= -1e-15).all()) and bool((x[:, ~graph.real] == 0).all())
    torch.testing.assert_close(x.sum(2), w, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fixed + graph.sum_by_rank(x), load, rtol=1e-12, atol=1e-12)


def nearest_in_simplex(y, total):
    """Nearest point with no negative entry and this sum, by sorting."""
    if len(y) == 0 or total == 0:
        return np.zeros_like(y)
    falling = np.sort(y)[::-1]
    lam = (falling.cumsum() - total) / np.arange(1, len(y) + 1)
    return np.maximum(y - lam[np.flatnonzero(falling > lam)[-1]], 0)


def fill_up(sets, ranks, slots):
    """Placement of experts on these sets of ranks, and of others that fill up the slots."""
    rows = [[] for _ in range(ranks)]
    for expert, held in enumerate(sets):
        for rank in held:
            rows[rank].append(expert)
    n = len(sets)
    for row in rows:
        missing = slots - len(row)
        row += range(n, n + missing)
        n += missing
    return Placement.from_phy2log([expert for row in rows for expert in row], ranks)


def placement_of(name, rng):
    if name == "three or four copies":
        return fill_up(draw_sets(rng, 16, 20, 3, 4), 16, 12)
    if name == "disconnected":
        left, right = draw_sets(rng, 8, 8, 3, 4), draw_sets(rng, np.arange(8, 16), 8, 3, 5)
        return fill_up(left + right, 16, 12)
    if name == "12 copies":
        wide = [np.arange(12), np.arange(4, 16)]
        return fill_up(wide + draw_sets(rng, 16, 12, 2, 5), 16, 12)
    return shape_placement(name, rng)
