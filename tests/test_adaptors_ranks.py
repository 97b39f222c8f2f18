"""Solvers with SGLang's interface on several ranks."""

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from sglang_maps import padded, random_ids, random_maps

from lplb_triton import Balancer, Placement, _consensus
from lplb_triton.integrations.sglang import LPLBSolver, update_solvers
from lplb_triton.sync._rendezvous import all_gather_objects


class Coordinator:
    """What an engine wraps torch's group in."""

    def __init__(self, group):
        self.device_group = group


def check_ranks(rank, group):
    ranks = group.size()
    phy2log, log2phy = (m.cpu() for m in random_maps(11, ranks, 6, 8))
    solver = LPLBSolver(phy2log, log2phy, ranks, Coordinator(group))
    alone = LPLBSolver(phy2log, log2phy, ranks)

    def share(r, batch):
        """Rank 1 is idle in even batches, and everybody in batch 2."""
        idle = batch == 2 or (r == 1 and batch % 2 == 0)
        return random_ids(10 * batch + r, 0 if idle else 100 + r, 8).cpu()

    for batch in range(4):
        everything = torch.cat([share(r, batch) for r in range(ranks)])
        want = alone.solve(everything)
        mine = share(rank, batch)
        assert torch.equal(solver.solve(mine), want)
        # An idle rank may take SGLang's way for empty batches while the others call run.
        if len(mine):
            mapped = solver.run(mine)
            assert torch.equal(phy2log[mapped[mapped >= 0].long()], mine[mine >= 0].long())
        else:
            assert torch.equal(solver.solve(mine), want)
    solver.check()
    assert int(solver.balancer.certified) == int(solver.balancer.solves) == 8
    direct = LPLBSolver(phy2log, log2phy, ranks, group)
    assert torch.equal(direct.solve(share(rank, 3)), want)
    mine = random_maps(11 + rank, ranks, 6, 8)
    if rank == 0:
        LPLBSolver(*(m.cpu() for m in mine), ranks, group)
    else:
        with pytest.raises(ValueError, match="^phy2log must be the same on every rank"):
            LPLBSolver(*(m.cpu() for m in mine), ranks, group)


def check_replicated(rank, group):
    ranks = group.size()
    phy2log, log2phy = (m.cpu() for m in random_maps(11, ranks, 6, 8))
    other, rows = (m.cpu() for m in random_maps(12, ranks, 6, 8))
    log2phy, rows = padded(log2phy, 18), padded(rows, 18)
    solver = LPLBSolver(phy2log, log2phy, ranks, Coordinator(group), replicated_tokens=True)
    with pytest.warns(
        RuntimeWarning, match="Give ep_group= .*, or replicated_tokens=True"
    ) as caught:
        alone = LPLBSolver(phy2log, log2phy, ranks)
    assert caught[0].filename == __file__
    ids = random_ids(1, 200, 8).cpu()

    def same(tensor):
        everyone = [torch.empty_like(tensor) for _ in range(ranks)]
        dist.all_gather(everyone, tensor, group=group)
        return all(torch.equal(theirs, tensor) for theirs in everyone)

    for maps in ((phy2log, log2phy), (other, rows)):
        solver.update(*maps)
        alone.update(*maps)
        # Nothing is summed: these are the tokens of all.
        assert torch.equal(solver.solve(ids), alone.solve(ids))
        mapped = solver.run(ids)
        assert same(mapped) and torch.equal(mapped, alone.run(ids))
        # What each rank picks for tokens of its own is another matter.
        assert not same(Balancer(Placement(maps[0], ranks), rank=rank, device="cpu").run(ids))
    # Rank 1 comes with another map than rank 0.
    mine = (phy2log, log2phy) if rank == 1 else (other, rows)
    for call in (
        lambda: solver.update(*mine),
        lambda: LPLBSolver(*mine, ranks, group, replicated_tokens=True),
    ):
        if rank == 1:
            with pytest.raises(ValueError, match="^phy2log must be the same on every rank"):
                call()
        else:
            call()
    with pytest.raises(ValueError, match="^ep_group must have num_gpus 6 ranks, got 3"):
        LPLBSolver(*mine, 6, group)


def check_layers(rank, group):
    """One rendezvous serves the update of all layers, and all hear of what is wrong on one."""
    ranks, layers = group.size(), range(3)
    before = [[padded(m.cpu(), 18) for m in random_maps(20 + i, ranks, 6, 8)] for i in layers]
    after = [[padded(m.cpu(), 18) for m in random_maps(30 + i, ranks, 6, 8)] for i in layers]
    solvers = [LPLBSolver(*maps, ranks, group) for maps in before]
    purposes = []

    def counted(group, purpose, *arguments):
        purposes.append(purpose)
        return all_gather_objects(group, purpose, *arguments)

    phy2log, log2phy = (torch.stack(maps) for maps in zip(*after, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_consensus, "all_gather_objects", counted)
        update_solvers(solvers, phy2log, log2phy, (log2phy >= 0).sum(2))
    assert purposes == ["update_solvers"]
    ids = random_ids(rank, 200, 8).cpu()
    for solver, maps in zip(solvers, after, strict=True):
        assert torch.equal(solver.log2phy, maps[1])
        want = LPLBSolver(*maps, ranks, group)
        assert torch.equal(solver.solve(ids), want.solve(ids))
        assert torch.equal(solver.run(ids), want.run(ids))
    wrong = log2phy.clone()
    if rank == 1:
        wrong[2, 0] = -1
    message = "log2phy gives expert 0 no slot"
    with pytest.raises(ValueError, match=message if rank == 1 else f"rank 1's was.*{message}"):
        update_solvers(solvers, phy2log.flip(0), wrong.flip(0))
    for solver, maps in zip(solvers, after, strict=True):
        assert torch.equal(solver.balancer.placement.phy2log.long(), maps[0])


def check_all(rank, group):
    check_ranks(rank, group)
    check_replicated(rank, group)
    check_layers(rank, group)


def test_ranks_over_gloo(tmp_path):
    """Solvers on three ranks agree on shares, replicated tokens and updates of all layers."""
    run_ranks(check_all, 3, tmp_path)
