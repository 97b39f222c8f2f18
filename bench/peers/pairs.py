"""Treat placements with two copies per expert as the edges of a graph."""

from __future__ import annotations

import torch

__all__ = [
    "check_loads",
    "color_edges",
    "find_copy_ranks",
]


def find_copy_ranks(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the ranks of the two copies of every column.

    Parameters
    ----------
    mask : torch.Tensor
        ``[G, C]`` bool, whether a rank holds a copy of a column.

    Returns
    -------
    first, second : torch.Tensor
        ``[C]`` int64 on the CPU, the lower and the higher rank; -1 for a column without copies
        (padding).

    Raises
    ------
    ValueError
        If a column has one copy, or more than two.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [G, C], got {mask.dtype} {tuple(mask.shape)}")
    held = mask.cpu()
    copies = held.sum(0)
    wrong = torch.nonzero((copies != 2) & (copies != 0)).flatten()
    if wrong.numel():
        column = int(wrong[0])
        raise ValueError(
            f"mask must give every column two copies, column {column} has {int(copies[column])}"
        )
    rank = torch.arange(len(held), device="cpu").unsqueeze(1)
    second = torch.where(held, rank, -1).amax(0)
    first = torch.where(held, rank, len(held)).amin(0)
    return torch.where(copies == 2, first, -1), second


def color_edges(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Colour the edges of a multigraph so that no vertex has two of one colour.

    Takes edges in order; where no colour is free at both ends, two colours are swapped along a
    path (a Kempe chain). On a bipartite graph, as even rings, cubes and such tori are, the
    number of colours is the largest degree, which is the least possible.

    Parameters
    ----------
    first, second : torch.Tensor
        ``[C]`` int64, the two vertices of every edge; negative for no edge.

    Returns
    -------
    torch.Tensor
        ``[C]`` int64, colours from 0 on; -1 for no edge.
    """
    ends = list(zip(first.tolist(), second.tolist(), strict=True))
    colors = [-1] * len(ends)
    # at[vertex][color] is the edge of that colour at that vertex.
    at: dict[int, dict[int, int]] = {vertex: {} for pair in ends for vertex in pair}
    n_colors = 0
    for edge, (u, v) in enumerate(ends):
        if u < 0 or v < 0:
            continue
        free_u = [color for color in range(n_colors) if color not in at[u]]
        free_v = [color for color in range(n_colors) if color not in at[v]]
        pairs = [(a, b) for a in free_u for b in free_v]
        # A colour free at both ends needs no swap: its path is empty.
        pairs.sort(key=lambda pair: pair[0] != pair[1])
        for a, b in pairs:
            path, vertex, color = [], v, a
            while color in at[vertex]:
                path.append(at[vertex][color])
                vertex = sum(ends[path[-1]]) - vertex
                color = a + b - color
            if vertex != u:
                _swap_colors(path, a, b, ends, colors, at)
                colors[edge] = a
                break
        else:
            colors[edge] = n_colors
            n_colors += 1
        at[u][colors[edge]] = at[v][colors[edge]] = edge
    return torch.tensor(colors, dtype=torch.int64, device="cpu")


def _swap_colors(
    path: list[int],
    a: int,
    b: int,
    ends: list[tuple[int, int]],
    colors: list[int],
    at: dict[int, dict[int, int]],
) -> None:
    """Exchange the two colours of a path of edges."""
    for edge in path:
        for vertex in ends[edge]:
            del at[vertex][colors[edge]]
        colors[edge] = a + b - colors[edge]
    for edge in path:
        for vertex in ends[edge]:
            at[vertex][colors[edge]] = edge


def check_loads(
    weights: torch.Tensor, fixed: torch.Tensor, n_ranks: int, n_columns: int, device: torch.device
) -> None:
    """Raise unless the loads are float32, contiguous and of the sizes of the placement."""
    for name, value, size in (("weights", weights, n_columns), ("fixed", fixed, n_ranks)):
        if value.ndim != 2 or value.shape != (len(weights), size):
            raise ValueError(
                f"{name} must be [{len(weights)}, {size}], got shape {tuple(value.shape)}"
            )
        if value.dtype != torch.float32 or value.device != device or not value.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 on {device}, "
                f"got {value.dtype} on {value.device}"
            )
