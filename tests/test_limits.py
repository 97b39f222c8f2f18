"""Sizes that the Triton backend doesn't take are refused before anything is compiled."""

import re

import numpy as np
import pytest
import torch

from lplb_triton import Balancer, Placement, Problem, kernels, solve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _no_kernel_runs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(kernels, "solve", refuse)
    monkeypatch.setattr(kernels, "solve_counts", refuse)


def problem_of(ranks, columns):
    mask = torch.ones(1, ranks, columns, dtype=torch.bool)
    return Problem(torch.ones(1, columns), torch.ones(1, ranks), mask).to(DEVICE)


@pytest.mark.parametrize(
    ("ranks", "columns", "message"),
    [
        (129, 1, "problem has 129 ranks in a group, backend 'triton' takes at most 128"),
        (1024, 1024, "problem has 1024 ranks in a group, backend 'triton' takes at most 128"),
        (65, 257, "problem has 65 ranks and 257 columns, padded to powers of two 65536 pairs"),
        (8, 4097, "problem has 8 ranks and 4097 columns, padded to powers of two 65536 pairs"),
    ],
)
def test_problems(ranks, columns, message):
    """A problem that is too large for Triton is refused with its sizes and an alternative."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*use backend='torch', or Bal"):
        solve(problem_of(ranks, columns), backend="triton")


@pytest.mark.parametrize(("ranks", "columns"), [(128, 256), (8, 4096), (1, 1), (65, 0)])
def test_problems_that_are_not_too_large(ranks, columns):
    """A problem within the limits reaches the kernel."""
    with pytest.raises(AssertionError, match="a kernel was asked for"):
        solve(problem_of(ranks, columns), backend="triton")


def test_a_problem_of_any_size_has_the_other_backend():
    """The torch backend solves a problem of more ranks than Triton takes."""
    solve(problem_of(130, 2), backend="torch").check()


def placement_of(ranks, n_logical, slots):
    flat = np.arange(ranks * slots) % n_logical
    return Placement.from_phy2log(flat, ranks, n_logical=n_logical)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (placement_of(513, 513, 2), "placement has 513 ranks in a group, .* at most 512"),
        (placement_of(2, 16385, 8193), "placement has 16385 logical experts, .* at most 16384"),
        (placement_of(128, 256, 19), "placement has 2176 redundant slots in a group, .* 2048"),
    ],
    ids=repr,
)
def test_placements(placement, message):
    """A placement that is too large for Triton is refused with its size and the limit."""
    with pytest.raises(ValueError, match=f"^{message}; use backend='torch'$"):
        Balancer(placement, device=DEVICE, backend="triton")


def test_a_placement_of_very_many_ranks_has_the_other_backend():
    """The torch backend solves a placement of 1024 ranks."""
    placement = placement_of(1024, 1024, 2)
    balancer = Balancer(placement, device="cpu", backend="torch")
    balancer.solve(torch.arange(1024)).check()
