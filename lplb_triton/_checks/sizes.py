"""Checks of the sizes that the Triton backend supports, before a kernel is compiled for them.

The torch backend supports any size. Kernels are compiled for sizes padded to powers of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lplb_triton.placement import Placement
    from lplb_triton.problem import Problem

__all__ = ["check_dense_size", "check_placement_size", "check_problem_size"]

# Limits of the interior-point kernel: ranks, and ranks times columns, both padded. Beyond them the
# kernel takes minutes to compile, or more shared memory than a multiprocessor has.
PROBLEM_RANKS = 128
PROBLEM_CELLS = 1 << 15
# Limits of the kernels of `Balancer`: ranks of a group, logical experts, and redundant slots of a
# group.
GROUP_RANKS = 512
EXPERTS = 1 << 14
REDUNDANT_SLOTS = 1 << 11


def _padded(n: int, least: int) -> int:
    """Return the next power of two from ``n`` on, at least ``least``."""
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least


def check_problem_size(problem: Problem) -> None:
    """Raise a ValueError if the kernel of `lplb_triton.solve` can't take a problem of this size."""
    _check_dense(
        "problem", problem.group_size, problem.n_columns, problem.device,
        "backend 'triton'", "use backend='torch', or Balancer.solve",
    )  # fmt: skip


def check_dense_size(placement: Placement, device: torch.device) -> None:
    """Raise a ValueError if the interior-point kernel can't take a placement of this size."""
    _check_dense(
        "placement", placement.group_size, placement.max_columns, device,
        "solver 'interior_point'", "use solver='levelling', or backend='torch'",
    )  # fmt: skip


def _check_dense(
    name: str, ranks: int, columns: int, device: torch.device, taker: str, advice: str
) -> None:
    """Raise a ValueError naming ``name`` unless the interior-point kernel takes these sizes.

    ``taker`` says in the message what has the limit, ``advice`` what to use instead.
    """
    if ranks > PROBLEM_RANKS:
        raise ValueError(
            f"{name} has {ranks} ranks in a group, {taker} takes at most {PROBLEM_RANKS}; {advice}"
        )
    cells = _padded(ranks, 8) * _padded(columns, 32)
    if cells > PROBLEM_CELLS:
        raise ValueError(
            f"{name} has {ranks} ranks and {columns} columns, padded to powers of two {cells} "
            f"pairs of them; {taker} takes at most {PROBLEM_CELLS}; {advice}"
        )
    if device.type == "cuda":
        # The kernel passes one tile of float32 through shared memory.
        properties = torch.cuda.get_device_properties(device)
        available = getattr(properties, "shared_memory_per_block_optin", 4 * cells)
        if 4 * cells > available:
            raise ValueError(
                f"{name} has {ranks} ranks and {columns} columns, for which {taker} needs "
                f"{4 * cells} bytes of shared memory; {device} has {available}; {advice}"
            )


def check_placement_size(placement: Placement) -> None:
    """Raise a ValueError if the kernels of `Balancer` can't take a placement of this size."""
    for what, size, most in (
        ("ranks in a group", placement.group_size, GROUP_RANKS),
        ("logical experts", placement.n_logical, EXPERTS),
        ("redundant slots in a group", placement.redundant_per_group, REDUNDANT_SLOTS),
    ):
        if size > most:
            raise ValueError(
                f"placement has {size} {what}, backend 'triton' takes at most {most}; "
                "use backend='torch'"
            )
