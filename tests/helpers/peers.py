"""Ranks of one process that exchange counts through the kernel, each with an endpoint."""

import numpy as np
import torch

from helpers.layout import message_word
from lplb_triton import Balancer, Placement, kernels, reference, topologies
from lplb_triton._layout import NO_COUNT
from lplb_triton.sync._channels import Channels
from lplb_triton.sync._faults import fault_error
from lplb_triton.sync._peer import Endpoint, PeerCommunicator

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


FAILED = NO_COUNT


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

    def row(self, at, sender, epoch, channel=0):
        """What ``sender`` writes in one rank's buffer in an epoch: its header and counts."""
        return self.slots(at, channel)[epoch % 2, sender]

    def publish(self, rank, counts, epoch, channel=0, version=77, to=None, opening=0):
        """What the kernel of ``rank`` does first, by hand."""
        call = len(counts) | opening << kernels.COUNT_BITS
        numbers = torch.cat([torch.tensor([version, call]), counts.long()])
        for at in range(self.n_ranks) if to is None else to:
            self.row(at, rank, epoch, channel)[: len(numbers)] = message_word(epoch, numbers)

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

    def __init__(self, rank, timeout, first=0):
        self.rank, self.timeout, self.device = rank, timeout, DEVICE
        self.members = range(first, first + 256)

    def __repr__(self):
        return "p2p(test)"


def error_of(ranks, rank, openings=None):
    status = ranks.endpoints[rank].status_view
    return fault_error(Sync(rank, 0.05), status, openings or {})


class Member(PeerCommunicator):
    """One of `Ranks` as a balancer's communicator: what it needs of one, and no process group."""

    def __init__(self, ranks, rank, timeout):
        self.kind, self.device, self.timeout = "p2p(test)", DEVICE, timeout
        self.rank, self.n_ranks, self.ranks_per_node = rank, ranks.n_ranks, 1
        self.members = range(ranks.n_ranks)
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
