"""Weights of a rank's slots, and the gradients that they collect."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lplb_triton.training.checks import is_trained
from lplb_triton.training.rows import Rows, parts_of, row_shape

__all__ = ["Slots"]


class Slots:
    """One contiguous tensor ``[slots_per_rank, ...]`` for each name.

    Parameters
    ----------
    params : mapping of str to Rows
        The originals.
    slots_per_rank : int
        Rows of each tensor.
    dtype : torch.dtype or None
        Dtype of the trained tensors; None takes that of their originals.
    """

    def __init__(
        self, params: Mapping[str, Rows], slots_per_rank: int, dtype: torch.dtype | None
    ) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._trained = {name: is_trained(rows) for name, rows in params.items()}
        for name, rows in params.items():
            part = parts_of(rows)[0]
            weight = torch.empty(
                (slots_per_rank, *row_shape(rows)),
                dtype=dtype if dtype is not None and self._trained[name] else part.dtype,
                device=part.device,
            )
            self.weights[name] = weight
            if not self._trained[name]:
                continue
            weight.requires_grad_()
            if weight.dtype != part.dtype:
                weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _make_accumulator(self._sums, name, part.dtype)
                )

    def names_with_gradients(self) -> list[str]:
        """List the names whose slots hold gradients."""
        return [
            name
            for name, weight in self.weights.items()
            if weight.grad is not None or name in self._sums
        ]

    def take_gradient(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Remove and return the gradient of all slots, ``[slots_per_rank, ...]``, or zeros."""
        weight = self.weights[name]
        grad = self._sums.pop(name, None)
        if weight.grad is not None:
            grad = weight.grad.to(dtype) if grad is None else grad.add_(weight.grad)
            weight.grad = None
        return torch.zeros_like(weight, dtype=dtype) if grad is None else grad

    def drop_gradients(self) -> None:
        """Forget the gradients of all slots."""
        self._sums.clear()
        for weight in self.weights.values():
            weight.grad = None

    def follow(self, params: Mapping[str, Rows]) -> None:
        """Set ``requires_grad`` as the originals have it, since these may be frozen for a while.

        Raises
        ------
        RuntimeError
            Naming an entry that was frozen when the slots were made and is trained now, or that
            is trained for some of its experts only.
        """
        for name, rows in params.items():
            flags = {part.requires_grad for part in parts_of(rows)}
            if len(flags) > 1:
                raise RuntimeError(
                    f"params[{name!r}] must be trained (requires_grad) for all experts or none"
                )
            wanted = True in flags
            if wanted and not self._trained[name]:
                raise RuntimeError(
                    f"params[{name!r}] was frozen when the Replicas was made: to train it, "
                    "close() the Replicas and make another one"
                )
            if self.weights[name].requires_grad != wanted:
                self.weights[name].requires_grad_(wanted)


def _make_accumulator(
    sums: dict[str, torch.Tensor], name: str, dtype: torch.dtype
) -> Callable[[torch.Tensor], None]:
    """Make the hook that sums a slot tensor's gradients in the parameter's dtype."""

    def accumulate(weight: torch.Tensor) -> None:
        if weight.grad is None:
            return
        if name in sums:
            sums[name].add_(weight.grad)
        else:
            sums[name] = weight.grad.to(dtype)
        weight.grad = None

    return accumulate
