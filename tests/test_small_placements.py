"""Every small size: `chain`, `place` and EPLB end, and no slot is wasted where one can be used."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplb_triton import Placement, chain, place, rebalance_experts, solve
from lplb_triton.testing.instances import FAMILIES

# (ranks, experts of a rank, redundant slots of a rank)
SIZES = list(itertools.product(range(1, 17), range(1, 8), range(0, 13)))
SMALL = list(itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3), (0, 1, 2, 3, 5, 8)))


def loads_of(n, number):
    """Equal loads, none at all, one hot expert, or something in between."""
    kind = number % 5
    if kind == 0:
        return torch.full((n,), 7.0)
    if kind == 1:
        return torch.zeros(n)
    load = torch.from_numpy(np.random.default_rng(number).lognormal(0, 1, n))
    if kind == 2:
        load[number % n] = 1000 * n
    if kind == 3:
        load[torch.arange(n) % 3 > 0] = 0
    return load


def check_slots(placement, n_logical, ranks, redundant, n_group=1):
    """Sizes are as asked for, and only a rank that has every expert of its group repeats one."""
    assert (placement.n_logical, placement.ep_size) == (n_logical, ranks)
    assert placement.slots_per_rank == n_logical // ranks + redundant
    assert placement.n_group == n_group
    copies = torch.zeros(n_logical, ranks, dtype=torch.int64)
    where = placement.phy2log.long(), placement.rank_of_slot.long()
    copies.index_put_(where, torch.ones(placement.n_physical, dtype=torch.int64), accumulate=True)
    assert int(copies.sum(1).min()) >= 1
    repeats = (copies > 1).any(0)
    complete = (copies > 0).sum(0) == n_logical // n_group
    assert bool((~repeats | complete).all())
    by_group = (copies > 0).reshape(n_logical, n_group, -1).any(2)
    assert bool((by_group.sum(1) == 1).all())


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.timeout(120)
def test_chain_ends_for_every_small_size():
    """`chain` ends and wastes no slot for all 1456 small sizes."""
    assert len(SIZES) == 1456
    for number, (ranks, experts, redundant) in enumerate(SIZES):
        n = ranks * experts
        for load in (torch.ones(n), loads_of(n, number)):
            check_slots(chain(load, ranks, redundant_per_rank=redundant), n, ranks, redundant)


@pytest.mark.timeout(120)
def test_chain_ends_for_every_small_size_in_domains():
    """`chain` ends and wastes no slot for any split of small sizes in domains."""
    for number, (ranks, experts, redundant) in enumerate(SMALL):
        n = ranks * experts
        for domain in divisors(ranks):
            found = chain(
                loads_of(n, number), ranks, redundant_per_rank=redundant, ranks_per_domain=domain
            )
            check_slots(found, n, ranks, redundant, ranks // domain)


@pytest.mark.timeout(120)
def test_place_ends_for_every_small_size():
    """`place` ends and wastes no slot for small sizes, with and without domains."""
    for number, (ranks, experts, redundant) in enumerate(SMALL):
        n = ranks * experts
        batches = (1, 2, 9)[number % 3]
        history = torch.stack([loads_of(n, number + 5 * i) for i in range(batches)])
        trials = 4 * (number % 2)
        arguments = {"redundant_per_rank": redundant, "samples": 8, "trials": trials}
        domain = divisors(ranks)[number % len(divisors(ranks))]
        found = place(history, ranks, **arguments)
        check_slots(found, n, ranks, redundant)
        found = place(history, ranks, ranks_per_domain=domain, **arguments)
        check_slots(found, n, ranks, redundant, ranks // domain)


@pytest.mark.timeout(120)
def test_eplb_ends_for_every_small_size():
    """EPLB ends for small sizes, and `from_history` gives just its slots."""
    for number, (ranks, experts, redundant) in enumerate(SIZES[::4]):
        n = ranks * experts
        load = loads_of(n, number)
        nodes = divisors(ranks)[number % len(divisors(ranks))]
        found = Placement.from_history(
            load, ranks, redundant_per_rank=redundant, num_groups=n, num_nodes=nodes
        )
        # EPLB itself, repeats and all.
        sizes = (n + redundant * ranks, n, nodes, ranks)
        phy2log, _, logcnt = rebalance_experts(load[None], *sizes)
        assert torch.equal(found.phy2log.long(), phy2log[0])
        layers, _, copies = rebalance_experts(torch.stack([load, load.flip(0)]), *sizes)
        assert layers.shape == (2, sizes[0]) and torch.equal(copies[0], logcnt[0])
        assert bool((copies >= 1).all())


@pytest.mark.parametrize(
    "arguments",
    [
        {"history": torch.ones(8), "ep_size": 8, "redundant_per_rank": 3, "trials": 0},
        {
            "history": torch.tensor([[1000.0, 1, 1, 1, 1, 1], [900, 1, 1, 1, 1, 1]]),
            "ep_size": 3,
            "redundant_per_rank": 2,
        },
    ],
)
def test_reported_calls_of_place(arguments):
    """`place` ends and wastes no slot if redundant slots are as many as originals or more."""
    found = place(**arguments)
    n = arguments["history"].shape[-1]
    check_slots(found, n, arguments["ep_size"], arguments["redundant_per_rank"])


def test_repeats_of_a_previous_placement_are_used_unless_moves_have_a_price():
    """A repeated expert gives way unless moves cost."""
    history = torch.tensor([[9.0, 1, 1, 1], [8.0, 2, 1, 1]])
    wasteful = Placement(np.array([0, 0, 1, 0, 2, 3]), 2)
    found = place(history, 2, previous=wasteful, trials=0)
    check_slots(found, 4, 2, 1)
    assert int((found.phy2log != wasteful.phy2log).sum()) == 1
    assert place(history, 2, previous=wasteful, move_penalty=100.0) == wasteful


def sweeps():
    return st.tuples(
        st.sampled_from(SMALL), st.sampled_from(sorted(FAMILIES)), st.integers(0, 2**16)
    )


@settings(max_examples=60)
@given(sweeps())
def test_start_is_never_worse_than_eplb(case):
    """The start of `place` has a mean optimum not above EPLB's for any load family."""
    (ranks, experts, redundant), family, seed = case
    rng = np.random.default_rng(seed)
    load = torch.from_numpy(np.stack([FAMILIES[family](rng, ranks * experts) for _ in range(3)]))
    load = load[load.sum(1) > 0]
    if not len(load):
        return
    load = load / load.sum(1, keepdim=True)
    found = place(load, ranks, redundant_per_rank=redundant, trials=0)
    eplb = Placement.from_history(load.mean(0), ranks, redundant_per_rank=redundant)
    optimum, rival = (solve(p.problem(load)).max_load.mean() for p in (found, eplb))
    assert float(optimum) <= float(rival) * (1 + 1e-3)
    check_slots(found, ranks * experts, ranks, redundant)


def test_placements_without_waste_are_what_they_were():
    """Placements of sizes without waste keep their slots."""
    # Made by the version that could hang, for sizes where it didn't and no slot was wasted.
    load = torch.tensor([9.0, 2, 3, 1, 5, 4, 7, 8])
    assert chain(load, 4).phy2log.tolist() == [0, 7, 3, 0, 6, 1, 6, 4, 5, 4, 7, 2]
    history = torch.stack([load, load.flip(0), load.roll(3)])
    assert place(history, 4, samples=16, trials=40).phy2log.tolist() == [
        7,
        1,
        3,
        0,
        3,
        4,
        0,
        2,
        5,
        2,
        7,
        6,
    ]


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200, 2.0**1023])
def test_scale_of_loads_does_not_matter(scale):
    """A scale of loads from 1e-310 to 2**1023 does not change a placement."""
    load = torch.tensor([9.0, 2, 3, 1, 5, 4, 7, 8], dtype=torch.float64) / 16
    history = torch.stack([load, load.flip(0), load.roll(3)])
    # Powers of two are exact.
    factor = 2.0 ** round(np.log2(scale))
    for domain in (None, 2):
        wanted = chain(load, 4, ranks_per_domain=domain)
        assert chain(load * factor, 4, ranks_per_domain=domain) == wanted
    assert place(history * factor, 4, trials=20) == place(history, 4, trials=20)


@pytest.mark.parametrize("penalty", [1e30, 1e300])
def test_no_move_pays_an_enormous_price(penalty):
    """With an enormous price `place` returns the previous placement."""
    history = torch.tensor([[9.0, 1, 1, 1], [8.0, 2, 1, 1]])
    start = chain(torch.arange(4.0), 2)
    assert place(history, 2, previous=start, move_penalty=penalty, trials=30) == start
