"""Sending weights to slots, gradients back to originals, and experts to new ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist

from lplb_triton.training.checks import is_trained
from lplb_triton.training.routes import Routes, Traffic
from lplb_triton.training.rows import Index, Rows, parts_of, put_rows, take_rows
from lplb_triton.training.slots import Slots

__all__ = [
    "add_gradient",
    "add_rows",
    "exchange_rows",
    "move_rows",
    "start_gradients",
    "start_sum",
    "start_weights",
]


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
            message, work = exchange_rows(out, routes, group)
            work.wait()
        put_rows(rows, routes.local_to, local)
        if message is not None:
            put_rows(rows, routes.into, message)


def start_weights(
    params: Mapping[str, Rows], slots: Slots, routes: Routes, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Start copying originals to all slots; return a function that finishes it."""
    arriving: list[tuple[torch.Tensor, torch.Tensor, dist.Work]] = []
    for name, rows in params.items():
        weight = slots.weights[name]
        put_rows(weight, routes.local_to, take_rows(rows, routes.local_from).to(weight.dtype))
        if routes.remote:
            message = take_rows(rows, routes.out).to(weight.dtype)
            arriving.append((weight, *exchange_rows(message, routes, group)))

    def finish() -> None:
        for weight, message, work in arriving:
            work.wait()
            put_rows(weight, routes.into, message)

    return finish


def start_gradients(
    params: Mapping[str, Rows], slots: Slots, traffic: Traffic, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Start adding up the slots' gradients on the originals; return a function that finishes it."""
    routes = traffic.gradient_routes
    arriving: list[tuple[Rows, torch.Tensor, tuple[torch.Tensor, dist.Work] | None]] = []
    for name, rows in params.items():
        if not is_trained(rows):
            continue
        part = parts_of(rows)[0]
        grad = slots.take_gradient(name, part.dtype)
        message = (
            exchange_rows(take_rows(grad, routes.out), routes, group) if routes.remote else None
        )
        total = start_sum(grad, traffic)
        arriving.append((rows, total, message))

    def finish() -> None:
        for rows, total, message in arriving:
            if message is not None:
                received, work = message
                work.wait()
                add_rows(total, received, traffic.arriving_rounds)
            add_gradient(rows, traffic.summed, total)

    return finish


def start_sum(grad: torch.Tensor, traffic: Traffic) -> torch.Tensor:
    """Add up the gradients of this rank's slots, ``[len(summed), ...]`` in at least float32."""
    total = torch.zeros(
        (len(traffic.summed.host), *grad.shape[1:]),
        dtype=torch.promote_types(grad.dtype, torch.float32),
        device=grad.device,
    )
    add_rows(total, grad, traffic.local_rounds)
    return total


def add_rows(
    total: torch.Tensor, rows: torch.Tensor, rounds: Iterable[tuple[Index, Index]]
) -> None:
    """Add rows to those of ``total``, round by round."""
    for source, target in rounds:
        total.index_add_(0, target.device, take_rows(rows, source).to(total.dtype))


def add_gradient(rows: Rows, index: Index, total: torch.Tensor) -> None:
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


def exchange_rows(
    rows: torch.Tensor, routes: Routes, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, dist.Work]:
    """Start sending rows to their ranks; return the buffer that receives them, and the work."""
    rows = rows.contiguous()
    received = rows.new_empty((sum(routes.in_counts), *rows.shape[1:]))
    size = rows.shape[1:].numel() * rows.element_size()
    # Rows are sent as bytes, so that every back end can send every dtype.
    work = dist.all_to_all_single(
        received.view(-1).view(torch.uint8),
        rows.view(-1).view(torch.uint8),
        [count * size for count in routes.in_counts],
        [count * size for count in routes.out_counts],
        group=group,
        async_op=True,
    )
    return received, work
