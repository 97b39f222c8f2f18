"""Figures and plain-text pictures of a topology."""

from __future__ import annotations

import string
import textwrap
from collections import Counter
from dataclasses import dataclass

import torch

from ._validate import inverse, validate

_WIDTH = 96
# The matrix has one character per rank and slot, and must fit in a line.
_MATRIX_RANKS = 40
_MAX_MOVES_SHOWN = 4
_SLOT_MARKS = string.digits + string.ascii_lowercase


def summary(r2o: object) -> str:
    """Describe a topology in one line.

    Parameters
    ----------
    r2o : torch.Tensor or array
        ``[group_size, num_redundants]``, as for :func:`validate`.

    Returns
    -------
    str
        Ranks, redundant slots per rank, edges, smallest and largest degree, diameter, and whether
        all ranks are connected. These are figures of the undirected graph with an edge wherever
        two ranks share at least one replicated expert; edges for which they share several are
        also counted as multiple.

    Raises
    ------
    TypeError, ValueError
        As :func:`validate`.
    """
    return _summarize(_Graph.build(validate(r2o)))


def draw(r2o: object) -> str:
    """Draw a topology as plain text, for a person choosing one.

    Parameters
    ----------
    r2o : torch.Tensor or array
        ``[group_size, num_redundants]``, as for :func:`validate`.

    Returns
    -------
    str
        Several lines without a newline at the end, ASCII only:

        1. the line of :func:`summary`;
        2. over how many ranks one rank can spread its load in 1, 2, ... moves from an original
           to its copy (the fewest over all ranks, itself included): a bound on how well a single
           hot rank can be relieved, and the main difference between topologies of equal size;
        3. a grid if the topology is a torus (either direction, either order of the slots), else
           the rings that each slot forms: ``a <- b`` says that ``a`` holds a copy of an expert of
           ``b``, so tokens can move from ``b`` to ``a``;
        4. a table with, for each rank, the origin of each slot's copy, the place of each copy of
           its own experts, and its neighbours;
        5. up to 40 ranks, a matrix that shows at row ``i``, column ``j`` the slot in which rank
           ``i`` holds an expert of rank ``j``. Blocks near the diagonal stay within a node when
           ranks are numbered node by node.

    Raises
    ------
    TypeError, ValueError
        As :func:`validate`.
    """
    matrix = validate(r2o)
    graph = _Graph.build(matrix)
    sections = [f"{_summarize(graph)}\n{_describe_reach(graph)}"]
    grid = _find_grid(matrix)
    sections.append(_draw_grid(*grid) if grid is not None else _draw_rings(matrix))
    sections.append(_draw_table(matrix, graph))
    if graph.size <= _MATRIX_RANKS and matrix.shape[1] <= len(_SLOT_MARKS):
        sections.append(_draw_matrix(matrix))
    return "\n\n".join(sections)


@dataclass(frozen=True)
class _Graph:
    """The undirected graph of ranks, and the distances in it."""

    n_slots: int
    neighbours: list[list[int]]
    n_copies: Counter[tuple[int, int]]  # copies per edge (low rank, high rank)
    steps: list[list[int]]  # along edges, -1 where there is no path
    moves: list[list[int]]  # along edges from original to copy only

    @classmethod
    def build(cls, matrix: torch.Tensor) -> _Graph:
        """Find edges and distances of a validated r2o matrix."""
        size, n_slots = matrix.shape
        n_copies = Counter(
            (min(rank, source), max(rank, source))
            for rank, sources in enumerate(matrix.tolist())
            for source in sources
        )
        neighbours: list[list[int]] = [[] for _ in range(size)]
        for low, high in n_copies:
            neighbours[low].append(high)
            neighbours[high].append(low)
        neighbours = [sorted(ranks) for ranks in neighbours]
        hosts = inverse(matrix).tolist()
        steps = [_find_distances(rank, neighbours) for rank in range(size)]
        moves = [_find_distances(rank, hosts) for rank in range(size)]
        return cls(n_slots, neighbours, n_copies, steps, moves)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.neighbours)

    @property
    def diameter(self) -> int:
        """Largest number of steps between connected ranks."""
        return max(max(row) for row in self.steps)

    @property
    def component_sizes(self) -> list[int]:
        """Ranks of each connected component, largest first."""
        seen: set[int] = set()
        sizes = []
        for row in self.steps:
            members = {rank for rank, steps in enumerate(row) if steps >= 0}
            if not members & seen:
                sizes.append(len(members))
                seen |= members
        return sorted(sizes, reverse=True)


def _find_distances(start: int, successors: list[list[int]]) -> list[int]:
    """Find the distance of each rank from ``start``, -1 without a path."""
    steps = [-1] * len(successors)
    steps[start] = 0
    queue = [start]
    for rank in queue:  # breadth-first search: the queue grows while it is read
        for other in successors[rank]:
            if steps[other] < 0:
                steps[other] = steps[rank] + 1
                queue.append(other)
    return steps


def _summarize(graph: _Graph) -> str:
    """Write the line of `summary`."""
    multiple = sum(copies > 1 for copies in graph.n_copies.values())
    degrees = [len(ranks) for ranks in graph.neighbours]
    parts = graph.component_sizes
    connected = len(parts) == 1
    slots = "slot" if graph.n_slots == 1 else "slots"
    edges = "edge" if len(graph.n_copies) == 1 else "edges"
    return ", ".join(
        [
            f"{graph.size} ranks",
            f"{graph.n_slots} redundant {slots} per rank",
            f"{len(graph.n_copies)} {edges}" + (f" ({multiple} multiple)" if multiple else ""),
            f"degree {min(degrees)}..{max(degrees)}",
            f"diameter {graph.diameter if connected else 'infinite'}",
            "connected"
            if connected
            else f"not connected ({len(parts)} parts of {_format_sizes(parts)} ranks)",
        ]
    )


def _format_sizes(parts: list[int]) -> str:
    """Write the range of sizes, given in descending order."""
    return f"{parts[-1]}..{parts[0]}" if parts[0] != parts[-1] else f"{parts[0]}"


def _describe_reach(graph: _Graph) -> str:
    """Write over how many ranks a rank can spread its load in 1, 2, ... moves."""
    last = max(max(row) for row in graph.moves)
    shown = [*range(1, min(last, _MAX_MOVES_SHOWN) + 1)]
    if last > _MAX_MOVES_SHOWN:
        shown.append(last)
    counts = [min(sum(0 <= m <= limit for m in row) for row in graph.moves) for limit in shown]
    listed = [f"{count} in {limit}" for count, limit in zip(counts, shown, strict=True)]
    listed[0] = f"{counts[0]} ranks in 1 move"
    if last > _MAX_MOVES_SHOWN + 1:
        listed.insert(-1, "...")
    return f"spread of one rank's load: {', '.join(listed)}"


def _find_grid(
    matrix: torch.Tensor,
) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]] | None:
    """Recognise a torus: the rank grid, the slots along its columns and rows, and directions.

    A direction of 1 means that a rank's copy comes from the next row (or column), -1 from the
    previous one. None if the ranks, numbered row by row, form no torus.
    """
    size, n_slots = matrix.shape
    if n_slots != 2:
        return None
    for n_rows in range(2, size // 2 + 1):
        if size % n_rows:
            continue
        grid = torch.arange(size, dtype=torch.int32, device="cpu").view(n_rows, -1)
        for down in (0, 1):
            by_slot = matrix[:, down].view_as(grid), matrix[:, 1 - down].view_as(grid)
            directions = [
                next((s for s in (1, -1) if torch.equal(part, grid.roll(-s, dim))), 0)
                for dim, part in enumerate(by_slot)
            ]
            if all(directions):
                return grid, (down, 1 - down), (directions[0], directions[1])
    return None


def _draw_grid(grid: torch.Tensor, slots: tuple[int, int], directions: tuple[int, int]) -> str:
    """Draw the grid of a torus with arrows."""
    n_rows, n_columns = grid.shape
    width = len(str(grid.numel() - 1))
    across = " <- " if directions[1] > 0 else " -> "
    mark = "^" if directions[0] > 0 else "v"
    lines = [
        f"{n_rows} x {n_columns} torus: slot {slots[0]} along the columns, slot {slots[1]} along "
        "the rows, both closed to rings",
        "(tokens can move the way the arrows point, from the original to the copy)",
        "",
    ]
    between = "  " + (" " * len(across)).join(mark.rjust(width) for _ in range(n_columns))
    for row in grid.tolist():
        lines.append("  " + across.join(f"{r:>{width}}" for r in row) + across + f"({row[0]})")
        lines.append(between)
    ends = [f"({r})".rjust(width + 2) for r in grid[0].tolist()]
    lines.append(" " + (" " * (len(across) - 2)).join(ends))
    return "\n".join(line.rstrip() for line in lines)


def _draw_rings(matrix: torch.Tensor) -> str:
    """Draw the rings of each slot."""
    lines = ["rings formed by each slot (a <- b: a holds a copy from b, tokens can move b to a)"]
    for d in range(matrix.shape[1]):
        rings = _cycles(matrix[:, d].tolist())
        lengths = sorted(Counter(map(len, rings)).items())
        lines.append(f"slot {d}: {', '.join(f'{n} of {length} ranks' for length, n in lengths)}")
        line = ""
        for ring in rings:
            if len(ring) == 2:
                text = f"  {ring[0]} <-> {ring[1]}"
            else:
                text = "  " + " <- ".join(map(str, [*ring, ring[0]]))
            if line and len(line) + 2 + len(text) > _WIDTH:
                lines.append(_wrap(line))
                line = ""
            line += "  " * bool(line) + text
        lines.append(_wrap(line))
    return "\n".join(lines)


def _cycles(column: list[int]) -> list[list[int]]:
    """Split a permutation into its cycles, each starting with its lowest rank."""
    seen: set[int] = set()
    cycles = []
    for start in range(len(column)):
        if start in seen:
            continue
        cycle = [start]
        while column[cycle[-1]] != start:
            cycle.append(column[cycle[-1]])
        seen.update(cycle)
        cycles.append(cycle)
    return cycles


def _draw_table(matrix: torch.Tensor, graph: _Graph) -> str:
    """Draw the table of sources, hosts and neighbours of each rank."""
    slots = range(matrix.shape[1])
    cells = [["rank", *(f"slot {d} from" for d in slots), *(f"copy {d} on" for d in slots)]]
    cells[0].append("neighbours")
    rows = zip(matrix.tolist(), inverse(matrix).tolist(), graph.neighbours, strict=True)
    for rank, (sources, hosts, others) in enumerate(rows):
        cells.append([str(v) for v in (rank, *sources, *hosts)] + [" ".join(map(str, others))])
    widths = [max(len(row[c]) for row in cells) for c in range(len(cells[0]) - 1)]
    return "\n".join(
        "  ".join([*(v.rjust(w) for v, w in zip(row, widths, strict=False)), row[-1]])
        for row in cells
    )


def _draw_matrix(matrix: torch.Tensor) -> str:
    """Draw the matrix of slots by rank and source."""
    size = matrix.shape[0]
    width = len(str(size - 1))
    cells = [["."] * size for _ in range(size)]
    for rank, sources in enumerate(matrix.tolist()):
        cells[rank][rank] = "\\"
        for d, source in enumerate(sources):
            cells[rank][source] = _SLOT_MARKS[d] if cells[rank][source] == "." else "*"
    several = any("*" in row for row in cells)
    lines = [
        "row i, column j: the slot in which rank i holds an expert of rank j"
        + (" (*: more than one slot)" if several else "")
    ]
    for place in range(width):
        digits = (str(rank).rjust(width)[place] for rank in range(size))
        lines.append((" " * (width + 2) + " ".join(digits)).rstrip())
    lines += [f"{rank:>{width}}  {' '.join(row)}" for rank, row in enumerate(cells)]
    return "\n".join(lines)


def _wrap(text: str) -> str:
    """Break a line at the width of a page."""
    return textwrap.fill(
        text, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
