"""Solve a batch of min-max programs on the default backend of a device, or on a given one."""

from __future__ import annotations

import torch

from lplb_triton import reference
from lplb_triton._checks import check_max_iterations, check_problem_size, check_tolerance
from lplb_triton.problem import Problem
from lplb_triton.solution import Solution

__all__ = ["DEFAULT_MAX_ITERATIONS", "DEFAULT_TOLERANCE", "resolve_backend", "solve"]

DEFAULT_TOLERANCE = 1e-3
DEFAULT_MAX_ITERATIONS = 40
# Below this tolerance the round-off of float32 is as large as the gap.
MIN_TOLERANCE_FLOAT32 = 1e-5
MIN_TOLERANCE_FLOAT64 = 1e-9


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """Return the backend for a device; an explicit choice is used or refused, never replaced.

    Parameters
    ----------
    backend : {"triton", "torch"} or None
        ``None`` takes the Triton kernels on a GPU and the torch twin on a CPU.
    device : torch.device
        Device of the data.

    Returns
    -------
    str
        ``"triton"`` or ``"torch"``.

    Raises
    ------
    ValueError
        If ``backend`` is unknown, or is ``"triton"`` for CPU tensors while Triton's
        interpreter is off.
    """
    if backend is None:
        return "torch" if device.type == "cpu" else "triton"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend must be 'triton', 'torch' or None, got {backend!r}")
    if backend == "triton" and device.type == "cpu":
        from lplb_triton import kernels

        if not kernels.is_interpreted():
            raise ValueError(
                "backend='triton' needs GPU tensors, or TRITON_INTERPRET=1 set before the first "
                "import of triton; got CPU tensors"
            )
    return backend


def solve(
    problem: Problem,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> Solution:
    """Solve every instance of ``problem`` to a certified relative gap.

    Parameters
    ----------
    problem : Problem
        The instances.
    tolerance : float
        Relative gap at which an instance counts as certified; in [1e-5, 1) for float32,
        [1e-9, 1) for float64.
    max_iterations : int
        The most interior-point iterations; 3 to 8 are usual.
    backend : {"triton", "torch"} or None
        ``None`` takes the Triton kernel on a GPU and the torch twin on a CPU. The kernel takes up
        to 128 ranks, and up to 32,768 pairs of a rank and a column (each number padded to a power
        of two, columns to at least 32); the twin takes any.
    dtype : torch.dtype or None
        Arithmetic of the torch twin, float64 (default) or float32. The kernel computes in
        float32.

    Returns
    -------
    Solution
        On the problem's device. The call doesn't wait for a GPU; see `Solution.check`. Its loads
        are float64 from the torch twin and for problems in float64, otherwise float32.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit; also for a problem that is too large for the kernel.

    Examples
    --------
    >>> mask = torch.tensor([[[True], [True]]])
    >>> p = Problem(torch.tensor([[6.0]]), torch.tensor([[4.0, 2.0]]), mask)
    >>> solve(p).max_load.round(decimals=2)
    tensor([6.], dtype=torch.float64)
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a Problem, got {type(problem).__name__}")
    check_max_iterations(max_iterations)
    chosen = resolve_backend(backend, problem.device)
    if chosen == "torch":
        dtype = torch.float64 if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        minimum = MIN_TOLERANCE_FLOAT32 if dtype == torch.float32 else MIN_TOLERANCE_FLOAT64
        return reference.solve(problem, check_tolerance(tolerance, minimum), max_iterations, dtype)
    if dtype not in (None, torch.float32):
        raise ValueError(f"dtype must be None or torch.float32 for backend 'triton', got {dtype}")
    tolerance = check_tolerance(tolerance, MIN_TOLERANCE_FLOAT32)
    check_problem_size(problem)
    with torch.no_grad():
        return _solve_by_kernel(problem, tolerance, max_iterations)


def _solve_by_kernel(problem: Problem, tolerance: float, max_iterations: int) -> Solution:
    """Solve by the interior-point kernel, in float32."""
    from lplb_triton import kernels

    weights, fixed, unit = _scale_to_float32(problem.weights, problem.fixed)
    shares, max_load, lower_bound, gap, iterations, status = kernels.solve(
        weights, fixed, problem.mask, problem.start, tolerance, max_iterations
    )
    if unit is not None:
        max_load, lower_bound = max_load * unit, lower_bound * unit
    return Solution(shares, max_load, lower_bound, gap, iterations, status, tolerance)


def _scale_to_float32(
    weights: torch.Tensor, fixed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Divide float64 loads by a power of two near their sum, one for each instance.

    Then they are in the range of float32. Returns weights, fixed and the divisors ``[B]`` float64,
    None if neither is float64. Where the sum isn't finite, loads become infinite, which the kernel
    reports.
    """
    if torch.float64 not in (weights.dtype, fixed.dtype):
        return weights, fixed, None
    total = weights.double().sum(1) + fixed.double().sum(1)
    finite = torch.isfinite(total)
    exponent = torch.frexp(torch.where(finite, total, 1.0)).exponent.clamp(-1000, 1000)
    unit = torch.ldexp(torch.ones_like(total), exponent)
    scale = torch.where(finite, 1.0 / unit, torch.inf)[:, None]
    return (weights * scale).float(), (fixed * scale).float(), unit
