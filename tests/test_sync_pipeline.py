"""The pipeline of a balancer whose group exchanges counts by the kernel."""

import pytest
import torch
import triton.language as tl
from helpers.peers import (
    DEVICE,
    FAILED,
    Team,
    eplb_of_three,
    error_of,
    ids_for,
    ring_of_two,
    two_rings,
)

from lplb_triton import kernels
from lplb_triton.kernels import count
from lplb_triton.kernels.launch import launch_call
from lplb_triton.kernels.solve.launch import solve_counts_call
from lplb_triton.sync import SyncError


@pytest.mark.parametrize(
    ("make", "quotas"),
    [
        (ring_of_two, "local"),
        (ring_of_two, "global"),
        (eplb_of_three, "local"),
        # Several groups: an exchange of its own, between two launches.
        (two_rings, "local"),
    ],
)
def test_the_pipeline_exchanges_counts(make, quotas):
    """Every rank's ids and recorded loads are of the summed counts; it sends just its own."""
    team = Team(make(), quotas)
    n_ranks = team.placement.ep_size
    epochs = 3 if quotas == "local" and n_ranks < 4 else 2
    recorded = torch.zeros(team.placement.n_logical, dtype=torch.float64)
    for balancer in team.balancers:
        balancer.record_loads()
    for epoch in range(1, epochs + 1):
        dtype = torch.int32 if epoch == 2 else torch.int64
        batches = ids_for(team, 20, seed=epoch, dtype=dtype)
        counts, expected = team.counts(batches), team.expected(batches)
        recorded += counts.sum(0)
        # On a CPU one rank runs after the other: those to come are there already.
        for rank in range(n_ranks):
            team.ranks.publish(rank, counts[rank], epoch)
        for rank, balancer in enumerate(team.balancers):
            # But for its own, which it has to send.
            sent = [team.ranks.row(at, rank, epoch) for at in range(n_ranks)]
            messages = torch.stack(sent)
            for row in sent:
                row.zero_()
            out = balancer.run(batches[rank])
            assert out.dtype == dtype and torch.equal(out, expected[rank])
            assert torch.equal(torch.stack(sent), messages)
            balancer.check()
            solved = epoch * team.placement.n_group
            assert int(balancer.solves) == int(balancer.certified) == solved
            assert torch.equal(balancer.load_history().cpu(), recorded)
    if quotas == "global":
        kept, _, everything = (sum(int(b.traffic[i]) for b in team.balancers) for i in range(3))
        assert 0 < kept < everything


def test_warmup_takes_no_part_in_the_group():
    """A warm-up sends nothing and leaves epochs and counters at 0."""
    team = Team(ring_of_two())
    image = team.ranks.memory.clone()
    balancer = team.balancers[0]
    balancer.warmup()
    assert torch.equal(team.ranks.memory, image) and not team.ranks.endpoints[0]._epochs.any()
    assert not balancer._backend.peers.failed()
    assert not any((balancer.certified, balancer.solves, *balancer.traffic))


# numpy's, of the interpreter: what is missing has an infinite load.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("quotas", ["local", "global"])
def test_a_failed_exchange_leaves_the_even_split(quotas):
    """After a failed exchange tokens are split evenly and nothing is sent."""
    team = Team(ring_of_two(), quotas, timeout=0.05)
    batches = ids_for(team, 20, seed=1)
    mine, balancer = batches[0], team.balancers[0]
    counts = team.counts(batches)
    # Nothing is split evenly, as what failed is.
    nothing = torch.zeros(team.placement.n_logical, dtype=torch.int32, device=DEVICE)
    counts[1] = 0
    expected = team.answer(0, mine, counts, nothing)
    out = balancer.run(mine)
    assert torch.equal(out, expected)
    kept = out[mine >= 0].cpu()
    assert torch.equal(team.placement.phy2log[kept].long(), mine[mine >= 0].cpu())
    assert int(balancer.solves) == 1 and int(balancer.certified) == 0
    for call in (balancer.check, lambda: balancer.run(mine)):
        with pytest.raises(SyncError, match=r"epoch 1 .* ranks \[1\] did not come") as info:
            call()
        assert info.value.ranks == (1,)
    # A graph would go on: nothing is sent any more, and the answer stays the same.
    image = team.ranks.memory.clone()
    balancer._backend.peers.begin = lambda n: kernels.FIRST_CHANNEL
    balancer._backend.raise_on_report = lambda: None
    assert torch.equal(balancer.run(mine), expected)
    assert torch.equal(team.ranks.memory, image)
    assert int(balancer.certified) == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_rank_whose_own_counts_fail_to_come_is_absent(monkeypatch):
    """It sends nobody a part of them for a whole, and names itself."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(count, "MOST_POLLS", tl.constexpr(2))
    team = Team(ring_of_two(), timeout=0.05)
    batches = ids_for(team, 20, seed=1)
    team.ranks.publish(1, team.counts(batches)[1], 1)
    balancer = team.balancers[0]
    pipeline = balancer._backend._find_scratch(balancer.default_n_sms).pipeline
    pipeline._buffers.counts.fill_(-1)
    settings = balancer._backend.settings(balancer.certified, balancer.solves, balancer.uncertified)
    # Without rows there is nothing to sum.
    running, tables = pipeline._running[:0], pipeline._solve_tables
    call = solve_counts_call(
        running,
        pipeline._buffers,
        tables,
        settings,
        balancer._backend.report,
        pipeline._exchange,
        kernels.FIRST_CHANNEL,
    )
    launch_call(call)
    error = error_of(team.ranks, 0)
    assert error.ranks == (0,) and error.epoch == 1
    assert (pipeline._exchange.total == FAILED).all()
    assert not any(team.ranks.slots(at)[:, 0].any() for at in (0, 1))
    assert int(balancer.solves) == 1 and int(balancer.certified) == 0
