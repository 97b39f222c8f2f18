"""`lplb-bench simulate-live`."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lplb_triton.bench import advise, live, options, output, tables, workloads
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.machine import environment
from lplb_triton.bench.measure import simulate_live as simulation
from lplb_triton.bench.measure.simulate import draw_experts
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.bench.progress import progress
from lplb_triton.bench.types import Row
from lplb_triton.placement.arguments import MOST_LIVE

__all__ = ["add", "read_pull_rate", "run"]

TOKENS = (1024, 2048, 4096, 8192, 16384)
MODELS = ("deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b")
WORKLOADS = ("rotating", "burst")
MOST_TOKENS, MOST_BATCHES = 2**17, 100
# Where `lplb-bench ep --sections live` leaves the rate of a pull.
SECTION, ROUTING, FORM = "live:layer", "changing", "live, symmetric"


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "simulate-live",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="live slots on many simulated ranks: measured products, measured rate of a pull",
        description=(
            "A SIMULATION: the busiest ranks of an EP group one after the other on one GPU. Their\n"
            "expert products are timed for real, with the rows that no balancing, static copies\n"
            "under the LP, and live slots give them. Live slots also take the time of the\n"
            "busiest port for the experts that it sends or receives, at a rate measured on two\n"
            "GPUs, as if nothing overlapped. No dispatch, no routing, no time for the plan."
        ),
        examples=(
            "  lplb-bench simulate-live --pulls ep.json --ep 8,16,32,64 --markdown live.md\n"
            "  lplb-bench simulate-live --pull-rate 300 --ep 32 --model deepseek-v3 --training"
        ),
    )
    rate = sub.add_mutually_exclusive_group(required=True)
    rate.add_argument(
        "--pulls", type=Path, metavar="PATH",
        help="JSON file of lplb-bench ep --sections live, with the measured rate of a pull",
    )  # fmt: skip
    rate.add_argument(
        "--pull-rate", type=options.rate, metavar="GB/S", help="the measured rate of a pull"
    )
    sub.add_argument(
        "--model", type=options.names(tuple(advise.MODELS)), default=MODELS,
        metavar="NAME[,NAME...]", help=f"some of {', '.join(advise.MODELS)} (default "
        f"{','.join(MODELS)})",
    )  # fmt: skip
    options.add_ep(sub)
    sub.add_argument(
        "--tokens", type=options.integers(1, MOST_TOKENS), default=TOKENS, metavar="N[,N...]",
        help=f"tokens of a rank in a batch (default {','.join(map(str, TOKENS))})",
    )  # fmt: skip
    names = tuple(name for name in workloads.WORKLOADS if name != workloads.ADVERSARIAL)
    sub.add_argument(
        "--workload", type=options.names(names), default=WORKLOADS, metavar="NAME[,NAME...]",
        help=f"some of {', '.join(names)} (default {','.join(WORKLOADS)})",
    )  # fmt: skip
    sub.add_argument(
        "--base", type=_read_base, default=live.Base("chain", 1), metavar="NAME",
        help="static placement below the live slots, as lplb-bench live takes it (default chain:1)",
    )  # fmt: skip
    sub.add_argument(
        "--live", type=partial(options.count, most=MOST_LIVE), default=1, metavar="N",
        help="live slots of a rank; lplb has as many more static ones (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--batches", type=partial(options.count, most=MOST_BATCHES), default=2, metavar="N",
        help="batches of each workload (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--training", action="store_true",
        help="count the backward pass: three times the products, weights twice and gradients",
    )  # fmt: skip


def _read_base(text: str) -> live.Base:
    try:
        return live.read_base(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_pull_rate(path: Path) -> float:
    """Read the median rate of a pull, GB/s, from the JSON file of the section ``live``.

    Parameters
    ----------
    path
        Of the file.

    Raises
    ------
    UsageError
        If it can't be read, or has no such figure.
    """
    try:
        report = json.loads(path.read_text())
        forms = report["sections"][SECTION]["routings"][ROUTING]["forms"]
        return float(forms[FORM]["fetch_gb_s"]["median"])
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --pulls: {path} can't be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"argument --pulls: {path} has no rate of {FORM!r} in the section {SECTION!r}; make "
            "it by lplb-bench ep --sections live --json"
        ) from error


def run(args: argparse.Namespace, out: Output) -> int:
    """Simulate every model, number of ranks and workload."""
    models = {name: advise.MODELS[name] for name in args.model}
    for model in models.values():
        options.check_divides(args.ep, model.experts)
    inputs = [] if args.pulls is None else [("--pulls", args.pulls)]
    output.check_files([("--json", args.json), ("--markdown", args.markdown)], inputs)
    rate = args.pull_rate if args.pulls is None else read_pull_rate(args.pulls)
    settings = simulation.LiveSettings(args.base, args.live, rate, args.training)
    _check_slots(args, models)
    device, timer = gpu.start(args)
    begin = time.perf_counter()
    steps = len(args.tokens) * len(args.workload)
    labels = [(f"{name}, EP {ep}", steps) for name in models for ep in args.ep]
    rows: list[Row] = []
    with progress(labels, args.progress) as advance:
        for name, model in models.items():
            for ep in args.ep:
                rows += _simulate(args, name, model, ep, settings, timer, device, advance)
    report = {
        "command": "simulate-live",
        "options": {
            "models": list(models),
            "ep": list(args.ep),
            "tokens": list(args.tokens),
            "workloads": list(args.workload),
            "base": str(args.base),
            "live": args.live,
            "pull_rate": rate,
            "pulls": None if args.pulls is None else str(args.pulls.name),
            "training": args.training,
            "batches": args.batches,
        },
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    output.finish(args, out, report, tables.make_simulate_live_grids(report))
    return OK


def _check_slots(args: argparse.Namespace, models: dict[str, advise.Model]) -> None:
    """Raise before any work if the slots can't be laid out or the loads can't be drawn."""
    for name, model in models.items():
        for ep in args.ep:
            most = model.experts - model.experts // ep
            if args.base.slots + args.live > most:
                raise UsageError(
                    f"argument --base: {name} takes at most {most} slots on {ep} ranks"
                )
            try:
                _draw(args, model, ep)
            except ValueError as error:
                raise UsageError(str(error)) from error


def _draw(args: argparse.Namespace, model: advise.Model, ep: int) -> list[live.Source]:
    settings = workloads.Settings(ep, model.experts, args.batches)
    return live.draw_workloads(args.workload, settings)


def _simulate(
    args: argparse.Namespace,
    name: str,
    model: advise.Model,
    ep: int,
    settings: simulation.LiveSettings,
    timer: Timer,
    device: torch.device,
    advance: Any,
) -> list[Row]:
    """Simulate one model on one number of ranks, by every workload."""
    slots = model.experts // ep + settings.base.slots + settings.live
    weights = draw_experts(model.hidden, model.inner, slots, device)
    tokens = sorted(args.tokens)
    teraflops = simulation.measure_teraflops(model, ep, tokens[-1], weights, timer, device)
    found: list[Row] = []
    for source in _draw(args, model, ep):
        rows = simulation.simulate_live(
            model, ep, source, tokens, settings, weights, teraflops, timer, device, advance
        )
        found.append(
            {
                "model": name,
                "ep": ep,
                "workload": source.name,
                "teraflops": teraflops,
                "break_even": simulation.find_break_even(rows),
                "rows": rows,
            }
        )
    return found
