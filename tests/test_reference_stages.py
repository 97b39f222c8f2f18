"""The stages of levelling in the torch twin: graph, sweeps, bounds by cuts, steps by potentials.

Loads are in units of about the mean load of a rank.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.reference_masks import DOUBLE, SHAPES, SLACK, draw_mask, hold
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lplb_triton.reference import graph as graphs
from lplb_triton.reference import levelling, potentials
from lplb_triton.testing.verify import highs_optimum


def stage(shape, seed=0, batch=5):
    """Graph of a shape with tokens, fixed loads and a random plan: graph, x, load, w, fixed."""
    rng = np.random.default_rng(seed)
    graph = graphs.build_graph(torch.from_numpy(draw_mask(shape, rng))[0])
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


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_join_all_copies_in_classes_without_common_ranks(shape):
    """Edges connect the copies of each column, and a class names no rank twice."""
    mask = torch.from_numpy(draw_mask(shape, np.random.default_rng(0)))[0]
    graph = graphs.build_graph(mask)
    width = graph.rank.shape[1]
    joined = {row: [] for row in range(len(graph.columns))}
    for low, high, first, second in graph.classes:
        ends = torch.cat((first, second)).tolist()
        assert len(set(ends)) == len(ends)
        for cell, rank in ((low, first), (high, second)):
            assert torch.equal(graph.rank.flatten()[cell], rank)
            assert bool(graph.real.flatten()[cell].all())
        assert torch.equal(low // width, high // width)
        for a, b in zip(low.tolist(), high.tolist(), strict=True):
            joined[a // width].append((a % width, b % width))
    for row, pairs in joined.items():
        copies = int(graph.copies[row])
        assert copies == int(mask[:, graph.columns[row]].sum()) and len(set(pairs)) == len(pairs)
        if copies <= 4:
            assert len(pairs) == copies * (copies - 1) // 2
        ends = np.array(pairs).T
        found = coo_matrix((np.ones(len(pairs)), ends), shape=(copies, copies))
        assert connected_components(found)[0] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_laplacian_of_free_cells(shape):
    """The product with the Laplacian is that of the matrix of equation 20."""
    graph = stage(shape)[0]
    unit = torch.eye(graph.n_ranks, dtype=DOUBLE)
    for free in random_cells(graph, seed=1):
        expected = torch.zeros_like(unit)
        for row, on in zip(graph.rank, free, strict=True):
            ranks = row[on]
            block = torch.eye(len(ranks), dtype=DOUBLE) - 1 / max(1, len(ranks))
            expected[ranks.unsqueeze(1), ranks] += block
        found = potentials.apply_laplacian(graph, free.expand(len(unit), -1, -1), unit)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [0.5, 0.75])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sweep_never_raises_the_largest_load(shape, part):
    """A sweep keeps columns and raises neither the largest load nor the sum of squares."""
    graph, x, load, w, fixed = stage(shape)
    for _ in range(4):
        new_x, new_load = levelling.level_edges(graph, x, load, part)
        check_plan(graph, new_x, new_load, w, fixed)
        assert bool((new_load.amax(1) <= load.amax(1) * (1 + 1e-14)).all())
        assert bool(((new_load**2).sum(1) <= (load**2).sum(1) * (1 + 1e-14)).all())
        x, load = new_x, new_load


def test_an_edge_moves_its_part_or_what_there_is():
    """An edge moves its fraction of the difference, or all tokens that its cell has."""
    graph = graphs.build_graph(torch.ones(2, 1, dtype=torch.bool))
    x = torch.tensor([[[2.0, 2.0]], [[2.0, 2.0]], [[2.0, 2.0]]])
    fixed = torch.tensor([[0.0, 2.0], [0.0, 40.0], [40.0, 0.0]])
    level, load = levelling.level_edges(graph, x, fixed + 2, 0.5)
    assert level[:, 0].tolist() == [[3, 1], [4, 0], [0, 4]]
    assert load.tolist() == [[3, 3], [4, 40], [40, 4]]
    beyond, load = levelling.level_edges(graph, x, fixed + 2, 0.75)
    assert beyond[:, 0].tolist() == [[3.5, 0.5], [4, 0], [0, 4]]
    assert load.tolist() == [[3.5, 2.5], [4, 40], [40, 4]]


@pytest.mark.parametrize("shape", SHAPES)
def test_cuts_are_below_the_optimum_whatever_the_plan(shape):
    """The bound of cuts never exceeds the optimum that HiGHS finds."""
    graph, x, load, w, fixed = stage(shape)
    mask = torch.zeros(graph.n_ranks, len(graph.columns), dtype=torch.bool)
    row, nth = graph.real.nonzero(as_tuple=True)
    mask[graph.rank[row, nth], row] = True
    for aim in (0.3, 1e-2, 1e-3):
        bound = levelling.compute_cut_bound(graph, load, w, fixed, aim)
        for i in range(len(w)):
            optimum = highs_optimum(w[i].numpy(), fixed[i].numpy(), mask.numpy())
            assert float(bound[i]) <= optimum * (1 + SLACK)


def test_a_cut_finds_the_ranks_that_are_too_full():
    """The bound is that of the set of ranks whose tokens cannot leave it."""
    # Ranks 0 to 2 hold 12 tokens that can't leave them; rank 2 can pass on one that others hold.
    graph = graphs.build_graph(torch.from_numpy(hold(5, [(0, 1, 2), (2, 3), (3, 4)]))[0])
    w, fixed = torch.tensor([[6.0, 1.0, 1.0]]), torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0]])
    load = torch.tensor([[4.0, 4.0, 3.99, 1.01, 1.0]])
    assert levelling.compute_cut_bound(graph, load, w, fixed, 1e-2).tolist() == [4.0]


@pytest.mark.parametrize("depth", [0.4, 1.6, 6.4, 25.6])
def test_how_deep_cuts_are(depth):
    """The four cuts lie at their depths below the largest load."""
    graph = graphs.build_graph(torch.from_numpy(hold(3, [(0, 1)]))[0])
    w, fixed, aim = torch.tensor([[2.0]]), torch.zeros(1, 3), 1e-3
    for above, below, expected in ((0.9, 1.1, 1.0), (1.1, 1.3, 2 / 3), (0.7, 0.9, 2 / 3)):
        # Only a cut between ranks 1 and 2 finds the set of ranks 0 and 1.
        load = 1 - aim * depth * torch.tensor([[0.0, above, below]], dtype=DOUBLE)
        bound = levelling.compute_cut_bound(graph, load, w.double(), fixed.double(), aim)
        none = expected < 1 and depth == 25.6 and above > 1
        assert float(bound[0]) == pytest.approx(0.0 if none else expected)


def nearest_in_simplex(y, total):
    """Nearest point with no negative entry and this sum, by sorting."""
    if len(y) == 0 or total == 0:
        return np.zeros_like(y)
    falling = np.sort(y)[::-1]
    lam = (falling.cumsum() - total) / np.arange(1, len(y) + 1)
    return np.maximum(y - lam[np.flatnonzero(falling > lam)[-1]], 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_enough_rounds_project_on_the_nearest_point(shape):
    """With enough rounds the projection is the nearest plan, and five rounds give a plan."""
    graph, x, load, w, _ = stage(shape)
    y = x - graph.at_cells(load - load.mean(1, keepdim=True))
    # At least one of a column's cells may get tokens.
    on = random_cells(graph, seed=3, batch=len(w))
    on[:, :, 0] = True
    # A round takes out one cell at least, unless it was the last one.
    most = max([1, *graph.copies.tolist()])
    assert graph.rounds == min(most, 5)
    enough = replace(graph, rounds=most)
    found = potentials.project_on_simplices(enough, y, on, w)
    for i, column in np.ndindex(*w.shape):
        cells = on[i, column]
        expected = nearest_in_simplex(y[i, column][cells].numpy(), float(w[i, column]))
        np.testing.assert_allclose(found[i, column][cells], expected, rtol=1e-9, atol=1e-12)
        assert bool((found[i, column][~cells] == 0).all())
    # Five rounds give a plan, if not the nearest.
    rough = potentials.project_on_simplices(graph, y, on, w)
    assert bool((rough >= 0).all()) and bool((rough[~on] == 0).all())
    torch.testing.assert_close(rough.sum(2), w, rtol=1e-12, atol=1e-14)


def test_columns_with_no_cell_that_may_get_tokens_are_split_evenly():
    """A column is split evenly if none of its cells may get tokens."""
    graph, x, _, w, _ = stage("few copies")
    nothing = torch.zeros_like(x, dtype=torch.bool)
    assert torch.equal(potentials.project_on_simplices(graph, x, nothing, w), graph.split_evenly(w))


@pytest.mark.parametrize("shape", SHAPES)
def test_free_cells(shape):
    """Free cells are those of equation 20."""
    graph, x, load, w, _ = stage(shape, seed=4)
    w = w * (torch.arange(w.shape[1]) % 5 != 4)
    x = x * (w > 0).unsqueeze(2)
    # Some cells have just too little, some just enough.
    edge = torch.tensor([0.9e-6, 1.1e-6], dtype=DOUBLE).repeat(graph.real.shape[1] + 1)
    edge = edge[: graph.real.shape[1]] * w.unsqueeze(2)
    drawn = torch.rand(x.shape) < 0.3
    drawn[:, :, 0] = False
    x = torch.where(graph.real & drawn, edge, x)
    found = potentials.find_free_cells(graph, x, load, w)
    for i, column, nth in np.ndindex(*x.shape):
        ranks = graph.rank[column]
        has = x[i, column] > 1e-6 * w[i, column]
        expected = bool(graph.real[column, nth]) and float(w[i, column]) > 0
        if expected and not bool(has[nth]):
            expected = bool(load[i, ranks[nth]] < load[i, ranks[has]].mean())
        assert bool(found[i, column, nth]) == expected


@pytest.mark.parametrize("can_be_levelled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_potentials_leave_least_of_what_eight_products_can_reach(shape, can_be_levelled):
    """Potentials minimise the residual over the Krylov space of eight products."""
    graph, _, load, _, _ = stage(shape)
    free = random_cells(graph, seed=5, batch=len(load))
    if can_be_levelled:
        load = 3 + potentials.apply_laplacian(graph, free, load)
    found = potentials.find_potentials(graph, free, load)
    unit = torch.eye(graph.n_ranks, dtype=DOUBLE)
    for on, one, potential in zip(free, load, found, strict=True):
        matrix = potentials.apply_laplacian(graph, on.expand(len(unit), -1, -1), unit)
        uneven = one - one.mean()
        # Potentials are sums of the uneven loads and L times them, up to seven times.
        reach = [uneven / uneven.norm().clamp(min=1e-30)]
        while len(reach) < 9:
            new = matrix @ reach[-1]
            for _ in range(2):
                for old in reach:
                    new = new - (new @ old) * old
            if float(new.norm()) < 1e-3:
                break
            reach.append(new / new.norm())
        if len(reach) < 9 and not can_be_levelled:
            # Nothing is left to reach, and further steps have only round-off to go by.
            continue
        images = matrix @ torch.stack(reach[:8], 1)
        best = np.linalg.lstsq(images.numpy(), uneven.numpy(), rcond=1e-10)[0]
        left = uneven - images @ torch.from_numpy(best)
        torch.testing.assert_close(uneven - matrix @ potential, left, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_that_clips_nothing_moves_by_potentials(shape):
    """A step changes the loads by minus L times the potentials if no cell runs out of tokens."""
    graph, _, load, w, _ = stage(shape)
    # So many tokens that no cell runs out of them.
    w = w + 10_000
    x = graph.split_evenly(w)
    fixed = load - graph.sum_by_rank(x)
    new_x, new_load = potentials.step_by_potentials(graph, x, load, w, fixed, False)
    free = graph.real.expand_as(x)
    potential = potentials.find_potentials(graph, free, load)
    expected = load - potentials.apply_laplacian(graph, free, potential)
    torch.testing.assert_close(new_load, expected, rtol=1e-9, atol=1e-9)
    assert bool((new_x[:, graph.real] > 0).all())


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_keep_columns(shape, search):
    """A step keeps the sums of columns, and with a line search the sum of squares falls."""
    graph, x, load, w, fixed = stage(shape, seed=7)
    new_x, new_load = potentials.step_by_potentials(graph, x, load, w, fixed, search)
    check_plan(graph, new_x, new_load, w, fixed)
    if search:
        assert bool(((new_load**2).sum(1) <= (load**2).sum(1) * (1 + 1e-12)).all())


@pytest.mark.parametrize("scale", [-1.0, 0.5, 4.0])
def test_a_search_stops_where_the_sum_of_squares_is_least(monkeypatch, scale):
    """The line search stops where the sum of squared loads is least."""
    original = potentials.find_potentials
    monkeypatch.setattr(potentials, "find_potentials", lambda *args: scale * original(*args))
    graph, x, load, w, fixed = stage("few copies", seed=7)
    w = w + 10_000
    fixed, x = load - graph.sum_by_rank(graph.split_evenly(w)), graph.split_evenly(w)
    whole, whole_load = potentials.step_by_potentials(graph, x, load, w, fixed, False)
    found, found_load = potentials.step_by_potentials(graph, x, load, w, fixed, True)
    part = torch.linspace(0, 1, 4001, dtype=DOUBLE)
    squares = (torch.lerp(load, whole_load, part[:, None, None]) ** 2).sum(2)
    best = part[squares.argmin(0)]
    assert bool((best < 1).all()) == (scale != 0.5) and bool((best > 0).all()) == (scale > 0)
    expected = x + best[:, None, None] * (whole - x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float((whole - x).abs().max()))
    torch.testing.assert_close(fixed + graph.sum_by_rank(found), found_load, rtol=0, atol=1e-9)


def test_a_step_levels_what_its_cells_join():
    """A step levels only the ranks that free cells join."""
    # Column 1 has no tokens on rank 2, which is the fullest: ranks 0 and 1 are levelled alone.
    graph = graphs.build_graph(torch.from_numpy(hold(4, [(0, 1), (1, 2), (2, 3)]))[0])
    w, fixed = torch.tensor([[8.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 20.0, 7.0]])
    x = torch.tensor([[[6.0, 2.0], [2.0, 0.0], [0.0, 4.0]]])
    load = fixed + graph.sum_by_rank(x)
    state = (t.double() for t in (x, load, w, fixed))
    _, found = potentials.step_by_potentials(graph, *state, False)
    torch.testing.assert_close(found, torch.tensor([[5.5, 5.5, 20.0, 11.0]], dtype=DOUBLE))


def test_a_step_gives_tokens_to_ranks_that_have_none():
    """A step moves tokens to a rank below the mean that had none."""
    # Rank 1 is below rank 0, which has all tokens, and rank 2 is above it.
    graph = graphs.build_graph(torch.ones(3, 1, dtype=torch.bool))
    w, fixed = torch.tensor([[4.0]]), torch.tensor([[0.0, 1.0, 5.0]])
    x = torch.tensor([[[4.0, 0.0, 0.0]]])
    state = (t.double() for t in (x, fixed + x[0], w, fixed))
    _, load = potentials.step_by_potentials(graph, *state, False)
    torch.testing.assert_close(load, torch.tensor([[2.5, 2.5, 5.0]], dtype=DOUBLE))
