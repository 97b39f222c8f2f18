"""Per-batch load balancing of mixture-of-experts layers by a certified linear program.

The objects most scripts need are here; see `lplb_triton.topologies` for replica topologies and
`lplb_triton.bench` for the command line.
"""

from lplb_triton._backends.workspace import workspace_bytes
from lplb_triton._version import __version__
from lplb_triton.balancer import Balancer
from lplb_triton.costs import TimeCost
from lplb_triton.eplb import rebalance_experts
from lplb_triton.placement import Placement, load_placements, save_placements
from lplb_triton.placement.chaining import chain
from lplb_triton.placement.moves import MovePlan, plan_moves
from lplb_triton.placement.placing import place
from lplb_triton.planner import Planner
from lplb_triton.problem import Problem
from lplb_triton.solution import Solution, SolveError, Status
from lplb_triton.solver import solve
from lplb_triton.training.live_slots import LiveSlots
from lplb_triton.training.replicas import Replicas
from lplb_triton.training.spread import spread
from lplb_triton.training.spread_plan import SpreadPlan

__all__ = [
    "Balancer",
    "LiveSlots",
    "MovePlan",
    "Placement",
    "Planner",
    "Problem",
    "Replicas",
    "Solution",
    "SolveError",
    "SpreadPlan",
    "Status",
    "TimeCost",
    "__version__",
    "chain",
    "load_placements",
    "place",
    "plan_moves",
    "rebalance_experts",
    "save_placements",
    "solve",
    "spread",
    "workspace_bytes",
]
