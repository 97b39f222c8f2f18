"""SGLang's placement entry point and per-batch LP solver, backed by this library."""

from lplb_triton.integrations._sglang_placement import (
    EplbAlgorithm,
    compute_algorithm,
    rebalance_experts,
)
from lplb_triton.integrations._sglang_solver import LPLBSolver, update_solvers

__all__ = [
    "EplbAlgorithm",
    "LPLBSolver",
    "compute_algorithm",
    "rebalance_experts",
    "update_solvers",
]
