"""What other batches, slots and placements would leave of the imbalance, on a part of a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lplb_triton import Placement, solve
from lplb_triton.bench.balance.history import Stretch
from lplb_triton.bench.balance.placements import BY_HISTORY, make_placement
from lplb_triton.bench.balance.replay import Options
from lplb_triton.bench.balance.results import Cell, imbalance
from lplb_triton.bench.balance.whole_tokens import compute_token_loads, merge_sources
from lplb_triton.bench.types import Floats, Row
from lplb_triton.traces.trace import MOST_TOKENS, Trace

__all__ = [
    "BATCH_SIZES",
    "Part",
    "choose_shown",
    "compare_batch_sizes",
    "find_changes",
    "share_programs",
    "take_parts",
]

# Linear programs that one alternative may take, and sums of recorded batches that stand for larger
# ones.
MOST_PROGRAMS, BATCH_SIZES = 128, (1, 2, 4, 8, 16)
# Of combinations that are as good as the best within this, the one with the fewest slots is shown.
AS_GOOD = 0.005


def choose_shown(cells: tuple[Cell, ...]) -> int:
    """Choose the combination that a report is about.

    Parameters
    ----------
    cells
        Results of `lplb_triton.bench.balance.run`, at least one of them possible.

    Returns
    -------
    int
        Index of the one with the fewest slots whose mean imbalance in whole tokens is within half
        a percent of the least, of the first EP size that has results.
    """
    ep = next(cell.ep for cell in cells if cell.reason is None)
    means = {
        at: float(cell.imbalance("integer").mean())
        for at, cell in enumerate(cells)
        if cell.reason is None and cell.ep == ep
    }
    near = [at for at, mean in means.items() if mean <= (1 + AS_GOOD) * min(means.values())]
    return min(near, key=lambda at: (cells[at].slots, means[at]))


@dataclass(frozen=True)
class Part:
    """Some test batches of one layer in one stretch, int64 ``[batches, sources, experts]``."""

    history: torch.Tensor
    later: torch.Tensor
    counts: torch.Tensor
    placement: Placement


def find_changes(trace: Trace, cell: Cell, options: Options) -> list[Row]:
    """Balance the same batches with one thing changed at a time.

    Parameters
    ----------
    trace, options
        As given to `lplb_triton.bench.balance.run`.
    cell
        One of its results.

    Returns
    -------
    list of dict
        ``change`` (``"nothing"`` is the first; ``"slots"``, one more on each rank; ``"chain"``,
        that placement; ``"fresh"``, the same placement made from the batches that it serves),
        ``slots``, and the mean ``imbalance``, its ``p95`` and the ``bound`` of any split, over at
        most about 128 batches. A change that isn't possible is left out; only placements that are
        made for a history have more than the first.
    """
    parts = list(take_parts(trace, cell, per_part=share_programs(cell)))

    def remake(name: str, slots: int, fresh: bool = False) -> Callable[[Part], Placement]:
        return lambda part: make_placement(
            name, part.later if fresh else part.history, cell.ep, slots
        )

    ways: dict[str, tuple[int, Callable[[Part], Placement]]] = {
        "nothing": (cell.slots, lambda part: part.placement)
    }
    if cell.placement in BY_HISTORY:
        if trace.experts + cell.ep * (cell.slots + 1) <= trace.experts * cell.ep:
            ways["slots"] = (cell.slots + 1, remake(cell.placement, cell.slots + 1))
        if cell.placement != "chain" and cell.slots:
            ways["chain"] = (cell.slots, remake("chain", cell.slots))
        ways["fresh"] = (cell.slots, remake(cell.placement, cell.slots, fresh=True))
    rows = []
    for change, (slots, make) in ways.items():
        found = [_balance(make(part), part.counts, options) for part in parts]
        values = np.concatenate([token for token, _ in found])
        rows.append(
            {
                **{"change": change, "slots": slots, "imbalance": float(values.mean())},
                "p95": float(np.percentile(values, 95)),
                "bound": float(np.concatenate([bound for _, bound in found]).mean()),
            }
        )
    return rows


def compare_batch_sizes(trace: Trace, cell: Cell, options: Options) -> list[Row]:
    """Balance sums of successive batches, which stand for larger batches.

    Parameters
    ----------
    trace, options, cell
        As for `find_changes`.

    Returns
    -------
    list of dict
        For each of `BATCH_SIZES` that the test batches are enough for: ``batches`` that are added
        up, ``rows`` (tokens times top-k of a rank, in the mean) and the mean imbalance by
        ``none``, ``eplb`` (as many slots, split evenly) and ``integer``.
    """
    rows = []
    for size in BATCH_SIZES:
        found: dict[str, list[Floats]] = {"none": [], "eplb": [], "integer": []}
        assigned = []
        for part in take_parts(trace, cell, per_part=size * share_programs(cell), together=size):
            totals = part.counts.sum(1)
            if not len(totals) or int(totals.max()) > MOST_TOKENS:
                continue
            for name, method, slots in (("none", "none", 0), ("eplb", "eplb", cell.slots)):
                placed = make_placement(method, part.history, cell.ep, slots)
                found[name].append(imbalance(placed.even_loads(totals).numpy()))
            found["integer"].append(_balance(part.placement, part.counts, options)[0])
            assigned.append(totals.sum(1).double().numpy() / cell.ep)
        if not assigned:
            break
        means = {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}
        rows.append({"batches": size, "rows": float(np.concatenate(assigned).mean()), **means})
    return rows


def share_programs(cell: Cell) -> int:
    """Batches of each layer and stretch, so that all together have about `MOST_PROGRAMS`."""
    return max(2, MOST_PROGRAMS // len(cell.results))


def take_parts(trace: Trace, cell: Cell, per_part: int, together: int = 1) -> Iterator[Part]:
    """Yield some test batches of each result of a cell, evenly spread or ``together`` added up."""
    for result in cell.results:
        part: Stretch = result.stretch
        counts = torch.from_numpy(trace.counts[:, result.layer].astype(np.int64))
        tested = counts[part.split : part.stop]
        if together == 1:
            at = np.linspace(0, len(tested) - 1, min(per_part, len(tested))).round().astype(int)
            chosen = tested[torch.from_numpy(at)]
        else:
            whole = min(len(tested), per_part) // together
            chosen = tested[: whole * together]
            chosen = chosen.reshape(whole, together, *tested.shape[1:]).sum(1)
        yield Part(
            history=counts[part.start : part.split].sum(1).double(),
            later=tested.sum(1).double(),
            counts=merge_sources(chosen, cell.ep),
            placement=result.placement,
        )


def _balance(placement: Placement, counts: torch.Tensor, options: Options) -> tuple[Floats, Floats]:
    """Imbalance of each batch in whole tokens, and the one that no split over the copies beats."""
    totals = counts.sum(1)
    if placement.n_copies == placement.n_logical:
        even = imbalance(placement.even_loads(totals).numpy())
        return even, even
    solution = solve(
        placement.problem(totals.to(options.device)),
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
        backend=options.backend,
    )
    mean = np.maximum(totals.sum(1).double().numpy() / placement.ep_size, 1e-12)
    bound = solution.lower_bound.cpu().double().reshape(len(totals), -1).amax(1).numpy()
    bound = np.where(totals.sum(1).numpy() > 0, bound / mean, 1.0)
    return imbalance(compute_token_loads(placement, counts, solution).numpy()), bound
