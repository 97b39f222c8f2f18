"""Adaptors' signatures, and SGLang's placement, held against this library.

The signatures below were read, not imported, from

- vLLM 0.33.0: ``vllm/distributed/eplb/policy/abstract.py``, and the calls in ``eplb_state.py`` and
  ``async_worker.py`` beside it;
- SGLang 0.5.23: ``sglang/srt/eplb/lplb_solver.py`` and ``sglang/srt/eplb/eplb_algorithms/``.
"""

import ast
import enum
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lplb_triton import eplb, integrations
from lplb_triton.integrations import sglang
from lplb_triton.integrations.sglang import EplbAlgorithm, LPLBSolver
from lplb_triton.integrations.vllm import LplbEplbPolicy
from lplb_triton.placement import moves

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
    """The adaptors' positional parameters have the names and order of vLLM's and SGLang's."""
    assert positional(LplbEplbPolicy.rebalance_experts) == VLLM_PARAMETERS
    assert positional(sglang.rebalance_experts) == SGLANG_REBALANCE_PARAMETERS
    assert positional(LPLBSolver) == SGLANG_SOLVER_PARAMETERS
    assert positional(LPLBSolver.solve) == [("self", False), ("topk_ids", False)]
    names = [("raw_algorithm", False), ("num_groups", False), ("num_nodes", False)]
    assert positional(sglang.compute_algorithm) == names


def test_import_is_light():
    """The adaptors import, solve and run on a CPU without vLLM, SGLang or Triton."""
    code = (
        "import sys, torch\n"
        "from lplb_triton.integrations import sglang, vllm\n"
        "phy2log, log2phy = torch.tensor([0, 1, 0, 2]), torch.tensor([[0, 2], [1, -1], [3, -1]])\n"
        "s = sglang.LPLBSolver(phy2log, log2phy, 2)\n"
        "s.solve(torch.tensor([[0, 1]])); s.run(torch.tensor([[0, 1]]))\n"
        "assert not {'vllm', 'sglang', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


# What makes a tensor where the user's default device would decide, unless it is named.
CREATORS = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip


def test_every_new_tensor_names_its_device():
    """`torch.set_default_device` decides nothing: what is made is made where its inputs are."""
    files = [*Path(integrations.__file__).parent.glob("*.py"), Path(moves.__file__)]
    seen = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in CREATORS
            ):
                seen += 1
                assert "device" in {k.arg for k in node.keywords}, (file.name, node.lineno)
    assert seen >= 5


def test_the_default_device_decides_nothing():
    """Results of the adaptors stay on the CPU under another default device."""
    cpu = torch.device("cpu")
    weight = torch.arange(1.0, 17.0, device=cpu).reshape(2, 8)
    ids = torch.arange(8, device=cpu)
    active = torch.tensor([1, 1, 0, 1], device=cpu)
    with torch.device("meta"):
        old = LplbEplbPolicy.rebalance_experts(weight, 12, 1, 1, 4)
        new = LplbEplbPolicy.rebalance_experts(weight.flip(1), 9, 1, 1, 3, old)
        spoilt = LplbEplbPolicy.rebalance_experts(weight * torch.nan, 9, 1, 1, 3, old)
        placed = sglang.rebalance_experts(
            weight[None], 12, 3, 1, 1, "elasticity_aware", active_ranks=active
        )
        maps = sglang.rebalance_experts(weight[None], 12, 3, 1, 1, "deepseek")
        solver = LPLBSolver(maps[0][0], maps[1][0], 4, None, maps[2][0])
        solver.update(maps[0][1], maps[1][1], maps[2][1])
        found = (old, new, spoilt, *placed, *maps, solver.solve(ids), solver.run(ids))
    assert all(tensor.device == cpu for tensor in found)
    assert torch.equal(maps[0][1][found[-1]], ids)


# SGLang's entry point for placements


class Theirs(enum.Enum):
    deepseek = enum.auto()
    deepseek_hierarchical = enum.auto()
    deepseek_vec = enum.auto()
    deepseek_vec_hierarchical = enum.auto()
    elasticity_aware = enum.auto()
    elasticity_aware_hierarchical = enum.auto()


class TestSglangRebalance:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
    @pytest.mark.parametrize("steps", [1, 5])
    def test_is_our_eplb(self, dtype, steps):
        """A rebalance is EPLB's on the tokens of all steps, as int64 maps on the CPU."""
        tokens = torch.randint(0, 1000, (steps, 3, 24)).to(dtype).to(DEVICE)
        for algorithm, groups, nodes, given_groups in (
            (EplbAlgorithm.deepseek, 1, 1, None),
            (Theirs.deepseek, 1, 1, 4),
            ("deepseek_hierarchical", 4, 2, 4),
            (Theirs.deepseek_hierarchical, 4, 2, 4),
            (EplbAlgorithm.elasticity_aware, 1, 1, None),
            (Theirs.elasticity_aware_hierarchical, 4, 2, 4),
        ):
            got = sglang.rebalance_experts(
                tokens_per_expert=tokens,
                num_physical_experts=32,
                num_local_physical_experts=4,
                num_groups=given_groups,
                num_nodes=2,
                algorithm=algorithm,
                active_ranks=torch.tensor([1] * 8 + [0] * 4),
            )
            want = eplb.rebalance_experts(tokens.sum(0), 32, groups, nodes, 8)
            for mine, theirs, shape in zip(
                got, want, [(3, 32), (3, 24, int(want[2].max())), (3, 24)], strict=True
            ):
                assert torch.equal(mine, theirs)
                assert mine.dtype == torch.int64 and mine.shape == shape
                assert mine.device.type == "cpu"

    def test_compute_algorithm(self):
        """`auto` is hierarchical where nodes divide the groups; unknown names are refused."""
        choose = sglang.compute_algorithm
        assert choose("auto", 8, 4) is EplbAlgorithm.deepseek_hierarchical
        assert choose("auto", 8, 3) is EplbAlgorithm.deepseek
        assert choose("auto", None, 1) is EplbAlgorithm.deepseek
        assert choose("deepseek", 8, 4) is EplbAlgorithm.deepseek
        elastic = EplbAlgorithm.elasticity_aware_hierarchical
        assert choose("elasticity_aware_hierarchical", None, 1) is elastic
        with pytest.raises(ValueError, match="^raw_algorithm.*deepseek_vec"):
            choose("deepseek_vec", 8, 4)
        with pytest.raises(ValueError, match="^num_nodes"):
            choose("auto", 8, 0)

    @pytest.mark.parametrize("name", ["elasticity_aware", "elasticity_aware_hierarchical"])
    @pytest.mark.parametrize("active", [[1, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 1, 0]])
    def test_ranks_that_are_not_active(self, name, active):
        """The ranks left get EPLB's global placement; the others' slots name expert 0."""
        n_local, experts, n_ranks = 5, 8, 4 if len(active) < 8 else 8
        tokens = torch.randint(1, 1000, (3, 2, experts))
        phy2log, log2phy, count = sglang.rebalance_experts(
            tokens, n_ranks * n_local, n_local, 2, 2, name, active_ranks=torch.tensor(active)
        )
        left = [rank for rank in range(n_ranks) if active[rank]]
        want, _, wanted = eplb.rebalance_experts(
            tokens.sum(0), len(left) * n_local, 1, 1, len(left)
        )
        by_rank = phy2log.reshape(2, n_ranks, n_local)
        assert torch.equal(by_rank[:, left].reshape(want.shape), want)
        assert torch.equal(count, wanted) and log2phy.shape == (2, experts, int(count.max()))
        for layer in range(2):
            for rank in set(range(n_ranks)) - set(left):
                assert by_rank[layer, rank].tolist() == [0] * n_local
            for expert in range(experts):
                listed = [s for s in log2phy[layer, expert].tolist() if s >= 0]
                assert len(listed) == count[layer, expert] == len(set(listed))
                assert all(phy2log[layer, s] == expert and s // n_local in left for s in listed)

    @pytest.mark.parametrize(
        ("active", "error", "message"),
        [
            (None, ValueError, "^active_ranks must be given for the elasticity-aware"),
            ([1, 1, 1, 1], TypeError, "^active_ranks must be a torch.Tensor"),
            (torch.ones(4), TypeError, "^active_ranks must hold integers"),
            (torch.tensor([1, 1, 2, 1]), ValueError, "^active_ranks must hold 0 and 1"),
            (torch.tensor([1, 1, 1]), ValueError, "^active_ranks must have an entry for each of 4"),
            (torch.tensor([1, 1, 1, 1, 1]), ValueError, "^active_ranks must.*the last 1 at 4"),
            (torch.tensor([0, 0, 0, 0]), ValueError, "^active_ranks must name at least one"),
            (torch.tensor([0, 1, 1, 1]), ValueError, "^active_ranks must leave room for 8 experts"),
        ],
    )
    def test_active_ranks_errors(self, active, error, message):
        """Active ranks that are missing, malformed or too few are refused by name."""
        with pytest.raises(error, match=message):
            sglang.rebalance_experts(
                torch.ones(1, 2, 8), 8, 2, 1, 1, "elasticity_aware", active_ranks=active
            )

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"algorithm": Theirs.deepseek_vec}, ValueError, "^algorithm.*deepseek_vec"),
            ({"algorithm": 1}, ValueError, "^algorithm"),
            ({"tokens_per_expert": torch.ones(2, 8)}, ValueError, "^tokens_per_expert"),
            ({"tokens_per_expert": [1]}, TypeError, "^tokens_per_expert"),
            (
                {"tokens_per_expert": -torch.ones(1, 2, 8)},
                ValueError,
                "^tokens_per_expert holds 16",
            ),
            (
                {"tokens_per_expert": 1e38 * torch.ones(1, 2, 8)},
                ValueError,
                "^tokens_per_expert add",
            ),
            ({"num_physical_experts": 6}, ValueError, "^num_physical_experts must be at least"),
            ({"num_nodes": 3, "num_groups": 3}, ValueError, "^num_physical_experts / num_local"),
            ({"num_groups": 6}, ValueError, "^num_groups must divide the number of logical"),
            ({"num_local_physical_experts": 3}, ValueError, "^num_local_physical_experts"),
            ({"num_local_physical_experts": 0}, ValueError, "^num_local_physical_experts"),
            ({"num_physical_experts": 8.0}, TypeError, "^num_physical_experts"),
            ({"num_groups": None}, ValueError, "^num_groups"),
            ({"num_groups": 3}, ValueError, "^num_groups must be a multiple of num_nodes 2"),
            ({"num_nodes": 0}, ValueError, "^num_nodes must be at least 1"),
        ],
    )
    def test_errors(self, change, error, message):
        """A wrong algorithm, load or size is refused with a message that names an argument."""
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
