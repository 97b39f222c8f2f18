"""Sending weights to slots, gradients back to originals, and experts to new ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from lplb_triton.training.checks import is_trained
from lplb_triton.training.routes import Routes, Traffic
from lplb_triton.training.rows import (
    Index,
    Rows,
    as_integers,
    parts_of,
    put_rows,
    row_shape,
    take_rows,
)
from lplb_triton.training.slots import Slots

__all__ = [
    "move_rows",
    "start_copies",
    "start_gradients",
    "start_exchange",
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
            row = out.new_empty(row_shape(rows))
            (message,) = start_exchange([row], [list(out)], routes, group)()
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
    wait = None
    if routes.remote:
        kinds = [slots.detach()[0] for slots, _ in pairs]
        out = routes.out.host
        sent = [[rows[i].detach().to(slots.dtype) for i in out] for slots, rows in pairs]
        wait = start_exchange(kinds, sent, routes, group)
    if routes.local_from.host:
        for slots, rows in pairs:
            local = take_rows(rows, routes.local_from).to(slots.dtype)
            put_rows(slots, routes.local_to, local)

    def finish() -> None:
        if wait is None:
            return
        into = routes.into.host
        targets = [slots.detach()[i] for slots, _ in pairs for i in into]
        _copy_rows(targets, [row for rows in wait() for row in rows])

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
    grads = [grad.contiguous() for grad in grads]
    wait = None
    if routes.remote and grads:
        kinds = [grad.new_empty(grad.shape[1:]) for grad in grads]
        out = routes.out.host
        wait = start_exchange(kinds, [[grad[i] for i in out] for grad in grads], routes, group)

    def finish(into: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        arrived = [grad[:0] for grad in grads] if wait is None else wait()
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


def start_exchange(
    kinds: Sequence[torch.Tensor],
    sent: Sequence[Sequence[torch.Tensor]],
    routes: Routes,
    group: dist.ProcessGroup | None,
) -> Callable[[], list[torch.Tensor]]:
    """Start sending rows of several tensors; return a function that waits and returns what came.

    Rows travel in one message per pair of ranks (one for each size of elements, if these differ),
    into which one launch gathers them: a message of its own for each row would cost the host more.

    Parameters
    ----------
    kinds : sequence of torch.Tensor
        For each tensor one of its rows, or any of the same shape, dtype and device.
    sent : sequence of sequences of torch.Tensor
        For each tensor the rows to send, grouped by receiver as ``routes.out_counts`` says.
    routes : Routes
        How many rows go to, and come from, each rank.
    group : torch.distributed.ProcessGroup or None
        The ranks.

    Returns
    -------
    callable
        Returns, for each tensor, the rows that came, grouped by sender: ``[rows, ...]``, whose rows
        are contiguous.
    """
    by_element: dict[torch.dtype, list[int]] = {}
    for i, one in enumerate(kinds):
        by_element.setdefault(as_integers(one).dtype, []).append(i)
    waits = [
        (
            chosen,
            _start_message([kinds[i] for i in chosen], [sent[i] for i in chosen], routes, group),
        )
        for chosen in by_element.values()
    ]

    def wait() -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for chosen, one in waits:
            found.update(zip(chosen, one(), strict=True))
        return [found[i] for i in range(len(kinds))]

    return wait


def _start_message(
    kinds: Sequence[torch.Tensor],
    sent: Sequence[Sequence[torch.Tensor]],
    routes: Routes,
    group: dist.ProcessGroup | None,
) -> Callable[[], list[torch.Tensor]]:
    """Send rows whose elements are of one size; see `start_exchange`."""
    widths = [one.numel() for one in kinds]
    width = sum(widths)
    element = as_integers(kinds[0])
    n_out, n_in = len(routes.out.host), len(routes.into.host)
    message = element.new_empty(n_out * width)
    rows = [as_integers(parts[i]).reshape(-1) for i in range(n_out) for parts in sent]
    if rows:
        torch._foreach_copy_(list(torch.split(message, widths * n_out)), rows)
    arrived = element.new_empty(n_in * width)
    # Rows are sent as bytes, so that every back end can send every dtype.
    size = width * element.element_size()
    work = dist.all_to_all_single(
        arrived.view(torch.uint8),
        message.view(torch.uint8),
        [count * size for count in routes.in_counts],
        [count * size for count in routes.out_counts],
        group=group,
        async_op=True,
    )

    def wait() -> list[torch.Tensor]:
        work.wait()
        table = arrived.view(n_in, width) if width else arrived.new_empty((n_in, 0))
        return [
            part.view(one.dtype).view(n_in, *one.shape)
            for part, one in zip(torch.split(table, widths, 1), kinds, strict=True)
        ]

    return wait


def _copy_rows(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy contiguous rows of any dtype in one launch."""
    if targets:
        torch._foreach_copy_(
            [as_integers(one).view(-1) for one in targets],
            [as_integers(one).view(-1) for one in sources],
        )
