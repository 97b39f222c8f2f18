"""Tables that the commands print: one module for each command, one for drawing them."""

from lplb_triton.bench.tables.advise import advice_check_grids, advise_grids
from lplb_triton.bench.tables.balance import LABELS, PARTS, show_balance, show_verdicts
from lplb_triton.bench.tables.ep import ep_grids
from lplb_triton.bench.tables.grid import (
    Grid,
    MissingExtraError,
    console,
    markdown,
    require,
    show_grids,
)
from lplb_triton.bench.tables.pipeline import pipeline_grids
from lplb_triton.bench.tables.placement import placement_grids, workloads_grids
from lplb_triton.bench.tables.simulate import simulate_grids
from lplb_triton.bench.tables.solve import solve_grids

__all__ = [
    "LABELS",
    "PARTS",
    "Grid",
    "MissingExtraError",
    "advice_check_grids",
    "advise_grids",
    "console",
    "ep_grids",
    "markdown",
    "pipeline_grids",
    "placement_grids",
    "require",
    "show_balance",
    "show_grids",
    "show_verdicts",
    "simulate_grids",
    "solve_grids",
    "workloads_grids",
]
