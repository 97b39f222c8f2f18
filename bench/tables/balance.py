"""Print the tables of `lplb-bench balance` and `lplb-bench verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lplb_triton.solution import Status

if TYPE_CHECKING:
    from rich.console import Console

    from lplb_triton.bench.balance import Cell
    from lplb_triton.testing.verify import Verdict
from lplb_triton.bench.tables.cells import format_share

__all__ = [
    "LABELS",
    "PARTS",
    "show_balance",
    "show_verdicts",
]


LABELS = {
    "none": "no balancing",
    "reordered": "reorder only",
    "even": "split evenly",
    "lp": "LP",
    "integer": "LP, tokens",
}

# Titles for the parts of the corpus.
PARTS = {
    "random": "Random programs",
    "traffic": "Real traffic",
    "hard": "Hard placements",
}


def show_balance(target: Console, cells: Sequence[Cell], *, title: str, time_label: str) -> None:
    """Print imbalances and certificates of every combination.

    Parameters
    ----------
    target
        Console to print to.
    cells
        Results of `lplb_triton.bench.balance.run`.
    title
        Line above the first table.
    time_label
        Description of the solve time.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    # A box without lines between the columns, which would exceed 80 characters.
    imbalance = Table(
        title=escape(title),
        caption="imbalance = max/mean of rank loads; LP, tokens = the LP's plan in whole tokens",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("EP", "slots"):
        imbalance.add_column(name, justify="right", no_wrap=True)
    imbalance.add_column("placement", no_wrap=True)
    imbalance.add_column("")
    for label in LABELS.values():
        imbalance.add_column(label.replace(" ", "\n"), justify="right", no_wrap=True)
    certificates = Table(
        title="Certificates", caption=escape(f"time per LP: {time_label}"), box=SIMPLE_HEAD
    )
    for name in ("EP", "slots"):
        certificates.add_column(name, justify="right", no_wrap=True)
    certificates.add_column("placement", no_wrap=True)
    for name in ("certified", "largest gap", "iterations\nmean, max", "time per LP"):
        certificates.add_column(name, justify="right")

    for cell in cells:
        head = (str(cell.ep), str(cell.slots), cell.placement)
        if cell.reason is not None:
            imbalance.add_row(*head, "", *["n/a"] * len(LABELS), end_section=True)
            certificates.add_row(*head, *["n/a"] * 4)
            continue
        values = [cell.imbalance(variant) for variant in LABELS]
        imbalance.add_row(*head, "mean", *[f"{v.mean():.3f}" for v in values], style="bold")
        imbalance.add_row("", "", "", "p95", *[f"{np.percentile(v, 95):.3f}" for v in values])
        imbalance.add_row("", "", "", "max", *[f"{v.max():.3f}" for v in values], end_section=True)
        certificates.add_row(*head, *_format_certificate(cell))
    target.print(imbalance)
    target.print(certificates)
    for cell in cells:
        if cell.reason is not None:
            target.print(
                f"n/a: EP {cell.ep}, slots {cell.slots}: {escape(cell.reason)}", soft_wrap=True
            )


def _format_certificate(cell: Cell) -> list[str]:
    status, microseconds = cell.status(), cell.microseconds()
    if microseconds is None:
        return ["no LP", "", "", ""]
    iterations = cell.iterations()
    certified = int((status == Status.CERTIFIED).sum())
    text = f"{certified} of {len(status)}"
    return [
        text if certified == len(status) else f"[bold red]{text}[/]",
        f"{cell.gap().max():.1e}",
        f"{iterations.mean():.1f}, {iterations.max()}",
        f"{microseconds:.0f} us" if microseconds >= 10 else f"{microseconds:.2f} us",
    ]


def show_verdicts(target: Console, verdicts: Sequence[Verdict], *, title: str) -> None:
    """Print the results of a comparison with HiGHS, a table for each part of the corpus.

    Parameters
    ----------
    target
        Console to print to.
    verdicts
        Results of `lplb_triton.testing.verify.verify`.
    title
        Line above the tables.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    rows: dict[str, Callable[[Verdict], str]] = {
        "instances": lambda v: str(v.instances),
        "infeasible plans": lambda v: str(v.infeasible),
        "bounds above the optimum": lambda v: str(v.bound_above_optimum),
        "loads below the optimum": lambda v: str(v.load_below_optimum),
        "not certified": lambda v: str(v.not_certified),
        "certified": lambda v: format_share(v.certified),
        "worst gap": lambda v: f"{v.worst_gap:.2e}",
    }
    # `Balancer` reports steps by potentials, `lplb_triton.solve` interior-point iterations.
    for word, from_counts in (("iterations", False), ("steps", True)):
        for label, value in (
            ("mean", lambda v: f"{v.total_iterations / max(v.instances, 1):.1f}"),
            ("max", lambda v: str(v.max_iterations)),
        ):
            rows[f"{word}, {label}"] = partial(_show_if, value, from_counts)
    for part in dict.fromkeys(v.part for v in verdicts):
        here = [v for v in verdicts if v.part == part]
        table = Table(title=escape(f"{PARTS[part]}, {title}"), box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("tolerance")
        for v in here:
            way = ", from counts" if v.from_counts else ""
            table.add_column(f"{v.tolerance:g}{way}", justify="right")
        for label, value in rows.items():
            cells = [value(v) for v in here]
            if any(cells):
                table.add_row(label, *cells)
        target.print(table)


def _show_if(value: Callable[[Verdict], str], from_counts: bool, verdict: Verdict) -> str:
    return value(verdict) if verdict.from_counts == from_counts else ""
