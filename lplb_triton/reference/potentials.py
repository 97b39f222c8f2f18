"""Steps by potentials: the torch twin of kernels/solve/potentials.py.

Equation numbers refer to docs/method.md. Cells and the sizes ``B``, ``E``, ``K`` and ``G`` are as
in `lplb_triton.reference.graph`. Loads and tokens are in any one unit; `levelling.solve` uses the
mean load of a rank.
"""

from __future__ import annotations

import torch

from lplb_triton.reference.graph import Graph

__all__ = [
    "apply_laplacian",
    "find_free_cells",
    "find_potentials",
    "project_on_simplices",
    "step_by_potentials",
]

# A cell has tokens if it has more than this fraction of its column's (equation 20).
EMPTY_FRACTION = 1e-6
# Steps of the method of conjugate residuals for the potentials (equation 21).
RESIDUAL_STEPS = 8
# Denominators are at least this. Loads are about 1.
TINY = 1e-30


def find_free_cells(
    graph: Graph, x: torch.Tensor, load: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """Find the cells that have tokens or are likely to get some (equation 20).

    A cell is likely to get tokens if its rank's load is below the mean load of those ranks that
    have tokens of the column.

    Parameters
    ----------
    graph : Graph
        The columns.
    x, load, w : torch.Tensor
        As for `levelling.level_edges` and `levelling.compute_cut_bound`.

    Returns
    -------
    torch.Tensor
        ``[B, E, K]`` bool; padding is not free.
    """
    w = w.unsqueeze(2)
    has = graph.real & (x > EMPTY_FRACTION * w)
    here = graph.at_cells(load)
    total = torch.where(has, here, 0.0).sum(2, keepdim=True)
    mean = total / has.sum(2, keepdim=True).clamp(min=1)
    return graph.real & (w > 0) & (has | (here < mean))


def apply_laplacian(graph: Graph, free: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
    """Multiply the matrix L of the free cells by potentials (equation 20).

    Parameters
    ----------
    graph : Graph
        The columns.
    free : torch.Tensor
        ``[B, E, K]`` bool, free cells; padding is not free.
    potential : torch.Tensor
        ``[B, G]`` float.

    Returns
    -------
    torch.Tensor
        ``[B, G]``.
    """
    here = torch.where(free, graph.at_cells(potential), 0.0)
    mean = here.sum(2, keepdim=True) / free.sum(2, keepdim=True).clamp(min=1)
    return graph.sum_by_rank(torch.where(free, here - mean, 0.0))


def find_potentials(graph: Graph, free: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """Find the potentials that level loads best by moves along free cells (equation 21).

    Parameters
    ----------
    graph : Graph
        The columns.
    free : torch.Tensor
        ``[B, E, K]`` bool, free cells; padding is not free.
    load : torch.Tensor
        ``[B, G]`` float, load of each rank.

    Returns
    -------
    torch.Tensor
        ``[B, G]``; moves along free cells by them change loads by minus L times them.
    """
    residual = load - load.mean(1, keepdim=True)
    potential = torch.zeros_like(residual)
    # The search direction and its product with L.
    direction, image = torch.zeros_like(residual), torch.zeros_like(residual)
    product = torch.zeros_like(residual[:, :1])
    for _ in range(RESIDUAL_STEPS):
        residual_image = apply_laplacian(graph, free, residual)
        previous, product = product, (residual * residual_image).sum(1, keepdim=True)
        beta = torch.where(previous > TINY, product / previous.clamp(min=TINY), 0.0)
        direction = residual + beta * direction
        image = residual_image + beta * image
        square = (image * image).sum(1, keepdim=True)
        alpha = torch.where(square > TINY, product / square.clamp(min=TINY), 0.0)
        potential = potential + alpha * direction
        residual = residual - alpha * image
    return potential


def project_on_simplices(
    graph: Graph, y: torch.Tensor, free: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """Project each column on the non-negative cells that add up to its tokens (equation 22).

    Parameters
    ----------
    graph : Graph
        The columns.
    y : torch.Tensor
        ``[B, E, K]`` float, any numbers.
    free : torch.Tensor
        ``[B, E, K]`` bool, cells that may get tokens; padding may not.
    w : torch.Tensor
        ``[B, E]`` float, tokens of each column.

    Returns
    -------
    torch.Tensor
        ``[B, E, K]``, non-negative, with columns that add up to ``w`` but for round-off.
    """
    chosen, level = free, w.unsqueeze(2)
    for _ in range(graph.rounds):
        total = torch.where(chosen, y, 0.0).sum(2, keepdim=True)
        level = (total - w.unsqueeze(2)) / chosen.sum(2, keepdim=True).clamp(min=1)
        chosen = chosen & (y > level)
    x = torch.where(chosen, y - level, 0.0)
    total = x.sum(2, keepdim=True)
    scaled = x * (w.unsqueeze(2) / total.clamp(min=TINY))
    return torch.where(total > TINY, scaled, graph.split_evenly(w))


def step_by_potentials(
    graph: Graph,
    x: torch.Tensor,
    load: torch.Tensor,
    w: torch.Tensor,
    fixed: torch.Tensor,
    line_search: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step by potentials over the free cells (equations 20 to 23).

    Parameters
    ----------
    graph : Graph
        The columns.
    x, load, w, fixed : torch.Tensor
        As for `levelling.level_edges` and `levelling.compute_cut_bound`.
    line_search : bool
        Whether the length of the step is searched for (equation 23).

    Returns
    -------
    x, load : torch.Tensor
        The new ones. The peak may have grown.
    """
    free = find_free_cells(graph, x, load, w)
    potential = find_potentials(graph, free, load)
    new_x = project_on_simplices(graph, x - graph.at_cells(potential), free, w)
    new_load = fixed + graph.sum_by_rank(new_x)
    if not line_search:
        return new_x, new_load
    change = new_load - load
    excess = load - load.mean(1, keepdim=True)
    length = -(excess * change).sum(1) / (change * change).sum(1).clamp(min=TINY)
    length = length.clamp(min=0.0, max=1.0)
    return x + length[:, None, None] * (new_x - x), load + length[:, None] * change
