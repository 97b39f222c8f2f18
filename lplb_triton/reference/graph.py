"""The graph of ranks that the copies of columns join, as the torch twins use it.

Equation numbers refer to docs/method.md. A *cell* is a pair of a column and a rank that holds it.
Only columns with two copies or more have cells. They are kept as a table ``[E, K]``, a row per
column, where ``E`` is the number of such columns and ``K`` the largest number of copies; shorter
rows are padded. ``G`` is the number of ranks and ``B`` the number of instances.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch

from lplb_triton.problem import Problem

__all__ = ["Graph", "build_graph", "list_graphs"]

# Up to so many copies of a column are joined each with each (equation 18).
MAX_COPIES_ALL_JOINED = 4
# Rounds of the projection, at most (equation 22).
MAX_PROJECTION_ROUNDS = 5
# Size of the cache of graphs.
MAX_CACHED_GRAPHS = 64


@dataclass(frozen=True, eq=False)
class Graph:
    """The cells and edges of one mask, in tables."""

    columns: torch.Tensor
    """``[E]`` int64, numbers of the columns that have two copies or more."""
    rank: torch.Tensor
    """``[E, K]`` int64, rank of each cell in ascending order; 0 where the row is padded."""
    real: torch.Tensor
    """``[E, K]`` bool, False where the row is padded."""
    copies: torch.Tensor
    """``[E]`` int64, cells of each column."""
    rank_cells: torch.Tensor
    """``[G, M]`` int64, numbers of the cells on each rank, row by row; ``E * K`` for padding."""
    classes: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], ...]
    """For each class of edges the numbers of their two cells, then these cells' ranks, int64."""
    rounds: int
    """Rounds of the projection (equation 22)."""

    @property
    def n_ranks(self) -> int:
        """Number of ranks, G."""
        return self.rank_cells.shape[0]

    def at_cells(self, by_rank: torch.Tensor) -> torch.Tensor:
        """Return the value of each cell's rank, ``[B, G]`` to ``[B, E, K]``; padding gets any."""
        return by_rank[:, self.rank]

    def sum_by_rank(self, cells: torch.Tensor) -> torch.Tensor:
        """Sum up the cells of each rank, ``[B, E, K]`` to ``[B, G]``."""
        padded = torch.nn.functional.pad(cells.flatten(1), (0, 1))
        return padded[:, self.rank_cells].sum(2)

    def split_evenly(self, w: torch.Tensor) -> torch.Tensor:
        """Split each column's tokens evenly over its cells, ``[B, E]`` to ``[B, E, K]``."""
        return torch.where(self.real, (w / self.copies).unsqueeze(2), 0.0)


def _join_copies(n: int) -> list[tuple[int, int]]:
    """List the pairs of n copies that edges join: all of them, or the edges of a hypercube."""
    pairs = list(combinations(range(n), 2))
    if n > MAX_COPIES_ALL_JOINED:
        pairs = [(i, j) for i, j in pairs if (i ^ j).bit_count() == 1]
    return pairs


def _colour_edges(
    ranks_of: list[list[int]], width: int, n_ranks: int
) -> list[list[tuple[int, int, int, int]]]:
    """Put the edges of equation 18 into classes that name no rank twice (an edge colouring).

    Edges of ranks with many edges come first. ``ranks_of`` lists the ranks of each row of the table
    of cells, which is ``width`` cells wide. An edge is the numbers of two cells, then their ranks.
    """
    edges = []
    for row, ranks in enumerate(ranks_of):
        for i, j in _join_copies(len(ranks)):
            edges.append((row * width + i, row * width + j, ranks[i], ranks[j]))
    degree = [0] * n_ranks
    for *_, a, b in edges:
        degree[a] += 1
        degree[b] += 1
    edges.sort(key=lambda edge: -degree[edge[2]] - degree[edge[3]])
    taken = [0] * n_ranks  # Bit k is set if the rank has an edge of class k.
    classes: list[list[tuple[int, int, int, int]]] = []
    for edge in edges:
        a, b = edge[2:]
        either = taken[a] | taken[b]
        k = (~either & (either + 1)).bit_length() - 1
        taken[a] |= 1 << k
        taken[b] |= 1 << k
        if k == len(classes):
            classes.append([])
        classes[k].append(edge)
    return classes


def build_graph(mask: torch.Tensor) -> Graph:
    """Find the cells and edges of a mask (equation 18).

    Parameters
    ----------
    mask : torch.Tensor
        ``[G, C]`` bool, whether a rank holds a copy of a column.

    Returns
    -------
    Graph
        On the device of the mask.
    """
    device, n_ranks = mask.device, mask.shape[0]
    by_column = [[g for g, held in enumerate(row) if held] for row in mask.T.tolist()]
    columns = [e for e, ranks in enumerate(by_column) if len(ranks) > 1]
    ranks_of = [by_column[e] for e in columns]
    width = max([1, *map(len, ranks_of)])
    on_rank: list[list[int]] = [[] for _ in range(n_ranks)]
    for row, ranks in enumerate(ranks_of):
        for nth, g in enumerate(ranks):
            on_rank[g].append(row * width + nth)
    most_on_rank = max([1, *map(len, on_rank)])

    def to_table(rows: list[list[int]], size: int, padding: int) -> torch.Tensor:
        rows = [row + [padding] * (size - len(row)) for row in rows]
        made = torch.tensor(rows, dtype=torch.int64, device=device)
        return made.reshape(len(rows), size)

    copies = to_table([[len(ranks)] for ranks in ranks_of], 1, 0)[:, 0]
    edges = _colour_edges(ranks_of, width, n_ranks)
    tables = [torch.tensor(one, dtype=torch.int64, device=device) for one in edges]
    return Graph(
        columns=to_table([[e] for e in columns], 1, 0)[:, 0],
        rank=to_table(ranks_of, width, 0),
        real=torch.arange(width, device=device) < copies.unsqueeze(1),
        copies=copies,
        rank_cells=to_table(on_rank, most_on_rank, len(columns) * width),
        classes=tuple((t[:, 0], t[:, 1], t[:, 2], t[:, 3]) for t in tables),
        rounds=min(width, MAX_PROJECTION_ROUNDS),
    )


@lru_cache(maxsize=MAX_CACHED_GRAPHS)
def _build_graph_once(cells: bytes, n_ranks: int, n_columns: int, device: torch.device) -> Graph:
    """Build the graph of a mask from its bytes, or take it from the cache."""
    mask = torch.tensor(list(cells), dtype=torch.bool, device=device)
    return build_graph(mask.reshape(n_ranks, n_columns))


def list_graphs(problem: Problem) -> list[tuple[Graph, torch.Tensor]]:
    """List the distinct masks' graphs, each with the numbers of its instances, ``[n]`` int64."""
    device, mask = problem.device, problem.mask.cpu()
    found: dict[bytes, list[int]] = {}
    for i, one in enumerate(mask):
        found.setdefault(one.contiguous().numpy().tobytes(), []).append(i)
    if len(mask) == 1:
        found = {cells: list(range(problem.n_instances)) for cells in found}
    return [
        (
            _build_graph_once(cells, problem.group_size, problem.n_columns, device),
            torch.tensor(rows, dtype=torch.int64, device=device),
        )
        for cells, rows in found.items()
    ]
