"""lplb_triton.eplb against DeepSeek's documented example and a plain-Python oracle."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplb_triton.eplb import rebalance_experts

# The example of the README of https://github.com/deepseek-ai/EPLB.
EXAMPLE_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EXAMPLE_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]

WEIGHT_KINDS = ["few", "pair", "equal", "zeros", "one hot", "tenths", "counts", "uniform", "skew"]


def make_weight(kind: str, n_layers: int, n_experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_layers, n_experts)
    if kind == "few":
        return torch.randint(0, 3, shape, generator=generator)
    if kind == "pair":
        return torch.randint(1, 3, shape, generator=generator, dtype=torch.int32)
    if kind == "equal":
        return torch.full(shape, 0.1)
    if kind == "zeros":
        return torch.zeros(shape, dtype=torch.int64)
    if kind == "one hot":
        weight = torch.zeros(shape)
        weight[:, seed % n_experts] = 5.0
        return weight
    if kind == "tenths":
        return torch.randint(0, 10, shape, generator=generator) * 0.1
    if kind == "counts":
        return torch.randint(0, 100_000, shape, generator=generator)
    if kind == "uniform":
        return torch.rand(shape, generator=generator)
    if kind == "skew":
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).exp()
    raise AssertionError(kind)


def make_case(rnd: random.Random) -> tuple[int, int, int, int, int]:
    """Draw (experts, replicas, groups, nodes, gpus), half of them hierarchical."""
    n_nodes = rnd.choice([1, 2, 3, 4])
    n_gpus = n_nodes * rnd.choice([1, 2, 3, 4])
    if rnd.random() < 0.5:
        n_groups = n_nodes * rnd.choice([1, 2, 3])
        n_experts = n_groups * rnd.choice([1, 2, 3, 4])
    else:
        n_nodes, n_groups = rnd.choice([(2, 1), (3, 4), (4, 2), (5, 8)])
        n_experts = rnd.randrange(1, 30)
    n_replicas = math.ceil(n_experts / n_gpus) * n_gpus + n_gpus * rnd.choice([0, 1, 2])
    return n_experts, n_replicas, n_groups, n_nodes, n_gpus


def oracle_pack(loads: list[list[np.float32]], n_packs: int) -> list[list[list[int]]]:
    """Give the items of each pack, row by row, by the rule "heaviest first, least loaded pack"."""
    n_items = len(loads[0])
    capacity = n_items // n_packs
    if capacity == 1:
        return [[[i] for i in range(n_items)] for _ in loads]
    # Which of two equal items comes first is whatever torch.sort says for the matrix.
    matrix = torch.tensor([[float(v) for v in row] for row in loads], dtype=torch.float32)
    result = []
    for row, order in zip(loads, matrix.sort(-1, descending=True).indices.tolist(), strict=True):
        assert all(row[a] >= row[b] for a, b in zip(order, order[1:], strict=False))
        packs: list[list[int]] = [[] for _ in range(n_packs)]
        total = [np.float32(0)] * n_packs
        for item in order:
            open_packs = [p for p in range(n_packs) if len(packs[p]) < capacity]
            chosen = sorted(open_packs, key=lambda p: (float(total[p]), p))[0]
            packs[chosen].append(item)
            total[chosen] = np.float32(total[chosen] + row[item])
        result.append(packs)
    return result


def oracle(
    weight: torch.Tensor, n_replicas: int, n_groups: int, n_nodes: int, n_gpus: int
) -> tuple[list[list[int]], list[list[list[int]]], list[list[int]]]:
    """Give (phy2log, log2phy without padding, logcnt) layer by layer, expert by expert."""
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    load = weight.to(torch.float32)
    n_layers, n_experts = load.shape
    size = n_experts // n_groups
    group_loads = [[np.float32(v) for v in r] for r in load.view(n_layers, -1, size).sum(-1)]

    tasks: list[list[int]] = []  # the experts of each (layer, node)
    for packs in oracle_pack(group_loads, n_nodes):
        for groups in packs:
            tasks.append([g * size + i for g in groups for i in range(size)])

    copies: list[list[tuple[int, int]]] = []  # (expert, which copy) of each (layer, node)
    copy_loads: list[list[np.float32]] = []
    for row, experts in enumerate(tasks):
        of = {e: np.float32(load[row // n_nodes, e]) for e in experts}
        count = dict.fromkeys(experts, 1)
        placed = [(e, 0) for e in experts]
        while len(placed) < n_replicas // n_nodes:
            best = experts[0]
            for e in experts[1:]:
                if of[e] / np.float32(count[e]) > of[best] / np.float32(count[best]):
                    best = e
            placed.append((best, count[best]))
            count[best] += 1
        copies.append(placed)
        copy_loads.append([of[e] / np.float32(count[e]) for e, _ in placed])

    phy2log: list[list[int]] = [[] for _ in range(n_layers)]
    slots: list[list[dict[int, int]]] = [[{} for _ in range(n_experts)] for _ in range(n_layers)]
    for row, packs in enumerate(oracle_pack(copy_loads, n_gpus // n_nodes)):
        layer = row // n_nodes
        for item in (i for pack in packs for i in pack):
            expert, index = copies[row][item]
            slots[layer][expert][index] = len(phy2log[layer])
            phy2log[layer].append(expert)
    log2phy = [[[s[i] for i in range(len(s))] for s in row] for row in slots]
    return phy2log, log2phy, [[len(s) for s in row] for row in log2phy]


def check_consistent(
    result: tuple[torch.Tensor, ...], n_layers: int, n_experts: int, n_replicas: int
) -> None:
    phy2log, log2phy, logcnt = result
    assert all(t.dtype == torch.int64 and t.device.type == "cpu" for t in result)
    assert phy2log.shape == (n_layers, n_replicas)
    assert logcnt.shape == (n_layers, n_experts)
    assert log2phy.shape == (n_layers, n_experts, int(logcnt.max()))
    assert int(logcnt.min()) >= 1
    assert logcnt.sum(1).tolist() == [n_replicas] * n_layers
    for layer in range(n_layers):
        assert torch.equal(phy2log[layer].bincount(minlength=n_experts), logcnt[layer])
        seen = []
        for expert in range(n_experts):
            count = int(logcnt[layer, expert])
            slots = log2phy[layer, expert]
            assert (slots[count:] == -1).all()
            assert (phy2log[layer, slots[:count]] == expert).all()
            seen += slots[:count].tolist()
        assert sorted(seen) == list(range(n_replicas))


def test_published_example() -> None:
    """The documented example of EPLB gives its documented placement."""
    phy2log, log2phy, logcnt = rebalance_experts(torch.tensor(EXAMPLE_WEIGHT), 16, 4, 2, 8)
    assert phy2log.tolist() == EXAMPLE_PHY2LOG
    check_consistent((phy2log, log2phy, logcnt), 2, 12, 16)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_equals_oracle(kind: str) -> None:
    """Maps and counts equal those of a plain-Python version of EPLB."""
    rnd = random.Random(WEIGHT_KINDS.index(kind))
    for seed in range(50):
        n_experts, n_replicas, n_groups, n_nodes, n_gpus = make_case(rnd)
        n_layers = rnd.choice([1, 2, 3])
        weight = make_weight(kind, n_layers, n_experts, seed)
        result = rebalance_experts(weight, n_replicas, n_groups, n_nodes, n_gpus)
        phy2log, log2phy, logcnt = result
        expected = oracle(weight, n_replicas, n_groups, n_nodes, n_gpus)
        case = (kind, seed, n_experts, n_replicas, n_groups, n_nodes, n_gpus)
        assert phy2log.tolist() == expected[0], case
        unpadded = [[[s for s in e if s >= 0] for e in layer] for layer in log2phy.tolist()]
        assert unpadded == expected[1], case
        assert logcnt.tolist() == expected[2], case


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int, int]:
    n_nodes = draw(st.integers(1, 3))
    n_gpus = n_nodes * draw(st.integers(1, 4))
    n_groups = draw(st.integers(1, 4)) * draw(st.sampled_from([1, n_nodes]))
    n_experts = n_groups * draw(st.integers(1, 4))
    n_replicas = (-(-n_experts // n_gpus) + draw(st.integers(0, 2))) * n_gpus
    row = st.lists(st.integers(0, 1000), min_size=n_experts, max_size=n_experts)
    weight = torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))
    return weight, n_replicas, n_groups, n_nodes, n_gpus


@given(problems())
@settings(max_examples=150, deadline=None)
def test_invariants(problem: tuple[torch.Tensor, int, int, int, int]) -> None:
    """Maps are consistent, and each group is on one node where nodes divide the groups."""
    weight, n_replicas, n_groups, n_nodes, n_gpus = problem
    before = weight.clone()
    result = rebalance_experts(*problem)
    assert torch.equal(weight, before)
    check_consistent(result, weight.shape[0], weight.shape[1], n_replicas)
    if n_groups % n_nodes == 0:
        node_of_slot = torch.arange(n_replicas) // (n_replicas // n_nodes)
        for layer in range(weight.shape[0]):
            group_of_slot = result[0][layer] // (weight.shape[1] // n_groups)
            pairs = set(zip(group_of_slot.tolist(), node_of_slot.tolist(), strict=True))
            assert len(pairs) == n_groups  # every group lives on one node


@given(problems())
@settings(max_examples=100, deadline=None)
def test_replication_is_greedy_optimal(problem: tuple[torch.Tensor, int, int, int, int]) -> None:
    """Taking any copy away leaves an expert at least as heavy as the heaviest copy."""
    weight, n_replicas, _, _, n_gpus = problem
    _, _, logcnt = rebalance_experts(weight, n_replicas, 1, 1, n_gpus)
    for load, count in zip(weight.tolist(), logcnt.tolist(), strict=True):
        heaviest = max(Fraction(w, c) for w, c in zip(load, count, strict=True))
        # Taking any copy away again would leave an expert at least as heavy as the heaviest.
        # Integers to 1000 over few copies: float32 quotients compare like exact ones, or tie.
        assert all(
            Fraction(w, c - 1) >= heaviest for w, c in zip(load, count, strict=True) if c > 1
        )


def test_layers_are_independent() -> None:
    """The placement of a layer does not depend on the other layers."""
    weight = torch.rand(6, 32, generator=torch.Generator().manual_seed(3)).double()
    # The order of equal items is torch.sort's and may depend on the shape of the whole matrix:
    # compare slots where all loads differ (no redundancy), else only the number of copies.
    assert all(len(row.unique()) == 32 for row in weight.float())
    slots = rebalance_experts(weight, 32, 4, 2, 8)[0]
    counts = rebalance_experts(weight, 48, 4, 2, 8)[2]
    for layer in range(6):
        alone = weight[layer : layer + 1]
        assert torch.equal(slots[layer], rebalance_experts(alone, 32, 4, 2, 8)[0][0])
        assert torch.equal(counts[layer], rebalance_experts(alone, 48, 4, 2, 8)[2][0])


def test_global_policy_ignores_groups_and_nodes() -> None:
    """Where nodes do not divide the groups, both numbers are ignored."""
    weight = make_weight("skew", 3, 24, 1)
    expected = rebalance_experts(weight, 32, 1, 1, 8)
    # Five groups don't divide 24 experts, and three nodes don't divide 8 GPUs: allowed here.
    for got, want in zip(rebalance_experts(weight, 32, 5, 3, 8), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float64],
)
def test_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Equal weights in any real dtype give equal maps."""
    weight = torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = rebalance_experts(weight, 24, 4, 2, 4)
    for got, want in zip(rebalance_experts(weight.to(dtype), 24, 4, 2, 4), expected, strict=True):
        assert torch.equal(got, want)


def test_boolean_and_gradient_weights() -> None:
    """Boolean weights count as 0 and 1, and maps from weights with gradients have none."""
    hot = torch.eye(4, dtype=torch.bool)
    assert rebalance_experts(hot, 8, 1, 1, 2)[2].tolist() == (1 + 4 * torch.eye(4).int()).tolist()
    weight = torch.rand(2, 8, requires_grad=True)
    assert not rebalance_experts(weight, 8, 1, 1, 2)[0].requires_grad


def test_no_redundancy_is_a_permutation() -> None:
    """Without redundancy each expert has one slot, and the two maps are inverse."""
    weight = make_weight("counts", 4, 32, 0)
    phy2log, log2phy, logcnt = rebalance_experts(weight, 32, 1, 1, 8)
    assert (logcnt == 1).all()
    assert torch.equal(phy2log.sort(1).values, torch.arange(32).expand(4, -1))
    assert torch.equal(phy2log.argsort(1), log2phy.squeeze(2))


def test_one_gpu_and_one_expert() -> None:
    """A single expert fills every slot, and a single GPU takes all slots."""
    phy2log, log2phy, logcnt = rebalance_experts(torch.tensor([[3.0]]), 4, 1, 1, 2)
    assert phy2log.tolist() == [[0, 0, 0, 0]]
    assert sorted(log2phy[0, 0].tolist()) == [0, 1, 2, 3]
    assert logcnt.tolist() == [[4]]
    check_consistent(rebalance_experts(torch.rand(2, 5), 7, 1, 1, 1), 2, 5, 7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": [[1, 2]]}, TypeError, r"^weight must be a torch\.Tensor, got list"),
        ({"weight": torch.ones(1, 12, dtype=torch.complex64)}, TypeError, "^weight .* real dtype"),
        ({"weight": torch.ones(12)}, ValueError, r"^weight must have shape .* got \[12\]"),
        ({"weight": torch.ones(0, 12)}, ValueError, r"^weight must have shape .* got \[0, 12\]"),
        ({"weight": torch.ones(2, 0)}, ValueError, r"^weight must have shape .* got \[2, 0\]"),
        ({"weight": torch.full((1, 12), math.nan)}, ValueError, "^weight must be finite"),
        ({"weight": torch.full((1, 12), math.inf)}, ValueError, "^weight must be finite"),
        (
            {"weight": torch.full((1, 12), 1e300, dtype=torch.float64)},
            ValueError,
            "^weight must be finite in float32",
        ),
        ({"weight": -torch.ones(1, 12)}, ValueError, "^weight must be non-negative, got -1"),
        (
            {"weight": torch.full((1, 12), 1e38)},
            ValueError,
            r"^weight must add up .* got 1\.2e\+39",
        ),
        ({"num_replicas": 8}, ValueError, "^num_replicas must be at least .* 12 .* got 8"),
        ({"num_replicas": 17}, ValueError, r"^num_replicas .* multiple of num_gpus \(8\), got 17"),
        ({"num_replicas": 16.0}, TypeError, "^num_replicas must be an int, got float"),
        ({"num_groups": 8}, ValueError, "^num_groups must divide .* 12 .* got 8"),
        ({"num_groups": 0}, ValueError, "^num_groups must be positive, got 0"),
        ({"num_nodes": -2}, ValueError, "^num_nodes must be positive, got -2"),
        (
            {"num_groups": 3, "num_nodes": 3},
            ValueError,
            r"^num_gpus must be a multiple of num_nodes \(3\), got 8",
        ),
        ({"num_gpus": "8"}, TypeError, "^num_gpus must be an int, got str"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A wrong argument is refused with a message that begins with an argument's name."""
    arguments: dict[str, Any] = {
        "weight": torch.ones(2, 12),
        "num_replicas": 16,
        "num_groups": 4,
        "num_nodes": 2,
        "num_gpus": 8,
    }
    with pytest.raises(error, match=message):
        rebalance_experts(**(arguments | change))
