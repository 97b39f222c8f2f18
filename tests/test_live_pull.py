"""Kernels that pull live experts' weights and return gradients, for ranks of one process."""

import pytest
import torch
from helpers.live_peers import DEVICE, Pullers

from lplb_triton.kernels.pull import copy
from lplb_triton.training.live_engines import require_no_capture
from lplb_triton.training.live_peer import fault_error
from lplb_triton.training.live_rows import LiveRows, RowKind

BYTES = ((24,), torch.uint8, False)
FLOAT = ((3,), torch.float32, True)
# More than a chunk.
LARGE = ((9000,), torch.float32, True)
KINDS = [((40, 8), torch.bfloat16, True), FLOAT, BYTES, LARGE]
SMALL = [((5, 7), torch.float8_e4m3fn, False), ((1,), torch.float32, False)]
PLAN = [[4, -1], [-1, 4], [0, 9]]


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_slots(ranks, plan, rank):
    """Filled slots of a rank hold their experts' rows, bit for bit, and the others zeros."""
    for number in range(len(ranks.rows.kinds)):
        for slot, expert in enumerate(plan[rank]):
            got = ranks.slots_of(number, rank)[slot]
            source = ranks.source(number, expert % ranks.n_ranks)[expert // ranks.n_ranks]
            assert same_bytes(got, source if expert >= 0 else torch.zeros_like(got))


@pytest.mark.parametrize(
    ("slots", "kinds", "n_sms", "runs"),
    [(2, KINDS, 3, 0), (2, KINDS, 2, 1), (2, KINDS, 0, 0), (1, SMALL, 3, 0), (1, SMALL, 0, 0)],
)
def test_slots_hold_the_rows_of_their_experts(slots, kinds, n_sms, runs, monkeypatch):
    """All tensors of filled slots are copied from the homes, by programs or by the host."""
    monkeypatch.setattr(copy, "COPY_RUNS", runs)
    ranks = Pullers(3, 4, slots, kinds, n_sms=n_sms)
    ranks.fill()
    plan = [row[2 - slots :] for row in PLAN]
    ranks.pull(ranks.plan(plan))
    for rank in range(3):
        check_slots(ranks, plan, rank)
        assert not ranks.peers[rank].failed()


def test_an_empty_plan_fetches_nothing_and_waits_for_nobody():
    """Without live experts nothing is written, and late ranks don't matter."""
    ranks = Pullers(2, 2, 1, [FLOAT])
    ranks.fill()
    ranks.peers[0].exit_update()
    ranks.peers[0].pull(ranks.tables, ranks.plan([[-1], [1]]), ranks.live[0])
    assert not ranks.live.any() and not ranks.peers[0].failed()


def test_a_late_rank_is_named_and_only_its_readers_fail():
    """Who reads a rank that hasn't published gets an error with its number, and no weights."""
    ranks = Pullers(3, 2, 1, [FLOAT])
    ranks.fill()
    for rank in (0, 2):
        ranks.peers[rank].exit_update()
    plan = [[1], [-1], [3]]  # at home on ranks 1 and 0
    for rank in (0, 2):
        ranks.peers[rank].pull(ranks.tables, ranks.plan(plan), ranks.live[rank])
    check_slots(ranks, plan, 2)
    assert [peer.failed() for peer in ranks.peers] == [True, False, False]
    assert not ranks.live[0].any()
    error = fault_error(ranks.peers[0], "LiveSlots(1)", 0.05)
    assert error.ranks == (1,)
    assert "ranks [1] did not publish the weights of step 1 within 0.05 s" in str(error)
    # From now on this rank neither pulls nor tells anybody to go on.
    ranks.peers[1].exit_update()
    sent = ranks.signals.clone()
    ranks.peers[0].pull(ranks.tables, ranks.plan(plan), ranks.live[0])
    ranks.peers[0].exit_update()
    assert not ranks.live[0].any() and torch.equal(ranks.signals, sent)
    ranks.peers[2].exit_update()
    ranks.peers[2].pull(ranks.tables, ranks.plan(plan), ranks.live[2])
    assert fault_error(ranks.peers[2], "LiveSlots(1)", 0.05).ranks == (0,)


def test_an_update_waits_for_every_rank_that_reads():
    """An update begins once all ranks have ended their pulls, and names those that have not."""
    ranks = Pullers(3, 2, 1, [FLOAT])
    for rank in (1, 2):
        ranks.peers[rank].enter_update(wait=False)
    ranks.peers[0].enter_update()
    assert not ranks.peers[0].failed()
    ranks.peers[0].exit_update()
    ranks.peers[1].exit_update()
    ranks.peers[0].enter_update()
    error = fault_error(ranks.peers[0], "LiveSlots(1)", 0.05)
    assert error.ranks == (1, 2) and "did not end step 1 of its pulls" in str(error)


def test_plans_that_differ_are_noticed():
    """Of two ranks with different plans, or layers, the later one names the other."""
    for other, layer in (([[1], [-1], [3]], 3), ([[-1], [1], [2]], 3), ([[1], [-1], [2]], 4)):
        ranks = Pullers(3, 2, 1, [FLOAT])
        plan = ranks.plan([[1], [-1], [2]])
        ranks.peers[0].pull(ranks.tables, plan, ranks.live[0])
        ranks.tables.number = layer
        ranks.peers[2].pull(ranks.tables, ranks.plan(other), ranks.live[2])
        assert [peer.failed() for peer in ranks.peers] == [False, False, True]
        error = fault_error(ranks.peers[2], "LiveSlots(1)", 0.05)
        assert error.ranks == (0,) and "another plan" in str(error)


def test_a_plan_that_comes_again_is_not_compared():
    """The backward pass's pull of an earlier plan takes no part in the comparison of plans."""
    ranks = Pullers(2, 2, 1, [FLOAT])
    ranks.fill()
    plan = ranks.plan([[1], [0]])
    ranks.peers[0].pull(ranks.tables, plan, ranks.live[0])
    ranks.peers[0].pull(ranks.tables, plan, ranks.live[0], compare=False)
    for _ in range(2):
        ranks.peers[1].pull(ranks.tables, plan, ranks.live[1])
    assert not any(peer.failed() for peer in ranks.peers)


def test_the_host_does_not_read_a_plan_twice():
    """With copy engines a pull returns this rank's experts, and the next one takes them."""
    ranks = Pullers(2, 2, 2, [FLOAT], n_sms=0)
    ranks.fill()
    plan = ranks.plan([[1, -1], [-1, 2]])
    assert ranks.peers[0].pull(ranks.tables, plan, ranks.live[0]) == (1, -1)
    ranks.live.zero_()
    options = {"compare": False, "experts": (1, -1)}
    # What the host copies isn't looked for in the plan.
    ranks.peers[0].pull(ranks.tables, torch.full_like(plan, -1), ranks.live[0], **options)
    check_slots(ranks, [[1, -1]], 0)


def test_copy_engines_refuse_a_capture(monkeypatch):
    """A CUDA graph can't capture what the host reads, and the message says what can be."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    require_no_capture()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make it with a number of multiprocessors"):
        require_no_capture()


@pytest.mark.parametrize("n_sms", [3, 0])
def test_resident_slots_are_read_when_they_change(n_sms):
    """With ``held``, only slots whose expert changes are copied."""
    ranks = Pullers(2, 2, 2, [FLOAT], n_sms=n_sms)
    ranks.fill()
    held = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    options = {"held": held, "compare": False}
    ranks.peers[0].pull(ranks.tables, ranks.plan([[1, 3], [-1, -1]]), ranks.live[0], **options)
    check_slots(ranks, [[1, 3]], 0)
    assert held.tolist() == [1, 3]
    before = ranks.slots_of(0, 0)[0].clone()
    ranks.fill(1)
    ranks.peers[0].pull(ranks.tables, ranks.plan([[1, 1], [-1, -1]]), ranks.live[0], **options)
    assert same_bytes(ranks.slots_of(0, 0)[0], before)
    assert same_bytes(ranks.slots_of(0, 0)[1], ranks.source(0, 1)[0])
    # An empty slot keeps what it holds.
    for plan in ([[-1, 1], [-1, -1]], [[1, 1], [-1, -1]]):
        ranks.peers[0].pull(ranks.tables, ranks.plan(plan), ranks.live[0], **options)
    assert held.tolist() == [1, 1]
    assert same_bytes(ranks.slots_of(0, 0)[0], before)


def expected_sums(ranks, plan, live, own):
    """Gradients at home: own, then each live slot in the order of slots, rounded once."""
    for home in range(ranks.n_ranks):
        for place, total in enumerate(own[home]):
            wide = torch.promote_types(total.dtype, torch.float32)
            for row in range(ranks.n_static):
                expert = row * ranks.n_ranks + home
                value = total[row].to(wide)
                for rank in range(ranks.n_ranks):
                    for slot in range(ranks.slots):
                        if plan[rank][slot] == expert:
                            value = value + live[rank][place][slot].to(wide)
                total[row] = value.to(total.dtype)
    return own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gradients_are_added_in_order(dtype):
    """Homes add live slots' gradients in the order of slots, return after return."""
    # The second tensor's rows aren't multiples of 16 bytes, and the first is longer than a block.
    kinds = [((9000,), dtype, True), BYTES, ((5, 3), dtype, True)]
    ranks = Pullers(3, 4, 2, kinds, n_sms=1)
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        shapes = [(n, 9000), (n, 5, 3)]
        return [torch.randn(s, generator=generator).to(dtype).to(DEVICE) for s in shapes]

    plans = PLAN, [[-1, -1], [3, 7], [7, -1]], [[1, 2], [2, 0], [1, 4]]
    for plan in plans if dtype == torch.float32 else plans[2:]:
        live, own = [draw(2) for _ in range(3)], [draw(4) for _ in range(3)]
        wanted = expected_sums(ranks, plan, live, [[g.clone() for g in one] for one in own])
        ranks.give_back(ranks.plan(plan), live, own)
        # The interpreter rounds towards zero to bfloat16.
        inexact = DEVICE.type == "cpu" and dtype == torch.bfloat16
        torch.testing.assert_close(own, wanted, rtol=2**-7 * inexact, atol=0)
    assert not any(peer.failed() for peer in ranks.peers)


def test_a_fast_rank_overwrites_nothing():
    """A rank may write the next return's gradients before its last ones are added up."""
    ranks = Pullers(2, 2, 1, [FLOAT])
    plan, (home, fast) = ranks.plan([[-1], [2]]), ranks.peers
    for value in (1.0, 2.0):
        fast.begin_return(ranks.tables, plan, [torch.full((1, 3), value, device=DEVICE)])
        fast.exchange(ranks.tables, plan, wait=False)
    for value in (1.0, 2.0):
        own = [torch.zeros(2, 3, device=DEVICE)]
        home.begin_return(ranks.tables, plan, [torch.zeros(1, 3, device=DEVICE)])
        home.exchange(ranks.tables, plan)
        home.end_return(ranks.tables, own)
        assert own[0].tolist() == [[0.0] * 3, [value] * 3]
    assert not home.failed() and not fast.failed()


def test_gradients_wait_for_their_memory():
    """A rank that hasn't added up is named by the one that would overwrite its gradients."""
    ranks = Pullers(2, 2, 1, [FLOAT])
    plan, grads = ranks.plan([[1], [-1]]), [torch.ones(1, 3, device=DEVICE)]
    for _ in range(2):
        ranks.peers[0].begin_return(ranks.tables, plan, grads)
        ranks.peers[0].exchange(ranks.tables, plan, wait=False)
        assert not ranks.peers[0].failed()
    ranks.peers[0].begin_return(ranks.tables, plan, grads)
    error = fault_error(ranks.peers[0], "LiveSlots(1)", 0.05)
    assert error.ranks == (0, 1) and "add up the gradients" in str(error)


def test_gradients_that_do_not_come_are_missed():
    """A home names the rank whose gradients are missing, and adds nothing."""
    ranks = Pullers(2, 2, 1, [FLOAT])
    plan, own = ranks.plan([[-1], [2]]), [torch.ones(2, 3, device=DEVICE)]
    home = ranks.peers[0]
    home.begin_return(ranks.tables, plan, [torch.ones(1, 3, device=DEVICE)])
    home.exchange(ranks.tables, plan)
    home.end_return(ranks.tables, own)
    error = fault_error(home, "LiveSlots(1)", 0.05)
    assert error.ranks == (1,) and "return the gradients of its live slots, return 1" in str(error)
    assert (own[0] == 1).all()


def test_warming_leaves_no_trace():
    """Kernels are loaded without a word to other ranks."""
    ranks = Pullers(2, 2, 1, KINDS)
    ranks.peers[1].warm(ranks.rows)
    assert not ranks.signals.any() and not ranks.peers[1].failed()


def test_rows_begin_at_multiples_of_16_bytes():
    """Sizes are rounded up to units of 16 bytes, and views show the elements of a row."""
    rows = LiveRows([RowKind((3,), torch.bfloat16, True), RowKind((2, 4), torch.float32, True)], 2)
    assert (rows.units, rows.offsets, rows.total_units) == ([1, 2], [0, 2], 6)
    assert rows.gradient_place(1) == (2, 2, 6)
    memory = torch.zeros(rows.words, dtype=torch.int32)
    first, second = (rows.view(memory, number) for number in range(2))
    first.fill_(1)
    second[1].fill_(2)
    assert first.shape == (2, 3) and second.shape == (2, 2, 4)
    assert int((memory.view(torch.bfloat16)[:16] == 1).sum()) == 6
    assert (memory.view(torch.float32)[16:24] == 2).all()
