"""Sending weights to slots, gradients back to originals, and experts to new ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from lplb_triton.training.checks import is_trained
from lplb_triton.training.routes import Routes, Traffic
from lplb_triton.training.rows import Index, Rows, parts_of, put_rows, take_rows
from lplb_triton.training.slots import Slots

__all__ = [
    "move_rows",
    "start_copies",
    "start_gradients",
    "start_sums",
    "start_weights",
]

# Parts of a message begin at multiples of so many bytes, so that they can be read as any dtype.
ALIGNMENT = 16


def move_rows(
    movable: Iterable[Rows], routes: Routes, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Move rows to the positions of other rows; messages are sent from ``device``."""
    for rows in movable:
        # All rows are read before the first is written, since they may swap positions.
        local = take_rows(rows, routes.local_from)
        message = None
        if routes.remote:
            out = take_rows(rows, routes.out).to(device)
            (message,) = Exchange([out], routes, group).wait()
        put_rows(rows, routes.local_to, local)
        if message is not None:
            put_rows(rows, routes.into, message)


def start_weights(
    params: Mapping[str, Rows], slots: Slots, routes: Routes, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Start copying originals to all slots; return a function that finishes it."""
    return start_copies(
        [(slots.weights[name], rows) for name, rows in params.items()], routes, group
    )


def start_copies(
    pairs: Sequence[tuple[torch.Tensor, Rows]],
    routes: Routes,
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Start copying rows to slots ``[n_slots, ...]``; return a function that finishes it."""
    exchange = None
    if routes.remote:
        out = [take_rows(rows, routes.out).to(weight.dtype) for weight, rows in pairs]
        exchange = Exchange(out, routes, group)
    if routes.local_from.host:
        for weight, rows in pairs:
            local = take_rows(rows, routes.local_from).to(weight.dtype)
            put_rows(weight, routes.local_to, local)

    def finish() -> None:
        if exchange is not None:
            for (weight, _), arrived in zip(pairs, exchange.wait(), strict=True):
                put_rows(weight, routes.into, arrived)

    return finish


def start_gradients(
    params: Mapping[str, Rows], slots: Slots, traffic: Traffic, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Start adding up the slots' gradients on the originals; return a function that finishes it."""
    trained = [(name, rows) for name, rows in params.items() if is_trained(rows)]
    grads = [slots.take_gradient(name, parts_of(rows)[0].dtype) for name, rows in trained]
    finish_sums = start_sums(grads, traffic, group)

    def finish() -> None:
        for (_, rows), total in zip(trained, finish_sums(), strict=True):
            _add_gradient(rows, traffic.summed, total)

    return finish


def start_sums(
    grads: Sequence[torch.Tensor], traffic: Traffic, group: dist.ProcessGroup | None
) -> Callable[[], list[torch.Tensor]]:
    """Start adding up slots' gradients; return a function that finishes and returns the sums.

    There is a sum ``[len(summed), ...]`` for each of ``grads`` ``[n_slots, ...]``, in at least
    float32. The order is fixed: slots of this rank first, then the others by slot number.
    """
    routes = traffic.gradient_routes
    exchange = None
    if routes.remote and grads:
        exchange = Exchange([take_rows(grad, routes.out) for grad in grads], routes, group)
    totals = []
    for grad in grads:
        total = torch.zeros(
            (len(traffic.summed.host), *grad.shape[1:]),
            dtype=torch.promote_types(grad.dtype, torch.float32),
            device=grad.device,
        )
        _add_rows(total, grad, traffic.local_rounds)
        totals.append(total)

    def finish() -> list[torch.Tensor]:
        if exchange is not None:
            for total, arrived in zip(totals, exchange.wait(), strict=True):
                _add_rows(total, arrived, traffic.arriving_rounds)
        return totals

    return finish


def _add_rows(
    total: torch.Tensor, rows: torch.Tensor, rounds: Iterable[tuple[Index, Index]]
) -> None:
    """Add rows to those of ``total``, round by round."""
    for source, target in rounds:
        total.index_add_(0, target.device, take_rows(rows, source).to(total.dtype))


def _add_gradient(rows: Rows, index: Index, total: torch.Tensor) -> None:
    """Add ``total`` to the gradients of the originals' rows ``index``; the others get zeros."""
    if isinstance(rows, torch.Tensor):
        if rows.grad is None and len(index.host) == len(rows):
            rows.grad = total.to(rows.dtype)
            return
        if rows.grad is None:
            rows.grad = torch.zeros_like(rows)
        rows.grad.index_add_(0, index.device, total.to(rows.grad.dtype))
        return
    for row, value in zip(index.host, total, strict=True):
        param = rows[row]
        if param.grad is None:
            param.grad = value.to(param.dtype)
        else:
            param.grad += value.to(param.grad.dtype)
    for param in rows:
        if param.grad is None:
            param.grad = torch.zeros_like(param)


class Exchange:
    """Rows of several tensors under way to their ranks, in one message per pair of ranks.

    Parameters
    ----------
    parts : sequence of torch.Tensor
        ``[rows, ...]`` each, the rows to send, grouped by peer.
    routes : Routes
        How many rows go to, and come from, each rank.
    group : torch.distributed.ProcessGroup or None
        Only None if no rank sends anything.
    """

    def __init__(
        self, parts: Sequence[torch.Tensor], routes: Routes, group: dist.ProcessGroup | None
    ) -> None:
        self._kinds = [(part.shape[1:], part.dtype) for part in parts]
        self._widths = [
            -(-part.shape[1:].numel() * part.element_size() // ALIGNMENT) * ALIGNMENT
            for part in parts
        ]
        width = sum(self._widths)
        # Rows are sent as bytes, so that every back end can send every dtype.
        rows = [_as_bytes(part, w) for part, w in zip(parts, self._widths, strict=True)]
        message = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
        self._received = message.new_empty((sum(routes.in_counts), width))
        self._message = message  # stays until it is sent
        self._work = dist.all_to_all_single(
            self._received.view(-1),
            message.view(-1),
            [count * width for count in routes.in_counts],
            [count * width for count in routes.out_counts],
            group=group,
            async_op=True,
        )

    def wait(self) -> list[torch.Tensor]:
        """Return the received rows ``[rows, ...]`` of each tensor; the current stream waits."""
        self._work.wait()
        found = []
        for (shape, dtype), part in zip(
            self._kinds, torch.split(self._received, self._widths, 1), strict=True
        ):
            if shape.numel() == 0:
                found.append(torch.empty((len(part), *shape), dtype=dtype, device=part.device))
                continue
            used = part[:, : shape.numel() * dtype.itemsize].view(dtype)
            found.append(used.view(len(part), *shape))
        return found


def _as_bytes(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return rows as bytes ``[len(rows), width]``, with padding of any value at the end."""
    elements = rows.shape[1:].numel()
    if elements == 0:
        return torch.empty((len(rows), 0), dtype=torch.uint8, device=rows.device)
    flat = rows.contiguous().view(len(rows), elements).view(torch.uint8)
    return flat if flat.shape[1] == width else pad(flat, (0, width - flat.shape[1]))
