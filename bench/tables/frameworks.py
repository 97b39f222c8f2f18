"""Make the table of `lplb-bench frameworks`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_or_na
from lplb_triton.bench.tables.grid import Grid

__all__ = ["COLUMNS", "make_frameworks_grids"]

# What each column is, for the command's help and below the table.
COLUMNS = {
    "method": "none: the framework's own expert parallelism. even: copies of experts, whose "
    "tokens go to the copies in turn, as EPLB splits them. lp: the same copies, filled by the LP",
    "imbalance": "largest load of a rank over the mean one, as routed, averaged over the last "
    "batches and the MoE layers",
    "step ms": "a training step, optimizer included, of the slowest rank: median, p99",
    "MoE layers ms": "forward and backward passes of all MoE layers in a step, waits for other "
    "ranks, weights of copies and their gradients included: median, p99",
    "loss difference": "of the losses from those of none, root of the mean square over the steps",
}


def make_frameworks_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench frameworks``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
        A table for each routing.
    """
    options = report["options"]
    grids = [
        Grid(
            f"{options['framework']}, {routing} routing: imbalance "
            f"{rows['none']['imbalance_before']:.3f} without balancing",
            ("method", "imbalance", "step ms", "p99", "MoE layers ms", "p99", "loss difference"),
            [
                (
                    method,
                    f"{row['imbalance_after']:.3f}",
                    *(f"{row[k][v]:.2f}" for k in ("step_ms", "moe_ms") for v in ("median", "p99")),
                    format_or_na(row["loss_difference"], ".1e"),
                )
                for method, row in rows.items()
            ],
            tuple(
                f"{method}: {row['idle_layers']} of {options['layers']} layers are even enough "
                "and idle, so their tokens stay at home."
                for method, row in rows.items()
                if row["idle_layers"]
            ),
        )
        for routing, rows in report["routings"].items()
    ]
    if grids:
        last = grids.pop()
        notes = (_describe_run(options), *(f"{name}: {text}." for name, text in COLUMNS.items()))
        faults = tuple(f"failed: {fault}" for fault in report["faults"])
        grids.append(Grid(last.title, last.header, last.rows, (*last.notes, *notes, *faults)))
    return grids


def _describe_run(options: dict[str, Any]) -> str:
    return (
        f"{options['ranks']} ranks, {options['layers']} MoE layers, {options['experts']} experts, "
        f"top-{options['top_k']}, hidden {options['hidden']}, expert hidden "
        f"{options['expert_hidden']}, {options['tokens']} tokens per rank, {options['redundant']} "
        f"redundant slots per rank, {options['dtype']}; {options['steps']} steps of each method in "
        f"turns, a new batch in every step, after {options['warm_up']} that aren't timed, in which "
        "copies are placed."
    )
