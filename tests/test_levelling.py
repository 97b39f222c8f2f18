"""Levelling along edges: the table of edges, and plans that need no more than that."""

import itertools

import numpy as np
import pytest
import torch
from helpers.layout import fields_of

from lplb_triton import Balancer, Placement, _steps, solve, topologies
from lplb_triton._backends.edges import MAX_COPIES_ALL_JOINED
from lplb_triton._backends.tables import DeviceTables
from lplb_triton._layout import COPIES_AT_ONCE, RANK_CELLS, SHARE_ONE, Extent
from lplb_triton.kernels.solve import levelling
from lplb_triton.kernels.solve.group_tables import Extents
from lplb_triton.testing.instances import corpus, draw_loads, shape_placement
from lplb_triton.testing.verify import highs_optimum, solve_counts

PLACEMENTS = [instance.placement for instance in corpus(17, seed=3)]


def tables_of(placement):
    views = DeviceTables(placement, torch.device("cpu")).views
    return {name: view.numpy() for name, view in views.items()}


def edges_of(placement):
    """Lists of (first rank, second rank, column) by group and class."""
    views = tables_of(placement)
    tables = (views[name] for name in ("edges", "extents", "cell_number"))
    groups = []
    for classes, extents, number in zip(*tables, strict=True):
        number = number.T
        # The kernel asks for the class after the last, too.
        n = extents[Extent.N_CLASSES]
        assert n < len(classes) and (classes[n:] == -1).all()
        ranks, columns = np.nonzero(number >= 0)
        column_of = dict(zip(number[ranks, columns].tolist(), columns.tolist(), strict=True))
        rank_of = dict(zip(number[ranks, columns].tolist(), ranks.tolist(), strict=True))
        groups.append([])
        for row in classes[:n]:
            words = fields_of(row[row != -1]).tolist()
            for second, first, *cells in words:
                assert [second, first] == [rank_of[cell] for cell in cells]
                assert len({column_of[cell] for cell in cells}) == 1
            groups[-1].append([(b, a, column_of[cell]) for a, b, cell, _ in words])
    return groups


@pytest.mark.parametrize("placement", PLACEMENTS, ids=repr)
def test_edges(placement):
    """Edges join all copies of a column, in classes that name no rank twice."""
    for mask, classes in zip(placement.structure.mask, edges_of(placement), strict=True):
        joined = {column: [] for column in range(mask.shape[1])}
        for edges in classes:
            ranks = [rank for edge in edges for rank in edge[:2]]
            assert edges and len(set(ranks)) == len(ranks)
            for first, second, column in edges:
                joined[column].append((first, second))
        for column, pairs in joined.items():
            ranks = np.flatnonzero(mask[:, column]).tolist()
            assert {rank for pair in pairs for rank in pair} == set(ranks)
            if len(ranks) <= MAX_COPIES_ALL_JOINED:
                assert sorted(pairs) == list(itertools.combinations(ranks, 2))
                continue
            reached = {ranks[0]}
            for _ in ranks:
                reached |= {r for pair in pairs if reached & set(pair) for r in pair}
            assert reached == set(ranks)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=repr)
def test_cells(placement):
    """Cells are numbered by column, then by rank, and every table lists them so."""
    views = tables_of(placement)
    for group, mask in enumerate(placement.structure.mask):
        number, extents = views["cell_number"][group].T, views["extents"][group]
        assert ((number >= 0) == mask).all()
        assert sorted(number[mask]) == list(range(mask.sum()))
        assert extents[Extent.N_CELLS] == mask.sum()
        ranks, columns, first, copies = views["cells"][group][:, : mask.sum()]
        assert (number[ranks, columns] == np.arange(mask.sum())).all()
        assert (copies == mask.sum(0)[columns]).all()
        assert (first == views["cell_start"][group][columns]).all()
        assert (np.diff(columns) >= 0).all() and extents[Extent.MOST_COPIES] == mask.sum(0).max()
        for rank, cells in enumerate(views["rank_cells"][group].T):
            mine = mask[rank].sum()
            assert (cells[:mine] == number[rank][mask[rank]]).all() and (cells[mine:] == -1).all()
        assert extents[Extent.MOST_CELLS] == mask.sum(1).max()
        for column, ranks in enumerate(views["first_ranks"][group].T):
            early = np.flatnonzero(mask[:, column])[:COPIES_AT_ONCE]
            assert ranks.tolist() == [*early, *[-1] * (COPIES_AT_ONCE - early.size)]
    assert views["rank_cells"].shape[1] % RANK_CELLS == 0


def test_tables_have_the_kernels_block_sizes():
    """Kernels read the tables in the block sizes and in the order that these are made with."""
    assert levelling.RANK_CELLS.value == RANK_CELLS
    assert levelling.COPIES_AT_ONCE.value == COPIES_AT_ONCE
    names = [extent.name.lower() for extent in Extent]
    assert names == [*Extents._fields, "in_pairs"]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=repr)
def test_ends_of_cells(placement):
    """The ends of a cell are its last copy and the one before its first copy."""
    views, s = tables_of(placement), placement.structure
    holder = s.copy_slot // placement.slots_per_rank
    for group, ends in enumerate(views["cell_ends"]):
        ranks, columns, _, _ = views["cells"][group]
        n_cells = int(views["extents"][group, Extent.N_CELLS])
        assert (ends[:, n_cells:] == -1).all()
        for cell in range(n_cells):
            expert = s.column_members[s.column_start[group, columns[cell]]]
            copies = range(s.copy_start[expert], s.copy_start[expert + 1])
            rank = group * placement.group_size + ranks[cell]
            here = [copy for copy in copies if holder[copy] == rank]
            before = [copy for copy in copies if holder[copy] < rank]
            assert ends[:, cell].tolist() == [here[-1], max(before, default=-1)]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=repr)
def test_the_first_plan_splits_evenly_over_ranks(placement):
    """The first plan splits every column evenly over the ranks that hold it."""
    counts = torch.arange(1, placement.n_logical + 1, dtype=torch.float64)
    views = tables_of(placement)
    experts, parts = (views[name] for name in ("rank_experts", "rank_parts"))
    loads = (np.where(experts >= 0, counts.numpy()[experts], 0.0) * parts).sum(2)
    problem = placement.problem(counts)
    even = problem.mask / problem.mask.sum(1, keepdim=True).clamp(min=1)
    want = problem.fixed + (problem.weights.unsqueeze(1) * even).sum(2)
    assert loads == pytest.approx(want.numpy(), rel=1e-6)
    fixed = np.where(parts == 1, counts.numpy()[experts], 0.0).sum(2)
    assert fixed == pytest.approx(problem.fixed.numpy())


def test_more_cells_than_an_edge_can_number():
    """A placement with more than 65536 cells is refused."""
    # An expert for each of 83 neighbours of each of 400 ranks.
    neighbour = (np.arange(400)[:, None] + np.arange(1, 84)) % 400
    experts = np.arange(400 * 83).reshape(400, 83)
    second = experts.reshape(-1)[np.argsort(neighbour.reshape(-1), kind="stable")].reshape(400, 83)
    placement = Placement.from_phy2log(np.concatenate([experts, second], axis=1).reshape(-1), 400)
    with pytest.raises(ValueError, match="at most 65536 pairs of a column and its rank"):
        DeviceTables(placement, torch.device("cpu"))


@pytest.mark.parametrize(
    "placement",
    [
        # Copies on one rank only: no column, no cell.
        Placement(np.array([0, 0, 1, 1]), 2, max_columns=0),
        # Fewer cells than there is room for, ranks and columns that are no powers of two.
        Placement.from_phy2log([0, 1, 2, 0, 1, 0, 3, 4, 0], 3),
        Placement.from_topology(topologies.ring(3), 3 * 4, 3 * 3, 3),
    ],
    ids=repr,
)
def test_nothing_depends_on_what_memory_held(monkeypatch, placement):
    """A solution does not depend on the contents of uninitialized memory."""
    counts = torch.arange(3, 3 + placement.n_logical, dtype=torch.int32)
    fresh = torch.empty
    found = []
    # As float32: 0, the least number above it, nearly the largest, and none.
    for word in (0, 1, 0x7F7F7F7F, -1):

        def filled(*args, word=word, **kwargs):
            block = fresh(*args, **kwargs)
            block.view(torch.int32).fill_(word)
            return block

        monkeypatch.setattr(torch, "empty", filled)
        solution = Balancer(placement, device="cpu", backend="triton").solve(counts)
        monkeypatch.setattr(torch, "empty", fresh)
        solution.check()
        found.append(solution)
    for solution in found[1:]:
        assert torch.equal(solution.shares, found[0].shares)
        assert torch.equal(solution.max_load, found[0].max_load)


@pytest.mark.parametrize("lost", [0, -1])
@pytest.mark.parametrize(
    "placement",
    [
        # Pairs, and an expert with three copies.
        Placement.from_phy2log([0, 1, 2, 0, 1, 3, 4, 5], 4),
        shape_placement("ring:5", np.random.default_rng(0)),
        Placement.from_phy2log([0, 1, 2, 0, 1, 3, 0, 4], 4),
    ],
    ids=repr,
)
def test_counts_of_a_failed_exchange_are_invalid_at_once(monkeypatch, placement, lost):
    """A negative count makes every group invalid without a step of the solver."""
    counts = torch.full((placement.n_logical,), 5, dtype=torch.int32)
    counts[lost] = -1
    balancer = Balancer(placement, device="cpu", backend="triton")
    # On a CPU `Balancer.solve` refuses what the kernel of a run may meet.
    monkeypatch.setattr(_steps, "counts_to_int32", lambda name, counts, on_host: counts)
    solution = balancer.solve(counts)
    assert solution.status.tolist() == [2] and solution.iterations.tolist() == [0]
    assert int(balancer.certified) == 0 and int(balancer.solves) == 1
    with pytest.raises(RuntimeError, match="^counts, or their sums over the ranks, were outside"):
        balancer.check()
    balancer.check()
    held = placement.problem(counts.clamp(min=1)).mask[0]
    even = held / held.sum(0).clamp(min=1)
    assert torch.allclose(solution.shares[0].double(), even.double())
    assert (solution.shares[0][held & (held.sum(0) == 2)] == 0.5).all()


@pytest.mark.parametrize(
    "placement",
    [
        # Columns of seven experts each.
        Placement.from_topology(topologies.ring(4), 4 * 14, 4 * 7, 4),
        # An expert with a copy on each of eleven ranks, two of them twice on a rank.
        Placement.from_phy2log([0, 1, 2, 3, 0, 0, 4, 1, 2, *[0, 5, 6] * 9], 12, n_logical=7),
    ],
    ids=repr,
)
def test_columns_of_many_experts_and_of_many_copies(placement):
    """Columns of many experts or copies reach HiGHS's optimum within the tolerance."""
    rng = np.random.default_rng(0)
    balancer = Balancer(placement, device="cpu", backend="triton")
    for family in ("normal", "zipf"):
        counts = draw_loads(family, rng, placement.n_logical)
        solution = balancer.solve(counts)
        solution.check()
        problem = placement.problem(counts)
        loads = problem.fixed + (problem.weights.unsqueeze(1) * solution.shares).sum(2)
        assert float(loads.max()) == pytest.approx(float(solution.max_load[0]), rel=1e-6)
        held = problem.mask.any(1)
        assert (solution.shares.double().sum(1)[held] == 1).all()
        assert (solution.shares[~problem.mask] == 0).all()
        optimum = highs_optimum(
            problem.weights[0].numpy(), problem.fixed[0].numpy(), problem.mask[0].numpy()
        )
        assert float(loads.max()) <= optimum * (1 + 1.1e-3)
        cumulative = balancer.cumulative_shares(solution.shares)
        assert int(cumulative.max()) == SHARE_ONE


def test_the_table_has_room_for_any_placement_of_its_sizes():
    """Tables made for one placement take any other of its sizes."""
    rng = np.random.default_rng(0)
    tables = None
    for _ in range(30):
        extra = rng.integers(24, size=24) if rng.random() < 0.5 else rng.integers(2, size=24)
        flat = rng.permutation(np.concatenate([np.arange(24), extra]))
        placement = Placement.from_phy2log(flat, 12, n_logical=24)
        if tables is None:
            tables = DeviceTables(placement, torch.device("cpu"))
        tables.write(placement)
        assert int(tables.views["extents"][0, Extent.N_CLASSES]) > 0


@pytest.mark.parametrize("shape", ["ring:8", "cube", "eplb:24:1", "chain:16:1"])
def test_most_plans_need_no_iteration(shape):
    """Levelling alone certifies these plans, with bounds that enclose HiGHS's optimum."""
    rng = np.random.default_rng(5)
    placement = shape_placement(shape, rng)
    balancer = Balancer(placement, device="cpu", backend="triton")
    iterations = []
    for family in ("lognormal", "zipf", "sparse"):
        counts = draw_loads(family, rng, placement.n_logical)
        solution = balancer.solve(counts)
        solution.check()
        problem = placement.problem(counts)
        optimum = highs_optimum(
            problem.weights[0].numpy(), problem.fixed[0].numpy(), problem.mask[0].numpy()
        )
        assert float(solution.lower_bound[0]) <= optimum * (1 + 1e-6)
        assert optimum <= float(solution.max_load[0]) * (1 + 1e-6)
        iterations.append(int(solution.iterations[0]))
    assert iterations == [0, 0, 0]


@pytest.mark.parametrize(
    ("device", "shape"),
    [
        ("cpu", "cube"),
        ("cpu", "eplb:64:2"),
        pytest.param("cuda", "cube", marks=pytest.mark.gpu),
        pytest.param("cuda", "torus:4x8", marks=pytest.mark.gpu),
        pytest.param("cuda", "eplb:64:2", marks=pytest.mark.gpu),
    ],
)
def test_steps_go_on_where_levelling_ends(device, shape):
    """Steps by potentials, without sweeps, reach the load that levelling reaches."""
    rng = np.random.default_rng(2)
    placement = shape_placement(shape, rng)
    counts = draw_loads("normal", rng, placement.n_logical).to(device)
    balancer = Balancer(placement, device=device, backend="triton", tolerance=1e-4)
    level = balancer.solve(counts)
    balancer._tables.views["extents"][:, Extent.MOST_SWEEPS] = 0
    stepped = balancer.solve(counts)
    for solution in (level, stepped):
        solution.check()
    assert int(level.iterations[0]) == 0 < int(stepped.iterations[0])
    assert float(level.max_load[0]) == pytest.approx(float(stepped.max_load[0]), rel=2e-4)


@pytest.mark.parametrize(
    ("device", "shape"),
    [
        # More cells of a rank, or copies of a column, than are taken at once.
        ("cpu", "eplb:16:12"),
        ("cpu", "random:16:9"),
        *(
            pytest.param("cuda", shape, marks=pytest.mark.gpu)
            for shape in ("eplb:16:12", "eplb:32:8", "eplb:64:4", "eplb:64:8", "eplb:96:1")
        ),
    ],
)
def test_bounds_where_there_is_much_of_everything(device, shape):
    """Bounds hold where cells and copies exceed what kernels take at once."""
    rng = np.random.default_rng(7)
    placement = shape_placement(shape, rng)
    for steps in (False, True):
        balancer = Balancer(placement, device=device, backend="triton")
        if steps:
            balancer._tables.views["extents"][:, Extent.MOST_SWEEPS] = 0
        for family in ("normal", "lognormal", "sparse"):
            counts = draw_loads(family, rng, placement.n_logical)
            solution = balancer.solve(counts.to(device))
            problem = placement.problem(counts)
            held = (p[0].numpy() for p in (problem.weights, problem.fixed, problem.mask))
            optimum = highs_optimum(*held)
            assert float(solution.lower_bound[0]) <= optimum * (1 + 1e-6)
            loads = problem.fixed + (problem.weights.unsqueeze(1) * solution.shares.cpu()).sum(2)
            assert float(loads.max()) == pytest.approx(float(solution.max_load[0]), rel=1e-6)
            assert optimum * (1 - 1e-6) <= float(loads.max()) <= optimum * (1 + 1.1e-3)


def test_several_groups_have_edges_of_their_own():
    """Each of two groups has edges of its own and needs no iteration."""
    placement = Placement.from_topology(topologies.ring(4), 2 * 12, 2 * 8, 8)
    assert placement.n_group == 2
    balancer = Balancer(placement, device="cpu", backend="triton")
    rng = np.random.default_rng(1)
    solution = balancer.solve(draw_loads("lognormal", rng, placement.n_logical))
    solution.check()
    assert len(edges_of(placement)) == 2 and solution.iterations.tolist() == [0, 0]


def test_batches_from_counts_agree_with_their_programs():
    """A batch of counts has the largest loads of its programs within the tolerance."""
    rng = np.random.default_rng(3)
    placement = shape_placement("ring:8", rng)
    counts = torch.stack([draw_loads(f, rng, placement.n_logical) for f in ("normal", "zipf")])
    solution = solve_counts(placement, counts, "cpu", 1e-4)
    solution.check()
    exact = solve(placement.problem(counts), tolerance=1e-6)
    assert solution.shares.shape == exact.shares.shape
    assert solution.max_load.tolist() == pytest.approx(exact.max_load.tolist(), rel=1.1e-4)
