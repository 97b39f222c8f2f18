"""Adaptors for serving engines, held against the engines' signatures and against this library.

The signatures below were read, not imported, from

- vLLM, repository vllm-project/vllm: vllm/distributed/eplb/policy/default.py at
  02c1119c578212d6d51339bc88ad6d12f96e08c2 (`DefaultEplbPolicy`), and the call of it in
  vllm/distributed/eplb/eplb_state.py at 50feac95f9e53a97d6ed27fee6bfe3b163d18594;
- SGLang, repository sgl-project/sglang: python/sglang/srt/eplb/lplb_solver.py at
  0221963c584951daa71849761864ab33f01b64df (`LPLBSolver`), eplb_algorithms/__init__.py beside it at
  046f88cb789d7d0e268dce5b7bdbe4ad3252d5ba and eplb_algorithms/deepseek.py at
  06120cc8d77b198b925c6a04ef52ef4e218078f4.
"""

import abc
import enum
import inspect
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from gloo import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from lplb_triton import Placement, SolveError, eplb, solve
from lplb_triton.adaptors import sglang
from lplb_triton.adaptors.sglang import EplbAlgorithm, LPLBSolver
from lplb_triton.adaptors.vllm import LplbEplbPolicy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (name, whether it has a default) of each positional parameter, in order.
VLLM_PARAMETERS = [
    ("weight", False),
    ("num_replicas", False),
    ("num_groups", False),
    ("num_nodes", False),
    ("num_ranks", False),
    ("old_global_expert_indices", True),
]
SGLANG_REBALANCE_PARAMETERS = [
    ("tokens_per_expert", False),
    ("num_physical_experts", False),
    ("num_local_physical_experts", False),
    ("num_groups", False),
    ("num_nodes", False),
    ("algorithm", False),
]
SGLANG_SOLVER_PARAMETERS = [
    ("phy2log", False),
    ("log2phy", False),
    ("num_gpus", False),
    ("ep_group", True),
    ("logical_to_all_physical_map_num_valid", True),
]


def positional(function):
    return [
        (p.name, p.default is not p.empty)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


def test_signatures():
    assert positional(LplbEplbPolicy.rebalance_experts) == VLLM_PARAMETERS
    assert positional(sglang.rebalance_experts) == SGLANG_REBALANCE_PARAMETERS
    assert positional(LPLBSolver) == SGLANG_SOLVER_PARAMETERS
    assert positional(LPLBSolver.solve) == [("self", False), ("topk_ids", False)]
    names = [("raw_algorithm", False), ("num_groups", False), ("num_nodes", False)]
    assert positional(sglang.compute_algorithm) == names


def test_import_is_light():
    code = (
        "import sys, torch\n"
        "from lplb_triton.adaptors import sglang, vllm\n"
        "phy2log, log2phy = torch.tensor([0, 1, 0, 2]), torch.tensor([[0, 2], [1, -1], [3, -1]])\n"
        "s = sglang.LPLBSolver(phy2log, log2phy, 2)\n"
        "s.solve(torch.tensor([[0, 1]])); s.run(torch.tensor([[0, 1]]))\n"
        "assert not {'vllm', 'sglang', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


# vLLM


class TestVllm:
    def load(self, layers, experts, seed=0):
        return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1.5, (layers, experts)))

    def keep_oracle(self, new, old, n_ranks):
        """One slot after the other, in plain Python."""
        out = []
        for row, before in zip(new.tolist(), old.tolist(), strict=True):
            n = len(row) // n_ranks
            placed = []
            for r in range(n_ranks):
                todo, was = row[r * n : (r + 1) * n], before[r * n : (r + 1) * n]
                slots = [None] * n
                for s, expert in enumerate(was):
                    if expert in todo:
                        slots[s] = expert
                        todo.remove(expert)
                placed += [todo.pop(0) if s is None else s for s in slots]
            out.append(placed)
        return torch.tensor(out)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.int32])
    @pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (4, 2), (3, 2)])
    def test_is_our_eplb(self, dtype, groups, nodes):
        weight = (100 * self.load(3, 24)).to(dtype).to(DEVICE)
        got = LplbEplbPolicy.rebalance_experts(weight, 32, groups, nodes, 8)
        assert got.dtype == torch.int64 and got.shape == (3, 32) and got.device.type == "cpu"
        assert torch.equal(got, eplb.rebalance_experts(weight, 32, groups, nodes, 8)[0])
        assert inspect.ismethod(LplbEplbPolicy.rebalance_experts)

    @given(
        seed=st.integers(0, 10**6),
        ranks=st.sampled_from([1, 2, 3, 4]),
        slots=st.integers(1, 7),
        layers=st.integers(1, 4),
    )
    def test_keeps_slots(self, seed, ranks, slots, layers):
        rng = np.random.default_rng(seed)
        experts = int(rng.integers(1, ranks * slots + 1))
        weight = torch.from_numpy(rng.lognormal(0, 2, (layers, experts)))
        # The old map is anything, several copies on a rank and empty slots included.
        old = torch.from_numpy(rng.integers(-1, experts, (layers, ranks * slots)))
        plain = LplbEplbPolicy.rebalance_experts(weight, ranks * slots, 1, 1, ranks)
        kept = LplbEplbPolicy.rebalance_experts(weight, ranks * slots, 1, 1, ranks, old.int())
        assert kept.dtype == torch.int64
        assert torch.equal(kept, self.keep_oracle(plain, old, ranks))
        by_rank = (layers, ranks, slots)
        assert torch.equal(
            kept.reshape(by_rank).sort(-1).values, plain.reshape(by_rank).sort(-1).values
        )
        most = sum(
            sum((Counter(a) & Counter(b)).values())
            for new_row, old_row in zip(
                plain.reshape(by_rank).tolist(), old.reshape(by_rank).tolist(), strict=True
            )
            for a, b in zip(new_row, old_row, strict=True)
        )
        assert int((kept == old).sum()) == most

    def test_same_load_moves_nothing(self):
        weight = self.load(5, 64)
        old = LplbEplbPolicy.rebalance_experts(weight, 80, 1, 1, 8)
        shuffled = old.reshape(5, 8, 10).flip(-1).reshape(5, 80)
        again = LplbEplbPolicy.rebalance_experts(weight, 80, 1, 1, 8, shuffled)
        assert torch.equal(again, shuffled)

    def test_other_number_of_slots_binds_nothing(self):
        weight = self.load(2, 16)
        plain = LplbEplbPolicy.rebalance_experts(weight, 16, 1, 1, 4)
        old = torch.arange(24).remainder(16).expand(2, -1)
        assert torch.equal(LplbEplbPolicy.rebalance_experts(weight, 16, 1, 1, 4, old), plain)

    def test_stands_in_for_the_abstract_class(self):
        class Abstract(abc.ABC):
            @classmethod
            @abc.abstractmethod
            def rebalance_experts(cls, *args):
                raise NotImplementedError

        class Policy(LplbEplbPolicy, Abstract):
            pass

        assert not inspect.isabstract(Policy)
        assert Policy.rebalance_experts(self.load(1, 4), 6, 1, 1, 2).shape == (1, 6)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"num_ranks": 5}, ValueError, "^num_replicas must be a multiple of num_ranks"),
            ({"num_ranks": 0}, ValueError, "^num_ranks"),
            ({"num_ranks": 2.0}, TypeError, "^num_ranks"),
            ({"num_replicas": 12}, ValueError, "^num_replicas"),
            ({"weight": -torch.ones(2, 16)}, ValueError, "weight"),
            ({"old_global_expert_indices": [0]}, TypeError, "^old_global"),
            ({"old_global_expert_indices": torch.zeros(2, 16)}, TypeError, "^old_global"),
            ({"old_global_expert_indices": torch.arange(16)}, ValueError, "^old_global"),
            (
                {"old_global_expert_indices": torch.zeros(3, 16, dtype=torch.int64)},
                ValueError,
                "^old_global.*2 layers",
            ),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {
            "weight": self.load(2, 16),
            "num_replicas": 16,
            "num_groups": 1,
            "num_nodes": 1,
            "num_ranks": 4,
        }
        with pytest.raises(error, match=message):
            LplbEplbPolicy.rebalance_experts(**(arguments | change))


# SGLang's entry point for placements


class Theirs(enum.Enum):
    deepseek = enum.auto()
    deepseek_hierarchical = enum.auto()
    deepseek_vec = enum.auto()


class TestSglangRebalance:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
    @pytest.mark.parametrize("steps", [1, 5])
    def test_is_our_eplb(self, dtype, steps):
        tokens = torch.randint(0, 1000, (steps, 3, 24)).to(dtype).to(DEVICE)
        for algorithm, groups, nodes, given_groups in (
            (EplbAlgorithm.deepseek, 1, 1, None),
            (Theirs.deepseek, 1, 1, 4),
            ("deepseek_hierarchical", 4, 2, 4),
            (Theirs.deepseek_hierarchical, 4, 2, 4),
        ):
            got = sglang.rebalance_experts(
                tokens_per_expert=tokens,
                num_physical_experts=32,
                num_local_physical_experts=4,
                num_groups=given_groups,
                num_nodes=2,
                algorithm=algorithm,
            )
            want = eplb.rebalance_experts(tokens.sum(0), 32, groups, nodes, 8)
            for mine, theirs, shape in zip(
                got, want, [(3, 32), (3, 24, int(want[2].max())), (3, 24)], strict=True
            ):
                assert torch.equal(mine, theirs)
                assert mine.dtype == torch.int64 and mine.shape == shape
                assert mine.device.type == "cpu"

    def test_compute_algorithm(self):
        choose = sglang.compute_algorithm
        assert choose("auto", 8, 4) is EplbAlgorithm.deepseek_hierarchical
        assert choose("auto", 8, 3) is EplbAlgorithm.deepseek
        assert choose("auto", None, 1) is EplbAlgorithm.deepseek
        assert choose("deepseek", 8, 4) is EplbAlgorithm.deepseek
        with pytest.raises(ValueError, match="^raw_algorithm.*elasticity_aware"):
            choose("elasticity_aware", 8, 4)
        with pytest.raises(ValueError, match="^num_nodes"):
            choose("auto", 8, 0)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"algorithm": Theirs.deepseek_vec}, ValueError, "^algorithm.*deepseek_vec"),
            ({"algorithm": 1}, ValueError, "^algorithm"),
            ({"tokens_per_expert": torch.ones(2, 8)}, ValueError, "^tokens_per_expert"),
            ({"tokens_per_expert": [1]}, TypeError, "^tokens_per_expert"),
            ({"num_local_physical_experts": 3}, ValueError, "^num_local_physical_experts"),
            ({"num_local_physical_experts": 0}, ValueError, "^num_local_physical_experts"),
            ({"num_physical_experts": 8.0}, TypeError, "^num_physical_experts"),
            ({"num_groups": None}, ValueError, "^num_groups"),
            ({"num_groups": 3}, ValueError, "^num_groups"),
            ({"num_nodes": 0}, ValueError, "^num_nodes"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = {
            "tokens_per_expert": torch.ones(1, 2, 8),
            "num_physical_experts": 8,
            "num_local_physical_experts": 2,
            "num_groups": 2,
            "num_nodes": 2,
            "algorithm": "deepseek_hierarchical",
        }
        with pytest.raises(error, match=message):
            sglang.rebalance_experts(**(arguments | change))


# SGLang's solver


def random_maps(seed, ranks, slots, experts):
    """Any placement: several copies, several on one rank; rows and padding in random order."""
    rng = np.random.default_rng(seed)
    n_physical = ranks * slots
    hot = rng.integers(0, experts, max(1, experts // 3))
    extra = rng.choice(np.concatenate([hot, np.arange(experts)]), n_physical - experts)
    phy2log = rng.permutation(np.concatenate([np.arange(experts), extra]))
    width = int(np.bincount(phy2log).max()) + int(rng.integers(0, 3))
    log2phy = np.full((experts, width), -1)
    for expert in range(experts):
        found = rng.permutation(np.flatnonzero(phy2log == expert))
        log2phy[expert, rng.permutation(width)[: len(found)]] = found
    return torch.from_numpy(phy2log).to(DEVICE), torch.from_numpy(log2phy).to(DEVICE)


def random_ids(seed, tokens, experts, top_k=4):
    rng = np.random.default_rng(seed)
    ids = (rng.random((tokens, top_k)) ** 3 * (experts + 1)).astype(np.int32) - 1
    return torch.from_numpy(ids).to(DEVICE)


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


class TestSolver:
    @given(
        seed=st.integers(0, 10**6),
        ranks=st.sampled_from([1, 2, 3, 5, 8]),
        slots=st.integers(1, 6),
        tokens=st.sampled_from([0, 1, 7, 300]),
        dtype=st.sampled_from([torch.int32, torch.int64]),
    )
    def test_shares_are_optimal(self, seed, ranks, slots, tokens, dtype):
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
        phy2log = torch.arange(8).to(DEVICE)
        log2phy = torch.full((8, 8), -1).to(DEVICE)
        log2phy[:, 0] = phy2log
        prob = LPLBSolver(phy2log, log2phy, 4).solve(random_ids(0, 50, 8))
        assert torch.equal(prob, (log2phy >= 0).float())

    def test_buffer_is_fixed(self):
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
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        width = 24
        other_phy2log, other_log2phy = random_maps(4, 4, 6, 16)

        def padded(rows):
            return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=-1)

        log2phy, other_log2phy = padded(log2phy), padded(other_log2phy)
        solver = LPLBSolver(phy2log, log2phy, 4)
        ids = random_ids(5, 300, 16)
        before = solver.solve(ids)
        tables = [table.data_ptr() for table in solver._tables]
        solver.update(other_phy2log, other_log2phy, (other_log2phy >= 0).sum(1))
        after = solver.solve(ids)
        assert after.data_ptr() == before.data_ptr()
        assert [table.data_ptr() for table in solver._tables] == tables
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

    @pytest.mark.parametrize("ids", [torch.empty(0, 8), torch.full((5, 8), -1), torch.empty(3, 0)])
    def test_no_tokens(self, ids):
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        solver = LPLBSolver(phy2log, log2phy, 4)
        ids = ids.int().to(DEVICE)
        check_rows(solver.solve(ids), log2phy)
        assert torch.equal(solver.run(ids), ids)
        solver.check()
        assert int(solver.balancer.certified) == 2

    def test_run_meets_the_quotas(self):
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
        assert torch.equal(solver._write(shares.to(DEVICE))[0].cpu(), torch.tensor([0.5, 0.5]))

    def test_not_certified_is_told(self):
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
        arguments = {
            "phy2log": torch.tensor([0, 1, 0, 2]),
            "log2phy": torch.tensor([[0, 2], [1, -1], [3, -1]]),
            "num_gpus": 2,
        }
        with pytest.raises(error, match=message):
            LPLBSolver(**(arguments | change))

    def test_bad_ids(self):
        solver = LPLBSolver(torch.tensor([0, 1]), torch.tensor([[0], [1]]), 2)
        with pytest.raises(ValueError, match="^idx must hold ids"):
            solver.solve(torch.tensor([2]))
        with pytest.raises(TypeError, match="^idx"):
            solver.solve(torch.tensor([0.5]))
        assert int(solver.balancer.solves) == 0

    def test_triton_agrees_with_its_twin(self):
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
        phy2log, log2phy = random_maps(3, 4, 6, 16)
        rows = torch.nn.functional.pad(log2phy, (0, 24 - log2phy.shape[1]), value=-1)
        solver = LPLBSolver(phy2log, rows, 4)
        ids = random_ids(1, 200, 16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            prob = solver.solve(ids)
        for seed in (2, 3):
            if seed == 3:
                phy2log, log2phy = random_maps(4, 4, 6, 16)
                rows = torch.nn.functional.pad(log2phy, (0, 24 - log2phy.shape[1]), value=-1)
                solver.update(phy2log, rows)
            ids.copy_(random_ids(seed, 200, 16))
            prob.fill_(torch.nan)
            graph.replay()
            want = LPLBSolver(phy2log, rows, 4).solve(ids)
            assert torch.equal(prob, want)
        solver.check()


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


def test_ranks_over_gloo(tmp_path):
    run_ranks(check_ranks, 3, tmp_path)
