"""Ranks that share one GPU, whose kernels run at the same time."""

import time
from functools import partial

import pytest
import torch
from helpers.peers import (
    DEVICE,
    FAILED,
    Ranks,
    Team,
    eplb_of_three,
    error_of,
    ids_for,
    ring_of_two,
    two_rings,
)

from lplb_triton import kernels
from lplb_triton.sync import SyncError


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
        """Sums and rows of 2000 epochs are right although ranks are late at random."""
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
        """Graphs of five exchanges give exact sums in any order of the ranks' replays."""
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
        """Two channels give exact sums although ranks use them in opposite orders."""
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
        """A rank late within the bound is summed; a later one is named."""
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
        """Ids of 600 batches are right and certified although ranks are late at random."""
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
        """Graphs of three runs give right ids for new tokens."""
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
        """Runs on two channels give right ids in opposite orders."""
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
        """A late rank's run is right within the bound, then fails."""
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
