"""SGLang's per-batch solver, held against this library and HiGHS."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from sglang_maps import DEVICE, padded, random_ids, random_maps

from lplb_triton import Balancer, Placement, SolveError, solve
from lplb_triton._backends.tables import DeviceTables
from lplb_triton.integrations.sglang import LPLBSolver, update_solvers


def counts_of(ids, experts):
    flat = ids.flatten()
    return torch.bincount(flat[flat >= 0], minlength=experts).cpu()


def loads_of(prob, log2phy, counts, ranks, n_physical):
    """Load of each rank if each copy takes its part."""
    tokens = prob.double().cpu() * counts.unsqueeze(1)
    rows = log2phy.cpu()
    per_slot = torch.zeros(n_physical, dtype=torch.float64)
    per_slot.index_add_(0, rows[rows >= 0], tokens[rows >= 0])
    return per_slot.reshape(ranks, -1).sum(1)


def check_rows(prob, log2phy):
    assert prob.dtype == torch.float32 and prob.shape == log2phy.shape
    assert prob.device == log2phy.device
    assert bool((prob >= 0).all())
    assert not bool(prob[log2phy < 0].any())
    torch.testing.assert_close(prob.sum(1), torch.ones_like(prob[:, 0]), atol=1e-6, rtol=0)


def highs(phy2log, counts, ranks):
    """Optimum of the LP with one variable per slot, from an outside solver."""
    experts, slots = len(counts), len(phy2log)
    conserve = np.zeros((experts, slots + 1))
    conserve[phy2log, np.arange(slots)] = 1
    load = np.zeros((ranks, slots + 1))
    load[np.arange(slots) // (slots // ranks), np.arange(slots)] = 1
    load[:, -1] = -1
    cost = np.zeros(slots + 1)
    cost[-1] = 1
    done = linprog(
        cost, A_ub=load, b_ub=np.zeros(ranks), A_eq=conserve, b_eq=counts, method="highs"
    )
    assert done.success
    return done.fun


def addresses(solver):
    tables = solver._tables
    return [t.data_ptr() for t in (tables.log2phy, tables.cell, tables.part, tables.even)]


class TestSolver:
    @given(
        seed=st.integers(0, 10**6),
        ranks=st.sampled_from([1, 2, 3, 5, 8]),
        slots=st.integers(1, 6),
        tokens=st.sampled_from([0, 1, 7, 300]),
        dtype=st.sampled_from([torch.int32, torch.int64]),
    )
    def test_shares_are_optimal(self, seed, ranks, slots, tokens, dtype):
        """The largest load under a solver's shares is HiGHS's optimum within the tolerance."""
        n_physical = ranks * slots
        experts = int(np.random.default_rng(seed).integers(1, n_physical + 1))
        # On the CPU everywhere: on a GPU every shape would compile kernels of its own.
        phy2log, log2phy = (m.cpu() for m in random_maps(seed, ranks, slots, experts))
        solver = LPLBSolver(phy2log, log2phy, ranks, None, (log2phy >= 0).sum(1))
        assert torch.equal(solver.log2phy, log2phy) and solver.log2phy.dtype == torch.int64
        assert (solver.num_logical, solver.num_phy) == (experts, n_physical)
        assert solver.max_copies == log2phy.shape[1]
        ids = random_ids(seed, tokens, experts).cpu().to(dtype)
        prob = solver.solve(ids)
        check_rows(prob, log2phy)
        counts = counts_of(ids, experts)
        largest = float(loads_of(prob, log2phy, counts, ranks, n_physical).max())
        placement = Placement(phy2log, ranks, n_logical=experts)
        best = float(solve(placement.problem(counts), tolerance=1e-8, backend="torch").max_load)
        assert best * (1 - 1e-6) <= largest <= best * (1 + 1.1e-3)
        outside = highs(phy2log.numpy(), counts.numpy(), ranks)
        assert outside * (1 - 1e-6) <= largest <= outside * (1 + 1.1e-3)
        solver.check()
        assert int(solver.balancer.certified) == int(solver.balancer.solves) == 1

    def test_copies_on_one_rank_share_evenly(self):
        """Copies of an expert on one rank take equal parts of the rank's share."""
        # Expert 0: two slots on rank 0 and one on rank 1; expert 1: both slots on rank 1.
        phy2log = torch.tensor([0, 0, 2, 0, 1, 1]).to(DEVICE)
        log2phy = torch.tensor([[3, 0, 1], [-1, 5, 4], [2, -1, -1]]).to(DEVICE)
        solver = LPLBSolver(phy2log, log2phy, 2, tolerance=1e-5)
        ids = torch.tensor([0] * 60 + [1] * 30 + [2] * 10).to(DEVICE)
        want = [[1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5], [1, 0, 0]]
        got = solver.solve(ids).cpu()
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-3, rtol=0)
        assert float(got[0, 1]) == float(got[0, 2])

    def test_no_copies_and_padding_as_wide_as_the_slots(self):
        """An expert without copies has share 1 in its one slot, and padding has share 0."""
        phy2log = torch.arange(8).to(DEVICE)
        log2phy = torch.full((8, 8), -1).to(DEVICE)
        log2phy[:, 0] = phy2log
        prob = LPLBSolver(phy2log, log2phy, 4).solve(random_ids(0, 50, 8))
        assert torch.equal(prob, (log2phy >= 0).float())

    def test_buffer_is_fixed(self):
        """Every solve writes its shares to one buffer, and equal ids give equal shares."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        solver = LPLBSolver(phy2log, log2phy, 4)
        addresses, plans = set(), []
        for seed in (1, 2, 1):
            prob = solver.solve(random_ids(seed, 200, 16))
            addresses.add(prob.data_ptr())
            plans.append(prob.clone())
        assert len(addresses) == 1
        assert torch.equal(plans[0], plans[2]) and not torch.equal(plans[0], plans[1])

    def test_update_in_place(self):
        """An update keeps every address, and a refused one changes no shares."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        other_phy2log, other_log2phy = random_maps(4, 4, 6, 16)
        log2phy, other_log2phy = padded(log2phy), padded(other_log2phy)
        solver = LPLBSolver(phy2log, log2phy, 4)
        ids = random_ids(5, 300, 16)
        before = solver.solve(ids)
        tables = addresses(solver)
        solver.update(other_phy2log, other_log2phy, (other_log2phy >= 0).sum(1))
        after = solver.solve(ids)
        assert after.data_ptr() == before.data_ptr()
        assert addresses(solver) == tables
        assert torch.equal(after, LPLBSolver(other_phy2log, other_log2phy, 4).solve(ids))
        mapped = solver.run(ids)
        assert torch.equal(other_phy2log[mapped[mapped >= 0].long()], ids[ids >= 0].long())
        for bad, message in (
            ((phy2log[:-4], log2phy), "^phy2log must have shape"),
            ((phy2log, log2phy[:, :-1]), "^log2phy must have shape"),
            ((phy2log, other_log2phy), "^log2phy gives expert"),
        ):
            with pytest.raises(ValueError, match=message):
                solver.update(*bad)
        assert torch.equal(solver.solve(ids), after)

    def test_maps_are_copied(self):
        """A solver neither writes to the caller's maps nor reads them later."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        log2phy = padded(log2phy)
        given = phy2log.clone(), log2phy.clone()
        solver = LPLBSolver(phy2log, log2phy, 4)
        other, other_rows = random_maps(4, 4, 6, 16)
        solver.update(other, padded(other_rows))
        assert torch.equal(phy2log, given[0]) and torch.equal(log2phy, given[1])
        log2phy.fill_(-1)
        solver.update(*given)
        assert torch.equal(solver.log2phy, given[1])

    def test_maps_of_an_update_may_be_on_the_cpu(self):
        """An update takes maps on the CPU for a solver on any device."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        solver = LPLBSolver(phy2log, padded(log2phy), 4)
        other, rows = random_maps(4, 4, 6, 16)
        solver.update(other.cpu(), padded(rows).cpu())
        assert torch.equal(solver.log2phy, padded(rows))

    def test_an_update_to_the_same_maps_writes_nothing(self, monkeypatch):
        """An update to equal maps writes neither tables nor entries."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        log2phy = padded(log2phy)
        solver = LPLBSolver(phy2log, log2phy, 4)
        ids = random_ids(5, 300, 16)
        want = solver.solve(ids).clone()
        written = []
        monkeypatch.setattr(DeviceTables, "_fill", lambda *_: written.append("tables"))
        monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *_: written.append("entries"))
        solver.update(phy2log.clone(), log2phy.clone())
        monkeypatch.undo()
        assert written == []
        assert torch.equal(solver.solve(ids), want)

    def test_other_rows_for_the_same_placement(self):
        """Rows in another order for the same placement reorder the shares alike."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        log2phy = padded(log2phy)
        solver = LPLBSolver(phy2log, log2phy, 4)
        ids = random_ids(5, 300, 16)
        want = solver.solve(ids).flip(1).clone()
        solver.update(phy2log, log2phy.flip(1))
        assert torch.equal(solver.log2phy, log2phy.flip(1))
        torch.testing.assert_close(solver.solve(ids), want)

    def test_made_under_inference_mode(self):
        """A solver made under inference mode works inside it and outside."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        with torch.inference_mode():
            solver = LPLBSolver(phy2log, log2phy, 4)
        ids = random_ids(5, 300, 16)
        prob = solver.solve(ids)
        assert not prob.is_inference() and not solver.log2phy.is_inference()
        with torch.inference_mode():
            solver.update(phy2log, log2phy.flip(1))
            assert torch.equal(solver.run(ids), Balancer(Placement(phy2log, 4)).run(ids))
        check_rows(solver.solve(ids), solver.log2phy)

    def test_first_buffer_is_even(self):
        """Until the first batch, probabilities are even over the slots listed."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        listed = (log2phy >= 0).float()
        assert torch.equal(
            LPLBSolver(phy2log, log2phy, 4)._probabilities, listed / listed.sum(1)[:, None]
        )

    def test_a_dropped_solver_is_freed(self):
        """SGLang makes the solvers of all layers anew after every chunk of a rebalance."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        gone = []
        for _ in range(3):
            solver = LPLBSolver(phy2log, log2phy, 4)
            solver.run(random_ids(5, 30, 16))
            gone += [weakref.ref(solver), weakref.ref(solver.balancer)]
            del solver
        assert [ref() for ref in gone] == [None] * 6

    def test_columns_of_fused_shared_experts(self):
        """SGLang splits them off, feeds what is left, a view, and joins them again."""
        phy2log, log2phy = random_maps(7, 4, 8, 20)
        solver = LPLBSolver(phy2log, log2phy, 4)
        routed = random_ids(8, 60, 20)
        topk_ids = torch.cat([routed, torch.full_like(routed[:, :1], 20)], dim=1)
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="^topk_ids must hold ids"):
                solver.run(topk_ids)
        view = topk_ids[:, :-1]
        assert not view.is_contiguous()
        mapped = solver.run(view)
        assert torch.equal(mapped, solver.run(routed)) and mapped.shape == routed.shape
        assert torch.equal(solver.solve(view), solver.solve(routed))
        physical = torch.cat([mapped, topk_ids[:, -1:]], dim=1)
        assert torch.equal(physical[:, -1], topk_ids[:, -1])
        held = mapped >= 0
        assert torch.equal(phy2log[mapped[held].long()], routed[held].long())

    def test_layers_at_once(self):
        """One call updates the solvers of all layers, and wrong maps or sizes are refused."""
        maps = [random_maps(i, 4, 6, 16) for i in range(4)]
        phy2log, log2phy = (
            torch.stack(m) for m in zip(*((p, padded(r)) for p, r in maps), strict=True)
        )
        solvers = [LPLBSolver(phy2log[0], log2phy[0], 4) for _ in maps]
        update_solvers(solvers, phy2log, log2phy)
        for solver, placed, rows in zip(solvers, phy2log, log2phy, strict=True):
            assert torch.equal(solver.balancer.placement.phy2log.long(), placed.cpu())
            assert torch.equal(solver.log2phy, rows)
        update_solvers([], phy2log, log2phy)
        other = LPLBSolver(phy2log[0], padded(log2phy[0], 20), 4)
        for bad, message in (
            ((solvers, phy2log[:2], log2phy), r"^phy2log must have shape \(4, 24\)"),
            ((solvers, phy2log, log2phy[0]), "^log2phy must have 3 dim"),
            ((solvers, phy2log, log2phy.flip(0)), "^log2phy gives expert"),
            (([*solvers, other], phy2log, log2phy), "^solvers must be of equal sizes"),
        ):
            with pytest.raises(ValueError, match=message):
                update_solvers(*bad)
        assert torch.equal(solvers[3].log2phy, log2phy[3])

    @pytest.mark.parametrize("ids", [torch.empty(0, 8), torch.full((5, 8), -1), torch.empty(3, 0)])
    def test_no_tokens(self, ids):
        """A batch without tokens is certified, keeps its ids and has shares that sum to 1."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        solver = LPLBSolver(phy2log, log2phy, 4)
        ids = ids.int().to(DEVICE)
        check_rows(solver.solve(ids), log2phy)
        assert torch.equal(solver.run(ids), ids)
        solver.check()
        assert int(solver.balancer.certified) == 2

    def test_run_meets_the_quotas(self):
        """A run gives each copy its share of the tokens to within one token."""
        phy2log, log2phy = random_maps(7, 4, 8, 20)
        solver = LPLBSolver(phy2log, log2phy, 4)
        ids = random_ids(8, 500, 20)
        prob = solver.solve(ids).cpu()
        mapped = solver.run(ids)
        assert mapped.dtype == ids.dtype and mapped.shape == ids.shape
        assert torch.equal(mapped < 0, ids < 0)
        assert torch.equal(phy2log[mapped[mapped >= 0].long()], ids[ids >= 0].long())
        taken = torch.bincount(mapped[mapped >= 0], minlength=32).cpu()
        wanted = prob.double() * counts_of(ids, 20).unsqueeze(1)
        rows = log2phy.cpu()
        assert float((taken[rows] - wanted)[rows >= 0].abs().max()) <= 1 + 1e-3

    def test_partial_rows_are_warned_of(self):
        """Rows that list some slots of an expert warn, and their probabilities sum to 1."""
        phy2log = torch.tensor([0, 1, 0, 2, 0, 3]).to(DEVICE)
        log2phy = torch.tensor([[2, 0], [1, -1], [3, -1], [5, -1]]).to(DEVICE)
        with pytest.warns(RuntimeWarning, match="some of the slots of 1 experts") as caught:
            solver = LPLBSolver(phy2log, log2phy, 3)
        assert caught[0].filename == __file__
        # The three ranks should take 10, 40 and 40 of expert 0's tokens; the third isn't listed.
        ids = torch.tensor([0] * 90 + [1] * 30).to(DEVICE)
        prob = solver.solve(ids)
        check_rows(prob, log2phy)
        torch.testing.assert_close(prob[0].cpu(), torch.tensor([0.8, 0.2]), atol=3e-3, rtol=0)
        assert 39 <= int((solver.run(ids) == 4).sum()) <= 41
        # No part of the plan is listed: the slots that are take even parts.
        shares = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1)
        shares = torch.nn.functional.pad(shares, (0, solver.balancer.placement.max_columns - 1))
        assert torch.equal(
            solver._write_probabilities(shares.to(DEVICE))[0].cpu(), torch.tensor([0.5, 0.5])
        )

    def test_not_certified_is_told(self):
        """A check raises with the number of solves that were not certified."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        solver = LPLBSolver(phy2log, log2phy, 4)
        solver.balancer.solves += 2
        with pytest.raises(SolveError, match="2 of 2"):
            solver.check()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"phy2log": [0, 1, 0, 2]}, TypeError, "^phy2log"),
            ({"phy2log": torch.ones(4)}, TypeError, "^phy2log"),
            ({"phy2log": torch.tensor([[0, 1, 0, 2]])}, ValueError, "^phy2log"),
            ({"phy2log": torch.tensor([0, 1, 0, 1])}, ValueError, "^phy2log gives no slot"),
            ({"phy2log": torch.tensor([0, 1, 0, 3])}, ValueError, "^phy2log must hold ids"),
            ({"log2phy": torch.ones(3, 2)}, TypeError, "^log2phy"),
            ({"log2phy": torch.arange(3)}, ValueError, "^log2phy"),
            ({"log2phy": torch.tensor([[0, 2], [1, 4], [3, -1]])}, ValueError, "^log2phy must"),
            ({"log2phy": torch.tensor([[0, 2], [1, -2], [3, -1]])}, ValueError, "^log2phy must"),
            ({"log2phy": torch.tensor([[0, 1], [1, -1], [3, -1]])}, ValueError, "gives expert 0"),
            ({"log2phy": torch.tensor([[0, 0], [1, -1], [3, -1]])}, ValueError, "lists a slot"),
            ({"log2phy": torch.tensor([[0, 2], [-1, -1], [3, -1]])}, ValueError, "expert 1 no"),
            ({"num_gpus": 3}, ValueError, "^num_gpus"),
            ({"num_gpus": 2.0}, TypeError, "^num_gpus"),
            ({"ep_group": object()}, TypeError, "^ep_group"),
            ({"replicated_tokens": 1}, TypeError, "^replicated_tokens must be a bool"),
            (
                {"logical_to_all_physical_map_num_valid": torch.tensor([2, 1, 2])},
                ValueError,
                "^logical_to_all_physical_map_num_valid",
            ),
            ({"backend": "numpy"}, ValueError, "^backend"),
            ({"tolerance": 0.0}, ValueError, "^tolerance"),
        ],
    )
    def test_errors(self, change, error, message):
        """A wrong argument of a solver is refused with a message that names it."""
        arguments = {
            "phy2log": torch.tensor([0, 1, 0, 2]),
            "log2phy": torch.tensor([[0, 2], [1, -1], [3, -1]]),
            "num_gpus": 2,
        }
        with pytest.raises(error, match=message):
            LPLBSolver(**(arguments | change))

    def test_bad_ids(self, monkeypatch):
        """Wrong ids are refused under the name topk_ids, at once or in a later call."""
        solver = LPLBSolver(torch.tensor([0, 1]), torch.tensor([[0], [1]]), 2)
        for call in (solver.solve, solver.run):
            with pytest.raises(ValueError, match="^topk_ids must hold ids"):
                call(torch.tensor([2]))
            with pytest.raises(TypeError, match="^topk_ids must be int64 or int32"):
                call(torch.tensor([0.5]))
            with pytest.raises(TypeError, match="^topk_ids must be a torch.Tensor"):
                call([0])
        assert int(solver.balancer.solves) == 0
        solver.check()

        def late(*_):
            raise RuntimeError("idx held 7, outside [-1, 2), in an earlier call")

        # As where kernels look, without a wait.
        monkeypatch.setattr(solver.balancer, "check", late)
        monkeypatch.setattr(solver.balancer, "count", late)
        monkeypatch.setattr(solver.balancer, "run", late)
        for call in (solver.check, lambda: solver.solve(None), lambda: solver.run(None)):
            with pytest.raises(RuntimeError, match="^topk_ids held 7, outside"):
                call()

    def test_triton_agrees_with_its_twin(self):
        """Both backends reach the same largest load within the tolerance."""
        phy2log, log2phy = random_maps(9, 4, 6, 16)
        ids = random_ids(10, 120, 16)
        counts = counts_of(ids, 16)
        largest = []
        for backend in ("triton", "torch"):
            solver = LPLBSolver(phy2log, log2phy, 4, backend=backend)
            prob = solver.solve(ids)
            check_rows(prob, log2phy)
            largest.append(float(loads_of(prob, log2phy, counts, 4, 24).max()))
            solver.check()
            assert int(solver.balancer.solves) == 1
        assert largest[0] == pytest.approx(largest[1], rel=1.1e-3)

    @pytest.mark.gpu
    def test_graph_replays_follow_ids_and_placement(self):
        """A replayed graph follows ids and placements that were written in place."""
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        rows = padded(log2phy)
        solver = LPLBSolver(phy2log, rows, 4)
        ids = random_ids(1, 200, 16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            prob = solver.solve(ids)
        for seed in (2, 3):
            if seed == 3:
                phy2log, log2phy = random_maps(4, 4, 6, 16)
                rows = padded(log2phy)
                solver.update(phy2log, rows)
            ids.copy_(random_ids(seed, 200, 16))
            prob.fill_(torch.nan)
            graph.replay()
            want = LPLBSolver(phy2log, rows, 4).solve(ids)
            assert torch.equal(prob, want)
        solver.check()
