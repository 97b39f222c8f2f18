"""Counters of solved and certified groups, changed on the device."""

from __future__ import annotations

import torch

from lplb_triton.solution import Status

__all__ = ["add_to_counter", "count_statuses"]


def count_statuses(
    status: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor, uncertified: torch.Tensor
) -> None:
    """Add the groups with each status to the counters, without a host sync.

    ``status`` is ``[n_group]`` int32 of a `Solution`; the counters have one element each.
    """
    # A caller's counter that was made in inference mode can be changed in that mode only.
    with torch.inference_mode(certified.is_inference()):
        add_to_counter(certified, status == Status.CERTIFIED)
    add_to_counter(solves, torch.ones_like(status))
    add_to_counter(uncertified, status == Status.GAP)


def add_to_counter(counter: torch.Tensor, amounts: torch.Tensor) -> None:
    """Add a sum to a counter of one element, atomically, since other streams may add to it too."""
    first = torch.zeros(1, dtype=torch.int64, device=counter.device)
    counter.view(-1).index_add_(0, first, amounts.sum().reshape(1).to(counter.dtype))
