"""Sizes that the Triton backend takes, so that nobody waits for a compilation that can't end well.

The torch backend takes any. Kernels are compiled for sizes padded to powers of two.
"""

from __future__ import annotations

import torch

from lplb_triton.placement import Placement
from lplb_triton.problem import Problem

__all__ = ["check_dense_size", "check_placement_size", "check_problem_size"]

# Of `lplb_triton.solve`: ranks, and ranks times columns, both padded. More takes minutes to compile
# or more shared memory than a multiprocessor has.
PROBLEM_RANKS = 128
PROBLEM_CELLS = 1 << 15
# Of `Balancer`: ranks of a group, logical experts, and redundant slots of a group.
GROUP_RANKS = 512
EXPERTS = 1 << 14
REDUNDANT_SLOTS = 1 << 11


def _padded(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least


def check_problem_size(problem: Problem) -> None:
    """Raise a ValueError if `lplb_triton.solve` has no kernel for problems of this size."""
    _check_dense(
        "problem", problem.group_size, problem.n_columns, problem.device,
        "backend 'triton'", "use backend='torch', or Balancer.solve",
    )  # fmt: skip


def check_dense_size(placement: Placement, device: torch.device) -> None:
    """Raise a ValueError if the interior-point kernel can't solve placements of this size."""
    _check_dense(
        "placement", placement.group_size, placement.max_columns, device,
        "solver 'interior_point'", "use solver='levelling', or backend='torch'",
    )  # fmt: skip


def _check_dense(
    name: str, ranks: int, columns: int, device: torch.device, who: str, way_out: str
) -> None:
    """Raise a ValueError that begins with ``name`` unless the dense kernel takes these sizes."""
    if ranks > PROBLEM_RANKS:
        raise ValueError(
            f"{name} has {ranks} ranks in a group, {who} takes at most {PROBLEM_RANKS}; {way_out}"
        )
    cells = _padded(ranks, 8) * _padded(columns, 32)
    if cells > PROBLEM_CELLS:
        raise ValueError(
            f"{name} has {ranks} ranks and {columns} columns, padded to powers of two {cells} "
            f"pairs of them; {who} takes at most {PROBLEM_CELLS}; {way_out}"
        )
    if device.type == "cuda":
        # A tile of float32 goes through shared memory.
        properties = torch.cuda.get_device_properties(device)
        there = getattr(properties, "shared_memory_per_block_optin", 4 * cells)
        if 4 * cells > there:
            raise ValueError(
                f"{name} has {ranks} ranks and {columns} columns, for which {who} needs "
                f"{4 * cells} bytes of shared memory; {device} has {there}; {way_out}"
            )


def check_placement_size(placement: Placement) -> None:
    """Raise a ValueError if `Balancer` has no kernels for placements of this size."""
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
