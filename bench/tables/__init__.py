"""Make the tables that the commands print: a module for each command, and `grid` to draw them."""

from lplb_triton.bench.tables.advise import make_advice_check_grids, make_advise_grids
from lplb_triton.bench.tables.balance import LABELS, PARTS, show_balance, show_verdicts
from lplb_triton.bench.tables.calibrate import make_calibration_grid
from lplb_triton.bench.tables.ep import make_ep_grids
from lplb_triton.bench.tables.frameworks import make_frameworks_grids
from lplb_triton.bench.tables.grid import (
    Grid,
    MissingExtraError,
    console,
    markdown,
    require,
    show_grids,
)
from lplb_triton.bench.tables.live import make_live_grids
from lplb_triton.bench.tables.nodes import make_node_times_grid, make_nodes_grid
from lplb_triton.bench.tables.pipeline import make_pipeline_grids
from lplb_triton.bench.tables.placement import (
    make_place_grid,
    make_place_traffic_grid,
    make_placement_grids,
    make_workloads_grids,
)
from lplb_triton.bench.tables.scale import make_scale_grids
from lplb_triton.bench.tables.simulate import make_simulate_grids
from lplb_triton.bench.tables.simulate_live import make_simulate_live_grids
from lplb_triton.bench.tables.simulate_time import (
    make_objective_runs_grid,
    make_simulate_time_grids,
)
from lplb_triton.bench.tables.solve import make_solve_grids

__all__ = [
    "LABELS",
    "PARTS",
    "Grid",
    "MissingExtraError",
    "make_advice_check_grids",
    "make_advise_grids",
    "console",
    "make_calibration_grid",
    "make_ep_grids",
    "make_frameworks_grids",
    "make_live_grids",
    "markdown",
    "make_node_times_grid",
    "make_nodes_grid",
    "make_pipeline_grids",
    "make_objective_runs_grid",
    "make_place_grid",
    "make_place_traffic_grid",
    "make_scale_grids",
    "make_placement_grids",
    "require",
    "show_balance",
    "show_grids",
    "show_verdicts",
    "make_simulate_grids",
    "make_simulate_live_grids",
    "make_simulate_time_grids",
    "make_solve_grids",
    "make_workloads_grids",
]
