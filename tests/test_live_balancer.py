"""Live slots of a balancer: physical ids, the plan of the last batch, rules, copies and files."""

import copy
import io
import pickle

import pytest
import torch
from helpers.live import (
    DEVICE,
    check_ids,
    count_by_rank,
    draw_ids,
    make_placement,
    words_of,
)

from lplb_triton import Balancer, Placement, chain
from lplb_triton.live import LiveRules

BACKENDS = ["triton"] if DEVICE == "cuda" else ["triton", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def make(placement, backend="triton", **settings):
    """Make a balancer of one process, whose counts are all there are."""
    return Balancer(placement, device=DEVICE, backend=backend, **{"rank": 0, **settings})


def make_twin(placement, **settings):
    """Make the torch twin of `make`, on the CPU."""
    return Balancer(placement, device="cpu", backend="torch", **{"rank": 0, **settings})


def check_loads(balancer, out):
    """Ranks have no more tokens than the plan says; returns whether slots were filled."""
    p, plan = balancer.placement, balancer.live
    filled = bool((plan.experts >= 0).any())
    # Without live copies, each replicated expert of a rank may be rounded up.
    slack = 1 if filled else 1 + p.static_per_rank
    assert int(count_by_rank(p, out).max()) <= float(plan.max_load) + slack
    assert float(plan.lower_bound) <= float(plan.max_load)
    gap = 1 - float(plan.lower_bound) / max(float(plan.max_load), 1e-30)
    assert float(plan.gap) == pytest.approx(gap, abs=1e-6) or float(plan.max_load) == 0
    return filled


@pytest.mark.parametrize(
    ("ranks", "experts", "live"), [(4, 12, 1), (4, 12, 2), (8, 32, 1), (8, 32, 2), (40, 80, 1)]
)
def test_kernel_and_twin_without_copies(ranks, experts, live):
    """Without redundant slots, kernel and twin give the same plan and the same ids."""
    placement = make_placement(ranks, experts, live)
    kernel, twin = make(placement), make_twin(placement)
    for dtype in (torch.int64, torch.int32) if ranks < 40 else (torch.int64,):
        idx = draw_ids(placement, 2400, seed=ranks, dtype=dtype)
        idx[::7, 1] = -1
        out, expected = kernel.run(idx), twin.run(idx.cpu())
        assert torch.equal(out.cpu(), expected)
        ours, theirs = words_of(kernel.live), words_of(twin.live)
        assert torch.equal(ours[:-2], theirs[:-2])
        # The bound and the gap are in float32 in one and in float64 in the other.
        numbers = [words[-2:].view(torch.float32) for words in (ours, theirs)]
        torch.testing.assert_close(*numbers, rtol=1e-6, atol=1e-6)
        check_ids(kernel, idx, out)
        assert check_loads(kernel, out)


@backends
@pytest.mark.parametrize(("ranks", "redundant"), [(4, 1), (4, 2), (8, 1), (8, 2), (40, 2)])
def test_ids_and_loads_with_copies(ranks, redundant, backend):
    """With redundant slots, ids name copies of their experts, and loads are those of the plan."""
    placement = make_placement(ranks, 2 * ranks, 1 + redundant % 2, redundant)
    balancer = make(placement, backend)
    idx = draw_ids(placement, 2400, power=8.0, seed=redundant)
    out = balancer.run(idx)
    check_ids(balancer, idx, out)
    filled, most = check_loads(balancer, out), float(balancer.live.max_load)
    assert most <= 1.1 * 2400 / ranks
    # Static copies alone may do.
    assert filled or most <= 1.021 * 2400 / ranks


@backends
@pytest.mark.parametrize(
    "rules",
    [
        {"live_cost": 30},
        {"live_fanout": 1},
        {"live_domain": 4},
        {"live_above": 1.5},
        {"live_resident": True},
    ],
    ids=str,
)
def test_rules(rules, backend):
    """Under each rule, ids and loads are those of the plan, which keeps the rule."""
    placement = make_placement(8, 32, 2)
    balancer, free = make(placement, backend, **rules), make_twin(placement)
    before = torch.full((8, 2), -1, dtype=torch.int32)
    for seed in (0, 1):
        idx = draw_ids(placement, 2000, power=6.0, seed=seed)
        out = balancer.run(idx)
        check_ids(balancer, idx, out)
        assert check_loads(balancer, out)
        free.run(idx.cpu())
        plan = balancer.live
        experts, most = plan.experts.cpu(), float(plan.max_load)
        ranks = torch.arange(8)[:, None].expand(8, 2)
        filled = experts >= 0
        homes = experts[filled] // 4
        if "live_fanout" in rules:
            assert int(homes.bincount().max()) == 1
        if "live_domain" in rules:
            assert torch.equal(homes // 4, ranks[filled] // 4)
        if "live_cost" in rules:
            static = torch.bincount(idx.flatten().cpu() // 4, minlength=8).max()
            assert most + 30 * int(homes.bincount().max()) < int(static)
        if "live_resident" in rules:
            kept = before >= 0
            assert (filled | ~kept).all() and (seed == 0 or kept.any())
            before = experts
        else:
            assert most >= float(free.live.lower_bound)


@backends
def test_resident_experts_stay(backend):
    """With `live_resident`, a second run of a batch fetches nothing and gives the same loads."""
    placement = make_placement(8, 32, 1)
    balancer = make(placement, backend, live_resident=True)
    idx = draw_ids(placement, 2000, power=6.0)
    first = count_by_rank(placement, balancer.run(idx))
    experts = balancer.live.experts
    assert (experts >= 0).any()
    again = count_by_rank(placement, balancer.run(idx))
    assert torch.equal(balancer.live.experts, experts)
    assert int(again.max()) <= int(first.max()) + 1
    # A level batch needs nothing, and nothing is forgotten.
    level = torch.arange(32, device=DEVICE).repeat(20).reshape(-1, 4)
    out = balancer.run(level)
    assert torch.equal(balancer.live.experts, experts)
    assert (out.cpu() % placement.slots_per_rank < placement.static_per_rank).all()


@backends
@pytest.mark.parametrize("redundant", [0, 1])
def test_a_batch_that_needs_nothing(redundant, backend):
    """A level batch leaves all live slots empty, and its ids are those without live slots."""
    placement = make_placement(8, 32, 1, redundant)
    static = placement.with_live_slots(0)
    idx = torch.arange(32, device=DEVICE).repeat(30).reshape(-1, 4)
    if redundant:
        idx = torch.cat([idx, torch.full((1, 4), -1, device=DEVICE)])
    balancer, plain = make(placement, backend, live_above=1.2), make(static, backend)
    out, expected = balancer.run(idx), plain.run(idx)
    # Slots are numbered with the live ones between.
    expected = expected + expected.clamp(min=0) // static.slots_per_rank
    assert torch.equal(out, torch.where(idx < 0, -1, expected))
    plan = balancer.live
    assert (plan.experts == -1).all() and float(plan.max_load) <= 1.2 * 120
    assert float(plan.lower_bound) == 120.0
    check_ids(balancer, idx, out)


@backends
def test_an_uneven_batch_then_a_level_one(backend):
    """What one batch put into live slots is not used in the next."""
    placement = make_placement(8, 32, 2)
    balancer = make(placement, backend)
    idx, level = draw_ids(placement, 2000), torch.arange(32, device=DEVICE).repeat(20)
    for _ in range(2):
        balancer.run(idx)
        uneven = balancer.live
        assert (uneven.experts >= 0).any()
        out = balancer.run(level)
        check_ids(balancer, level, out)
        assert (balancer.live.experts == -1).all()
        assert (uneven.experts >= 0).any(), "a plan changed after the next call"


@backends
def test_empty_batches(backend):
    """Without tokens live slots are empty, and all numbers of the plan are zero."""
    placement = make_placement(4, 12, 1, redundant=1)
    balancer = make(placement, backend)
    for idx in (torch.empty(0, 4), torch.full((3, 4), -1.0)):
        idx = idx.long().to(DEVICE)
        assert torch.equal(balancer.run(idx), idx)
        assert (balancer.live.experts == -1).all()
        assert [float(number) for number in balancer.live[1:]] == [0.0, 0.0, 0.0]
    balancer.check()


@backends
def test_every_plan_has_tensors_of_its_own(backend):
    """`live` has the documented shapes and dtypes, and later calls leave it alone."""
    placement = make_placement(4, 12, 2)
    balancer = make(placement, backend)
    with pytest.raises(RuntimeError, match="^no batch has been planned yet: call run first"):
        _ = balancer.live
    plans, copies = [], []
    for seed in range(3):
        balancer.run(draw_ids(placement, 400, seed=seed))
        plans.append(balancer.live)
        copies.append([tensor.clone() for tensor in plans[-1]])
        assert torch.equal(words_of(balancer.live), words_of(plans[-1]))
    assert len({plan.experts.data_ptr() for plan in plans}) == 3
    for plan, kept in zip(plans, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plan, kept, strict=True))
        assert plan.experts.shape == (4, 2) and plan.experts.dtype == torch.int32
        for number in plan[1:]:
            assert number.shape == () and number.dtype == torch.float32
        assert all(tensor.device.type == balancer.device.type for tensor in plan)
    assert not torch.equal(words_of(plans[0]), words_of(plans[1]))


@backends
def test_other_ranks_round_differently_and_plan_the_same(backend):
    """Every rank makes the same plan, and its own rounding stays within a token of each copy."""
    placement = make_placement(4, 12, 1)
    idx = draw_ids(placement, 1200, power=5.0)
    plans = []
    for rank in (0, 3):
        balancer = make(placement, backend, rank=rank)
        out = balancer.run(idx)
        check_ids(balancer, idx, out)
        most = float(balancer.live.max_load)
        assert int(count_by_rank(placement, out).max()) <= most + placement.slots_per_rank
        plans.append(words_of(balancer.live))
    assert torch.equal(*plans)


@backends
def test_replicated_quotas(backend):
    """With `quotas='replicated'` all ranks pick what rank 0 picks alone."""
    placement = make_placement(4, 12, 1)
    idx = draw_ids(placement, 800)
    balancer = make(placement, backend, rank=None, quotas="replicated")
    assert torch.equal(balancer.run(idx), make(placement, backend).run(idx))


@backends
def test_an_expert_with_many_static_copies(backend):
    """Tokens of an expert with seven static copies are divided over them and its live ones."""
    slots = [[0, rank + 1] for rank in range(7)] + [[8, 9], [10, 11]]
    placement = Placement.from_phy2log(torch.tensor(slots).reshape(-1), 9).with_live_slots(2)
    counts = torch.tensor([700, 90, 80, 70, 60, 50, 40, 30, 1, 2, 3, 4])
    idx = torch.repeat_interleave(torch.arange(12), counts)[torch.randperm(1130)].to(DEVICE)
    balancer = make(placement, backend)
    out = balancer.run(idx)
    check_ids(balancer, idx, out)
    assert check_loads(balancer, out)
    used = out[idx == 0].unique()
    assert (used.cpu() % 4 >= 2).any() and len(used) > 7


def test_refilled_offers():
    """A rank that gives twelve experts away gives them to twelve ranks, as the twin does."""
    placement = Placement.from_phy2log(torch.arange(256), 16).with_live_slots(1)
    counts = torch.zeros(16, 16, dtype=torch.long)
    counts[0] = torch.arange(100, 116)
    counts[1:, 3] = torch.arange(15)
    idx = torch.repeat_interleave(torch.arange(256), counts.reshape(-1)).to(DEVICE)
    kernel, twin = make(placement), make_twin(placement)
    out = kernel.run(idx)
    assert torch.equal(out.cpu(), twin.run(idx.cpu()))
    assert torch.equal(words_of(kernel.live)[:-2], words_of(twin.live)[:-2])
    assert int((kernel.live.experts >= 0).sum()) >= 12


@backends
def test_an_update_of_the_placement(backend):
    """After an update, plans are for the new placement."""
    old, new = (make_placement(4, 12, 1, 1, seed) for seed in (0, 1))
    balancer = make(old, backend)
    idx = draw_ids(old, 800, power=6.0)
    balancer.run(idx)
    balancer.update_placement(new)
    out = balancer.run(idx)
    check_ids(balancer, idx, out)
    fresh = make(new, backend)
    assert torch.equal(fresh.run(idx), out)
    assert torch.equal(words_of(fresh.live), words_of(balancer.live))


def test_the_steps_of_a_run_know_static_slots_only():
    """`select` with shares of the static copies gives ids of static slots."""
    placement = make_placement(4, 12, 1, redundant=1)
    for backend in BACKENDS:
        balancer = make(placement, backend)
        idx = draw_ids(placement, 400)
        counts, running = balancer.count(idx)
        cumulative = balancer.cumulative_shares(balancer.solve(counts).shares)
        assert cumulative.shape == (placement.n_copies,)
        out = balancer.select(idx, cumulative, running).cpu()
        assert (out % placement.slots_per_rank < placement.static_per_rank).all()
        assert torch.equal(placement.phy2log[out.long()].long(), idx.cpu())


@backends
def test_the_operator_gives_the_same_ids(backend):
    """A compiled call goes through the operator, gives the same ids and writes the plan."""
    placement = make_placement(4, 12, 1)
    balancer, other = make(placement, backend), make(placement, backend)
    compiled = torch.compile(lambda x: balancer.run(x * 1), backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        idx = draw_ids(placement, 400, power=6.0, seed=seed)
        assert torch.equal(compiled(idx), other.run(idx))
        assert torch.equal(words_of(balancer.live), words_of(other.live))


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, copy.copy, lambda b: pickle.loads(pickle.dumps(b)), through_a_file]
)
def test_copies_and_files_keep_the_rules(way):
    """Copies have the rules and the live slots of the original, and a plan of their own."""
    placement = make_placement(8, 32, 1)
    rules = LiveRules(above=1.1, cost=20, fanout=1, domain=4, resident=True)
    given = {f"live_{name}": value for name, value in rules._asdict().items()}
    balancer = make(placement, BACKENDS[-1], **given)
    idx = draw_ids(placement, 1200, power=5.0)
    expected = balancer.run(idx)
    twin = way(balancer)
    assert twin._layer.live == rules and twin.placement == placement
    with pytest.raises(RuntimeError, match="^no batch has been planned yet"):
        _ = twin.live
    balancer_plan = words_of(balancer.live)
    out = twin.run(idx)
    check_ids(twin, idx, out)
    assert torch.equal(words_of(balancer.live), balancer_plan)
    assert out.shape == expected.shape


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"live_above": 0.99}, ValueError, r"^live_above must be in \[1.0, 2.0\], got 0.99"),
        ({"live_above": 2.5}, ValueError, "^live_above"),
        ({"live_above": float("nan")}, ValueError, "^live_above"),
        pytest.param({"live_above": "much"}, (TypeError, ValueError), "live_above"),
        ({"live_above": None}, (TypeError, ValueError), "live_above"),
        ({"live_cost": -1}, ValueError, "^live_cost"),
        ({"live_cost": 1.5}, TypeError, "^live_cost"),
        ({"live_cost": 2**31}, ValueError, "^live_cost"),
        ({"live_fanout": 0}, ValueError, "^live_fanout"),
        ({"live_fanout": "1"}, TypeError, "^live_fanout"),
        ({"live_fanout": 2**31}, ValueError, "^live_fanout"),
        ({"live_domain": 0}, ValueError, "^live_domain"),
        ({"live_domain": 3}, ValueError, "^live_domain must divide ep_size 4, got 3"),
        ({"live_domain": 8}, ValueError, "^live_domain must divide ep_size 4, got 8"),
        ({"live_resident": "no"}, TypeError, "^live_resident"),
        ({"solver": "interior_point"}, ValueError, "needs solver='levelling'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(settings, error, text):
    """An argument that doesn't fit is refused by name."""
    with pytest.raises(error, match=text):
        make(make_placement(4, 12, 1), BACKENDS[-1], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"live_above": 1.5},
        {"live_cost": 1},
        {"live_fanout": 1},
        {"live_domain": 2},
        {"live_resident": True},
    ],
    ids=str,
)
def test_rules_need_live_slots(settings):
    """Rules are refused for a placement that has no live slots."""
    with pytest.raises(ValueError, match=r"need a placement with live slots: .*with_live_slots"):
        make(make_placement(4, 12, 0), BACKENDS[-1], **settings)


def test_a_plan_needs_live_slots():
    """`live` says what is missing if the placement has no live slots."""
    balancer = make(make_placement(4, 12, 0), BACKENDS[-1])
    balancer.run(draw_ids(balancer.placement, 40))
    with pytest.raises(RuntimeError, match="^the placement has no live slots: see Placement"):
        _ = balancer.live


def test_more_static_slots_than_a_plan_can_number():
    """A rank may have 1023 static slots beside its live ones, and no more."""
    most = Placement.from_phy2log(torch.arange(2 * 1024), 2)
    with pytest.raises(ValueError, match="at most 1023 other slots a rank, got 1024"):
        make(most.with_live_slots(1), BACKENDS[-1])
    load = torch.rand(2 * 1023)
    make(chain(load, 2, redundant_per_rank=0).with_live_slots(1), BACKENDS[-1])
