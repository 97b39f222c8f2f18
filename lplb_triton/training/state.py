"""Gradients, optimizer state and other tensors that move with the originals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from lplb_triton.training.checks import Spec, is_trained
from lplb_triton.training.memory import keep_distinct
from lplb_triton.training.rows import Rows, check_rows, parts_of

__all__ = ["Optimizers", "find_movable", "list_optimizers"]

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
"""One optimizer, several or none, as the caller gives them."""

_SHARDED = ": sharded state can't follow experts"


def list_optimizers(optimizer: Optimizers) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by the caller's names for them, or raise naming the argument."""
    if optimizer is None:
        return {}
    if isinstance(optimizer, torch.optim.Optimizer):
        return {"optimizer": optimizer}
    if not isinstance(optimizer, Sequence) or isinstance(optimizer, str):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, a sequence of them or None, "
            f"got {type(optimizer).__name__}"
        )
    named = {f"optimizer[{i}]": one for i, one in enumerate(optimizer)}
    for name, one in named.items():
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"{name} must be a torch.optim.Optimizer, got {type(one).__name__}")
    return named


def find_movable(
    params: Mapping[str, Rows],
    n_own: int,
    optimizers: Mapping[str, torch.optim.Optimizer],
    also: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None,
) -> tuple[list[Rows], Spec]:
    """Collect the tensors that have a row for each original, without duplicates.

    Their order is the same on all ranks.

    Parameters
    ----------
    params : mapping of str to Rows
        The originals.
    n_own : int
        Originals of this rank.
    optimizers : mapping of str to torch.optim.Optimizer
        By the caller's names for them.
    also : mapping of str to tensors, or None
        The argument ``also`` of `Replicas.move`.

    Returns
    -------
    rows : list of Rows
        Originals, gradients, optimizer state and ``also``.
    spec : dict
        Facts that must be the same on all ranks, so that all ranks move the same tensors.

    Raises
    ------
    TypeError, ValueError
        Naming what can't be moved.
    """
    if also is not None and not isinstance(also, Mapping):
        raise TypeError(f"also must be a mapping or None, got {type(also).__name__}")
    entries: dict[str, Rows] = {}
    for name, rows in params.items():
        label = f"params[{name!r}]"
        entries[label] = rows
        grads = _gradients(label, rows)
        if grads is not None:
            entries[f"{label}.grad"] = check_rows(f"{label}.grad", grads, n_own)
        for where, optimizer in optimizers.items():
            for key, state in _optimizer_state(f"{where}.state[{label}]", optimizer, rows):
                entries[key] = check_rows(key, state, n_own, _SHARDED)
        if optimizers and is_trained(rows):
            _check_updated(label, rows, optimizers.values())
    for name in sorted(also or {}):
        label = f"also[{name!r}]"
        entries[label] = check_rows(label, (also or {})[name], n_own)
    kept, same_as = keep_distinct(entries)
    spec: Spec = {label: _describe(rows, same_as.get(label)) for label, rows in entries.items()}
    return list(kept.values()), spec


def _describe(rows: Rows, same_as: str | None) -> str:
    """Describe what must be the same on all ranks."""
    part = parts_of(rows)[0]
    layout = "one tensor" if isinstance(rows, torch.Tensor) else "a tensor for each expert"
    trained = ", trained" if is_trained(rows) else ""
    memory = f", the memory of {same_as}" if same_as else ""
    return f"{layout} {tuple(part.shape)} {part.dtype}{trained}{memory}"


def _gradients(label: str, rows: Rows) -> Rows | None:
    """Return the gradients of an entry if it has any, or raise naming it."""
    parts = parts_of(rows)
    grads = [part.grad for part in parts if part.grad is not None]
    if len(grads) not in (0, len(parts)):
        raise ValueError(f"{label} has gradients for some of its tensors only")
    if not grads:
        return None
    return grads[0] if isinstance(rows, torch.Tensor) else grads


def _check_updated(label: str, rows: Rows, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise unless one of the optimizers updates these originals."""
    known = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    if any(id(part) not in known for part in parts_of(rows)):
        raise ValueError(
            f"optimizer does not update {label}; one that updates copies or shards of it needs "
            "its state given as `also`"
        )


def _optimizer_state(
    label: str, optimizer: torch.optim.Optimizer, rows: Rows
) -> Iterator[tuple[str, Rows]]:
    """Yield the state that ``optimizer`` holds for each expert of these originals, with names."""
    held = [optimizer.state.get(part, {}) for part in parts_of(rows)]
    for key in sorted({key for entry in held for key in entry}):
        values = [entry.get(key) for entry in held]
        where = f"{label}[{key!r}]"
        if not all(isinstance(value, torch.Tensor) for value in values):
            plain = isinstance(values[0], (int, float, str, type(None)))
            if plain and all(value == values[0] for value in values):
                continue  # one number or flag for all experts
            raise ValueError(
                f"{where} is neither a tensor nor the same for all experts: it can't follow them"
            )
        if not isinstance(rows, torch.Tensor):
            yield where, values
        elif values[0].ndim > 0:
            yield where, values[0]
