"""Ranks of one process that pull each other's weights, each with a `LivePeer`."""

import torch

from lplb_triton.training.live_peer import LivePeer, LiveTables
from lplb_triton.training.live_rows import LiveRows, RowKind

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Pullers:
    """Several ranks over memory of one device; expert e is at home on rank ``e % n_ranks``.

    That home isn't the usual one on purpose: nothing but ``homes`` may say where an expert is.
    """

    def __init__(self, n_ranks, n_static, slots, kinds, timeout=0.05, n_sms=3):
        self.n_ranks, self.slots, self.n_static = n_ranks, slots, n_static
        self.rows = LiveRows([RowKind(*kind) for kind in kinds], slots)
        self.n_experts = n_ranks * n_static
        experts = torch.arange(self.n_experts)
        homes = torch.stack([experts % n_ranks, experts // n_ranks], 1)
        self.homes = homes.int().to(DEVICE)
        self.signals = torch.zeros(n_ranks, LivePeer.words(), dtype=torch.int64, device=DEVICE)
        units = max(1, self.rows.gradient_units)
        self.returned = torch.zeros(n_ranks, 2 * units * 4, dtype=torch.int32, device=DEVICE)
        per_rank = [4 * n_static * n for n in self.rows.units]
        self.sources = [torch.zeros(n_ranks, n, dtype=torch.int32, device=DEVICE) for n in per_rank]
        self.live = torch.zeros(n_ranks, self.rows.words, dtype=torch.int32, device=DEVICE)
        addresses = [[one.data_ptr() for one in source] for source in self.sources]
        self.tables = LiveTables(self.rows, self.homes, addresses, 3, self.sources)
        at = [row.data_ptr() for row in self.signals]
        back = [row.data_ptr() for row in self.returned]
        self.peers = [
            LivePeer(at, back, rank, DEVICE, slots, timeout, n_sms) for rank in range(n_ranks)
        ]

    def source(self, number, rank):
        """A tensor's rows on a rank, ``[n_static, ...]``."""
        return self.rows.view_rows(self.sources[number][rank], number, self.n_static, 0)

    def slots_of(self, number, rank):
        """A tensor's live slots on a rank, ``[slots, ...]``."""
        return self.rows.view(self.live[rank], number)

    def fill(self, seed=0):
        """Give every source other bytes."""
        generator = torch.Generator().manual_seed(seed)
        for source in self.sources:
            values = torch.randint(-(2**31), 2**31, source.shape, generator=generator)
            source.copy_(values.int())

    def plan(self, rows):
        """A plan on the device."""
        return torch.tensor(rows, dtype=torch.int32, device=DEVICE)

    def pull(self, plan, **options):
        for rank, peer in enumerate(self.peers):
            peer.pull(self.tables, plan, self.live[rank], **options)

    def give_back(self, plan, live, own):
        """Return gradients; by rank and trained tensor ``live`` and ``own``, which is added to."""
        for rank, peer in enumerate(self.peers):
            peer.begin_return(self.tables, plan, live[rank])
        for peer in self.peers:
            peer.exchange(self.tables, plan, wait=False)
        for rank, peer in enumerate(self.peers):
            peer.exchange(self.tables, plan, send=False)
            peer.end_return(self.tables, own[rank])
