"""Exchange of counts by torch.distributed: NCCL on a GPU, gloo on a CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lplb_triton._layout import (
    GATHERED_HEADER_WORDS,
    MAX_COUNT,
    NO_COUNT,
)
from lplb_triton.sync._base import Communicator, SyncError, group_timeout
from lplb_triton.sync._faults import fault_error, mismatch_error
from lplb_triton.sync._gather import gather_rows

# Words of a message before the counts: epoch (unused, since the library keeps the order), version,
# number of counts, unused.
HEADER = GATHERED_HEADER_WORDS


class DistributedCommunicator(Communicator):
    """All-gather by torch.distributed; the reference for the results of the other back ends."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: float | None,
        ranks_per_node: int,
    ) -> None:
        backend = dist.get_backend(group)
        if timeout is not None and device.type == "cuda":
            raise ValueError(
                f"timeout must be None for torch.distributed on a GPU: {backend} waits as long as "
                "its process group says"
            )
        bound = group_timeout(group, device) if timeout is None else timeout
        super().__init__(group, device, bound, ranks_per_node)
        self.kind = f"torch.distributed({backend})"
        self._flat = backend == "nccl"
        self.whole_group = group
        """Ranks that report a failed call: the EP group, of which ``group`` may be a part."""
        self._calls = 0
        self._headers: dict[int, torch.Tensor] = {}
        self._error: SyncError | None = None
        self._status = torch.zeros(1, dtype=torch.int64, device="cpu")
        if device.type == "cuda":
            from lplb_triton import kernels

            words = kernels.status_words(self.n_ranks)
            self._status = torch.zeros(words, dtype=torch.int64, device="cpu", pin_memory=True)
        self._status_view = self._status.numpy()

    def exchange(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None = None,
    ) -> None:
        """See `Communicator.exchange`."""
        self._check_open()
        self._raise_on_failure()
        self._calls += 1
        n = counts.numel()
        header = self._headers.get(n)
        if header is None:
            words = torch.tensor([0, 0, n, 0], dtype=torch.int32, device="cpu")
            header = self._headers[n] = words.to(self.device)
        message = torch.cat((header[:1], version, header[2:], counts))
        rows = torch.empty(self.n_ranks, HEADER + n, dtype=torch.int32, device=self.device)
        if self.device.type == "cuda":
            if self._flat:
                dist.all_gather_into_tensor(rows, message, group=self.group)
            else:
                dist.all_gather(list(rows.unbind(0)), message, group=self.group)
            from lplb_triton import kernels

            kernels.sum_gathered(counts, total, gathered, rows, version, self._status, self.rank)
            return
        self._gather_on_host(rows, message)
        wrong = (rows[:, 1:3] != message[1:3]).any(1)
        if wrong.any():
            theirs = {
                self.members[r]: tuple(rows[r, 1:3].tolist())
                for r in torch.nonzero(wrong).flatten().tolist()
            }
            self._error = mismatch_error(self, self._calls, theirs, (int(version), n))
            raise self._error
        everyone = rows[:, HEADER:].long()
        sums = everyone.sum(0)
        invalid = (everyone < 0).any(0) | (sums > MAX_COUNT)
        total.copy_(torch.where(invalid, NO_COUNT, sums))
        if gathered is not None:
            gathered.copy_(rows[:, HEADER:])

    def _gather_on_host(self, rows: torch.Tensor, message: torch.Tensor) -> None:
        """Gather within the time-out; if that fails, raise naming the ranks that are missing."""
        try:
            gather_rows(
                rows, message, self.group, timeout=self.timeout, call=repr(self),
                epoch=self._calls, key="failed", members=self.members,
                whole_group=self.whole_group,
            )  # fmt: skip
        except SyncError as error:
            self._error = error
            raise

    def _raise_on_failure(self) -> None:
        """Raise the error of the first call that failed, if the host can see one already."""
        if self._error is not None:
            raise self._error
        if self._status_view[0]:
            self._error = fault_error(self, self._status_view)
            raise self._error

    def check(self) -> None:
        """See `Communicator.check`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._raise_on_failure()

    def bind(self, channel: int) -> None:
        """Do nothing: torch.distributed has one order for the calls of all streams."""

    def prepare(self, n: int) -> None:
        """See `Communicator.prepare`."""
        if self.device.type == "cuda":
            from lplb_triton import kernels

            # With the header made in advance, capturing a graph needs no copy from the host.
            words = torch.tensor([0, 0, n, 0], dtype=torch.int32, device="cpu")
            self._headers[n] = words.to(self.device)
            counts = torch.zeros(n, dtype=torch.int32, device=self.device)
            rows = torch.zeros(1, HEADER + n, dtype=torch.int32, device=self.device)
            rows[0, 2] = n
            version = torch.zeros(1, dtype=torch.int32, device=self.device)
            for gathered in (None, torch.empty_like(counts).reshape(1, n)):
                kernels.sum_gathered(
                    counts, torch.empty_like(counts), gathered, rows, version, self._status, 0
                )

    def failed(self) -> bool:
        """See `Communicator.failed`."""
        return self._error is not None or bool(self._status_view[0])

    def _release(self, failed: bool) -> None:
        """Do nothing: the ranks share no memory."""
