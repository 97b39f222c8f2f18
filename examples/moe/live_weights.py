"""Slot weights of one layer with live slots: experts at home, and the others sent in each batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lplb_triton import Placement, SpreadPlan, chain, spread
from lplb_triton.live import LivePlan
from lplb_triton.training.spread import attach

# Live slots of each rank.
LIVE = 1


def place_at_home(load: Tensor, ranks: int, redundant: int) -> Placement:
    """Place copies by ``load`` [experts] behind the experts at home, and live slots behind them."""
    placement = chain(load, ranks, redundant_per_rank=redundant, keep_home=True)
    return placement.with_live_slots(LIVE)


class LiveWeights:
    """Has what the trainer calls on `lplb_triton.Replicas`, for originals that stay at home.

    Parameters
    ----------
    placement
        With experts at home and live slots; the same on all ranks.
    params
        The originals by name, ``[own experts, ...]``.
    group, device, dtype
        The EP group, this rank's device, and the dtype of the weights that are sent.
    """

    def __init__(
        self,
        placement: Placement,
        params: dict[str, Tensor],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.params, self.group, self.device, self.dtype = params, group, device, dtype
        self.plan = SpreadPlan(placement, group=group, device=device)

    @property
    def placement(self) -> Placement:
        """The placement in use."""
        return self.plan.placement

    def send(self, live: LivePlan) -> tuple[SpreadPlan, dict[str, Tensor]]:
        """Return the plan of a batch and the weights of its slots; collective, forth and back."""
        plan = self.plan.fill(live)
        slots = spread(plan, *(param.to(self.dtype) for param in self.params.values()))
        return plan, dict(zip(self.params, slots, strict=True))

    def join(self, y: Tensor, plan: SpreadPlan, slots: dict[str, Tensor]) -> Tensor:
        """Return the experts' outputs so that this rank's backward pass returns gradients."""
        return attach(y, list(slots.values()), plan)

    def move(self, placement: Placement, optimizer: torch.optim.Optimizer) -> None:
        """Use another placement, on which all ranks agree; no expert moves."""
        self.plan.retire()
        self.plan = SpreadPlan(placement, group=self.group, device=self.device)

    def reduce_grads(self) -> None:
        """Do nothing: the backward pass has returned the gradients."""

    def sync_weights(self) -> None:
        """Do nothing: the next forward pass sends weights."""

    @contextmanager
    def logical_order(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Do nothing: experts stay in logical order."""
        yield
