"""Placements whose columns are pairs: which they are, their table, and the plans."""

import numpy as np
import pytest
import torch

from lplb_triton import Balancer, Placement
from lplb_triton._backends.tables import DeviceTables
from lplb_triton._layout import PAIR_EDGES, PAIR_FIELD, Extent
from lplb_triton.testing.instances import draw_loads, shape_placement
from lplb_triton.testing.verify import highs_optimum

SHAPES = ["ring:5", "cube", "hypercube", "torus:4x8", "torus:8x8"]


def two_copies(n_ranks, pairs, slots):
    """A placement of one expert per pair of ranks, and of single ones where slots are left."""
    held = [[] for _ in range(n_ranks)]
    for expert, ranks in enumerate(pairs):
        for rank in ranks:
            held[rank].append(expert)
    n = len(pairs)
    for experts in held:
        while len(experts) < slots:
            experts.append(n)
            n += 1
    return Placement.from_phy2log(np.concatenate(held), n_ranks, n_logical=n)


def words_of(placement):
    """[n_group, classes, ranks, 4] partner, expert, column and copy, and whether they count."""
    views = DeviceTables(placement, torch.device("cpu")).views
    words = views["pairs"].numpy()
    fields = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 4)
    return fields.astype(np.int64), views["extents"][:, Extent.IN_PAIRS].numpy()


def hold_against_highs(placement, counts, solution):
    problem, shares = placement.problem(counts.cpu()), solution.shares.cpu()
    loads = problem.fixed + (problem.weights.unsqueeze(1) * shares).sum(2)
    for group in range(placement.n_group):
        optimum = highs_optimum(
            problem.weights[group].numpy(),
            problem.fixed[group].numpy(),
            problem.mask[group].numpy(),
        )
        assert float(solution.lower_bound[group]) <= optimum * (1 + 1e-6)
        assert optimum <= float(loads[group].max()) * (1 + 1e-6)
        assert float(loads[group].max()) <= optimum * (1 + 1.001e-3)
    assert torch.allclose(loads.max(1).values, solution.max_load.cpu().double(), rtol=1e-6)
    held = problem.mask.any(1)
    assert (shares.double().sum(1)[held] == 1).all()
    assert (shares[~problem.mask] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_words(shape):
    """The table of pairs names each rank's partner, expert and copy, each copy once."""
    placement = shape_placement(shape, np.random.default_rng(1))
    s = placement.structure
    fields, in_pairs = words_of(placement)
    assert (in_pairs == 1).all() and fields.shape[1] > 0
    expert_of_copy = np.repeat(np.arange(placement.n_logical), np.diff(s.copy_start))
    for group, classes in enumerate(fields):
        seen = []
        for row in classes:
            for rank, (partner, expert, nothing, copy) in enumerate(row):
                assert row[partner][0] == rank and nothing == PAIR_FIELD
                if partner == rank:
                    assert expert == copy == PAIR_FIELD
                    continue
                column = s.column_of[expert]
                assert s.mask[group, :, column].nonzero()[0].tolist() == sorted((rank, partner))
                assert expert_of_copy[copy] == expert
                holder = s.copy_slot[copy] // placement.slots_per_rank
                assert holder == group * placement.group_size + rank
                seen.append((column, rank))
        assert sorted(seen) == sorted((c, r) for r, c in zip(*s.mask[group].nonzero(), strict=True))


@pytest.mark.parametrize(
    "placement",
    [
        # Three copies; two experts in a column; both copies on a rank too; too many classes.
        Placement.from_phy2log([0, 1, 0, 2, 0, 3], 3),
        two_copies(4, [(0, 1), (0, 1), (2, 3)], 3),
        Placement.from_phy2log([0, 0, 0, 1, 2, 3], 2),
        two_copies(2 + PAIR_EDGES, [(0, r) for r in range(1, 2 + PAIR_EDGES)], 9),
        two_copies(33, [(0, r) for r in range(1, 6)], 5),
        # More ranks than two warps have lanes.
        two_copies(66, [(r, r + 1) for r in range(0, 66, 2)], 2),
        # Nothing to level.
        Placement(np.array([0, 0, 1, 1]), 2, max_columns=0),
    ],
    ids=["three", "column", "rank", "classes", "two parts", "ranks", "none"],
)
def test_what_is_not_of_that_kind(placement):
    """A placement whose columns are not a few pairs has no table of pairs."""
    fields, in_pairs = words_of(placement)
    assert fields.shape[1] == 0 and (in_pairs == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_plans(shape):
    """Plans in pairs need no iteration and reach HiGHS's optimum within the tolerance."""
    rng = np.random.default_rng(3)
    placement = shape_placement(shape, rng)
    balancer = Balancer(placement, device="cpu", backend="triton")
    for family in ("normal", "lognormal", "sparse"):
        counts = draw_loads(family, rng, placement.n_logical)
        solution = balancer.solve(counts)
        solution.check()
        assert solution.iterations.tolist() == [0] * placement.n_group
        hold_against_highs(placement, counts, solution)


def test_groups_of_three_ranks_with_edges_that_few_of_them_have():
    """Groups of chains are solved, and an expert without tokens is split evenly."""
    # Chains, so that no class has all ranks; an expert without tokens is split evenly.
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5)]
    placement = two_copies(6, pairs, 3)
    placement = Placement(placement.phy2log, 6, n_logical=placement.n_logical, n_group=2)
    counts = torch.arange(placement.n_logical) * 17 % 40
    counts[0] = 0
    solution = Balancer(placement, device="cpu", backend="triton").solve(counts)
    solution.check()
    hold_against_highs(placement, counts, solution)
    column = int(placement.structure.column_of[0])
    assert solution.shares[0, :2, column].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_graph_sees_a_placement_of_another_kind(device):
    """The kernel that was compiled for pairs takes any placement of the sizes."""
    rng = np.random.default_rng(4)
    first = two_copies(8, [(r, (r + 1) % 8) for r in range(8)], 5)
    sizes = {"n_logical": first.n_logical, "max_columns": first.max_columns}
    crowded = np.concatenate([np.arange(32), [0, 0, 0, 0, 0, 1, 1, 2]])
    while True:
        flat = rng.permutation(crowded)
        if len(set(flat[:5])) == 5 and Placement(flat, 8, **sizes).structure.mask.sum(1).max() > 3:
            break
    star = two_copies(8, [(0, 1), (0, 2), (0, 3), (0, 4), (5, 6), (6, 7), (5, 7), (1, 2)], 5)
    placements = [first, Placement(flat, 8, **sizes), star, first]
    balancer = Balancer(first, device=device, backend="triton")
    classes = balancer._tables.views["pairs"].shape[1]
    counts = draw_loads("lognormal", rng, first.n_logical).to(device)
    solution = balancer.solve(counts)
    graph = None
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            solution = balancer.solve(counts)
    kinds = []
    for placement in placements:
        balancer.update_placement(placement)
        if graph is None:
            solution = balancer.solve(counts)
        else:
            graph.replay()
        solution.check()
        hold_against_highs(placement, counts, solution)
        kinds.append(int(balancer._tables.views["extents"][0, Extent.IN_PAIRS]))
        assert balancer._tables.views["pairs"].shape[1] == classes == 2
    assert kinds == [1, 0, 0, 1]


def test_ranks_that_stay_apart():
    """Where nothing joins two halves, the bound exceeds the mean load of all ranks."""
    # Two halves that nothing joins: the bound is that of the fuller one, not the mean.
    apart = two_copies(8, [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4)], 5)
    counts = torch.full((apart.n_logical,), 100)
    holders = apart.phy2log.reshape(8, 5)
    counts[torch.unique(holders[:4])] = 300
    solution = Balancer(apart, device="cpu", backend="triton").solve(counts)
    solution.check()
    hold_against_highs(apart, counts, solution)
    assert float(solution.lower_bound[0]) > 1.4 * float(counts.sum()) / 8
