"""Weights of physical slots as a differentiable function of originals that stay at home.

Expert parameters stay where a framework keeps them, in logical order on their home ranks. The
forward pass sends the rows that redundant slots of other ranks need, the backward pass returns the
gradients of these slots and adds them up at home. So sharding, gradient reduction, clipping,
optimizers and checkpoints see plain expert parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.autograd.function import once_differentiable

from lplb_triton._torch_op import outside_modes
from lplb_triton.training.rows import Rows, describe_tensor, parts_of, row_shape
from lplb_triton.training.slot_memory import Stamp
from lplb_triton.training.spread_plan import SpreadPlan, find_plan

__all__ = ["attach", "copy_weights", "spread", "stack_slots"]


def spread(
    plan: SpreadPlan,
    *originals: torch.Tensor | Sequence[torch.Tensor],
    redundant_only: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return the weights of this rank's slots; collective over the plan's group, forth and back.

    The forward pass sends rows, and the backward pass sends gradients, whenever one runs: once
    per micro-batch, and again where a checkpointed region is recomputed. The gradient of an
    original is the sum over its expert's slots in a fixed order, in float32 or more, rounded once.
    Every rank has to take part in the backward pass's exchange: `attach` makes sure that a rank
    does whose slots got no tokens.

    Parameters
    ----------
    plan : SpreadPlan
        Keep it alive, and unchanged, until the backward pass is over.
    *originals : torch.Tensor, or sequence of torch.Tensor
        Each is ``[n_local, ...]``, this rank's experts in order, or as many tensors ``[...]`` of
        one shape, in any dtype, on the plan's device, in the same order on all ranks. DTensors
        are taken as long as this rank's part holds its experts whole, as within the forward pass
        of a module under FSDP2.
    redundant_only : bool
        Return the redundant slots' weights only, for callers that compute with the originals
        themselves in the other slots: nothing is copied or kept but what other ranks sent.

    Returns
    -------
    tuple of torch.Tensor
        ``[slots_per_rank, ...]`` for each of ``originals``, or ``[n_redundant, ...]``.

    Raises
    ------
    TypeError, ValueError
        Naming the original that doesn't fit.
        On every rank, in a plan's first call, if originals differ in number, shapes or dtypes
        between ranks, or a stacked one requires gradients on some of them only.
    RuntimeError
        In the backward pass, if the plan was retired since the forward pass, or a stacked original
        was changed; and in a second derivative.

    Examples
    --------
    >>> from lplb_triton import Placement, SpreadPlan
    >>> load = torch.tensor([90.0, 10.0, 40.0, 60.0])
    >>> placement = Placement.from_history(load, 1, redundant_per_rank=2, keep_home=True)
    >>> w = torch.nn.Parameter(torch.randn(4, 8, 8))
    >>> (slots,) = spread(SpreadPlan(placement, device="cpu"), w)
    >>> slots.square().sum().backward()
    >>> slots.shape, w.grad.shape
    (torch.Size([6, 8, 8]), torch.Size([4, 8, 8]))
    """
    if not isinstance(plan, SpreadPlan):
        raise TypeError(f"plan must be a SpreadPlan, got {type(plan).__name__}")
    plan.require_current()
    rows = [_check_original(f"originals[{i}]", one, plan) for i, one in enumerate(originals)]
    stacked = [one for one in rows if isinstance(one, torch.Tensor)]
    if not redundant_only and len(stacked) == len(rows) and not torch.compiler.is_compiling():
        return stack_slots(plan, stacked)
    if not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        return _finish(rows, copy_weights(plan, rows), redundant_only)
    by_expert = [int(not isinstance(one, torch.Tensor)) for one in rows]
    flat = _list_parts(plan, rows)
    redundant = tuple(torch.ops.lplb_triton.spread(flat, by_expert, plan.handle))
    return _finish(rows, redundant, redundant_only)


def _finish(
    rows: Sequence[Rows], redundant: tuple[torch.Tensor, ...], redundant_only: bool
) -> tuple[torch.Tensor, ...]:
    """Put originals before the weights of redundant slots, if they are wanted."""
    if redundant_only:
        return redundant
    return tuple(
        torch.cat([one if isinstance(one, torch.Tensor) else torch.stack(one), copies])
        for one, copies in zip(rows, redundant, strict=True)
    )


def _list_parts(plan: SpreadPlan, originals: Sequence[Rows]) -> list[torch.Tensor]:
    """List what autograd learns of: stacked originals, and the parts ``plan.given`` of others."""
    return [
        part
        for rows in originals
        for part in ([rows] if isinstance(rows, torch.Tensor) else [rows[i] for i in plan.given])
    ]


def copy_weights(plan: SpreadPlan, originals: Sequence[Rows]) -> tuple[torch.Tensor, ...]:
    """Return redundant slots' weights, as `spread` does with ``redundant_only``, unchecked.

    Of originals by expert, autograd learns of those with copies only: to list all of them costs
    the host a millisecond per layer. Where any rank trains any of them, an anchor brings every
    rank to the backward pass.
    """
    plan.require_current()
    trained = plan.agree_on_training(originals)
    anchor = torch.zeros((), device=plan.device, requires_grad=any(trained))
    listed = _list_parts(plan, originals)
    slots: tuple[torch.Tensor, ...] = _CopyWeights.apply(plan, originals, trained, anchor, *listed)  # type: ignore[no-untyped-call]
    return slots


def stack_slots(
    plan: SpreadPlan,
    originals: Sequence[torch.Tensor],
    *,
    buffers: Sequence[torch.Tensor] | None = None,
    reuse_gradients: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return the weights of all slots, as `spread` does for stacked originals.

    Parameters
    ----------
    plan : SpreadPlan
        As for `spread`.
    originals : sequence of torch.Tensor
        ``[n_local, ...]`` each.
    buffers : sequence of torch.Tensor, or None
        ``[slots_per_rank, ...]`` each, whose first ``n_local`` rows are the original's own memory
        (see `lplb_triton.training.slot_memory`): only the redundant rows are written, and nothing
        is copied. None makes new tensors.
    reuse_gradients : bool
        Whether the backward pass may add to the memory of the gradients that it is given. That is
        right where slots are used by one operation, which makes a fresh gradient for them.
    """
    plan.agree_on_training(originals)
    given = [None] * len(originals) if buffers is None else list(buffers)
    slots: tuple[torch.Tensor, ...] = _Stack.apply(plan, given, reuse_gradients, *originals)  # type: ignore[no-untyped-call]
    return slots


def attach(
    output: torch.Tensor, slots: Sequence[torch.Tensor], plan: SpreadPlan | None = None
) -> torch.Tensor:
    """Return ``output``, whose backward pass then always takes part in that of `spread`.

    Where no token reached a rank's slots, or an operation skipped them, autograd would not visit
    them, and the other ranks would wait for this one. Give the layer's output, in which every
    rank's backward pass takes part anyway.

    Parameters
    ----------
    output : torch.Tensor
        Any, floating-point.
    slots : sequence of torch.Tensor
        What `spread` returned.
    plan : SpreadPlan or None
        What the slots were made by, if the backward pass is to raise where it was retired. The
        gradients of trained slots see to that themselves, frozen ones have none.
    """
    result: torch.Tensor = _Attach.apply(plan, output, *slots)  # type: ignore[no-untyped-call]
    return result


class _Attach(torch.autograd.Function):
    """The identity of an output; slots get no gradients, but their backward passes run."""

    @staticmethod
    def forward(
        ctx: Any, plan: SpreadPlan | None, output: torch.Tensor, *slots: torch.Tensor
    ) -> torch.Tensor:
        ctx.plan, ctx.n_slots = plan, len(slots)
        # Not a view for autograd, so that a layer may write to it.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.plan is not None:
            ctx.plan.require_current()
        # An undefined gradient is no work for autograd, but its receiver runs all the same.
        return (None, grads[0], *[None] * ctx.n_slots)


class _CopyWeights(torch.autograd.Function):
    """Weights of redundant slots; see `copy_weights`."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: SpreadPlan,
        originals: Sequence[Rows],
        trained: tuple[bool, ...],
        anchor: torch.Tensor,
        *listed: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.trained = plan, trained
        ctx.by_expert = [not isinstance(rows, torch.Tensor) for rows in originals]
        # Dispatch modes must not see inside: selective checkpointing would keep, or replay, parts.
        with outside_modes(), torch.no_grad():
            slots = plan.send_weights(originals)
        frozen = [one for one, flag in zip(slots, trained, strict=True) if not flag]
        ctx.mark_non_differentiable(*frozen)
        return tuple(slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.plan.require_current()
        with outside_modes(), torch.no_grad():
            given = [grad for grad, flag in zip(grads, ctx.trained, strict=True) if flag]
            kinds = [one for one, flag in zip(ctx.by_expert, ctx.trained, strict=True) if flag]
            totals = iter(_sum_at_home(ctx.plan, given, kinds))
        results = [next(totals) if flag else None for flag in ctx.trained]
        return (None, None, None, None, *_list_gradients(ctx.plan, results, ctx.by_expert))


class _Stack(torch.autograd.Function):
    """All slots of stacked originals; see `stack_slots`."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: SpreadPlan,
        buffers: list[torch.Tensor | None],
        reuse_gradients: bool,
        *originals: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.reuse_gradients = plan, reuse_gradients
        ctx.stamp = Stamp(originals)
        # Dispatch modes must not see inside: selective checkpointing would keep, or replay, parts.
        with outside_modes(), torch.no_grad():
            slots = []
            for original, buffer in zip(originals, buffers, strict=True):
                shape = (plan.placement.slots_per_rank, *original.shape[1:])
                if buffer is None:
                    view = torch.empty(shape, dtype=original.dtype, device=original.device)
                    view[: plan.n_local].copy_(original)
                else:
                    # Another view of the memory, since what this writes is what was there while a
                    # graph of the same step is alive: autograd's count of writes must not know.
                    view = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
                    view.set_(
                        buffer.untyped_storage(), buffer.storage_offset(), shape, buffer.stride()
                    )
                slots.append(view)
            plan.send_weights(originals, [one[plan.n_local :] for one in slots])
        return tuple(slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: SpreadPlan = ctx.plan
        plan.require_current()
        ctx.stamp.require_unchanged()
        n = plan.n_local
        with outside_modes(), torch.no_grad():
            whole = [grad.contiguous() for grad in grads]
            own = [grad[:n] if ctx.reuse_gradients else grad[:n].clone() for grad in whole]
            plan.return_gradients([grad[n:] for grad in whole], own)
        return (None, None, None, *own)


def _check_original(label: str, value: object, plan: SpreadPlan) -> Rows:
    """Return an original as plain tensors, or raise naming it."""
    n_local = plan.n_local
    if isinstance(value, torch.Tensor):
        whole = _to_local(label, value)
        if whole.ndim == 0 or len(whole) != n_local:
            raise ValueError(
                f"{label} must have a row for each of this rank's {n_local} experts, "
                f"got shape {tuple(whole.shape)}"
            )
        rows: Rows = whole
    elif isinstance(value, Sequence):
        if len(value) != n_local:
            raise ValueError(
                f"{label} must hold a tensor for each of this rank's {n_local} experts, "
                f"got {len(value)}"
            )
        rows = [_to_local(f"{label}[{i}]", part) for i, part in enumerate(value)]
        for part in rows:
            if (part.shape, part.dtype) != (rows[0].shape, rows[0].dtype):
                raise ValueError(
                    f"{label} must hold tensors of one shape and dtype, "
                    f"got {describe_tensor(rows[0])} and {describe_tensor(part)}"
                )
    else:
        raise TypeError(
            f"{label} must be a tensor or a sequence of tensors, got {type(value).__name__}"
        )
    for part in parts_of(rows):
        if part.device != plan.device:
            raise ValueError(
                f"{label} must be on the plan's device, {plan.device}, got {part.device}"
            )
    return rows


def _to_local(label: str, value: object) -> torch.Tensor:
    """Return this rank's part of a DTensor that holds whole experts, and other tensors as is."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")
    to_local = getattr(value, "to_local", None)
    if to_local is None:
        return value
    local: torch.Tensor = to_local()
    if local.shape[1:] != value.shape[1:]:
        raise ValueError(
            f"{label} is a DTensor whose experts are sharded themselves, {tuple(local.shape)} of "
            f"{tuple(value.shape)}: call spread where they are whole, within the module's forward"
        )
    return local


torch.library.define(
    "lplb_triton::spread", "(Tensor[] originals, int[] by_expert, int plan) -> Tensor[]"
)
torch.library.define(
    "lplb_triton::return_gradients",
    "(Tensor[] gradients, int[] by_expert, int plan) -> Tensor[]",
)


def _group_rows(
    flat: Sequence[torch.Tensor], by_expert: Sequence[int], plan: SpreadPlan
) -> list[Rows]:
    """Undo the flattening: each original is one stacked tensor, or the parts that are sent."""
    rows: list[Rows] = []
    taken = 0
    for is_parted in by_expert:
        if not is_parted:
            rows.append(flat[taken])
            taken += 1
            continue
        parts = [flat[taken]] * plan.n_local
        for row in plan.given:
            parts[row] = flat[taken]
            taken += 1
        rows.append(parts)
    return rows


def _spread(originals: list[torch.Tensor], by_expert: list[int], plan: int) -> list[torch.Tensor]:
    """Send weights; the implementation of the operator."""
    found = find_plan(plan)
    with torch.no_grad():
        return found.send_weights(_group_rows(originals, by_expert, found))


def _spread_fake(
    originals: list[torch.Tensor], by_expert: list[int], plan: int
) -> list[torch.Tensor]:
    """Return what tracing needs to know of the redundant slots."""
    found, fakes = find_plan(plan), []
    for rows in _group_rows(originals, by_expert, found):
        fakes.append(parts_of(rows)[0].new_empty((found.n_redundant, *row_shape(rows))))
    return fakes


def _return_gradients(
    gradients: list[torch.Tensor], by_expert: list[int], plan: int
) -> list[torch.Tensor]:
    """Add up the copies' gradients, in their dtype; the implementation of the operator."""
    found = find_plan(plan)
    found.require_current()
    with torch.no_grad():
        return _sum_at_home(found, gradients, by_expert)


def _sum_at_home(
    plan: SpreadPlan, gradients: Sequence[torch.Tensor], by_expert: Sequence[int]
) -> list[torch.Tensor]:
    """Return the sums of the copies' gradients, rounded to their dtype.

    A stacked original gets a gradient of its own shape. One of several parts gets a row for each
    part that has copies.
    """
    results = []
    for total, grad, is_parted in zip(
        plan.return_gradients(gradients), gradients, by_expert, strict=True
    ):
        rounded = total.to(grad.dtype)
        if not is_parted:
            whole = rounded.new_zeros((plan.n_local, *grad.shape[1:]))
            rounded = whole.index_copy_(0, plan.copied.device, rounded)
        results.append(rounded)
    return results


def _list_gradients(
    plan: SpreadPlan, totals: Sequence[torch.Tensor | None], by_expert: Sequence[int]
) -> list[torch.Tensor | None]:
    """Return a gradient for each tensor that autograd was given; parts without copies get none."""
    results: list[torch.Tensor | None] = []
    for total, is_parted in zip(totals, by_expert, strict=True):
        if total is None:
            results.extend([None] * (len(plan.given) if is_parted else 1))
        elif is_parted:
            sums = dict(zip(plan.copied.host, total.unbind(), strict=True))
            results.extend(sums.get(row) for row in plan.given)
        else:
            results.append(total)
    return results


def _return_gradients_fake(
    gradients: list[torch.Tensor], by_expert: list[int], plan: int
) -> list[torch.Tensor]:
    """Return what tracing needs to know of the sums."""
    found = find_plan(plan)
    return [
        grad.new_empty((len(found.copied.host) if is_parted else found.n_local, *grad.shape[1:]))
        for grad, is_parted in zip(gradients, by_expert, strict=True)
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    """Keep what the backward pass needs; no tensor is among it."""
    _, ctx.by_expert, ctx.plan = inputs
    # The caller may have let the plan of a batch go by the time of the backward pass.
    ctx.found = find_plan(ctx.plan)
    ctx.kinds = [(one.shape, one.dtype, one.device) for one in output]


def _differentiate(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, None, None]:
    """Return gradients at home; an expert without copies gets none from here."""
    given = [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.kinds, strict=True)
    ]
    totals = torch.ops.lplb_triton.return_gradients(given, ctx.by_expert, ctx.plan)
    results = _list_gradients(find_plan(ctx.plan), totals, ctx.by_expert)
    return results, None, None


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    """Raise, since what was sent once isn't sent again for a derivative of a derivative."""
    raise RuntimeError("spread can't be differentiated twice")


for _name, _call, _traced in (
    ("spread", _spread, _spread_fake),
    ("return_gradients", _return_gradients, _return_gradients_fake),
):
    torch.library.impl(f"lplb_triton::{_name}", "CompositeExplicitAutograd", _call)
    torch.library.register_fake(f"lplb_triton::{_name}", _traced)
    # A call takes part in an exchange, so it must not be removed where its result is unused.
    torch.fx.node.has_side_effect(getattr(torch.ops.lplb_triton, _name).default)
torch.library.register_autograd("lplb_triton::spread", _differentiate, setup_context=_remember)
torch.library.register_autograd("lplb_triton::return_gradients", _refuse)
