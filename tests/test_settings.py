"""Nothing depends on what the caller has set in torch."""

import contextlib

import numpy as np
import pytest
import torch

from lplb_triton import Balancer, Placement, reference, solve
from lplb_triton._backends import workspace
from lplb_triton.testing.instances import draw_loads, shape_placement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def changed(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def default_dtype(dtype):
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


SETTINGS = {
    "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
    "autocast on a CPU": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "medium precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


def problem_of(seed=0):
    rng = np.random.default_rng(seed)
    placement = shape_placement("random:12:2", rng)
    rows = [draw_loads(family, rng, placement.n_logical) for family in ("normal", "lognormal")]
    return placement, torch.stack(rows)


def numbers(solution):
    return [getattr(solution, name) for name in ("shares", "max_load", "lower_bound", "iterations")]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin(setting, dtype):
    """The twin's solution is the same under every setting of torch."""
    placement, counts = problem_of()
    counts = counts.to(DEVICE)

    def solved():
        problem = placement.problem(counts)
        return numbers(solve(problem, tolerance=1e-4, backend="torch", dtype=dtype))

    plain = solved()
    assert int(plain[3].max()) > 1
    with setting():
        found = solved()
    for a, b in zip(plain, found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_solves_and_ids(setting, backend):
    """Solutions, shares and ids of a balancer are the same under every setting of torch."""
    placement, counts = problem_of()
    counts = counts[0].to(DEVICE)
    idx = (torch.arange(4 * placement.n_logical) ** 2 % placement.n_logical).to(DEVICE)
    balancer = Balancer(placement, device=DEVICE, backend=backend)

    def results():
        solution = balancer.solve(counts)
        cumulative = balancer.cumulative_shares(solution.shares)
        running = balancer.count(idx)[1]
        return [*numbers(solution), cumulative, balancer.select(idx, cumulative, running)]

    plain = results()
    with setting():
        found = results()
    for a, b in zip(plain, found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_quotas_under_a_default_device():
    """Rounding offsets are on the CPU, whatever the default device."""
    with torch.device("meta"):
        offsets = reference.compute_rounding_offsets(3, 5)
    assert offsets.tolist() == reference.compute_rounding_offsets(3, 5).tolist()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_plan_has_no_gradient_but_loads_have_one(backend):
    """A plan has no gradient, and rank loads give each count a gradient of 1."""
    placement, counts = problem_of()
    loads = counts.double().to(DEVICE).requires_grad_()
    solution = solve(placement.problem(loads), backend=backend)
    assert not any(value.requires_grad for value in numbers(solution))
    placement.rank_loads(loads, solution).sum().backward()
    torch.testing.assert_close(loads.grad, torch.ones_like(loads))


def test_what_was_made_under_inference_mode_can_be_used_outside():
    """What inference mode made can be written and differentiated."""
    flat = [0, 1, 2, 0, 1, 3, 0, 4, 5]
    with torch.inference_mode():
        placement = Placement.from_phy2log(flat, 3)
        placement.problem(torch.ones(6))
        workspace.reserve(torch.empty(0, device=DEVICE).device, 1 << 10)
        workspace._blocks.clear()
        block, _ = workspace.scratch(torch.empty(0, device=DEVICE).device)
    block.zero_()
    loads = torch.ones(6, dtype=torch.float64, requires_grad=True)
    placement.problem(loads).fixed.sum().backward()
    assert loads.grad.tolist() == [0, 0, 1, 1, 1, 1]
