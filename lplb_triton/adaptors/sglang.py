"""The former name of `lplb_triton.integrations.sglang`."""

from lplb_triton.integrations.sglang import (
    EplbAlgorithm,
    LPLBSolver,
    compute_algorithm,
    rebalance_experts,
    update_solvers,
)

__all__ = [
    "EplbAlgorithm",
    "LPLBSolver",
    "compute_algorithm",
    "rebalance_experts",
    "update_solvers",
]
