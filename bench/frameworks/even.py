"""The split of an expert's tokens over its copies that EPLB makes, in place of the LP's."""

from __future__ import annotations

import torch

from lplb_triton import Placement
from lplb_triton.integrations.layers import LayerBalance

__all__ = ["split_evenly"]


def split_evenly(balance: LayerBalance) -> None:
    """Let the tokens of a layer's experts go to their copies in turn, and solve nothing."""
    # The balancer goes on placing copies; only what rewrites the ids is another.
    balance.balancer.run = _EvenSplit(balance)  # type: ignore[method-assign, assignment]


class _EvenSplit:
    """Rewrites ids by tables, which are made anew with each placement."""

    def __init__(self, balance: LayerBalance) -> None:
        self._balance = balance
        self._placement: Placement | None = None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Return physical ids of the same shape; the first dimension is that of tokens."""
        if self._placement is not self._balance.placement:
            self._placement = self._balance.placement
            device = self._balance.device
            self._slots = self._placement.log2phy.to(device, torch.int64)
            self._copies = self._placement.logcnt.to(device, torch.int64)
        turn = torch.arange(len(ids), device=ids.device)[:, None] % self._copies[ids]
        return self._slots[ids, turn].to(ids.dtype)
