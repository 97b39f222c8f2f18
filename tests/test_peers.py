"""The peers: each against its own method in float64, and against HiGHS."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplb_triton.bench import peers
from lplb_triton.testing.instances import draw_loads, shape_placement
from lplb_triton.testing.verify import highs_optimum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def programs(shape, families, seed=0):
    rng = np.random.default_rng(seed)
    placement = shape_placement(shape, rng)
    counts = torch.stack([draw_loads(f, rng, placement.n_logical) for f in families])
    problem = placement.problem(counts)
    return problem.mask[0], problem.weights, problem.fixed


def on_device(*tables):
    return [table.float().contiguous().to(DEVICE) for table in tables]


def rank_loads(mask, weights, fixed, shares):
    """Loads [B, G] when the first copies take ``shares`` [B, C]."""
    first, second = peers.find_copy_ranks(mask)
    used = first >= 0
    moved = (weights * shares.double().cpu())[:, used]
    loads = fixed.clone()
    loads.index_add_(1, first[used], moved)
    loads.index_add_(1, second[used], weights[:, used] - moved)
    return loads


def affine_scaling(weights, fixed, first, second, steps, big_m, step_factor=0.999):
    """Primal affine scaling in float64, by the book; returns A, b and x."""
    columns, ranks = len(weights), len(fixed)
    unit = max(weights.max(), fixed.max())
    a = np.zeros((ranks + columns, 2 * columns + ranks + 2))
    for e, (one, other) in enumerate(zip(first, second, strict=True)):
        a[one, e] = a[other, columns + e] = weights[e] / unit
        a[ranks + e, [e, columns + e]] = 1
    a[np.arange(ranks), 2 * columns + np.arange(ranks)] = 1
    a[:ranks, -2] = -1
    b = np.concatenate([-fixed / unit, np.ones(columns)])
    a[:, -1] = b - a.sum(1)
    cost = np.zeros(a.shape[1])
    cost[-2:] = 1, big_m
    x = np.ones(a.shape[1])
    for _ in range(steps):
        scaled = a * x
        y = np.linalg.solve(scaled @ scaled.T, scaled @ (x * cost))
        d = x * cost - scaled.T @ y
        x = x * (1 - step_factor * d / d.max())
    return a, b, x


@pytest.mark.parametrize(
    ("shape", "families", "steps"),
    [
        ("ring:5", ("normal", "lognormal", "zipf", "one hot expert", "sparse"), 5),
        ("cube", ("normal", "dirichlet"), 2),
        ("cube", ("normal", "dirichlet"), 5),
    ],
)
def test_affine_scaling_takes_the_steps_of_float64(shape, families, steps):
    """Affine scaling takes the steps of the same method in float64."""
    mask, weights, fixed = programs(shape, families)
    first, second = (ends.numpy() for ends in peers.find_copy_ranks(mask))
    x = peers.AffineScaling(mask, DEVICE, steps=steps).solve(*on_device(weights, fixed)).cpu()
    for row in range(len(families)):
        a, b, expected = affine_scaling(
            weights[row].numpy(), fixed[row].numpy(), first, second, steps, peers.BIG_M
        )
        np.testing.assert_allclose(x[row], expected, rtol=1e-3, atol=1e-4)
        # Steps keep A x = b; the artificial variable takes up what is missing.
        np.testing.assert_allclose(a @ x[row].double().numpy(), b, atol=1e-3)


def test_affine_scaling_ends_where_float64_does():
    """Affine scaling ends at the load of the float64 method, near HiGHS's optimum."""
    mask, weights, fixed = programs("ring:5", ("normal", "lognormal", "zipf"), seed=3)
    first, second = (ends.numpy() for ends in peers.find_copy_ranks(mask))
    x = peers.AffineScaling(mask, DEVICE).solve(*on_device(weights, fixed)).cpu()
    columns = weights.shape[1]
    largest = rank_loads(mask, weights, fixed, x[:, :columns]).amax(1)
    for row in range(len(weights)):
        w, f = weights[row].numpy(), fixed[row].numpy()
        _, _, expected = affine_scaling(w, f, first, second, 5, peers.BIG_M)
        shares = torch.from_numpy(expected[None, :columns])
        theirs = rank_loads(mask, weights[[row]], fixed[[row]], shares).max()
        assert float(largest[row]) == pytest.approx(float(theirs), rel=1e-4)
        # Five steps come near the optimum on such easy loads.
        assert float(largest[row]) == pytest.approx(highs_optimum(w, f, mask.numpy()), rel=0.05)


def test_affine_scaling_of_other_blocks_and_of_padding():
    """Affine scaling reaches the same optimum with other blocks and with padding."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    weights, fixed = torch.tensor([[4.0, 8.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    found = [
        peers.AffineScaling(mask, DEVICE, block=block).solve(*on_device(weights, fixed)).cpu()
        for block in (4, 8)
    ]
    for x in found:
        loads = rank_loads(mask, weights.double(), fixed.double(), x[:, :3])
        # The optimum is 6: rank 0 takes 4 + 8 - 4 - 3 of the weights.
        assert float(loads.max()) == pytest.approx(6.0, rel=2e-3)
        assert float(x[0, 2] + x[0, 5]) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_affine_scaling_without_tokens_and_without_instances():
    """Affine scaling stays finite without tokens and takes no instances at all."""
    mask, weights, fixed = programs("ring:5", ("empty",))
    peer = peers.AffineScaling(mask, DEVICE, steps=1)
    assert peer.solve(*on_device(weights, fixed)).isfinite().all()
    assert peer.solve(*on_device(weights[:0], fixed[:0])).shape == (0, peer.n_vars)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda e: e[0] != e[1]), min_size=1
    )
)
def test_colors_are_proper(edges):
    """No rank has two edges of one colour, and colours are fewer than twice the degree."""
    first, second = (torch.tensor(ends) for ends in zip(*edges, strict=True))
    colors = peers.color_edges(first, second)
    assert (colors >= 0).all()
    seen = [
        (vertex, color)
        for edge, color in zip(edges, colors.tolist(), strict=True)
        for vertex in edge
    ]
    assert len(set(seen)) == len(seen)
    degree = max(np.bincount(np.array(edges).ravel()))
    assert degree <= colors.max() + 1 <= 2 * degree - 1


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(5, 9)), min_size=1))
def test_colors_of_bipartite_graphs_are_the_fewest(edges):
    """A bipartite graph gets as many colours as its largest degree."""
    first, second = (torch.tensor(ends) for ends in zip(*edges, strict=True))
    degree = max(np.bincount(np.array(edges).ravel()))
    assert int(peers.color_edges(first, second).max()) + 1 == degree


@pytest.mark.parametrize(("shape", "colors"), [("ring:8", 2), ("cube", 4), ("torus:4x8", 4)])
def test_colors_of_topologies(shape, colors):
    """A ring of 8 gets two colours; the cube and the torus of 4 x 8 get four."""
    mask, _, _ = programs(shape, ("normal",))
    assert peers.EdgeBalancing(mask, "cpu").n_colors == colors


def edge_balancing(weights, fixed, first, second, colors, sweeps):
    """Coloured edge balancing in float64, edge by edge."""
    on_first = weights / 2
    loads = fixed.copy()
    np.add.at(loads, first, on_first)
    np.add.at(loads, second, weights - on_first)
    for _ in range(sweeps):
        for color in range(colors.max() + 1):
            for e in np.flatnonzero(colors == color):
                wanted = (loads[second[e]] - loads[first[e]]) / 2
                moved = min(max(wanted, -on_first[e]), weights[e] - on_first[e])
                on_first[e] += moved
                loads[first[e]] += moved
                loads[second[e]] -= moved
    return on_first


@pytest.mark.parametrize("shape", ["ring:5", "ring:8", "cube", "torus:3x4"])
def test_edge_balancing_is_that_of_float64(shape):
    """Edge balancing moves the same tokens as the method in float64."""
    mask, weights, fixed = programs(shape, ("normal", "one hot expert", "sparse"))
    first, second = peers.find_copy_ranks(mask)
    colors = peers.color_edges(first, second).numpy()
    peer = peers.EdgeBalancing(mask, DEVICE)
    sweeps = torch.tensor([0, 1, 6], dtype=torch.int32, device=DEVICE)
    shares = peer.solve(*on_device(weights, fixed), sweeps).cpu()
    for row, n in enumerate(sweeps.tolist()):
        w = weights[row].numpy()
        expected = edge_balancing(w, fixed[row].numpy(), first.numpy(), second.numpy(), colors, n)
        found = shares[row].double().numpy() * w
        np.testing.assert_allclose(found, expected, atol=1e-5 * w.max())


def test_edge_balancing_descends_to_the_optimum():
    """Sweeps never raise the largest load, and they end at HiGHS's optimum."""
    mask, weights, fixed = programs("ring:8", ("normal", "lognormal", "zipf", "sparse"), seed=1)
    peer = peers.EdgeBalancing(mask, DEVICE)
    loads = on_device(weights, fixed)
    largest = []
    for n in (0, 1, 2, 4, 8, 16, 64):
        shares = peer.solve(*loads, torch.full((4,), n, dtype=torch.int32, device=DEVICE)).cpu()
        assert ((shares >= 0) & (shares <= 1)).all()
        of_ranks = rank_loads(mask, weights, fixed, shares)
        torch.testing.assert_close(of_ranks.sum(1), weights.sum(1) + fixed.sum(1))
        largest.append(of_ranks.amax(1))
    for before, after in zip(largest[:-1], largest[1:], strict=True):
        assert (after <= before * (1 + 1e-5)).all()
    for row in range(4):
        optimum = highs_optimum(weights[row].numpy(), fixed[row].numpy(), mask.numpy())
        assert float(largest[-1][row]) == pytest.approx(optimum, rel=1e-3)


def test_padding_has_no_ranks():
    """A column without ranks has no ends and no colour, and the others are solved."""
    mask = torch.tensor([[1, 0], [1, 0], [0, 0]], dtype=torch.bool)
    first, second = peers.find_copy_ranks(mask)
    assert (first.tolist(), second.tolist()) == ([0, -1], [1, -1])
    assert peers.color_edges(first, second).tolist() == [0, -1]
    peer = peers.EdgeBalancing(mask, DEVICE)
    sweeps = torch.ones(1, dtype=torch.int32, device=DEVICE)
    loads = on_device(torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 3.0, 0.0]]))
    assert float(peer.solve(*loads, sweeps)[0, 0]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, f, s: (w.double(), f, s), "weights"),
        (lambda w, f, s: (w, f[:, :-1], s), "fixed"),
        (lambda w, f, s: (w, f, s.long()), "sweeps"),
        (lambda w, f, s: (w, f, s[:0]), "sweeps"),
    ],
)
def test_wrong_loads_are_named(change, message):
    """Loads and sweeps of a wrong dtype or shape are refused by name."""
    mask, weights, fixed = programs("ring:5", ("normal",))
    sweeps = torch.ones(1, dtype=torch.int32, device=DEVICE)
    arguments = change(*on_device(weights, fixed), sweeps)
    with pytest.raises(ValueError, match=message):
        peers.EdgeBalancing(mask, DEVICE).solve(*arguments)


def test_only_two_copies():
    """The peers refuse columns of three copies, and affine scaling too many ranks."""
    three = torch.ones(3, 1, dtype=torch.bool)
    for make in (peers.AffineScaling, peers.EdgeBalancing):
        with pytest.raises(ValueError, match="two copies, column 0 has 3"):
            make(three, DEVICE)
    with pytest.raises(ValueError, match="mask must be bool"):
        peers.find_copy_ranks(three.int())
    large, _, _ = programs("torus:8x8", ("normal",))
    with pytest.raises(ValueError, match="192 ranks and columns"):
        peers.AffineScaling(large, DEVICE)
