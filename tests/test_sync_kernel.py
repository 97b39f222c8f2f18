"""The peer-to-peer kernel: one process stands for several ranks, on a CPU step by step."""

import time

import pytest
import torch

from lplb_triton import kernels
from lplb_triton.sync import SyncError
from lplb_triton.sync._distributed import device_error
from lplb_triton.sync._peer import CHANNELS, Endpoint

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FAILED = -2


class Ranks:
    """Endpoints of several ranks over buffers of one device."""

    def __init__(self, n_ranks, capacity, timeout, device=DEVICE):
        words = Endpoint.words(n_ranks, capacity)
        self.n_ranks, self.capacity = n_ranks, capacity
        self.memory = torch.zeros(n_ranks, words, dtype=torch.int32, device=device)
        addresses = [row.data_ptr() for row in self.memory]
        self.endpoints = [
            Endpoint(addresses, rank, device, capacity, timeout) for rank in range(n_ranks)
        ]
        self.version = torch.full((1,), 77, dtype=torch.int32, device=device)

    def area(self, at, channel):
        """Flags and slots of a channel in one rank's buffer, as docs/sync.md lays them out."""
        words = kernels.channel_words(self.n_ranks, self.capacity)
        area = self.memory[at, channel * words : (channel + 1) * words]
        flags, slots = area[: kernels.MAX_RANKS], area[kernels.MAX_RANKS :]
        return flags, slots.view(2, self.n_ranks, kernels.HEADER_WORDS + self.capacity)

    def publish(self, rank, counts, epoch, channel=0, version=77, to=None):
        """What the kernel of ``rank`` does first, by hand."""
        for at in range(self.n_ranks) if to is None else to:
            flags, slots = self.area(at, channel)
            row = slots[epoch % 2, rank]
            n = len(counts)
            row[:4] = torch.tensor([epoch, version, n, 0], dtype=torch.int32)
            row[4 : 4 + n] = counts
            flags[rank] = epoch

    def exchange(self, rank, counts, channel=0, gather=True):
        """Run one rank's kernel; returns the total and everybody's counts."""
        on = self.memory.device
        total = torch.full((len(counts),), -9, dtype=torch.int32, device=on)
        gathered = None
        if gather:
            gathered = torch.full((self.n_ranks, len(counts)), -9, dtype=torch.int32, device=on)
        self.endpoints[rank].exchange(counts.to(on), self.version, total, gathered, channel)
        return total, gathered


class Sync:
    """What an error needs to know of a communicator."""

    def __init__(self, rank, timeout):
        self.rank, self.timeout, self.device = rank, timeout, DEVICE

    def __repr__(self):
        return "p2p(test)"


def error_of(ranks, rank):
    return device_error(Sync(rank, 0.05), ranks.endpoints[rank].status_view)


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
                # Everything this rank sends is wiped out first, except to itself.
                for at in range(n_ranks):
                    flags, slots = ranks.area(at, channel)
                    slots[epoch % 2, rank] = -1
                    flags[rank] = epoch - 1
                total, gathered = ranks.exchange(rank, counts[rank], channel, gather)
                assert torch.equal(total.cpu(), counts.sum(0, dtype=torch.int32))
                if gather:
                    assert torch.equal(gathered.cpu(), counts)
                for at in range(n_ranks):
                    _, slots = ranks.area(at, channel)
                    # Words behind the counts are not part of the message.
                    slots[epoch % 2, rank, 4 + n :] = 0
                assert torch.equal(ranks.memory, image)
    assert not any(endpoint.failed() for endpoint in ranks.endpoints)


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


@pytest.mark.parametrize("what", ["version", "size", "epoch"])
def test_another_call_is_no_part_of_the_sum(what):
    ranks = Ranks(3, 8, timeout=0.05)
    counts = torch.arange(1, 9, dtype=torch.int32)
    for rank in range(3):
        ranks.publish(rank, counts, 1)
    _, slots = ranks.area(0, 0)
    slots[1, 2, {"epoch": 0, "version": 1, "size": 2}[what]] = 6
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


def test_two_calls_at_once_on_one_channel_are_found():
    ranks = Ranks(1, 8, timeout=0.05)
    counts = torch.ones(8, dtype=torch.int32)
    ranks.endpoints[0]._gates[3] = 1
    total, _ = ranks.exchange(0, counts, channel=3)
    assert (total == FAILED).all() and "bind" in str(error_of(ranks, 0))


def test_epochs_may_wrap_around():
    ranks = Ranks(2, 8, timeout=0.05)
    last = 2**31 - 1
    for endpoint in ranks.endpoints:
        endpoint._epochs.fill_(last - 1)
    for flags in (ranks.area(at, 0)[0] for at in range(2)):
        flags[:2] = last - 1
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
                        rows[epoch] if gather and rank == 1 else None, 0,
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
                        counts[epoch, rank], ranks.version, totals[epoch, rank], None, 0
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
                            totals[step, rank, channel], None, channel,
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
