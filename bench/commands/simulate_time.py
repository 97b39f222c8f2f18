"""`lplb-bench simulate-time`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lplb_triton import TimeCost
from lplb_triton.bench import advise, machine, objectives, options, output, tables
from lplb_triton.bench.advise.calibrate import calibrate, list_rows
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output, say
from lplb_triton.bench.progress import progress
from lplb_triton.bench.types import Row

__all__ = ["add", "run"]

MODELS = ("deepseek-v3", "qwen3-235b-a22b", "minimax-m2")
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
PLACEMENTS = ("time", "home-chain", "eplb")
MOST_TOKENS, MOST_BATCHES, MOST_RANKS, MOST_ROUNDS = 2**17, 100, 1024, 100
# Whose cost holds for all ranks of a model: experts of a rank.
Costs = dict[tuple[str, int], TimeCost]


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "simulate-time",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="objectives on many simulated ranks: predicted and measured times of the products",
        description=(
            "A SIMULATION: the slowest ranks of an EP group one after the other on one GPU. First\n"
            "the cost of the products is calibrated. Then batches are planned without balancing,\n"
            "by an even split, by tokens and by time, and the products of the ranks predicted\n"
            f"within {1 - objectives.NEAR:.0%} of the slowest are timed, interleaved. No "
            "communication, no routing.\n"
            "Batches come in random order, so that those within --seconds are a sample of all."
        ),
        examples=(
            "  lplb-bench simulate-time --ep 8,32,64 --seconds 200 --json time.json\n"
            "  lplb-bench simulate-time --model deepseek-v3 --ep 32,64 --tokens 16,64,256\n"
            "  lplb-bench simulate-time --predict     on a CPU, by the packaged times of one H100"
        ),
    )
    _add_grid(sub)
    sub.add_argument(
        "--predict", action="store_true",
        help="measure nothing: predict all times by the packaged times of one H100",
    )  # fmt: skip
    sub.add_argument(
        "--runs", action="store_true",
        help="time Balancer.run by tokens and by time instead, of one rank, by the packaged cost",
    )  # fmt: skip
    sub.add_argument(
        "--seconds", type=options.seconds, metavar="N",
        help="begin no further batch so many seconds after the start (default: no limit)",
    )  # fmt: skip
    for name, most, default, text in (
        ("ranks", MOST_RANKS, objectives.MOST_RANKS, "ranks of a way that are timed, at most"),
        ("rounds", MOST_ROUNDS, objectives.ROUNDS, "rounds of timing, of which the median counts"),
    ):
        sub.add_argument(
            f"--{name}", type=partial(options.count, most=most), metavar="N",
            help=f"{text} (default {default})",
        )  # fmt: skip


def _add_grid(sub: argparse.ArgumentParser) -> None:
    """Add the options that say what is compared."""
    for name, known, default, text in (
        ("model", tuple(advise.MODELS), MODELS, "sizes of published models"),
        ("placement", objectives.PLACEMENTS, PLACEMENTS, "placements, made from the history"),
        ("loads", objectives.LOADS, objectives.LOADS, "the packaged trace, or lognormal loads"),
    ):
        sub.add_argument(
            f"--{name}", type=options.names(known), default=default, metavar="NAME[,NAME...]",
            help=f"{text}: some of {', '.join(known)} (default {','.join(default)})",
        )  # fmt: skip
    options.add_ep(sub)
    options.add_slots(sub)
    sub.add_argument(
        "--tokens", type=options.integers(1, MOST_TOKENS), default=TOKENS, metavar="N[,N...]",
        help=f"tokens of a rank in a batch (default {','.join(map(str, TOKENS))})",
    )  # fmt: skip
    sub.add_argument(
        "--batches", type=partial(options.count, most=MOST_BATCHES), default=1, metavar="N",
        help="batches of each combination (default %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Plan, predict and measure."""
    tables.require("rich")
    for name in ("predict", "runs"):
        if getattr(args, name):
            options.refuse(args, ("seconds", "ranks", "rounds"), f"not with --{name}")
    if args.predict and args.runs:
        raise UsageError("argument --runs: not with --predict")
    options.fill(args, {"ranks": objectives.MOST_RANKS, "rounds": objectives.ROUNDS})
    gpu.check_files(args)
    grid = objectives.Grid(
        args.model, args.ep, args.slots, tuple(sorted(args.tokens)),
        args.placement, args.loads, args.batches,
    )  # fmt: skip
    batches, left_out = objectives.draw_batches(grid)
    if not batches:
        raise UsageError(f"nothing can be laid out: {left_out[0]['reason']}")
    begin = time.perf_counter()
    if args.runs:
        return _time_runs(args, out, batches, begin)
    if args.predict:
        device, (costs, fits), timers = "cpu", _predict_costs(batches), None
    else:
        on, timer = gpu.start(args)
        device = on.type
        timers = _make_timers(batches, timer, on)
        costs, fits = _calibrate(args, batches, timers)
    rows = _compare(args, batches, costs, timers, begin)
    if not rows:
        raise UsageError("argument --seconds: calibration took longer; no batch was measured")
    report = {
        "command": "simulate-time",
        "options": _list_options(args),
        "environment": machine.environment(device),
        "seconds": time.perf_counter() - begin,
        "costs": fits,
        "left_out": left_out,
        "not_begun": len(batches) - len(rows),
        "summary": objectives.summarize_rows(rows),
        "rows": rows,
    }
    output.finish(args, out, report, tables.make_simulate_time_grids(report))
    return OK


def _list_options(args: argparse.Namespace) -> Row:
    """Return what the options say."""
    return {
        "models": list(args.model),
        **{name: list(getattr(args, name)) for name in ("ep", "slots", "tokens", "loads")},
        "placements": list(args.placement),
        **{name: getattr(args, name) for name in ("batches", "seconds", "ranks", "rounds")},
    }


def _time_runs(
    args: argparse.Namespace, out: Output, batches: Sequence[objectives.Batch], begin: float
) -> int:
    """Time `Balancer.run` for every combination, whose batches are drawn by the first one's."""
    device, timer = gpu.start(args)
    costs, _ = _predict_costs(batches)
    firsts = [batch for batch in batches if batch.number == 0]
    with progress([("runs", len(firsts))], args.progress) as advance:
        rows = []
        for batch in sorted(firsts, key=lambda one: (one.name, one.ep, one.slots, one.tokens)):
            cost = costs[batch.name, batch.ep]
            rows.append(objectives.time_runs(batch, args.batches, cost, timer, device))
            advance()
    report = {
        "command": "simulate-time",
        "runs": True,
        "options": _list_options(args),
        "environment": machine.environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    output.finish(args, out, report, [tables.make_objective_runs_grid(report)])
    return OK


def _count_slots(batches: Sequence[objectives.Batch]) -> dict[tuple[str, int], int]:
    """Return the most experts of a rank, by model and number of ranks."""
    found: dict[tuple[str, int], int] = {}
    for batch in batches:
        key = batch.name, batch.ep
        experts = batch.model.experts // batch.ep + batch.slots
        found[key] = max(found.get(key, 0), experts)
    return dict(sorted(found.items()))


def _predict_costs(batches: Sequence[objectives.Batch]) -> tuple[Costs, list[Row]]:
    """Make the packaged costs."""
    found: Costs = {}
    fits: list[Row] = []
    for (name, ep), experts in _count_slots(batches).items():
        model = advise.MODELS[name]
        cost = TimeCost.for_model(model.hidden, model.inner, most_active=experts)
        found[name, ep] = cost
        fits.append({"model": name, "ep": ep, "experts": experts, "source": cost.source})
    return found, fits


def _make_timers(
    batches: Sequence[objectives.Batch], timer: Timer, device: torch.device
) -> dict[str, advise.RankTimer]:
    """Make the timer of each model, with weights for its smallest number of ranks."""
    most: dict[str, int] = {}
    for (name, _), experts in _count_slots(batches).items():
        most[name] = max(most.get(name, 0), experts)
    return {
        name: advise.RankTimer(
            advise.MODELS[name].hidden, advise.MODELS[name].inner, experts, timer, device
        )
        for name, experts in most.items()
    }


def _calibrate(
    args: argparse.Namespace,
    batches: Sequence[objectives.Batch],
    timers: dict[str, advise.RankTimer],
) -> tuple[Costs, list[Row]]:
    """Measure and fit the cost of every model and number of ranks."""
    found: Costs = {}
    fits: list[Row] = []
    sizes, name_of_gpu, pairs = _count_slots(batches), machine.device_name(), machine.pairs()
    labels = [
        (f"calibration, {name}, EP {ep}", len(list_rows(most)))
        for (name, ep), most in sizes.items()
    ]
    with progress(labels, args.progress) as advance:
        for (name, ep), experts in sizes.items():
            model, time_rows = advise.MODELS[name], timers[name]

            def measure(rows: Sequence[int], time_rows: advise.RankTimer = time_rows) -> float:
                took = time_rows(rows)
                advance()
                return took

            source = f"measured on this {name_of_gpu}"
            cost, points, predicted = calibrate(
                model.hidden, model.inner, experts, measure, source, pairs
            )
            found[name, ep] = cost
            fits.append(
                {
                    "model": name,
                    "ep": ep,
                    "experts": experts,
                    "source": cost.source,
                    "wide_from": cost.wide_from,
                    "points": [
                        {"rows": point.rows, "us": point.us, "predicted": us}
                        for point, us in zip(points, predicted, strict=True)
                    ],
                }
            )
    return found, fits


def _compare(
    args: argparse.Namespace,
    batches: Sequence[objectives.Batch],
    costs: Costs,
    timers: dict[str, advise.RankTimer] | None,
    begin: float,
) -> list[Row]:
    """Plan and time batches until the time is up, and return their rows in the grid's order."""
    rows: list[Row] = []
    with progress([("batches", len(batches))], args.progress) as advance:
        for batch in batches:
            if args.seconds is not None and time.perf_counter() - begin > args.seconds:
                say(f"{len(batches) - len(rows)} of {len(batches)} batches are left: time is up")
                break
            cost = costs[batch.name, batch.ep]
            plans = objectives.plan_batch(batch.place(cost), cost, batch.count())
            measured = None
            if timers is not None:
                measured = objectives.time_plans(plans, timers[batch.name], args.ranks, args.rounds)
            rows.append(objectives.make_row(batch, plans, measured, args.ranks))
            advance()
    order = ("model", "ep", "slots", "placement", "load", "tokens", "batch")
    return sorted(rows, key=lambda row: tuple(row[name] for name in order))
