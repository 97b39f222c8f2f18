"""A balancer with ``locality="node"``: ids, traffic, settings, copies, files, ranks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers.balancers import DEVICE
from helpers.near_plans import Case, draw_counts
from helpers.peers import Member, Ranks

from lplb_triton import Balancer, Placement, TimeCost, chain, reference
from lplb_triton._backends.layer import create_layer
from lplb_triton._consensus import LayerPlacement
from lplb_triton._locality import Locality
from lplb_triton.bench.measure.timer import copy_to_cpu
from lplb_triton.reference import near_tables

BACKENDS = ["triton"] if DEVICE == "cuda" else ["triton", "torch"]
RANKS, PER_NODE, EXPERTS = 4, 2, 16
STEPS = 4
NEAR, NONE = Locality(PER_NODE, 0.01), Locality(PER_NODE, None)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Make few steps, which is enough for these tests and takes less time."""
    monkeypatch.setattr(near_tables, "STEPS_OF_FEW", STEPS)


class Table:
    """A communicator whose other ranks have sent what a table says."""

    ranks_per_node = 1

    def __init__(self, gathered):
        self.gathered = gathered

    def exchange(self, counts, version, total, gathered=None):
        """Write all counts, which this rank's must be among."""
        assert (self.gathered == counts).all(1).any()
        total.copy_(self.gathered.sum(0, dtype=torch.int32))
        gathered.copy_(self.gathered)

    def prepare(self, n):
        """Return, since nothing is compiled."""


def make(placement, rank, backend, locality, communicator, solver="levelling"):
    """Make the balancer of one rank with exact quotas, and give it a communicator."""
    device = torch.empty(0, device=DEVICE).device
    layer = create_layer(
        placement, device, backend, rank=rank, quotas="global", solver=solver,
        tolerance=1e-3, max_iterations=40, locality=locality,
    )  # fmt: skip
    balancer = Balancer.__new__(Balancer)
    balancer._set_up(layer, backend, None, "auto", None)
    balancer.communicator = communicator
    balancer._backend.follow_communicator()
    return balancer


def draw_batch(seed):
    """Draw a placement, counts by rank [RANKS, EXPERTS], and every rank's ids."""
    rng = np.random.default_rng(seed)
    history = draw_counts(rng, RANKS, PER_NODE, EXPERTS, 3000)
    counts = draw_counts(rng, RANKS, PER_NODE, EXPERTS, 300)
    placement = chain(torch.from_numpy(history.sum(0)), RANKS, redundant_per_rank=2)
    ids = [rng.permutation(np.arange(EXPERTS).repeat(row)) for row in counts]
    idx = [torch.from_numpy(row.reshape(-1, 4)).to(DEVICE) for row in ids]
    return placement, torch.from_numpy(counts.astype(np.int32)).to(DEVICE), idx


def measure(placement, out):
    """Return rank loads, and how many ids of each rank leave their node."""
    holder = [placement.rank_of_slot[ids.flatten().long().cpu()].long() for ids in out]
    loads = torch.bincount(torch.cat(holder), minlength=RANKS)
    away = [int((h // PER_NODE != rank // PER_NODE).sum()) for rank, h in enumerate(holder)]
    return loads, away


def test_fewer_tokens_leave_their_node():
    """Ids map back, loads are within the limit, and ids leave their node as reported."""
    placement, counts, batch = draw_batch(1)
    sent = {}
    for locality in (NONE, NEAR):
        balancers = [
            make(placement, rank, BACKENDS[-1], locality, Table(counts)) for rank in range(RANKS)
        ]
        out = [balancer.run(idx) for balancer, idx in zip(balancers, batch, strict=True)]
        for ids, idx in zip(out, batch, strict=True):
            assert torch.equal(placement.phy2log.to(DEVICE)[ids].long(), idx)
        loads, away = measure(placement, out)
        for balancer, left, idx in zip(balancers, away, batch, strict=True):
            _, on_node, everything = balancer.traffic.tolist()
            assert (everything - on_node, everything) == (left, idx.numel())
        sent[locality] = sum(away)
    traffic = balancers[0].node_traffic
    n_cells = 2 * placement.redundant_per_group
    assert sent[NEAR] < sent[NONE]
    saved = float(traffic.before - traffic.after)
    assert abs(sent[NONE] - sent[NEAR] - saved) <= 2 * n_cells
    assert float(traffic.least) <= float(traffic.after) <= float(traffic.total)
    assert int(loads.max()) <= float(traffic.max_load) + placement.slots_per_rank
    assert float(traffic.max_load) <= float(traffic.limit) and int(traffic.choice) > 0
    for other in balancers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other.node_traffic, traffic, strict=True))
    metrics = balancers[0].metrics()
    assert metrics.imbalance_after == pytest.approx(float(traffic.max_load) / 300, rel=1e-5)
    assert metrics.gap == pytest.approx(1 - metrics.bound / metrics.imbalance_after, abs=1e-5)
    assert int(balancers[0].certified) == int(balancers[0].solves) == 1


def answer(balancer, placement, counts, idx):
    """Return what a rank has to answer, from the twin's plan on its own plan of tokens."""
    twin = Balancer(placement, device="cpu", backend="torch", rank=0)
    solution = balancer.solve(counts.sum(0))
    case = Case(placement, PER_NODE, counts.cpu().numpy().astype(np.int64))
    case.solution = copy_to_cpu(solution)
    case.cumulative = balancer.cumulative_shares(solution.shares).cpu().numpy().astype(np.int64)
    (plan,), shares = case.plan(NEAR.slack)
    views, counts = twin._tables.views, counts.cpu()
    start, slot = views["copy_start"], views["copy_slot"]
    holder = slot // placement.slots_per_rank
    quotas, _ = reference.divide_quotas(
        counts, torch.from_numpy(shares).int(), start, holder, PER_NODE
    )
    rank = balancer.rank
    mine = reference.shares_of_quotas(quotas[rank], counts[rank], start, rank)
    ids = reference.assign_copies(idx.cpu(), counts[rank], mine, start, slot, rank)
    return ids, torch.from_numpy(plan.numbers)


@pytest.mark.parametrize("solver", ["levelling", "interior_point"])
def test_kernels_answer_as_the_twin(solver):
    """For the plan of their own solver, kernels give the ids and numbers of the twin's plan."""
    placement, counts, batch = draw_batch(2)
    balancer = make(placement, 2, "triton", NEAR, Table(counts), solver)
    out = balancer.run(batch[2])
    ids, numbers = answer(balancer, placement, counts, batch[2])
    assert torch.equal(out.cpu(), ids)
    assert torch.equal(balancer._layer.node_traffic.cpu()[0], numbers)
    assert float(balancer.node_traffic.after) < float(balancer.node_traffic.before)
    load = float(balancer.node_traffic.max_load)
    assert balancer.metrics().imbalance_after == pytest.approx(load / 300, rel=1e-5)


def test_kernels_that_exchange_counts_answer_as_the_twin():
    """Where the solving kernel exchanges counts, plans are made of what it has gathered."""
    placement, counts, batch = draw_batch(2)
    ranks = Ranks(RANKS, EXPERTS, 20.0)
    balancer = make(placement, 1, "triton", NEAR, Member(ranks, 1, 20.0))
    balancer._layer.version = ranks.version
    if DEVICE == "cuda":
        balancer.warmup()
    for rank in range(RANKS):
        ranks.publish(rank, counts[rank].cpu(), 1)
    out = balancer.run(batch[1])
    balancer.check()
    ids, numbers = answer(balancer, placement, counts, batch[1])
    assert torch.equal(out.cpu(), ids)
    assert torch.equal(balancer._layer.node_traffic.cpu()[0], numbers)


@pytest.mark.skipif(DEVICE == "cuda", reason="compares both back ends on a CPU")
def test_the_last_node_may_have_fewer_ranks():
    """With nodes of three ranks and of one, both back ends give the same ids and traffic."""
    placement, counts, batch = draw_batch(1)
    for locality in (Locality(3, None), Locality(3, 0.01)):
        found = []
        for backend in ("torch", "triton"):
            balancer = make(placement, 3, backend, locality, Table(counts))
            out = balancer.run(batch[3])
            _, on_node, everything = balancer.traffic.tolist()
            holder = placement.rank_of_slot[out.flatten()]
            assert (on_node, everything) == (int((holder == 3).sum()), out.numel())
            found.append(out)
        assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_placement_is_planned_by_its_own_tables(backend):
    """After `update_placement` plans are those of a balancer that began with the placement."""
    first, counts, batch = draw_batch(3)
    second = Placement(first.phy2log.flip(0), RANKS, max_columns=first.max_columns)
    changed = make(first, 0, backend, NEAR, Table(counts))
    if backend == "torch":
        # The twin keeps tables of the placement that it has planned for.
        changed.run(batch[0])
    changed._membership.write_idle(LayerPlacement(second, (0,)))
    fresh = make(second, 0, backend, NEAR, Table(counts))
    assert torch.equal(changed.run(batch[0]), fresh.run(batch[0]))
    assert torch.equal(changed.node_traffic.after, fresh.node_traffic.after)


def test_copies_and_files_keep_the_locality():
    """Copies and loaded balancers have the same locality; older files have none."""
    placement, counts, _ = draw_batch(4)
    balancer = make(placement, 1, BACKENDS[-1], NEAR, None)
    assert balancer.locality == "node" and "ranks_per_node=2, locality=node, slack=0.01" in repr(
        balancer
    )
    for other in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert other._layer.locality == NEAR and other.node_traffic.total.shape == (1,)
    kind, state = balancer.__reduce__()[1]
    del state["settings"]["locality"]
    assert balancer.__reduce__()[0](kind, state).locality == "none"
    with pytest.raises(RuntimeError, match="near are made by run only"):
        balancer.share_slots(counts.sum(0))
    plain = make(placement, 0, BACKENDS[-1], NONE, Table(counts))
    with pytest.raises(RuntimeError, match="locality='node' only"):
        _ = plain.node_traffic


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"locality": "rank"}, "^locality must be"),
        ({"locality": "node"}, "^locality='node' needs quotas='global'"),
        ({"ranks_per_node": 2}, "^ranks_per_node needs quotas='global'"),
        ({"slack": 0.02}, "^slack needs locality='node'"),
        ({"locality": "node", "quotas": "global"}, "^locality='node' needs ranks_per_node"),
        (
            {"locality": "node", "quotas": "global", "ranks_per_node": 5},
            r"^ranks_per_node must be in \[1, 4\], got 5",
        ),
        (
            {"locality": "node", "quotas": "global", "ranks_per_node": 2, "slack": 1.5},
            r"^slack must be in \[0, 1\]",
        ),
        (
            {
                "locality": "node", "quotas": "global", "ranks_per_node": 2, "objective": "time",
                "cost": TimeCost.for_model(2048, 768),
            },
            "^locality='node' with objective='time' is not there yet",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(settings, match, monkeypatch):
    """What doesn't go together is refused, and the message names the argument."""
    # A group isn't needed to see that settings don't fit.
    monkeypatch.setattr("lplb_triton.balancer.check_combination", lambda *_: None)
    placement, _, _ = draw_batch(5)
    with pytest.raises(ValueError, match=match):
        Balancer(placement, device="cpu", backend="torch", **settings)
    live = placement.with_live_slots(1)
    with pytest.raises(ValueError, match="^locality='node' with live slots is not there yet"):
        Balancer(
            live, device="cpu", backend="torch", quotas="global", locality="node", ranks_per_node=2
        )


def test_pairs_of_tokens_and_nodes():
    """A token counts once for each other node with any of its experts; dropped ids don't count."""
    placement, counts, _ = draw_batch(9)
    balancer = make(placement, 1, BACKENDS[-1], NEAR, Table(counts))
    slots = placement.slots_per_rank
    near, far, further = 0, 2 * slots, 3 * slots + 1
    idx = [[near, far, further], [near, near, -1], [-1, far, far], [-1, -1, -1]]
    found = balancer.count_node_pairs(torch.tensor(idx, device=DEVICE))
    assert found.tolist() == [2] and found.dtype == torch.int64
    by_rank = make(placement, 1, BACKENDS[-1], Locality(1, None), Table(counts))
    # Of a rank's own tokens those to the other three ranks count.
    assert by_rank.count_node_pairs(torch.tensor(idx, device=DEVICE)).tolist() == [3 + 1 + 1]
    lonely = Balancer(placement, device=DEVICE, backend=BACKENDS[-1], rank=0)
    with pytest.raises(RuntimeError, match="need ranks_per_node, or a group"):
        lonely.count_node_pairs(torch.tensor(idx, device=DEVICE))
    with pytest.raises(ValueError, match="^physical_ids must be"):
        balancer.count_node_pairs(torch.tensor(3, device=DEVICE))
    for shape in ((0,), (0, 2), (3, 0)):
        nothing = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
        assert balancer.count_node_pairs(nothing).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_out_of_range_are_no_pairs(backend):
    """Where the host reads ids, those out of range are refused; on a GPU they count nowhere."""
    placement, counts, _ = draw_batch(9)
    balancer = make(placement, 1, backend, NEAR, Table(counts))
    far = 2 * placement.slots_per_rank
    for wrong in (placement.n_physical, 10**9, -2):
        ids = torch.tensor([[far, wrong]], device=DEVICE)
        if balancer._backend.checks_on_host:
            with pytest.raises(ValueError, match="^physical_ids must hold ids in"):
                balancer.count_node_pairs(ids)
        else:
            assert balancer.count_node_pairs(ids).tolist() == [1]


def test_locality_is_part_of_what_ranks_compare():
    """Ranks with another slack, or other nodes, differ in their kinds and in the version."""
    placement, _, _ = draw_batch(6)
    kinds, versions = set(), set()
    close = Locality(PER_NODE, 0.01 * (1 + 1e-9))
    for locality in (NONE, NEAR, close, Locality(PER_NODE, 0.02), Locality(1, 0.01)):
        member = make(placement, 0, BACKENDS[-1], locality, None)._membership
        member.write(LayerPlacement(placement, (0,)))
        kinds.add(member.kinds)
        versions.add(int(member.layer.version))
    assert len(kinds) == len(versions) == 5


@pytest.mark.gpu
def test_graph_replays_give_the_same_ids():
    """A graph captures the near plan, and replays for other ids and counts give what calls give."""
    placement, counts, batch = draw_batch(7)
    _, more, other = draw_batch(8)
    table, idx = Table(counts.clone()), batch[0].clone()
    balancer = make(placement, 0, "triton", NEAR, table)
    balancer.warmup()
    # Counts come from the table, so the check of this rank's own would wait for the device.
    table.exchange = lambda own, version, total, gathered=None: (
        total.copy_(table.gathered.sum(0, dtype=torch.int32)), gathered.copy_(table.gathered)
    )  # fmt: skip
    eager = []
    for ids, rows in ((batch[0], counts), (other[0], more)):
        table.gathered.copy_(rows)
        eager.append(balancer.run(ids[: len(idx)]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = balancer.run(idx)
    for ids, rows, expected in zip((batch[0], other[0]), (counts, more), eager, strict=True):
        table.gathered.copy_(rows)
        idx.copy_(ids[: len(idx)])
        for _ in range(2):
            graph.replay()
            assert torch.equal(out, expected)
