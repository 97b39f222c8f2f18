"""``lplb-bench ep``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch

from lplb_triton.bench import options, output, tables
from lplb_triton.bench.commands.gpu import check_gpu
from lplb_triton.bench.ep.layer.sizes import TRANSPORTS, LayerSizes, check_layer, read_fields
from lplb_triton.bench.ep.schedule import describe_outcome, run_sections
from lplb_triton.bench.ep.sections import SECTIONS
from lplb_triton.bench.ep.sizes import KINDS, N_COUNTS, SIZES
from lplb_triton.bench.machine import communication, environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, tell

__all__ = ["add", "run"]

# Limit on processes on a CPU: more of them than cores only wait for each other.
MOST_ON_CPU = 16
# Sections that each option applies to.
_USED_BY = {
    "epochs": ("verify", "pipeline"),
    "tokens": ("pipeline",),
    "replays": ("time", "pipeline", "weights"),
    "kinds": ("verify", "time", "pipeline", "kill"),
    **dict.fromkeys(("layer", "live_transport"), ("live",)),
}

_LAYER_FIELDS = read_fields()


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "ep",
        run,
        parents=(options.output_files(),),
        help="load sync, whole runs, weights of slots and training on the GPUs of this host",
        description=(
            "Verify and time load sync against NCCL, whole runs with sync, a killed rank, weights\n"
            "of slots with gradients back, one MoE layer with and without live slots, and\n"
            "training with and without balancing, one process per GPU. Each section has\n"
            "processes of its own and a bound; one that fails doesn't keep the others from\n"
            "running. Nothing is timed before its answers have been held\n"
            "against the LP, or against sums made another way."
        ),
        examples=(
            "  lplb-bench ep --json ep.json --markdown ep.md\n"
            "  lplb-bench ep --sections verify,time --kinds symmetric\n"
            "  lplb-bench ep --sections live --layer hidden=4096,inner=1536,rounds=50\n"
            "  lplb-bench ep --device cpu"
        ),
    )
    sub.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: gloo and small sizes, which tests the sections, not the speed (default cuda)",
    )  # fmt: skip
    sub.add_argument(
        "--ranks", type=options.count, metavar="N", help="GPUs to use (default: all; 2 on a cpu)"
    )
    sub.add_argument(
        "--sections", type=options.names(SECTIONS), default=tuple(SECTIONS),
        metavar="NAME[,NAME...]", help=f"default {','.join(SECTIONS)}",
    )  # fmt: skip
    sub.add_argument(
        "--kinds", type=options.names(KINDS), metavar="NAME[,NAME...]",
        help=f"back ends (default {','.join(KINDS)}; distributed on a cpu)",
    )  # fmt: skip
    for name, text in (
        ("epochs", "sums to verify, eagerly and again under graph replay"),
        ("tokens", "tokens of a whole run on each rank"),
        ("replays", "timed replays of each graph, or steps of the section weights"),
    ):
        standard = ", ".join(f"{getattr(s, name)} on {on}" for on, s in SIZES.items())
        sub.add_argument(
            f"--{name}", type=options.count, metavar="N", help=f"{text} (default {standard})"
        )
    sub.add_argument(
        "--layer", type=_read_layer, metavar="NAME=VALUE[,...]",
        help="sizes of the section live, of " + ", ".join(_LAYER_FIELDS),
    )  # fmt: skip
    sub.add_argument(
        "--live-transport", type=options.names(TRANSPORTS), metavar="NAME[,NAME...]",
        help="ways to move live weights, each a form of its own: symmetric and messages of "
        "LiveSlots, and spread (default "
        + ", ".join(f"{','.join(s.layer.transports)} on {on}" for on, s in SIZES.items()) + ")",
    )  # fmt: skip
    sub.add_argument(
        "--seconds", type=options.seconds, default=570.0, metavar="S",
        help="bound on the whole run (default %(default)g)",
    )  # fmt: skip


def _read_layer(text: str) -> dict[str, Any]:
    """Read sizes of the layer as ``name=value`` with commas between them."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in _LAYER_FIELDS or name in found:
            raise argparse.ArgumentTypeError(
                f"expected each of {', '.join(_LAYER_FIELDS)} at most once, got {name!r}"
            )
        try:
            found[name] = _LAYER_FIELDS[name](value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from error
    return found


def _choose_layer(args: argparse.Namespace, ranks: int) -> LayerSizes:
    """Return the sizes of the section live."""
    layer = dataclasses.replace(SIZES[args.device].layer, **(args.layer or {}))
    if args.live_transport is not None:
        layer = dataclasses.replace(layer, transports=args.live_transport)
    if "live" in args.sections:
        try:
            check_layer(layer, ranks)
        except ValueError as error:
            raise UsageError(f"argument --layer: {error}") from error
        if args.device == "cpu" and "symmetric" in layer.transports:
            raise UsageError("argument --live-transport: symmetric needs GPUs")
    return layer


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the sections, and write the figures after each."""
    tables.require("rich")
    for name, users in _USED_BY.items():
        if not set(users) & set(args.sections):
            options.refuse(args, (name,), f"only for the sections {', '.join(users)}")
    output.check_files([("--json", args.json), ("--markdown", args.markdown)])
    on_gpu = args.device == "cuda"
    if on_gpu:
        check_gpu()
    ranks = _ranks(args.ranks, on_gpu)
    changed = {n: getattr(args, n) for n in ("epochs", "tokens", "replays") if getattr(args, n)}
    sizes = dataclasses.replace(
        SIZES[args.device], **changed, layer=_choose_layer(args, ranks)
    )  # fmt: skip
    kinds = args.kinds or (KINDS if on_gpu else ("distributed",))
    begin = time.perf_counter()
    report: dict[str, Any] = {
        "command": "ep",
        "options": {
            "ranks": ranks,
            "device": args.device,
            "kinds": list(kinds),
            **{name: getattr(sizes, name) for name in ("epochs", "tokens", "replays")},
        },
        "environment": {**environment(args.device), **communication(args.device)},
        "seconds": 0.0,
        "sections": {},
    }
    sections: dict[str, Any] = report["sections"]

    def after(name: str, figures: dict[str, Any]) -> None:
        tell(f"{name}: {describe_outcome(figures)}")
        sections[name] = figures
        report["seconds"] = time.perf_counter() - begin
        # Written after every section, so that an interrupted run keeps the figures so far.
        if args.json not in (None, "-"):
            output.Files().add("figures", args.json, output.json_text(report))

    run_sections(
        ranks, args.device, sizes, sections=args.sections, kinds=kinds, seconds=args.seconds,
        after=after,
    )  # fmt: skip
    output.finish(args, out, report, tables.make_ep_grids(report))
    return FAILED if any("failed" in row for row in sections.values()) else OK


def _ranks(asked: int | None, on_gpu: bool) -> int:
    """Return the number of processes, or raise a message that says what is possible."""
    found = torch.cuda.device_count() if on_gpu else MOST_ON_CPU
    ranks = asked or (found if on_gpu else 2)
    if ranks < 2 or N_COUNTS % ranks:
        raise UsageError(
            f"argument --ranks: expected at least 2, and a divisor of the {N_COUNTS} "
            f"experts, got {ranks}"
        )
    if ranks > found:
        what = f"torch finds {found} GPUs" if on_gpu else f"on a cpu at most {found}"
        raise UsageError(f"argument --ranks: {what}, got {ranks}")
    return ranks
