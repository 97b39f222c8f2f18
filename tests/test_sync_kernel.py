"""The peer-to-peer kernel: one process stands for several ranks, on a CPU step by step."""

import time
from functools import partial

import numpy as np
import pytest
import torch
import triton.language as tl

from lplb_triton import Balancer, Placement, kernels, reference, topologies
from lplb_triton.kernels import count
from lplb_triton.kernels.launch import launch_call
from lplb_triton.kernels.solve.launch import solve_counts_call
from lplb_triton.sync import SyncError
from lplb_triton.sync._channels import CHANNELS, Channels
from lplb_triton.sync._distributed import device_error
from lplb_triton.sync._peer import Endpoint, PeerCommunicator

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FAILED = -2


class Ranks:
    """Endpoints of several ranks over buffers of one device."""

    def __init__(self, n_ranks, capacity, timeout, device=DEVICE):
        words = Endpoint.words(n_ranks, capacity)
        self.n_ranks, self.capacity = n_ranks, capacity
        self.memory = torch.zeros(n_ranks, words, dtype=torch.int64, device=device)
        addresses = [row.data_ptr() for row in self.memory]
        self.endpoints = [
            Endpoint(addresses, rank, device, capacity, timeout) for rank in range(n_ranks)
        ]
        self.version = torch.full((1,), 77, dtype=torch.int32, device=device)

    def slots(self, at, channel=0):
        """A channel's two slots in one rank's buffer, as docs/sync.md lays them out."""
        words = kernels.channel_words(self.n_ranks, self.capacity)
        area = self.memory[at, channel * words : (channel + 1) * words]
        return area.view(2, self.n_ranks, kernels.HEADER_WORDS + self.capacity)

    def publish(self, rank, counts, epoch, channel=0, version=77, to=None, opening=0):
        """What the kernel of ``rank`` does first, by hand."""
        n = len(counts)
        call = n | opening << kernels.COUNT_BITS
        numbers = torch.cat([torch.tensor([version, call]), counts.long() & 0xFFFFFFFF])
        for at in range(self.n_ranks) if to is None else to:
            self.slots(at, channel)[epoch % 2, rank, : 2 + n] = (epoch << 32) + numbers

    def exchange(self, rank, counts, channel=0, gather=True, opening=0):
        """Run one rank's kernel; returns the total and everybody's counts."""
        on = self.memory.device
        total = torch.full((len(counts),), -9, dtype=torch.int32, device=on)
        gathered = None
        if gather:
            gathered = torch.full((self.n_ranks, len(counts)), -9, dtype=torch.int32, device=on)
        self.endpoints[rank].exchange(
            counts.to(on), self.version, total, gathered, kernels.Channel(channel, opening)
        )
        return total, gathered


class Sync:
    """What an error needs to know of a communicator."""

    def __init__(self, rank, timeout):
        self.rank, self.timeout, self.device = rank, timeout, DEVICE

    def __repr__(self):
        return "p2p(test)"


def error_of(ranks, rank, openings=None):
    status = ranks.endpoints[rank].status_view
    return device_error(Sync(rank, 0.05), status, openings or {})


@pytest.mark.parametrize(("n_ranks", "n"), [(1, 5), (2, 16), (3, 20), (9, 300)])
def test_sums_and_what_is_sent(n_ranks, n):
    torch.manual_seed(n)
    ranks = Ranks(n_ranks, 4 * -(-n // 4), timeout=0.05)
    epochs = 4 if n_ranks < 9 else 2
    for epoch in range(1, epochs + 1):
        counts = torch.randint(0, 1000, (n_ranks, n), dtype=torch.int32)
        if epoch == 2:
            counts[-1] = 0
        for channel in (0, CHANNELS - 1):
            for rank in range(n_ranks):
                ranks.publish(rank, counts[rank], epoch, channel)
            image = ranks.memory.clone()
            for rank in range(n_ranks):
                gather = rank % 2 == 0
                # Everything this rank sends is wiped out first.
                for at in range(n_ranks):
                    ranks.slots(at, channel)[epoch % 2, rank, : 2 + n] = -1
                total, gathered = ranks.exchange(rank, counts[rank], channel, gather)
                assert torch.equal(total.cpu(), counts.sum(0, dtype=torch.int32))
                if gather:
                    assert torch.equal(gathered.cpu(), counts)
                assert torch.equal(ranks.memory, image)
    assert not any(endpoint.failed() for endpoint in ranks.endpoints)


def test_sums_that_int32_does_not_hold():
    """No sum wraps around, and what one rank has no count for has no sum."""
    most = 2**31 - 1
    counts = torch.tensor([[most, most, -1, -1, 5], [0, 1, 100, -1, 6], [0, most, 7, 1, 7]])
    ranks = Ranks(3, 8, timeout=0.05)
    for rank in (1, 2):
        ranks.publish(rank, counts[rank], 1)
    total, gathered = ranks.exchange(0, counts[0].int())
    assert total.tolist() == [most, FAILED, FAILED, FAILED, 18]
    assert torch.equal(gathered.cpu().long(), counts)
    rows = torch.cat([torch.tensor([[0, 77, 5, 0]]).expand(3, 4), counts], 1).int().to(DEVICE)
    status = torch.zeros(kernels.status_words(3), dtype=torch.int64)
    status = status.pin_memory() if DEVICE.type == "cuda" else status
    total = torch.empty(5, dtype=torch.int32, device=DEVICE)
    own = counts[0].int().to(DEVICE)
    kernels.sum_gathered(own, total, None, rows, ranks.version, status, 0)
    assert total.tolist() == [most, FAILED, FAILED, FAILED, 18] and not status.any()


def test_a_rank_may_be_one_epoch_ahead_but_not_two():
    ranks = Ranks(2, 8, timeout=0.02)
    counts = torch.arange(8, dtype=torch.int32).reshape(2, 4)
    ranks.publish(1, counts[1], 1)
    ranks.publish(1, counts[1] * 10, 2)
    total, _ = ranks.exchange(0, counts[0])
    assert torch.equal(total.cpu(), counts.sum(0, dtype=torch.int32))
    total, _ = ranks.exchange(0, counts[0])
    assert torch.equal(total.cpu(), counts[0] + counts[1] * 10)
    # A rank that went on after others gave up on it would look like this.
    ranks.publish(1, counts[1], 5)
    total, _ = ranks.exchange(0, counts[0])
    assert (total == FAILED).all()
    assert error_of(ranks, 0).ranks == (1,)


def test_missing_ranks_are_named_and_the_endpoint_is_poisoned():
    ranks = Ranks(4, 8, timeout=0.05)
    counts = torch.arange(1, 9, dtype=torch.int32)
    for rank in range(4):
        ranks.publish(rank, counts, 1)
    ranks.exchange(0, counts)
    ranks.publish(2, counts, 2)
    total, gathered = ranks.exchange(0, counts)
    assert (total == FAILED).all()
    assert torch.equal(gathered[0].cpu(), counts) and (gathered[1:] == 0).all()
    error = error_of(ranks, 0)
    assert isinstance(error, SyncError) and error.ranks == (1, 3) and error.epoch == 2
    assert "epoch 2" in str(error) and "ranks [1, 3]" in str(error) and "0.05 s" in str(error)
    # The others come after all: nothing is sent any more, and nothing is believed.
    ranks.publish(1, counts, 2)
    ranks.publish(3, counts, 2)
    image = ranks.memory.clone()
    for channel in (0, 1):
        total, gathered = ranks.exchange(0, counts, channel)
        assert (total == FAILED).all()
        assert torch.equal(gathered[0].cpu(), counts) and (gathered[1:] == 0).all()
    assert torch.equal(ranks.memory, image)
    assert error_of(ranks, 0).ranks == (1, 3)


@pytest.mark.parametrize("what", ["version", "size"])
def test_another_call_is_no_part_of_the_sum(what):
    ranks = Ranks(3, 8, timeout=0.05)
    counts = torch.arange(1, 9, dtype=torch.int32)
    for rank in range(3):
        ranks.publish(rank, counts, 1)
    ranks.slots(0)[1, 2, ["version", "size"].index(what)] = (1 << 32) + 6
    total, _ = ranks.exchange(0, counts)
    assert (total == FAILED).all()
    error = error_of(ranks, 0)
    assert error.ranks == (2,) and "rank 2 came with placement version" in str(error)
    if what == "size":
        assert "6 counts" in str(error)
    if what == "version":
        assert "00000006" in str(error)
    total, _ = ranks.exchange(1, counts)
    assert torch.equal(total.cpu(), 3 * counts)


@pytest.mark.parametrize(
    ("n", "n_ranks", "rank", "word"),
    [
        # Of the header, of the first and the last tile of counts, of the last tile of ranks.
        (8, 3, 2, 0),
        (8, 3, 2, 1),
        (300, 3, 2, 2 + 5),
        (300, 3, 2, 2 + 299),
        (20, 9, 3, 2 + 4),
        (20, 9, 8, 2),
    ],
)
def test_one_word_that_is_missing_is_missed(n, n_ranks, rank, word):
    ranks = Ranks(n_ranks, n, timeout=0.01)
    counts = torch.arange(n, dtype=torch.int32)
    for sender in range(n_ranks):
        ranks.publish(sender, counts, 3, to=[0])
    # It is of the epoch before last, in the same slot.
    ranks.slots(0)[1, rank, word] -= 2 << 32
    ranks.endpoints[0]._epochs.fill_(2)
    total, _ = ranks.exchange(0, counts, gather=False)
    assert (total == FAILED).all()
    assert error_of(ranks, 0).ranks == (rank,)


def test_another_call_ends_the_wait_for_those_who_are_late():
    ranks = Ranks(3, 8, timeout=60.0)
    counts = torch.arange(8, dtype=torch.int32)
    ranks.publish(1, counts, 1, version=78)
    total, _ = ranks.exchange(0, counts)
    assert (total == FAILED).all()
    error = error_of(ranks, 0)
    assert error.ranks == (1,) and "came with placement version" in str(error)


def test_two_calls_at_once_on_one_channel_are_found():
    ranks = Ranks(1, 8, timeout=0.05)
    counts = torch.ones(8, dtype=torch.int32)
    ranks.endpoints[0]._gates[3] = 1
    total, _ = ranks.exchange(0, counts, channel=3)
    assert (total == FAILED).all() and "on different streams" in str(error_of(ranks, 0))


def test_the_first_fault_is_the_one_that_is_told():
    """Calls of other channels that are under way fail for want of a rank that was sent away."""
    ranks = Ranks(2, 8, timeout=0.05)
    counts = torch.ones(8, dtype=torch.int32)
    ranks.publish(1, counts, 1, version=78)
    ranks.exchange(0, counts)
    said = str(error_of(ranks, 0))
    assert "came with placement version" in said
    # Another call that had begun before finds its channel otherwise than it left it.
    ranks.endpoints[0]._gates[5] = 1
    total, _ = ranks.exchange(0, counts, channel=5)
    assert (total == FAILED).all() and str(error_of(ranks, 0)) == said
    assert (ranks.endpoints[0]._gates == 2).all()


def test_epochs_may_wrap_around():
    ranks = Ranks(2, 8, timeout=0.05)
    last = 2**31 - 1
    for endpoint in ranks.endpoints:
        endpoint._epochs.fill_(last - 1)
    counts = torch.arange(8, dtype=torch.int32)
    for epoch in (last, -(2**31), -(2**31) + 1):
        ranks.publish(1, counts, epoch)
        total, _ = ranks.exchange(0, counts)
        assert torch.equal(total.cpu(), 2 * counts)


@pytest.mark.parametrize("gather", [False, True])
def test_rows_gathered_elsewhere(gather):
    n_ranks, n = 130, 20
    status = torch.zeros(kernels.status_words(n_ranks), dtype=torch.int64)
    if DEVICE.type == "cuda":
        status = status.pin_memory()
    version = torch.full((1,), 5, dtype=torch.int32, device=DEVICE)
    counts = torch.randint(0, 9, (n_ranks, n), dtype=torch.int32)
    header = torch.tensor([0, 5, n, 0], dtype=torch.int32).expand(n_ranks, 4)
    rows = torch.cat([header, counts], 1).to(DEVICE)
    for bad in (None, 129):
        total = torch.full((n,), -9, dtype=torch.int32, device=DEVICE)
        gathered = torch.full((n_ranks, n), -9, dtype=torch.int32, device=DEVICE)
        if bad is not None:
            rows[bad, 1] = 4
        own = counts[1].to(DEVICE)
        kernels.sum_gathered(own, total, gathered if gather else None, rows, version, status, 1)
        if bad is None:
            assert torch.equal(total.cpu(), counts.sum(0, dtype=torch.int32))
            assert not gather or torch.equal(gathered.cpu(), counts)
            assert not status.any()
        else:
            assert (total == FAILED).all()
            assert not gather or torch.equal(gathered[1], own) and (gathered[bad] == 0).all()
            assert device_error(Sync(1, 1.0), status.numpy()).ranks == (bad,)


class Member(PeerCommunicator):
    """One of `Ranks` as a balancer's communicator: what it needs of one, and no process group."""

    def __init__(self, ranks, rank, timeout):
        self.kind, self.device, self.timeout = "p2p(test)", DEVICE, timeout
        self.rank, self.n_ranks, self.ranks_per_node = rank, ranks.n_ranks, 1
        self.capacity, self.endpoint = ranks.capacity, ranks.endpoints[rank]
        self.closed, self._error = False, None
        self._channels = Channels(self.kind, self._stream)
        # As what tests publish by hand.
        self.bind(0)

    def _handle(self):
        return super()._handle() if DEVICE.type == "cuda" else 0

    def check(self):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self._raise_on_failure()


class Team:
    """A balancer for each of several ranks of one process, and what they have to answer."""

    def __init__(self, placement, quotas="local", timeout=20.0):
        n_ranks = placement.ep_size
        self.placement, self.quotas = placement, quotas
        self.ranks = Ranks(n_ranks, 4 * -(-placement.n_logical // 4), timeout)
        self.alone = [Balancer(placement, backend="triton", rank=r) for r in range(n_ranks)]
        self.twins = [Balancer(placement, device="cpu", rank=r) for r in range(n_ranks)]
        self.balancers = [Balancer(placement, backend="triton", rank=r) for r in range(n_ranks)]
        for rank, balancer in enumerate(self.balancers):
            balancer.communicator = Member(self.ranks, rank, timeout)
            balancer._backend.follow_communicator()
            balancer.quotas, balancer._layer.version = quotas, self.ranks.version
            balancer._backend._fields.clear()
            if DEVICE.type == "cuda":
                balancer.warmup()

    def counts(self, batches):
        """[n_ranks, n_logical] on the CPU."""
        n = self.placement.n_logical
        return torch.stack([torch.bincount(b[b >= 0].cpu(), minlength=n) for b in batches]).int()

    def expected(self, batches):
        """Every rank's ids, from the plan for the sum of all counts and the torch twin."""
        counts = self.counts(batches)
        total = counts.sum(0, dtype=torch.int32).to(DEVICE)
        return [self.answer(rank, batches[rank], counts, total) for rank in range(len(batches))]

    def answer(self, rank, idx, counts, total):
        alone, twin, views = self.alone[rank], self.twins[rank], self.twins[rank]._tables.views
        cumulative = alone.cumulative_shares(alone.solve(total).shares).cpu()
        if self.quotas == "global":
            start, holder = views["copy_start"], views["copy_slot"] // self.placement.slots_per_rank
            quotas, _ = reference.divide_quotas(counts, cumulative, start, holder, 1)
            cumulative = reference.shares_of_quotas(quotas[rank], counts[rank], start, rank)
        running = counts[rank][None]
        return twin.select(idx.cpu(), cumulative, running).to(DEVICE)


def ring_of_two(n_logical=24):
    load = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, n_logical))
    r2o = topologies.from_name("ring:2")
    return Placement.from_topology(r2o, n_logical + 2, n_logical, 2, workload=load)


def two_rings():
    load = torch.from_numpy(np.random.default_rng(2).lognormal(0, 1, 16))
    return Placement.from_topology(topologies.from_name("ring:2"), 20, 16, 4, workload=load)


def eplb_of_three():
    load = torch.from_numpy(np.random.default_rng(1).lognormal(0, 1, 18))
    return Placement.from_history(load, 3, redundant_per_rank=2)


def ids_for(team, tokens, seed, top_k=4, dtype=torch.int64):
    """Uneven ids with holes; the last rank has none in every third batch."""
    rng = np.random.default_rng(seed)
    n_ranks, n = team.placement.ep_size, team.placement.n_logical
    shape = (n_ranks, tokens, top_k)
    ids = torch.from_numpy((rng.random(shape) ** 2 * (n + 1)).astype(np.int64) - 1)
    batches = list(ids.to(dtype).to(DEVICE))
    if seed % 3 == 2:
        batches[-1] = batches[-1][:0]
    return batches


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
    team = Team(make(), quotas)
    n_ranks = team.placement.ep_size
    epochs = 3 if quotas == "local" and n_ranks < 4 else 2
    for epoch in range(1, epochs + 1):
        dtype = torch.int32 if epoch == 2 else torch.int64
        batches = ids_for(team, 20, seed=epoch, dtype=dtype)
        counts, expected = team.counts(batches), team.expected(batches)
        # On a CPU one rank runs after the other: those to come are there already.
        for rank in range(n_ranks):
            team.ranks.publish(rank, counts[rank], epoch)
        for rank, balancer in enumerate(team.balancers):
            # But for its own, which it has to send.
            sent = [team.ranks.slots(at)[epoch % 2, rank] for at in range(n_ranks)]
            messages = torch.stack(sent)
            for row in sent:
                row.zero_()
            out = balancer.run(batches[rank])
            assert out.dtype == dtype and torch.equal(out, expected[rank])
            assert torch.equal(torch.stack(sent), messages)
            balancer.check()
            solved = epoch * team.placement.n_group
            assert int(balancer.solves) == int(balancer.certified) == solved
    if quotas == "global":
        kept, _, everything = (sum(int(b.traffic[i]) for b in team.balancers) for i in range(3))
        assert 0 < kept < everything


def test_warmup_takes_no_part_in_the_group():
    """Warm-up writes nothing to the memory of the group, and changes no counter."""
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
    """After a failed exchange ids are those of the even split, and later calls raise."""
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


@pytest.mark.gpu
class TestOnOneGpu:
    """Ranks as streams of one GPU, all of them under way at once."""

    N_RANKS, N = 4, 256

    def batches(self, epochs):
        return torch.randint(
            0, 1000, (epochs, self.N_RANKS, self.N), dtype=torch.int32, device=DEVICE
        )

    @pytest.mark.parametrize("gather", [False, True])
    def test_many_epochs_with_delays(self, gather):
        epochs = 2000
        ranks = Ranks(self.N_RANKS, self.N, timeout=20.0)
        ranks.endpoints[0].prepare(self.N)
        streams = [torch.cuda.Stream() for _ in range(self.N_RANKS)]
        counts = self.batches(epochs)
        totals = torch.full_like(counts, -9)
        rows = torch.full((epochs, self.N_RANKS, self.N), -9, dtype=torch.int32, device=DEVICE)
        delays = torch.randint(0, 20000, (epochs, self.N_RANKS)) * (
            torch.rand(epochs, self.N_RANKS) < 0.1
        )
        torch.cuda.synchronize()
        for epoch in range(epochs):
            for rank, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    if delays[epoch, rank]:
                        torch.cuda._sleep(int(delays[epoch, rank]))
                    ranks.endpoints[rank].exchange(
                        counts[epoch, rank], ranks.version, totals[epoch, rank],
                        rows[epoch] if gather and rank == 1 else None, kernels.FIRST_CHANNEL,
                    )  # fmt: skip
        torch.cuda.synchronize()
        assert not any(endpoint.failed() for endpoint in ranks.endpoints)
        expected = counts.sum(1, dtype=torch.int32, keepdim=True)
        assert torch.equal(totals, expected.expand_as(totals))
        if gather:
            assert torch.equal(rows, counts)

    def test_graph_replays(self):
        ranks = Ranks(self.N_RANKS, self.N, timeout=20.0)
        ranks.endpoints[0].prepare(self.N)
        streams = [torch.cuda.Stream() for _ in range(self.N_RANKS)]
        per_graph = 5
        counts = self.batches(per_graph)
        totals = torch.full_like(counts, -9)
        graphs = []
        for rank, stream in enumerate(streams):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for epoch in range(per_graph):
                    ranks.endpoints[rank].exchange(
                        counts[epoch, rank],
                        ranks.version,
                        totals[epoch, rank],
                        None,
                        kernels.FIRST_CHANNEL,
                    )
            graphs.append(graph)
        for _ in range(200):
            counts.copy_(self.batches(per_graph))
            totals.fill_(-9)
            torch.cuda.synchronize()
            for rank in torch.randperm(self.N_RANKS).tolist():
                with torch.cuda.stream(streams[rank]):
                    torch.cuda._sleep(int(torch.randint(0, 20000, ())))
                    graphs[rank].replay()
            torch.cuda.synchronize()
            expected = counts.sum(1, dtype=torch.int32, keepdim=True)
            assert torch.equal(totals, expected.expand_as(totals))
        assert not any(endpoint.failed() for endpoint in ranks.endpoints)

    def test_two_channels_in_opposite_order(self):
        ranks = Ranks(2, self.N, timeout=20.0)
        ranks.endpoints[0].prepare(self.N)
        streams = [[torch.cuda.Stream() for _ in range(2)] for _ in range(2)]
        counts = torch.randint(0, 99, (50, 2, 2, self.N), dtype=torch.int32, device=DEVICE)
        totals = torch.full_like(counts, -9)
        torch.cuda.synchronize()
        for step in range(len(counts)):
            for rank in (0, 1):
                for channel in (rank, 1 - rank):
                    with torch.cuda.stream(streams[rank][channel]):
                        ranks.endpoints[rank].exchange(
                            counts[step, rank, channel], ranks.version,
                            totals[step, rank, channel], None, kernels.Channel(channel),
                        )  # fmt: skip
        torch.cuda.synchronize()
        expected = counts.sum(1, dtype=torch.int32, keepdim=True)
        assert torch.equal(totals, expected.expand_as(totals))

    def test_late_within_the_bound_and_missing_beyond_it(self):
        timeout = 0.5
        ranks = Ranks(2, self.N, timeout)
        ranks.endpoints[0].prepare(self.N)
        streams = [torch.cuda.Stream() for _ in range(2)]
        counts = torch.ones(self.N, dtype=torch.int32, device=DEVICE)
        torch.cuda.synchronize()

        def exchange(rank):
            with torch.cuda.stream(streams[rank]):
                return ranks.exchange(rank, counts)[0]

        first = exchange(0)
        time.sleep(timeout / 3)
        second = exchange(1)
        torch.cuda.synchronize()
        assert (first == 2).all() and (second == 2).all()
        begun = time.monotonic()
        missing = exchange(0)
        torch.cuda.synchronize()
        took = time.monotonic() - begun
        assert timeout * 0.9 < took < timeout + 1
        assert (missing == FAILED).all()
        error = error_of(ranks, 0)
        assert error.ranks == (1,) and error.epoch == 2
        # Rank 0 did send its counts of that epoch, so rank 1 gets a right sum, once.
        late = exchange(1)
        torch.cuda.synchronize()
        assert (late == 2).all()
        begun = time.monotonic()
        again, next_one = exchange(0), exchange(1)
        torch.cuda.synchronize()
        assert time.monotonic() - begun < timeout + 1
        assert (again == FAILED).all() and (next_one == FAILED).all()
        assert error_of(ranks, 1).ranks == (0,) and error_of(ranks, 1).epoch == 3


@pytest.mark.gpu
class TestPipelinesOnOneGpu:
    """Whole runs of several ranks as streams of one GPU."""

    TOKENS, TOP_K = 4096, 8

    def start(self, make, quotas="local", timeout=20.0):
        """Team, its streams, some batches of every rank, and their answers."""
        team = Team(make(), quotas, timeout)
        streams = [torch.cuda.Stream() for _ in team.balancers]
        batches = [ids_for(team, self.TOKENS, seed, self.TOP_K) for seed in range(6)]
        expected = [team.expected(batch) for batch in batches]
        torch.cuda.synchronize()
        return team, streams, batches, expected

    @staticmethod
    def delay():
        if torch.rand(()) < 0.2:
            torch.cuda._sleep(int(torch.randint(0, 100_000, ())))

    @pytest.mark.parametrize("quotas", ["local", "global"])
    @pytest.mark.parametrize(
        "make", [partial(ring_of_two, 256), partial(ring_of_two, 64), eplb_of_three, two_rings]
    )
    def test_many_batches_with_delays(self, make, quotas):
        team, streams, batches, expected = self.start(make, quotas)
        wrong = torch.zeros(len(streams), dtype=torch.int64, device=DEVICE)
        torch.cuda.synchronize()
        for step in range(600):
            which = step % len(batches)
            for rank in torch.randperm(len(streams)).tolist():
                with torch.cuda.stream(streams[rank]):
                    self.delay()
                    out = team.balancers[rank].run(batches[which][rank])
                    wrong[rank] += (out != expected[which][rank]).any()
        for balancer in team.balancers:
            balancer.check()
            solved = 600 * team.placement.n_group
            assert int(balancer.solves) == int(balancer.certified) == solved
        assert wrong.tolist() == [0] * len(streams)

    @pytest.mark.parametrize("quotas", ["local", "global"])
    def test_graph_replays(self, quotas):
        team, streams, batches, expected = self.start(partial(ring_of_two, 256), quotas)
        full = [which for which, batch in enumerate(batches) if len(batch[-1])]
        static = [[b.clone() for b in batches[0]] for _ in range(3)]
        graphs, outs = [], []
        for rank, stream in enumerate(streams):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream):
                outs.append([team.balancers[rank].run(ids[rank]) for ids in static])
        for _ in range(100):
            drawn = [full[int(torch.randint(0, len(full), ()))] for _ in static]
            for ids, which in zip(static, drawn, strict=True):
                for rank in range(len(streams)):
                    ids[rank].copy_(batches[which][rank])
            torch.cuda.synchronize()
            for rank in torch.randperm(len(streams)).tolist():
                with torch.cuda.stream(streams[rank]):
                    self.delay()
                    graphs[rank].replay()
            torch.cuda.synchronize()
            for rank in range(len(streams)):
                for out, which in zip(outs[rank], drawn, strict=True):
                    assert torch.equal(out, expected[which][rank])
        for balancer in team.balancers:
            balancer.check()

    def test_two_channels_in_opposite_order(self):
        team, _, batches, expected = self.start(partial(ring_of_two, 256))
        streams = [[torch.cuda.Stream() for _ in range(2)] for _ in range(2)]
        for rank in range(2):
            for channel, stream in enumerate(streams[rank]):
                with torch.cuda.stream(stream):
                    team.balancers[rank].bind(channel)
        outs = [[[None, None], [None, None]] for _ in range(50)]
        for step in range(len(outs)):
            for rank in range(2):
                for channel in (rank, 1 - rank):
                    with torch.cuda.stream(streams[rank][channel]):
                        mine = batches[(step + channel) % len(batches)][rank]
                        outs[step][rank][channel] = team.balancers[rank].run(mine)
        torch.cuda.synchronize()
        for step, by_rank in enumerate(outs):
            for rank in range(2):
                for channel in range(2):
                    which = (step + channel) % len(batches)
                    assert torch.equal(by_rank[rank][channel], expected[which][rank])
        for balancer in team.balancers:
            balancer.check()

    def test_late_within_the_bound_and_missing_beyond_it(self):
        timeout = 0.5
        team, streams, batches, expected = self.start(partial(ring_of_two, 256), timeout=timeout)

        def run(rank):
            with torch.cuda.stream(streams[rank]):
                return team.balancers[rank].run(batches[0][rank])

        first = run(0)
        time.sleep(timeout / 3)
        second = run(1)
        torch.cuda.synchronize()
        assert torch.equal(first, expected[0][0]) and torch.equal(second, expected[0][1])
        begun = time.monotonic()
        missing = run(0)
        torch.cuda.synchronize()
        took = time.monotonic() - begun
        assert timeout * 0.9 < took < timeout + 1
        idx = batches[0][0]
        assert (missing[idx < 0] == -1).all()
        physical, logical = missing[idx >= 0].cpu(), idx[idx >= 0].cpu()
        assert torch.equal(team.placement.phy2log[physical].long(), logical)
        with pytest.raises(SyncError, match="epoch 2 ") as info:
            run(0)
        assert info.value.ranks == (1,)
        # Rank 0 did send its counts of that epoch, so rank 1 gets a right answer, once.
        late = run(1)
        torch.cuda.synchronize()
        assert torch.equal(late, expected[0][1])
        run(1)
        with pytest.raises(SyncError, match="epoch 3 ") as info:
            team.balancers[1].check()
        assert info.value.ranks == (0,)

    def test_the_next_kernel_is_not_there_while_a_rank_waits(self):
        """What a late rank needs can run: a waiting pipeline holds one program, not a GPU full."""
        timeout = 20.0
        team, streams, batches, expected = self.start(partial(ring_of_two, 256), timeout=timeout)
        # More of them than a GPU has room for, if they were there while rank 0 waits.
        many = torch.cuda.get_device_properties(DEVICE).multi_processor_count * 64
        with torch.cuda.stream(streams[0]):
            first = team.balancers[0].run(batches[0][0], n_sms=many)
        time.sleep(0.3)
        with torch.cuda.stream(streams[1]):
            second = team.balancers[1].run(batches[0][1])
        torch.cuda.synchronize()
        for balancer in team.balancers:
            balancer.check()
        assert torch.equal(first, expected[0][0]) and torch.equal(second, expected[0][1])
