"""Sums of counts within each domain first, then across domains."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lplb_triton._layout import MAX_COUNT, NO_COUNT
from lplb_triton.sync._base import Communicator
from lplb_triton.sync._distributed import DistributedCommunicator


class HierarchicalCommunicator(Communicator):
    """Two communicators, one after the other.

    ``inner`` joins the consecutive ranks of a domain, ``outer`` the ranks with the same number
    in every domain. Both belong to this one, and are closed with it. Their errors name ranks by
    their numbers in ``group``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        ranks_per_node: int,
        inner: Communicator,
        outer: Communicator,
    ) -> None:
        super().__init__(group, device, max(inner.timeout, outer.timeout), ranks_per_node)
        if inner.n_ranks * outer.n_ranks != self.n_ranks:
            raise ValueError(
                f"inner and outer must make up {self.n_ranks} ranks, got {inner.n_ranks} times "
                f"{outer.n_ranks}"
            )
        self.kind = f"hierarchical({inner!r} x {inner.n_ranks}, {outer!r} x {outer.n_ranks})"
        self.waits_on_device = inner.waits_on_device or outer.waits_on_device
        size = inner.n_ranks
        first = self.rank - self.rank % size
        inner.members = tuple(range(first, first + size))
        outer.members = tuple(range(self.rank % size, self.n_ranks, size))
        for part in (inner, outer):
            if isinstance(part, DistributedCommunicator):
                part.whole_group = group
        self._inner, self._outer = inner, outer

    def exchange(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None = None,
    ) -> None:
        """See `Communicator.exchange`."""
        self._check_open()
        if self.failed():
            # After a failure across domains, the ranks of a domain mustn't wait for one another.
            self.check()
        n, size = counts.numel(), self._inner.n_ranks
        partial = torch.empty_like(counts)
        if gathered is None:
            self._inner.exchange(counts, version, partial)
            self._outer.exchange(partial, _version_of_sum(version, partial), total)
            return
        domain = torch.empty(size, n, dtype=torch.int32, device=self.device)
        self._inner.exchange(counts, version, partial, domain)
        by_rank = torch.empty(size * n, dtype=torch.int32, device=self.device)
        self._outer.exchange(
            domain.reshape(-1),
            _version_of_sum(version, partial),
            by_rank,
            gathered.view(-1, size * n),
        )
        parts = by_rank.view(size, n).long()
        sums = parts.sum(0)
        invalid = (parts < 0).any(0) | (sums > MAX_COUNT)
        total.copy_(torch.where(invalid, NO_COUNT, sums))

    def bind(self, channel: int) -> None:
        """See `Communicator.bind`."""
        self._inner.bind(channel)
        self._outer.bind(channel)

    def prepare(self, n: int) -> None:
        """See `Communicator.prepare`."""
        self._inner.prepare(n)
        self._outer.prepare(n)
        self._outer.prepare(self._inner.n_ranks * n)

    def failed(self) -> bool:
        """See `Communicator.failed`."""
        return self._inner.failed() or self._outer.failed()

    def check(self) -> None:
        """See `Communicator.check`."""
        self._inner.check()
        self._outer.check()

    def _release(self, failed: bool) -> None:
        if failed:
            # If one of the two has failed, closing the other must be local too.
            self._inner.abandon()
            self._outer.abandon()
        else:
            self._outer.close()
            self._inner.close()


def _version_of_sum(version: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
    """Return the version for the second exchange.

    If the domain's exchange failed on the device it is a wrong one, so that other ranks refuse the
    sum. Single counts without a sum are no failure. On a CPU a failed exchange has raised.
    """
    if partial.device.type == "cpu":
        return version
    return torch.where((partial < 0).all(), version + 1, version)
