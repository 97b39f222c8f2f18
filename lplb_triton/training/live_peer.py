"""One rank's side of pulls and returns of gradients in memory that all ranks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lplb_triton._layout import (
    FAULT_MISMATCH,
    LIVE_FINISHED,
    LIVE_GRADED,
    LIVE_PUBLISHED,
    LIVE_SIGNAL_ROWS,
    LIVE_STATE_WORDS,
    LIVE_STEP,
    LIVE_TAKEN,
    MAX_RANKS,
    STATUS_CHANNEL,
    STATUS_EPOCH,
    STATUS_FAULT,
    STATUS_FIELDS,
    STATUS_FIRST,
)
from lplb_triton._torch_op import outside_modes
from lplb_triton.sync import SyncError
from lplb_triton.training.live_engines import HostTables, PlanReader, copy_live_rows
from lplb_triton.training.live_rows import DEFAULT_SMS, LiveRows

__all__ = ["LivePeer", "LiveTables", "fault_error"]

# Gradients return when no products run beside, so more programs write and add them: so many times
# those that copy.
WRITERS = 4
ADDERS = 2

# What a late rank did not do, by the kind of signal that did not come.
_AWAITED = {
    LIVE_PUBLISHED: "publish the weights of step {}",
    LIVE_FINISHED: "end step {} of its pulls",
    LIVE_GRADED: "return the gradients of its live slots, return {},",
    LIVE_TAKEN: "add up the gradients returned two calls before return {}",
}


class LiveTables:
    """What kernels need to know of a layer: homes of its experts, and where its weights are.

    Parameters
    ----------
    rows : LiveRows
        Sizes of the rows of each tensor.
    homes : torch.Tensor
        ``[n_logical, 2]`` int32 on the device, rank and static slot of each expert's original.
    addresses : sequence of sequence of int
        By tensor, the address of its first row on every rank.
    number : int
        Of the layer, the same on every rank.
    sources : sequence of sequence of torch.Tensor or None
        The same places as int32 memory, for copies that the host starts.
    """

    def __init__(
        self,
        rows: LiveRows,
        homes: torch.Tensor,
        addresses: Sequence[Sequence[int]],
        number: int,
        sources: Sequence[Sequence[torch.Tensor]] | None = None,
    ) -> None:
        from lplb_triton import kernels

        self.rows, self.homes, self.number = rows, homes, number
        self.copies = kernels.make_copy_table(rows.units, rows.offsets, addresses, homes.device)
        self.on_host: HostTables | None = None
        if sources is not None:
            self.on_host = HostTables(homes.tolist(), sources, rows.slots)


class LivePeer:
    """Signals of this rank, and the launches; nothing here waits on the host.

    Parameters
    ----------
    addresses : sequence of int
        Of every rank's signals, `LivePeer.words` int64 each, at first zero.
    returned : sequence of int
        Of every rank's memory for gradients, two halves of ``LiveRows.gradient_units``.
    rank : int
        This rank's number.
    device : torch.device
        Of all tensors.
    slots : int
        Live slots of each rank.
    timeout : float
        Bound on each wait, in seconds.
    n_sms : int
        Programs that copy; 0 for copy engines.
    """

    def __init__(
        self,
        addresses: Sequence[int],
        returned: Sequence[int],
        rank: int,
        device: torch.device,
        slots: int,
        timeout: float,
        n_sms: int,
    ) -> None:
        from lplb_triton import kernels

        self._kernels = kernels
        self.rank, self.device, self.slots, self.n_sms = rank, device, slots, n_sms
        n_ranks = len(addresses)
        status = torch.zeros(
            kernels.status_words(n_ranks),
            dtype=torch.int64,
            device="cpu",
            pin_memory=device.type == "cuda",
        )
        # Kernels write to this host memory, so the host reads it without a wait for the device.
        self.status = status.numpy()
        self._signals = kernels.Signals(
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(LIVE_STATE_WORDS, dtype=torch.int64, device=device),
            status,
            rank,
            max(1, round(timeout * 1000)),
        )
        self._returned = torch.tensor(returned, dtype=torch.int64, device=device)
        self._reader = PlanReader(device, slots)
        words = kernels.list_words(n_ranks, slots)
        self._lists = torch.zeros(words, dtype=torch.int32, device=device)

    @property
    def _adders(self) -> int:
        """Programs from which those that write and add gradients are counted."""
        return self.n_sms or DEFAULT_SMS

    @staticmethod
    def words() -> int:
        """Return the number of 64-bit words of a rank's signals."""
        return LIVE_SIGNAL_ROWS * MAX_RANKS

    def failed(self) -> bool:
        """Whether a kernel has reported a fault."""
        return bool(self.status[STATUS_FAULT])

    def pull(
        self,
        tables: LiveTables,
        plan: torch.Tensor,
        live: torch.Tensor,
        *,
        held: torch.Tensor | None = None,
        compare: bool = True,
        experts: tuple[int, ...] | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> tuple[int, ...] | None:
        """Copy what ``plan`` names to the slots ``live``.

        With ``n_sms`` of 0 the host waits for the plan, unless it is given this rank's ``experts``.

        Parameters
        ----------
        tables : LiveTables
            Of the layer.
        plan : torch.Tensor
            ``[n_ranks, slots]`` int32.
        live : torch.Tensor
            ``[LiveRows.words]`` int32, of all tensors' slots.
        held : torch.Tensor or None
            ``[slots]`` int32, what the slots hold; is updated.
        compare : bool
            Whether to compare plans with other ranks, which all must do in the same calls.
        experts : tuple of int or None
            What an earlier call for the same plan has returned.
        stream : torch.cuda.Stream or None
            Where to copy, by default the current stream.

        Returns
        -------
        tuple of int or None
            With ``n_sms`` of 0, this rank's part of the plan.
        """

        def launch() -> None:
            self._kernels.pull_rows(
                self._signals, plan, tables.homes, held, tables.number, tables.copies, live,
                self.n_sms, compare=compare, stream=None if stream is None else stream.cuda_stream,
            )  # fmt: skip

        if self.n_sms:
            launch()
            return None
        with outside_modes(), torch.no_grad(), torch.cuda.stream(stream):
            if experts is not None:
                launch()
            else:
                # Ahead of the kernel, so that the host doesn't wait for other ranks.
                self._reader.start(plan[self.rank])
                launch()
                experts = self._reader.finish()
            assert tables.on_host is not None
            copy_live_rows(tables.rows, tables.on_host, experts, live, resident=held is not None)
        return experts

    def begin_return(
        self, tables: LiveTables, plan: torch.Tensor, grads: Sequence[torch.Tensor]
    ) -> None:
        """Write gradients of this rank's live slots, ``[slots, ...]`` each, for others to read."""
        rows = tables.rows
        for number, grad in zip(rows.trained, grads, strict=True):
            self._kernels.write_gradients(
                grad, self._signals, plan, self._returned, *rows.gradient_place(number),
                WRITERS * self._adders,
            )  # fmt: skip

    def exchange(
        self, tables: LiveTables, plan: torch.Tensor, *, send: bool = True, wait: bool = True
    ) -> None:
        """Say that these gradients are written, and wait for those that this rank adds up."""
        self._kernels.exchange_returns(
            self._signals, plan, tables.homes, self._lists, send=send, wait=wait
        )

    def end_return(self, tables: LiveTables, own: Sequence[torch.Tensor]) -> None:
        """Add the gradients to ``own``, ``[static_per_rank, ...]`` each, and say so."""
        rows = tables.rows
        for number, grad in zip(rows.trained, own, strict=True):
            self._kernels.add_gradients(
                grad, self._lists, self._signals, self._returned, self.slots,
                *rows.gradient_place(number), ADDERS * self._adders,
                last=number == rows.trained[-1],
            )  # fmt: skip

    def enter_update(self, *, send: bool = True, wait: bool = True) -> None:
        """Say that this rank's pulls of this step are over, and wait until every rank's are."""
        self._kernels.meet(self._signals, LIVE_FINISHED, LIVE_STEP, more=1, send=send, wait=wait)

    def exit_update(self) -> None:
        """Begin the next step, and publish its weights."""
        self._kernels.meet(self._signals, LIVE_PUBLISHED, LIVE_STEP, advance=1)

    def warm(self, rows: LiveRows) -> None:
        """Compile and load all kernels, by one round of this rank alone.

        A kernel that is loaded while another waits for a rank may have to wait for that one's end.
        """
        on, n_ranks = self.device, self._signals.addresses.numel()
        small = rows.shrink()
        # All ranks' signals are this memory, and all that is waited for has come.
        signals = torch.full((self.words(),), 1 << 40, dtype=torch.int64, device=on)
        half = torch.zeros(max(4, 8 * small.gradient_units), dtype=torch.int32, device=on)
        solo = LivePeer(
            [signals.data_ptr()] * n_ranks, [half.data_ptr()] * n_ranks, self.rank, on,
            self.slots, 1.0, min(1, self.n_sms),
        )  # fmt: skip
        live = torch.zeros(small.words, dtype=torch.int32, device=on)
        sources = torch.zeros_like(live)
        homes = torch.full((1, 2), self.rank, dtype=torch.int32, device=on)
        homes[:, 1] = 0
        addresses = [[sources.data_ptr() + 16 * offset] * n_ranks for offset in small.offsets]
        places = [[sources[4 * offset :]] * n_ranks for offset in small.offsets]
        tables = LiveTables(small, homes, addresses, 0, places)
        plan = torch.full((n_ranks, self.slots), -1, dtype=torch.int32, device=on)
        plan[self.rank] = 0
        for held in (None, torch.full((self.slots,), -1, dtype=torch.int32, device=on)):
            for compare in (True, False):
                solo.pull(tables, plan, live, held=held, compare=compare)
        grads = [small.view(live, number).contiguous() for number in small.trained]
        solo.begin_return(tables, plan, grads)
        solo.exchange(tables, plan)
        solo.end_return(tables, [grad[:1] for grad in grads])
        solo.enter_update()
        solo.exit_update()
        if on.type == "cuda":
            torch.cuda.synchronize(on)


def fault_error(peer: LivePeer, name: str, timeout: float) -> SyncError:
    """Return the error for the fault that a kernel has reported.

    ``name`` is that of the object, for messages; ``timeout`` is in seconds.
    """
    if peer.device.type == "cuda":
        # The details are complete only after this wait, which is bounded, as every wait is.
        torch.cuda.synchronize(peer.device)
    status = peer.status
    number, row = int(status[STATUS_EPOCH]), int(status[STATUS_CHANNEL])
    by_rank = status[STATUS_FIRST:].reshape(STATUS_FIELDS, -1)
    blamed = tuple(int(rank) for rank in by_rank[0].nonzero()[0])
    where = f"{name} failed on rank {peer.rank}: ranks {list(blamed)}"
    if int(status[STATUS_FAULT]) == FAULT_MISMATCH:
        return SyncError(
            f"{where} made pull {number} by another plan or for another layer: all ranks pull the "
            "same layers in the same order, by the plan of the same batch",
            blamed,
            number,
        )
    what = _AWAITED[row].format(number)
    return SyncError(f"{where} did not {what} within {timeout:g} s", blamed, number)
