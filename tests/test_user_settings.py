"""The user's default device and default dtype make no difference."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

from lplb_triton import (
    Balancer,
    Placement,
    Planner,
    Problem,
    Replicas,
    chain,
    place,
    plan_moves,
    rebalance_experts,
    solve,
    topologies,
)
from lplb_triton.integrations.vllm import LplbEplbPolicy
from lplb_triton.placement import exact_search as exact
from lplb_triton.topologies._validate import checked_topology

PACKAGE = Path(__file__).parents[1] / "lplb_triton"
# Functions that make a tensor on the default device unless they are told another.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range",
    "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# "meta" stands in for any device but the CPU: a tensor that doesn't name its device has no values.
SETTINGS = {
    "with meta": lambda: torch.device("meta"),
    "default meta": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: deterministic(),
}
GENERATOR = torch.Generator().manual_seed(0)
LOAD = torch.rand(16, generator=GENERATOR)
HISTORY = torch.rand(12, 16, generator=GENERATOR) + 0.1
COUNTS = torch.randint(0, 100, (3, 16), generator=GENERATOR)
IDS = torch.randint(-1, 16, (50, 4), generator=GENERATOR)
PLACEMENT = Placement.from_history(LOAD, 4, redundant_per_rank=1)
R2O = topologies.ring(4)
COUNTER = torch.zeros(1, dtype=torch.int64)
WEIGHT = torch.nn.Parameter(torch.arange(48.0).reshape(16, 3))
WEIGHTS, FIXED = torch.tensor([[6.0, 3.0]]), torch.tensor([[4.0, 2.0, 0.0]])
MASK = torch.tensor([[[True, False], [True, True], [False, True]]])


def everything_of_a_placement():
    p = Placement(PLACEMENT.phy2log, 4)
    solution = solve(p.problem(COUNTS))
    maps = p.phy2log, p.log2phy, p.logcnt, p.rank_of_slot
    return *maps, p.even_loads(COUNTS), p.rank_loads(COUNTS, solution), hash(p) == hash(PLACEMENT)


def exact_search():
    price = torch.zeros(16, 4, dtype=torch.float32, device="cpu")
    domain = torch.zeros(4, dtype=torch.int64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    load = HISTORY / HISTORY.sum(1, keepdim=True) * 4
    return exact.ExactSearch(PLACEMENT, load, price, domain, generator).run(2)


def planner():
    p = Planner(R2O, 20, 16, 4, device="cpu")
    counter = COUNTER.zero_()
    ids = p.run(IDS, counter)
    counts, running = p.count_workload(IDS, 4)
    weight, scaled = p.solve_probs(counts, counter)
    chosen = p.weighted_select_target(IDS, weight, running, 4)
    maps = p.update_redundancy_mapping(LOAD)
    return ids, counts, running, weight, scaled, chosen, maps, counter, p.r2o, p.o2r, p.phy2log


def balancer(backend):
    b = Balancer(PLACEMENT, device="cpu", backend=backend)
    counts, running = b.count(IDS)
    solution = vars(b.solve(counts))
    shares = b.cumulative_shares(solution["shares"])
    return counts, running, solution, b.select(IDS, shares, running), b.run(IDS), b.certified


def replicas():
    alone = Placement.from_history(LOAD, 1, redundant_per_rank=2)
    copies = Replicas(alone, {"w": WEIGHT})
    copies.sync_weights()
    return copies.weights["w"].detach().clone(), copies.experts


CALLS = {
    "rebalance_experts": lambda: rebalance_experts(HISTORY, 24, 4, 2, 4),
    "from_history": lambda: Placement.from_history(LOAD, 4, redundant_per_rank=1),
    "from_history, array": lambda: Placement.from_history(LOAD.tolist(), 4, redundant_per_rank=1),
    "from_topology": lambda: Placement.from_topology(R2O, 20, 16, 4, workload=LOAD),
    "from_topology, array": lambda: Placement.from_topology(
        R2O.numpy(), 20, 16, 4, workload=LOAD.tolist()
    ),
    "from_phy2log": lambda: Placement.from_phy2log(PLACEMENT.phy2log, 4),
    "placement": everything_of_a_placement,
    "chain": lambda: chain(LOAD, 4),
    "chain, domains": lambda: chain(LOAD, 4, ranks_per_domain=2),
    "place": lambda: place(HISTORY, 4, samples=16, trials=30),
    "place, moves": lambda: place(
        HISTORY, 4, previous=PLACEMENT, move_penalty=1e-4, samples=16, trials=30
    ),
    "exact search": exact_search,
    "solve": lambda: vars(solve(Problem(WEIGHTS, FIXED, MASK))),
    "solve, float32": lambda: vars(solve(Problem(WEIGHTS, FIXED, MASK), dtype=torch.float32)),
    "solve, kernel": lambda: vars(solve(Problem(WEIGHTS, FIXED, MASK), backend="triton")),
    "plan_moves": lambda: vars(plan_moves(PLACEMENT, chain(LOAD, 4), ranks_per_domain=2)),
    "builders": lambda: [
        topologies.from_name(name) for name in ("ring:4", "cube", "hypercube", "torus:2x3")
    ],
    "topologies": lambda: (
        topologies.validate(R2O.numpy()),
        topologies.inverse(R2O),
        topologies.draw(topologies.cube()),
        topologies.draw(topologies.torus(2, 4)),
        topologies.summary(R2O),
        checked_topology("r2o", R2O),
    ),
    "Balancer": lambda: balancer("torch"),
    "Balancer, kernels": lambda: balancer("triton"),
    "Planner": planner,
    "Replicas": replicas,
    "vLLM": lambda: LplbEplbPolicy.rebalance_experts(
        HISTORY[:1], 20, 1, 1, 4, PLACEMENT.phy2log[None]
    ),
}


def plain(value):
    """Dtypes, devices and values of a result."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(value.device), value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer programs a step: the torch twin solves them one by one."""
    for name, value in (("CANDIDATES", 12), ("SCREENING_BATCHES", 12), ("SHORTLIST_SIZE", 2)):
        monkeypatch.setattr(exact, name, value)


@pytest.mark.parametrize("call", CALLS)
def test_results_do_not_depend_on_settings(call):
    """Every call gives the same values, dtypes and devices under all settings."""
    wanted = plain(CALLS[call]())
    for name, setting in SETTINGS.items():
        with setting():
            found = CALLS[call]()
        assert plain(found) == wanted, name


def test_a_placement_made_under_a_setting_serves_outside_of_it():
    """A placement made under any setting is differentiable outside of it."""
    weight = torch.rand(16, dtype=torch.float64, requires_grad=True)
    for setting in SETTINGS.values():
        with setting():
            p = Placement(PLACEMENT.phy2log, 4)
            p.problem(COUNTS)
        assert p == PLACEMENT
        p.even_loads(weight).sum().backward()
        p.problem(weight).fixed.sum().backward()


def test_tensors_without_values_are_refused_by_name():
    """Tensors on the meta device are refused by the argument's name."""
    with torch.device("meta"):
        load, r2o = torch.rand(16), torch.tensor([[1], [0]])
    for name, call in {
        "load": lambda: Placement.from_history(load, 4, redundant_per_rank=1),
        "workload": lambda: Placement.from_topology(R2O, 20, 16, 4, workload=load),
        "phy2log": lambda: Placement(load.long(), 4),
        "history": lambda: place(load, 4),
        "r2o": lambda: topologies.validate(r2o),
        "weight": lambda: rebalance_experts(load[None], 20, 1, 1, 4),
        "device": lambda: place(HISTORY, 4, device="meta"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must .*meta"):
            call()
    with pytest.raises(ValueError, match="^load must .*meta"):
        chain(load, 4)


def unnamed(path):
    """Lines that make a tensor without saying where."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            if all(keyword.arg != "device" for keyword in node.keywords):
                yield node.lineno


def test_every_tensor_names_its_device():
    """Every call in the package that makes a tensor names its device."""
    # Commands of the benchmark are processes of their own; only the recorder runs in the user's.
    files = [f for f in PACKAGE.rglob("*.py") if "bench" not in f.relative_to(PACKAGE).parts]
    files += [f for part in ("kernels", "topologies") for f in (PACKAGE / part).glob("*.py")]
    files += [PACKAGE / "bench" / "record.py"]
    assert len(files) > 50
    found = {str(f.relative_to(PACKAGE)): list(unnamed(f)) for f in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
