"""Rows of tensors, one for each expert, read and written whatever their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, TypeAlias

import torch

__all__ = [
    "Index",
    "Rows",
    "as_integers",
    "check_rows",
    "describe_tensor",
    "ordinary_tensors",
    "parts_of",
    "put_rows",
    "row_shape",
    "take_rows",
]

Rows: TypeAlias = torch.Tensor | list[torch.Tensor]
"""One row per expert: a stacked tensor ``[n, ...]``, or n tensors ``[...]``."""

# Integers of an element's size, which every device can index and copy. Complex128 needs none.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Index(NamedTuple):
    """Row numbers, on the host and on the device."""

    host: list[int]
    device: torch.Tensor


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Create ordinary tensors without gradient, also where the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def parts_of(rows: Rows) -> list[torch.Tensor]:
    """List the tensors that hold the rows."""
    return [rows] if isinstance(rows, torch.Tensor) else rows


def row_shape(rows: Rows) -> torch.Size:
    """Return the shape of one row."""
    return rows.shape[1:] if isinstance(rows, torch.Tensor) else rows[0].shape


def describe_tensor(value: object) -> str:
    """Describe dtype, shape and device of a tensor, or the type of anything else."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


def take_rows(rows: Rows, index: Index) -> torch.Tensor:
    """Return a fresh tensor ``[len(index), ...]`` of the given rows."""
    if isinstance(rows, torch.Tensor):
        selected = as_integers(rows).index_select(0, index.device.to(rows.device))
        return selected.view(rows.dtype)
    if not index.host:
        return rows[0].new_empty((0, *rows[0].shape))
    return torch.stack([as_integers(rows[i]) for i in index.host]).view(rows[0].dtype)


def put_rows(rows: Rows, index: Index, values: torch.Tensor) -> None:
    """Write ``values``, of the rows' dtype, to the given rows."""
    first = parts_of(rows)[0]
    fresh = as_integers(values).to(first.device)
    # Outside of inference mode torch refuses to write to a tensor that was made in it.
    with torch.inference_mode() if first.is_inference() else nullcontext():
        if isinstance(rows, torch.Tensor):
            as_integers(rows).index_copy_(0, index.device.to(rows.device), fresh)
            return
        for i, value in zip(index.host, fresh, strict=True):
            as_integers(rows[i]).copy_(value)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """View the same memory as integers of the same size, since not every dtype can be indexed."""
    integers = _INTEGERS.get(tensor.element_size())
    return tensor.detach() if integers is None else tensor.detach().view(integers)


def check_rows(label: str, value: object, n_own: int, hint: str = "") -> Rows:
    """Return ``value`` as rows that can be moved, or raise naming ``label``.

    Parameters
    ----------
    label : str
        The caller's name for it.
    value : torch.Tensor, or iterable of torch.Tensor
        ``[n_own, ...]``, or n_own tensors ``[...]`` of one shape and dtype.
    n_own : int
        Experts of this rank.
    hint : str
        Follows the message if the number of rows is wrong.
    """
    if isinstance(value, torch.Tensor):
        rows: Rows = value
    else:
        try:
            rows = list(value)  # type: ignore[call-overload]
        except TypeError:
            kind = type(value).__name__
            raise TypeError(
                f"{label} must be a tensor or a sequence of tensors, got {kind}"
            ) from None
    parts = parts_of(rows)
    for part in parts:
        _check_dense(label, part)
    if isinstance(rows, torch.Tensor):
        if rows.ndim == 0 or len(rows) != n_own:
            raise ValueError(
                f"{label} must have a row for each of this rank's {n_own} experts, "
                f"got shape {tuple(rows.shape)}{hint}"
            )
        return rows
    if len(rows) != n_own:
        raise ValueError(
            f"{label} must hold a tensor for each of this rank's {n_own} experts, "
            f"got {len(rows)}{hint}"
        )
    for part in parts:
        if _kind(part) != _kind(parts[0]):
            raise ValueError(
                f"{label} must hold tensors of one shape, dtype and device, "
                f"got {describe_tensor(parts[0])} and {describe_tensor(part)}"
            )
    return rows


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what must be the same for all tensors of an entry."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_inference()


def _check_dense(label: str, tensor: object) -> None:
    """Raise unless ``tensor`` is plain memory, with an address of its own for every element."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(tensor).__name__}")
    # Classes are recognised by their attributes, since importing them is slow.
    if hasattr(tensor, "to_local"):
        raise TypeError(
            f"{label} is a DTensor; give this rank's whole experts as a plain tensor "
            "(what is sharded further can't follow experts)"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(
            f"{label} is a {type(tensor).__name__}, which wraps other tensors; "
            "give those, each under a name of its own"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{label} must be a dense tensor, got {tensor.layout}, {tensor.dtype}")
    if tensor.is_meta:
        raise ValueError(f"{label} is on the meta device, where it holds nothing")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{label} must be resolved (resolve_conj, resolve_neg), got a lazy view")
    if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{label} must not be expanded, got strides {tensor.stride()}")
