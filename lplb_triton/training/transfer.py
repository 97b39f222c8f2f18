"""Sending weights to slots, gradients back to originals, and experts to new ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from lplb_triton.training.checks import is_trained
from lplb_triton.training.routes import Routes, Traffic
from lplb_triton.training.rows import Index, Rows, parts_of, put_rows, take_rows
from lplb_triton.training.slots import Slots

__all__ = [
    "list_peers",
    "move_rows",
    "start_copies",
    "start_gradients",
    "start_messages",
    "start_sums",
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
            message = out.new_empty((len(routes.into.host), *out.shape[1:]))
            start_messages(
                list(zip(list_peers(routes.out_counts), out, strict=True)),
                list(zip(list_peers(routes.in_counts), message, strict=True)),
                group,
            )()
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
    out, into = list_peers(routes.out_counts), list_peers(routes.in_counts)
    sent = [
        (peer, _row(rows, i).to(slots.dtype))
        for slots, rows in pairs
        for peer, i in zip(out, routes.out.host, strict=True)
    ]
    received = [
        (peer, slots[i].detach())
        for slots, _ in pairs
        for peer, i in zip(into, routes.into.host, strict=True)
    ]
    finish = start_messages(sent, received, group)
    if routes.local_from.host:
        for slots, rows in pairs:
            local = take_rows(rows, routes.local_from).to(slots.dtype)
            put_rows(slots, routes.local_to, local)
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
) -> Callable[..., list[torch.Tensor]]:
    """Start adding up slots' gradients; return a function that finishes and returns the sums.

    There is a sum ``[len(summed), ...]`` for each of ``grads`` ``[n_slots, ...]``, in at least
    float32. The order is fixed: slots of this rank first, then the others by slot number. The
    function takes ``into``, contiguous tensors ``[n_own, ...]`` of the gradients' dtype: then the
    sums are added to their rows ``summed`` and rounded once, and nothing is returned.
    """
    routes = traffic.gradient_routes
    peers = list_peers(routes.out_counts)
    grads = [grad.contiguous() for grad in grads]
    arrived = [grad.new_empty((len(routes.into.host), *grad.shape[1:])) for grad in grads]
    wait = start_messages(
        [(peer, grad[i]) for grad in grads for peer, i in zip(peers, routes.out.host, strict=True)],
        [
            message
            for rows in arrived
            for message in zip(list_peers(routes.in_counts), rows, strict=True)
        ],
        group,
    )

    def finish(into: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        wait()
        if into is None:
            return [
                _sum_rows(grad, rows, traffic, None)
                for grad, rows in zip(grads, arrived, strict=True)
            ]
        for grad, rows, own in zip(grads, arrived, into, strict=True):
            _sum_rows(grad, rows, traffic, own)
        return []

    return finish


def _sum_rows(
    grad: torch.Tensor, arrived: torch.Tensor, traffic: Traffic, own: torch.Tensor | None
) -> torch.Tensor:
    """Return the sums of one gradient, or add them to rows of ``own``."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    index = traffic.summed.device
    if grad.is_cuda and not traffic.local_rounds and dtype.is_floating_point:
        from lplb_triton import kernels  # it imports triton, which a CPU may lack

        shape = (len(index), *grad.shape[1:])
        total = torch.empty(shape, dtype=dtype, device=grad.device) if own is None else own
        starts, sources = traffic.arriving_starts, traffic.arriving_sources
        kernels.add_rows(total, arrived, starts, sources, index, in_place=own is not None)
        return total
    total = torch.zeros((len(index), *grad.shape[1:]), dtype=dtype, device=grad.device)
    if own is not None:
        total += own.index_select(0, index)
    _add_rows(total, grad, traffic.local_rounds)
    _add_rows(total, arrived, traffic.arriving_rounds)
    if own is not None:
        own.index_copy_(0, index, total.to(own.dtype))
    return total


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


def start_messages(
    out: Sequence[tuple[int, torch.Tensor]],
    into: Sequence[tuple[int, torch.Tensor]],
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Start sending tensors from their own memory into that of others; return what waits for it.

    Parameters
    ----------
    out : sequence of (int, torch.Tensor)
        Receivers by their numbers in the group, and contiguous tensors of any dtype.
    into : sequence of (int, torch.Tensor)
        Senders, and contiguous tensors to write. What two ranks send each other is in the same
        order on both.
    group : torch.distributed.ProcessGroup or None
        None only if nothing is sent.
    """
    operations = []
    # Tensors are sent as bytes, so that every back end can send every dtype.
    for call, messages in ((dist.isend, out), (dist.irecv, into)):
        for peer, tensor in messages:
            if tensor.numel():
                data = tensor.view(-1).view(torch.uint8)
                operations.append(dist.P2POp(call, data, group=group, group_peer=peer))
    works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def list_peers(counts: Sequence[int]) -> list[int]:
    """Return the peer of each row, from how many rows each has."""
    return [peer for peer, count in enumerate(counts) for _ in range(count)]


def _row(rows: Rows, number: int) -> torch.Tensor:
    """Return a row, contiguous, and in its own memory where it is."""
    return rows[number].detach().contiguous()
