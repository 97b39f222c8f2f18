"""Messages name an argument of the function that was called, and sizes that would work."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

from lplb_triton import Placement, Planner, chain, place, plan_moves, rebalance_experts, topologies

NAN = float("nan")
HUGE = torch.full((8,), 1e39, dtype=torch.float64)
RING = topologies.ring(2)
EIGHT = Placement(np.arange(8), 4)
HISTORY = {"load": torch.ones(12), "ep_size": 4, "redundant_per_rank": 1}
TOPOLOGY = {
    "r2o": RING,
    "n_routed_experts": 12,
    "n_logical_routed_experts": 8,
    "ep_size": 4,
    "workload": torch.ones(8),
}
PLANNER = {
    "redundant_to_original": RING,
    "n_routed_experts": 12,
    "n_logical_routed_experts": 8,
    "ep_size": 4,
    "device": "cpu",
}
EPLB = {
    "weight": torch.ones(2, 12),
    "num_replicas": 16,
    "num_groups": 4,
    "num_nodes": 2,
    "num_gpus": 8,
}

# Function, good arguments, the bad ones, and what the message must begin with.
CASES = [
    (Placement.from_history, HISTORY, {"ep_size": 5}, "ep_size"),
    (Placement.from_history, HISTORY, {"ep_size": 16}, "ep_size"),
    (Placement.from_history, HISTORY, {"ep_size": 0}, "ep_size"),
    (Placement.from_history, HISTORY, {"ep_size": "4"}, "ep_size"),
    (Placement.from_history, HISTORY, {"ep_size": 4.0}, "ep_size"),
    (Placement.from_history, HISTORY, {"redundant_per_rank": -1}, "redundant_per_rank"),
    (Placement.from_history, HISTORY, {"redundant_per_rank": 0.5}, "redundant_per_rank"),
    (Placement.from_history, HISTORY, {"redundant_per_rank": None}, "redundant_per_rank"),
    (Placement.from_history, HISTORY, {"num_groups": 5}, "num_groups"),
    (Placement.from_history, HISTORY, {"num_groups": 0}, "num_groups"),
    (Placement.from_history, HISTORY, {"num_groups": 3, "num_nodes": 3}, "num_nodes"),
    (Placement.from_history, HISTORY, {"num_nodes": 1.5}, "num_nodes"),
    (Placement.from_history, HISTORY, {"load": torch.ones(2, 2, 12)}, "load"),
    (Placement.from_history, HISTORY, {"load": torch.ones(0)}, "load"),
    (Placement.from_history, HISTORY, {"load": torch.full((12,), NAN)}, "load"),
    (Placement.from_history, HISTORY, {"load": -torch.ones(12)}, "load"),
    (Placement.from_history, HISTORY, {"load": HUGE}, "load"),
    (Placement.from_history, HISTORY, {"load": torch.full((12,), 1e38)}, "load"),
    (Placement.from_history, HISTORY, {"load": torch.ones(12).cfloat()}, "load"),
    (Placement.from_history, HISTORY, {"load": "much"}, "load"),
    (Placement.from_history, HISTORY, {"load": None}, "load"),
    (Placement.from_topology, TOPOLOGY, {"r2o": torch.zeros(2, 1).int()}, "r2o"),
    (Placement.from_topology, TOPOLOGY, {"ep_size": 3}, "ep_size"),
    (Placement.from_topology, TOPOLOGY, {"n_routed_experts": 13}, "n_routed_experts"),
    (Placement.from_topology, TOPOLOGY, {"n_routed_experts": 4}, "n_routed_experts"),
    (Placement.from_topology, TOPOLOGY, {"n_routed_experts": 8}, "n_routed_experts"),
    (Placement.from_topology, TOPOLOGY, {"n_routed_experts": 20}, "n_routed_experts"),
    (
        Placement.from_topology,
        {**TOPOLOGY, "workload": None},
        {"n_logical_routed_experts": 9},
        "n_logical_routed_experts",
    ),
    (
        Placement.from_topology,
        TOPOLOGY,
        {"r2o": topologies.torus(2, 2), "n_logical_routed_experts": 4, "n_routed_experts": 12},
        "n_logical_routed_experts",
    ),
    (Placement.from_topology, TOPOLOGY, {"workload": torch.ones(9)}, "workload"),
    (Placement.from_topology, TOPOLOGY, {"workload": torch.full((8,), NAN)}, "workload"),
    (Placement.from_topology, TOPOLOGY, {"workload": -torch.ones(8)}, "workload"),
    (Placement.from_topology, TOPOLOGY, {"workload": HUGE}, "workload"),
    (Placement.from_topology, TOPOLOGY, {"workload": "much"}, "workload"),
    (Placement.from_topology, TOPOLOGY, {"num_nodes": 0}, "num_nodes"),
    (Placement.from_topology, TOPOLOGY, {"num_nodes": "2", "workload": None}, "num_nodes"),
    (Planner, PLANNER, {"redundant_to_original": [[1], [0]]}, "redundant_to_original"),
    (Planner, PLANNER, {"redundant_to_original": torch.zeros(2, 1)}, "redundant_to_original"),
    (Planner, PLANNER, {"redundant_to_original": torch.ones(2, 1).int()}, "redundant_to_original"),
    (Planner, PLANNER, {"ep_size": 3}, "ep_size"),
    (Planner, PLANNER, {"n_routed_experts": 8}, "n_routed_experts"),
    (Placement.from_phy2log, {"phy2log": np.arange(8), "ep_size": 4}, {"ep_size": 3}, "ep_size"),
    (
        Placement.from_phy2log,
        {"phy2log": np.arange(8), "ep_size": 4},
        {"n_group": 3},
        "n_group",
    ),
    (Placement.from_phy2log, {"ep_size": 4}, {"phy2log": torch.ones(8).bfloat16()}, "phy2log"),
    (Placement.from_phy2log, {"ep_size": 4}, {"phy2log": [[1], [1, 2]]}, "phy2log"),
    (Placement.from_phy2log, {"ep_size": 1}, {"phy2log": [0, 2**40]}, "phy2log"),
    (Placement.from_phy2log, {"phy2log": np.arange(8), "ep_size": 4}, {"n_logical": 9}, "phy2log"),
    (Placement, {"phy2log": np.arange(8), "ep_size": 4}, {"max_columns": -1}, "max_columns"),
    (Placement, {"phy2log": np.arange(8), "ep_size": 4}, {"max_columns": 1.5}, "max_columns"),
    (Placement, {"phy2log": [0, 1, 0, 2], "ep_size": 2}, {"max_columns": 0}, "max_columns"),
    (chain, {"load": torch.ones(12)}, {"ep_size": 5}, "ep_size"),
    (chain, {"load": torch.ones(12), "ep_size": 4}, {"ranks_per_domain": 3}, "ranks_per_domain"),
    (place, {"history": torch.ones(12)}, {"ep_size": 5}, "ep_size"),
    (place, {"history": torch.ones(12), "ep_size": 4}, {"device": "gpu"}, "device"),
    (place, {"history": torch.ones(12), "ep_size": 4}, {"dispersion": 1e3}, "dispersion"),
    (
        place,
        {"history": torch.ones(4), "ep_size": 4, "redundant_per_rank": 0},
        {"previous": Placement(np.array([0, 1, 0, 2]), 4), "ranks_per_domain": 1},
        "previous",
    ),
    (
        place,
        {"history": torch.ones(3), "ep_size": 3, "redundant_per_rank": 1},
        {"previous": Placement(np.array([0, 1, 0, 2, 1, 2]), 3), "ranks_per_domain": 1},
        "ranks_per_domain",
    ),
    (plan_moves, {"previous": EIGHT}, {"placement": torch.arange(8)}, "placement"),
    (
        plan_moves,
        {"previous": EIGHT, "placement": EIGHT},
        {"ranks_per_domain": 3},
        "ranks_per_domain",
    ),
    (rebalance_experts, EPLB, {"num_replicas": 17}, "num_replicas"),
    (rebalance_experts, EPLB, {"num_groups": 8}, "num_groups"),
    (rebalance_experts, EPLB, {"num_groups": 3, "num_nodes": 3}, "num_gpus"),
    (topologies.from_name, {}, {"name": "ring:1"}, "name"),
    (topologies.from_name, {}, {"name": "torus:1x4"}, "name"),
    (topologies.from_name, {}, {"name": "torus:2000x2000"}, "name"),
    (topologies.from_name, {}, {"name": "ring:" + "9" * 5000}, "name"),
    (topologies.ring, {}, {"n": 2**40}, "n"),
    (topologies.torus, {}, {"m": 2**12, "n": 2**12}, "m"),
]
FUNCTIONS = {function for function, *_ in CASES} | {Placement.problem, topologies.validate}
NAMES = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
# Words of English, or too short to tell from one.
NAMES -= {"self", "m", "n", "load", "weight", "name", "mask", "device", "group", "placement"}


@pytest.mark.parametrize(("function", "good", "bad", "first"), CASES)
def test_messages_name_the_callers_arguments(function, good, bad, first):
    """A message begins with the caller's argument and names no other function's."""
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**{**good, **bad})
    message = str(caught.value)
    assert re.match(rf"{first}\b", message), message
    own = set(inspect.signature(function).parameters)
    assert first in own
    # An argument's attribute is the caller's too, and in brackets are names of axes.
    message = re.sub(r"previous\.phy2log|\[[^\]]*\]", "", message)
    words = set(re.findall(r"\w+", message))
    assert not (words & NAMES) - own, message
    assert "tensor(" not in message and len(message) < 300 + len(str(bad.get("name", "")))


@pytest.mark.parametrize(
    ("function", "good", "name", "wrong", "nearest"),
    [
        (Placement.from_history, {**HISTORY, "load": torch.rand(256)}, "ep_size", 3, [2, 4]),
        (Placement.from_history, HISTORY, "ep_size", 5, [4, 6]),
        (Placement.from_history, HISTORY, "ep_size", 100, [12]),
        (Placement.from_history, HISTORY, "num_groups", 5, [4, 6]),
        (Placement.from_topology, TOPOLOGY, "ep_size", 5, [4]),
        (Placement.from_topology, TOPOLOGY, "n_routed_experts", 14, [12, 16]),
        (Placement.from_topology, TOPOLOGY, "n_routed_experts", 8, [12]),
        (Placement.from_topology, TOPOLOGY, "n_routed_experts", 24, [16]),
        (chain, {"load": torch.ones(12)}, "ep_size", 5, [4, 6]),
        (chain, {"load": torch.ones(12), "ep_size": 6}, "ranks_per_domain", 4, [3, 6]),
        (place, {"history": torch.ones(12), "trials": 0}, "ep_size", 9, [6, 12]),
        (Placement, {"phy2log": np.arange(10)}, "ep_size", 3, [2, 5]),
        (Placement, {"phy2log": np.arange(12), "n_group": 3}, "ep_size", 5, [6]),
        (Placement.from_history, {**HISTORY, "num_nodes": 4, "num_groups": 4}, "ep_size", 5, [4]),
        (Placement.from_topology, TOPOLOGY, "n_logical_routed_experts", 9, [8]),
        (rebalance_experts, EPLB, "num_replicas", 17, [16, 24]),
        (rebalance_experts, EPLB, "num_groups", 8, [6, 12]),
        (rebalance_experts, {**EPLB, "num_nodes": 4}, "num_gpus", 2, [4]),
        (Planner, PLANNER, "n_routed_experts", 8, [12]),
    ],
)
def test_sizes_that_work_are_named(function, good, name, wrong, nearest):
    """A wrong size is refused with the nearest sizes that work."""
    with pytest.raises(ValueError, match=f"^{name} must .* got {wrong}") as caught:
        function(**{**good, name: wrong})
    said = re.search(r"; ([\d and]+) would do$", str(caught.value))
    assert said is not None, caught.value
    sizes = [int(size) for size in said[1].split(" and ")]
    assert sizes == nearest
    for size in sizes:
        function(**{**good, name: size})


def test_counting_repeats_is_not_quadratic():
    """A topology that repeats a rank 2**17 times is refused without a quadratic search."""
    r2o = torch.zeros(1 << 17, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="^r2o column 0 must be a permutation"):
        topologies.validate(r2o)
    assert math.prod(topologies.from_name("torus:4x8").shape) == 64
