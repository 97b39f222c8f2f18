"""Check the physical ids of all ranks against the LP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lplb_triton import Balancer, Placement, solve
from lplb_triton.bench.ep.sizes import N_COUNTS
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure.timer import WrongAnswerError, compute_statistics
from lplb_triton.bench.types import Row
from lplb_triton.solution import SHARE_BITS

__all__ = ["check_loads"]


def check_loads(worker: Worker, balancer: Balancer, batches: Sequence[torch.Tensor]) -> Row:
    """Check the physical ids of all ranks against the LP, before anything is timed.

    Every physical id must be a copy of its logical id, every copy must get its quota, and the
    largest rank load must lie between the LP's lower bound and its certified load plus what
    rounding may add.
    """
    placement, exact = balancer.placement, balancer.quotas == "global"
    rank_of_slot = placement.rank_of_slot.long()
    # The load of a copy differs from its share by less than a token: over all ranks with global
    # quotas, on each rank with local ones.
    replicated = placement.logcnt[placement.phy2log.long()] > 1
    slack = int(replicated.view(worker.ranks, -1).sum(1).max()) * (1 if exact else worker.ranks)
    imbalance, over_bound, kept, everything = [], [], 0, 0
    for idx in batches:
        logical, physical = worker.gather(idx), worker.gather(balancer.run(idx))
        if not torch.equal(placement.phy2log[physical].long(), logical):
            raise WrongAnswerError("physical ids don't map back")
        counts = _count_rows(logical, N_COUNTS)
        loads = _count_rows(physical, placement.n_physical)
        total = counts.sum(0)
        solution = balancer.solve(total.int().to(balancer.device))
        solution.check()
        cumulative = balancer.cumulative_shares(solution.shares).cpu().long()
        if exact:
            _check_quotas(placement, total[None], loads.sum(0, keepdim=True), cumulative)
        else:
            _check_quotas(placement, counts, loads, cumulative)
        best = solve(placement.problem(total))
        best.check()
        by_rank = loads.sum(0).view(worker.ranks, -1).sum(1).double()
        largest, bound = float(by_rank.max()), float(best.lower_bound.max())
        most = float(best.max_load.max()) / (1 - balancer.tolerance) + slack
        if not bound * (1 - 1e-6) <= largest <= most * (1 + 1e-6):
            raise WrongAnswerError(
                f"largest load {largest:.0f}, expected from {bound:.1f} to {most:.1f}"
            )
        imbalance.append(largest / float(by_rank.mean()))
        over_bound.append(largest / bound)
        sender = torch.arange(worker.ranks, device="cpu").view(-1, 1, 1)
        kept += int((rank_of_slot[physical] == sender).sum())
        everything += physical.numel()
    if exact:
        sent = [worker.sum_over_ranks(int(tokens)) for tokens in balancer.traffic]
        if sent[0] != kept or sent[2] != everything:
            raise WrongAnswerError(f"traffic says {sent}, {kept} of {everything} were kept")
    return {
        "batches": len(batches),
        "imbalance": compute_statistics(imbalance),
        "over_bound": max(over_bound),
        "kept_on_rank": kept / everything,
    }


def _count_rows(ids: torch.Tensor, n: int) -> torch.Tensor:
    """Count how often each id occurs in each row: ``[rows, n]``."""
    return torch.stack([torch.bincount(row.reshape(-1), minlength=n) for row in ids])


def _check_quotas(
    placement: Placement, counts: torch.Tensor, loads: torch.Tensor, cumulative: torch.Tensor
) -> None:
    """Refuse a copy whose load differs by a token or more from its share of its expert's count.

    Rows of ``counts`` ``[rows, n_logical]`` and ``loads`` ``[rows, n_physical]`` are checked
    separately; ``cumulative`` ``[n_physical]`` comes from `Balancer.cumulative_shares`.
    """
    structure = placement.structure
    start = torch.tensor(structure.copy_start).long()
    before = cumulative.roll(1)
    before[start[:-1]] = 0
    total = counts.repeat_interleave(start.diff(), 1)
    off = loads[:, torch.tensor(structure.copy_slot).long()] << SHARE_BITS
    off -= (cumulative - before) * total
    if int(off.abs().max()) >= 1 << SHARE_BITS:
        raise WrongAnswerError("a copy's load is a token or more off its share")
