"""A price on tokens that leave their node: placements, their search, and the books it keeps."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lplb_triton import Placement, chain, place
from lplb_triton.bench.node_placements import sum_sources
from lplb_triton.placement.cut_search import CutSearch
from lplb_triton.placement.exact_search import ExactSearch
from lplb_triton.placement.near_plans import NearPlans
from lplb_triton.placement.nodes import MOVED_PER_EXCESS, DeviceTraffic, TrafficPrice
from lplb_triton.traces import trace as traces


def draw_history(nodes, experts=32, batches=12, affinity=0.0, seed=0):
    """Draw tokens ``[batches, nodes, experts]`` whose popularity differs between nodes."""
    rng = np.random.default_rng(seed)
    mean = 50 * rng.lognormal(0, 1, experts) * rng.lognormal(0, affinity, (nodes, experts))
    return torch.from_numpy(rng.poisson(mean * rng.lognormal(0, 0.2, (batches, 1, experts))))


def count_copies(placement):
    """Count copies by expert and rank."""
    copies = np.zeros((placement.n_logical, placement.ep_size), dtype=np.int64)
    np.add.at(copies, (placement.phy2log.numpy(), placement.rank_of_slot.numpy()), 1)
    return copies


def find_lacking(placement, history, size):
    """Part of the tokens whose node has no copy of their expert, batches weighed equally."""
    part = history.double() / history.sum((1, 2), keepdim=True)
    held = count_copies(placement).reshape(placement.n_logical, -1, size).any(2)
    by_node = part.reshape(len(part), held.shape[1], -1, part.shape[2]).sum(2)
    return float((by_node.mean(0).T * torch.from_numpy(~held)).sum())


def make_traffic(history, price, size):
    part = history.double() / history.sum((1, 2), keepdim=True)
    return TrafficPrice(part.mean(0).T.contiguous().numpy(), price, size)


def node_of_copies(placement, size):
    return count_copies(placement).reshape(placement.n_logical, -1, size).any(2)


@settings(max_examples=30)
@given(data=st.data())
def test_sizes_repeats_and_homes(data):
    """Every size has a placement, without repeats where a rank lacks an expert, homes in order."""
    size, nodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    ranks = size * nodes
    n_local, redundant = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    load = data.draw(
        st.lists(
            st.sampled_from([0.0, 1.0, 3.0, 1e30]),
            min_size=ranks * n_local * nodes,
            max_size=ranks * n_local * nodes,
        )
    )
    history = torch.tensor(load).reshape(1, nodes, ranks * n_local)
    home = data.draw(st.booleans())
    found = chain(
        *(history, ranks),
        redundant_per_rank=redundant,
        keep_home=home,
        ranks_per_node=size,
        traffic_price=data.draw(st.sampled_from([0.0, 0.5, 10.0])),
    )
    assert (found.n_group, found.slots_per_rank) == (1, n_local + redundant)
    assert int(found.logcnt.min()) >= 1
    rows = found.phy2log.reshape(ranks, -1)
    for held in rows.tolist():
        everything = len(set(held)) == ranks * n_local
        assert len(set(held)) == len(held) or everything, "repeated though another was lacking"
    if home:
        assert rows[:, :n_local].reshape(-1).tolist() == list(range(ranks * n_local))


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("affinity", [0.0, 1.0])
def test_a_price_keeps_tokens_in_their_node(home, affinity):
    """Fewer tokens lack a copy in their node than without a price, and fewer at a higher one."""
    history = draw_history(4, 64, affinity=affinity)
    plain = chain(history.sum(1), 16, redundant_per_rank=2, keep_home=home)
    lacking = [find_lacking(plain, history, 4)]
    for price in (1.0, 100.0):
        found = chain(
            *(history, 16),
            redundant_per_rank=2,
            keep_home=home,
            ranks_per_node=4,
            traffic_price=price,
        )
        lacking.append(find_lacking(found, history, 4))
    assert lacking[1] < 0.9 * lacking[0]
    assert lacking[2] < lacking[1] + 0.005
    default = chain(history, 16, redundant_per_rank=2, keep_home=home, ranks_per_node=4)
    assert find_lacking(default, history, 4) == pytest.approx(lacking[1])


def test_experts_lie_where_their_tokens_are():
    """Experts that only one node uses lie in that node, and nowhere else."""
    nodes = torch.arange(32) * 7 % 4
    history = torch.zeros(1, 4, 32)
    history[0, nodes, torch.arange(32)] = 1.0 + torch.arange(32) % 3
    found = chain(history, 8, redundant_per_rank=1, ranks_per_node=2, traffic_price=5.0)
    held = node_of_copies(found, 2)
    assert held[np.arange(32), nodes.numpy()].all()
    assert find_lacking(found, history, 2) == 0


def test_sources_may_be_ranks_nodes_or_absent():
    """Sources of one node count together; without sources all nodes send alike; scale is free."""
    history = draw_history(8, affinity=1.0)
    options = {"redundant_per_rank": 1, "ranks_per_node": 4}
    by_node = history.reshape(12, 2, 4, 32).sum(2)
    scale = torch.logspace(-20, 200, 12, base=2.0, dtype=torch.float64)[:, None, None]
    first = chain(history, 8, **options)
    assert chain(by_node, 8, **options) == first
    assert chain(history * scale, 8, **options) == first
    alike = history.sum(1, keepdim=True).expand(-1, 2, -1)
    assert chain(history.sum(1), 8, **options) == chain(alike, 8, **options)
    nothing = torch.zeros(3, 8, 32)
    assert chain(nothing, 8, **options) == chain(torch.ones(32), 8, **options)


def test_one_node_is_no_node():
    """Where all ranks are one node, placements are those without nodes."""
    history = draw_history(1)
    for home in (False, True):
        plain = chain(history.sum(1), 8, keep_home=home)
        assert chain(history, 8, keep_home=home, ranks_per_node=8) == plain
    options = {"samples": 8, "trials": 20}
    plain = place(history.sum(1), 8, **options)
    assert place(history, 8, ranks_per_node=8, num_groups=4, **options) == plain


def test_no_price_makes_the_placement_without_nodes():
    """At a price of 0 placements are those without nodes, bit for bit; groups stay together."""
    history = draw_history(2, affinity=1.0)
    free = {"ranks_per_node": 4, "traffic_price": 0}
    for home in (False, True):
        plain = chain(history.sum(1), 8, keep_home=home)
        assert chain(history, 8, keep_home=home, **free) == plain
        assert chain(history.sum(1), 8, keep_home=home, **free) == plain
    options = {"samples": 8, "trials": 20}
    assert place(history, 8, **free, **options) == place(history.sum(1), 8, **options)
    assert chain(history, 8, num_groups=4, **free).n_group == 2


@pytest.mark.parametrize("price", [1e3, 1e6])
def test_groups_stay_in_one_node_at_any_price(price):
    """However much near tokens are worth, the search takes no copy out of its group's node."""
    history = draw_history(2, affinity=1.5)
    options = {"ranks_per_node": 4, "num_groups": 4, "redundant_per_rank": 2}
    found = place(history, 8, samples=8, trials=30, traffic_price=price, **options)
    held = node_of_copies(found, 4)
    node = held.argmax(1).reshape(4, 8)
    assert (held.sum(1) == 1).all() and (node == node[:, :1]).all()


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_groups_stay_in_one_node(home, search):
    """All copies of a group's experts lie in one node; the price puts groups near their tokens."""
    history = draw_history(2, affinity=1.0, seed=3)
    options = {"keep_home": home, "ranks_per_node": 4, "num_groups": 4}
    if search:
        found = place(history, 8, samples=16, trials=80, traffic_price=50.0, **options)
    else:
        found = chain(history, 8, traffic_price=50.0, **options)
    held = node_of_copies(found, 4)
    assert found.n_group == 2 and (held.sum(1) == 1).all()
    node = held.argmax(1).reshape(4, 8)
    assert (node == node[:, :1]).all()
    if not home:
        sent = history.double().sum(0).reshape(2, 4, 8).sum(2).numpy()
        best = max(
            sent[0, [a, b]].sum() + sent[1, [c for c in range(4) if c not in (a, b)]].sum()
            for a in range(4)
            for b in range(a)
        )
        assert sent[node[:, 0], np.arange(4)].sum() == best


@pytest.mark.parametrize("home", [False, True])
def test_search_lowers_load_and_traffic_together(home):
    """Optima and tokens that leave cost no more after a search, less with experts at home."""
    history = draw_history(4, affinity=0.5, batches=8)
    options = {"redundant_per_rank": 1, "keep_home": home, "ranks_per_node": 4}
    start = chain(history, 16, **options)
    found = place(history, 16, samples=16, trials=80, **options)
    assert found == place(history, 16, samples=16, trials=80, **options)
    costs = []
    for placement in (start, found):
        plans = NearPlans(placement, 4)
        parts = []
        for counts in history.numpy():
            least, _ = plans.balance(counts)
            parts.append(least * 16 / counts.sum() + plans.keep_near(counts, least * 1.01)[0])
        costs.append(np.mean(parts))
    assert costs[1] <= costs[0] + (-0.01 if home else 2e-3)


def test_price_of_copies_by_hand():
    """Tokens without a copy in their node and bound tokens above the mean load are priced."""
    # Expert 0 has a copy in each of two nodes of two ranks, the others have one copy.
    demand = np.array([[0.3, 0.1], [0.1, 0.1], [0.2, 0.0], [0.1, 0.1]])
    copies = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    traffic = TrafficPrice(demand, 2.0, 2)
    part = traffic.bind_tokens(copies, slice(None))
    assert part[0].tolist() == pytest.approx([0.75, 0, 0.25, 0])
    assert (part[1:] == copies[1:]).all()
    bound = 4 * demand.sum(1)[None] @ part
    # Rank 0 has 0.3 of expert 0 and 0.2 of expert 3: two mean rank loads.
    assert bound[0].tolist() == pytest.approx([2.0, 0.8, 0.4, 0.8])
    lacking = 0.1 + 0.2 + 0.1
    priced = traffic.price_copies(copies, bound)
    assert priced == pytest.approx(2.0 * (lacking + MOVED_PER_EXCESS * 0.25))
    # A free token, of an expert with copies elsewhere only, is bound to no rank.
    copies[1] = [1, 1, 0, 0]
    assert traffic.bind_tokens(copies, slice(None))[1].tolist() == [0.25, 0.25, 0, 0]


def test_books_of_the_search_by_cuts():
    """After a search the bound tokens are those of its placement."""
    history = draw_history(2, affinity=0.5)
    load = history.double().sum(1).numpy()
    load = (load / load.sum(1, keepdims=True) * 8).astype(np.float32)
    traffic = make_traffic(history, 1.0, 4)
    start = chain(history, 8, ranks_per_node=4)
    price, domain = np.zeros((32, 8), dtype=np.float32), np.zeros(8, dtype=np.int64)
    search = CutSearch(start, load, price, domain, np.random.default_rng(0), None, traffic)
    search.run(150)
    assert (search.expert != start.phy2log.numpy()).any()
    expected = load @ traffic.bind_tokens(search.copies, slice(None))
    np.testing.assert_allclose(search.bound, expected, atol=1e-5)


def test_traffic_on_a_device_is_the_same():
    """Prices on a device equal those on the host, and changes are priced by what they change."""
    history = draw_history(2, affinity=0.7, seed=5)
    traffic = make_traffic(history, 3.0, 4)
    load = history.double().sum(1)
    load = load / load.sum(1, keepdim=True) * 8
    start = chain(history, 8, redundant_per_rank=2, ranks_per_node=4)
    price, domain = torch.zeros(32, 8), torch.zeros(8, dtype=torch.int64)
    search = ExactSearch(
        *(start, load.float(), price, domain),
        torch.Generator().manual_seed(0),
        None,
        traffic,
    )
    on_device = DeviceTraffic(traffic, torch.device("cpu"))
    n_slots = start.n_physical
    swaps = torch.tensor([[0, 30], [3, 47], [17, 41]])
    gives = torch.tensor([[5, 1], [9, 40], [31, 44]])
    change = torch.cat([swaps[:, 0] * n_slots + swaps[:, 1], (n_slots + gives[:, 0]) * n_slots])
    change[3:] += gives[:, 1]
    copies = torch.cat([search.copies[None], search.apply_changes(change)])
    found = on_device.price_copies(copies, load).numpy()
    for one, value in zip(copies.numpy(), found, strict=True):
        bound = load.numpy() @ traffic.bind_tokens(one, slice(None))
        assert value == pytest.approx(traffic.price_copies(one, bound), rel=1e-5)
    nothing = np.zeros((0, 8))
    lacking = np.array([traffic.price_copies(one, nothing) for one in copies.numpy()])
    leave = on_device.price_leaving(search.copies, search.expert, search.rank)
    give = on_device.price_giving(search.copies, search.expert, search.rank)
    estimate = [float(leave[a, search.rank[b]] + leave[b, search.rank[a]]) for a, b in swaps]
    estimate += [float(give[expert, slot]) for expert, slot in gives]
    np.testing.assert_allclose(lacking[1:] - lacking[0], estimate, atol=1e-5)


def test_exact_search_lowers_the_price():
    """The search that solves exactly takes less traffic where the balance is perfect already."""
    history = draw_history(2, 16, affinity=1.0)
    traffic = make_traffic(history, 1.0, 4)
    load = history.double().sum(1)
    load = (load / load.sum(1, keepdim=True) * 8).float()
    start = chain(history.sum(1), 8, redundant_per_rank=2)
    search = ExactSearch(
        *(start, load, torch.zeros(16, 8), torch.zeros(8, dtype=torch.int64)),
        torch.Generator().manual_seed(0),
        None,
        traffic,
    )
    found, _ = search.run(3)
    assert find_lacking(found, history, 4) < find_lacking(start, history, 4)


def test_packaged_trace_across_nodes():
    """On unseen batches at most 0.62 of the tokens leave their node, at 1.03 times the mean."""
    counts = traces.packaged().counts[100:, 0].astype(np.int64)
    found = chain(torch.from_numpy(counts[:50]), 32, redundant_per_rank=2, ranks_per_node=8)
    plans = NearPlans(found, 8)
    loads, parts = [], []
    for batch in sum_sources(counts[50::20], 4):
        least, _ = plans.balance(batch)
        parts.append(plans.keep_near(batch, 1.01 * least)[0])
        loads.append(1.01 * least * 32 / batch.sum())
    assert np.mean(parts) <= 0.62
    assert np.mean(loads) <= 1.03


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "traffic_price needs ranks_per_node", {"traffic_price": 1.0}),
        (ValueError, "num_groups needs ranks_per_node", {"num_groups": 2}),
        (TypeError, "ranks_per_node must be", {"ranks_per_node": 2.0}),
        (ValueError, "ranks_per_node must divide the 4 ranks", {"ranks_per_node": 3}),
        (TypeError, "traffic_price must be", {"ranks_per_node": 2, "traffic_price": "high"}),
        (ValueError, "traffic_price must be in", {"ranks_per_node": 2, "traffic_price": -1.0}),
        (ValueError, "traffic_price must be in", {"ranks_per_node": 2, "traffic_price": 1e7}),
        (ValueError, "can't be combined", {"ranks_per_node": 2, "ranks_per_domain": 2}),
        (ValueError, "num_groups must divide", {"ranks_per_node": 2, "num_groups": 3}),
        (ValueError, "num_groups must divide", {"ranks_per_node": 2, "num_groups": 1}),
    ],
)
@pytest.mark.parametrize("make", [chain, place])
def test_wrong_arguments_are_named(make, error, message, options):
    """What doesn't fit is refused by its name."""
    with pytest.raises(error, match=message):
        make(torch.ones(8), 4, **options)


@pytest.mark.parametrize("name", ["ranks_per_node", "traffic_price", "num_groups"])
def test_traffic_has_no_price_in_time(name):
    """Placements by time refuse what is about nodes; a cost without them is what is refused."""
    with pytest.raises(ValueError, match=f"^{name} needs objective='tokens'"):
        place(torch.ones(8), 4, objective="time", **{name: 0})
    with pytest.raises(ValueError, match="^rows_per_rank needs objective='time'"):
        place(torch.ones(8), 4, rows_per_rank=8, **{name: 2})
    with pytest.raises(ValueError, match="^objective must be one of"):
        place(torch.ones(8), 4, objective="traffic", **{name: 2})


@pytest.mark.parametrize("make", [chain, place])
def test_wrong_sources_are_named(make):
    """Loads by source need nodes, as many sources for each."""
    name = "load" if make is chain else "history"
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        make(torch.ones(3, 2, 8), 4)
    with pytest.raises(ValueError, match=f"{name} must have a multiple of 2 sources"):
        make(torch.ones(3, 3, 8), 4, ranks_per_node=2)


def test_previous_must_keep_groups_together():
    """A previous placement whose groups are spread over nodes is refused, as with domains."""
    order = torch.tensor([0, 2, 1, 3, 0, 2, 4, 6, 5, 7, 4, 6])
    previous = Placement.from_phy2log(order, 4)
    spread = Placement.from_phy2log(torch.tensor([0, 2, 4, 3, 1, 2, 4, 6, 5, 7, 0, 6]), 4)
    with pytest.raises(ValueError, match="^num_groups is 2, but previous.phy2log spreads"):
        place(torch.ones(8), 4, previous=spread, ranks_per_node=2, num_groups=2)
    with pytest.raises(ValueError, match="num_groups"):
        place(
            *(torch.ones(8), 4),
            previous=Placement.from_phy2log(torch.tensor([0, 4, 1, 0, 5, 4, 2, 6, 3, 2, 7, 6]), 4),
            ranks_per_node=2,
            num_groups=2,
        )
    assert place(torch.ones(8), 4, previous=previous, ranks_per_node=2, num_groups=2, trials=5)
