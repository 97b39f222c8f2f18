"""``lplb-bench frameworks``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
import time
from functools import partial
from typing import Any

import torch

from lplb_triton.bench import options, output, tables
from lplb_triton.bench.commands.gpu import check_gpu
from lplb_triton.bench.frameworks.compare import compare_routings, find_faults, make_framework
from lplb_triton.bench.frameworks.ranks import Ranks, join_ranks, read_ranks
from lplb_triton.bench.frameworks.sizes import FRAMEWORKS, ROUTINGS, SIZES, Sizes
from lplb_triton.bench.machine import communication, environment, find_version
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, tell
from lplb_triton.bench.tables.frameworks import COLUMNS
from lplb_triton.bench.types import Row

__all__ = ["add", "run"]

# The package of each framework.
PACKAGES = {"megatron": "megatron-core", "transformers": "transformers"}
# Options that replace a size, with what it is and the least value.
_SIZES = {
    "hidden": ("width of the model, a multiple of 32", 32),
    "experts": ("experts of a layer, on all ranks together", 2),
    "expert_hidden": ("width of an expert", 1),
    "top_k": ("experts of a token", 1),
    "layers": ("MoE layers", 1),
    "tokens": ("tokens of a batch on each rank", 1),
    "redundant": ("redundant slots per rank", 1),
    "steps": ("timed steps of each method", 1),
    "warm_up": ("steps of each method before them; copies are placed after half of them", 2),
}


def add(commands: Any) -> None:
    """Add the parser."""
    columns = "\n".join(
        textwrap.fill(f"{name}: {text}", 78, initial_indent="  ", subsequent_indent="    ")
        for name, text in COLUMNS.items()
    )
    sub = options.add_command(
        commands,
        "frameworks",
        run,
        parents=(options.output_files(),),
        help="time training steps in Megatron-Core or transformers, by the ranks of a torchrun",
        description=(
            "Train an MoE model of a framework without balancing, with an even split over copies\n"
            "and with the LP, in turns, on the same batches and from the same weights. Routers\n"
            "have biases, as DeepSeek-V3's have, that make the ranks' loads even, or as uneven as\n"
            "is asked for. megatron: MoE layers with residuals, DDP and the distributed\n"
            "optimizer. transformers: a DeepSeek-V3 with FSDP.\n"
            f"\ncolumns of the tables:\n{columns}"
        ),
        examples=(
            "  torchrun --nproc-per-node 2 -m lplb_triton.bench frameworks \\\n"
            "      --framework megatron --hidden 2048 --experts 64 --expert-hidden 1408 \\\n"
            "      --tokens 8192 --steps 20 --json megatron.json --markdown megatron.md\n"
            "  torchrun --nproc-per-node 2 -m lplb_triton.bench frameworks \\\n"
            "      --framework transformers --routing skewed --imbalance 1.3"
        ),
    )
    sub.add_argument("--framework", choices=FRAMEWORKS, required=True, help="which one")
    sub.add_argument(
        "--device", choices=("cuda", "cpu"),
        help="cpu: gloo and small sizes, which tests the command, not the speed (default: cuda if "
        "there is one). Megatron-Core as it is released needs a GPU",
    )  # fmt: skip
    sub.add_argument(
        "--routing", type=options.names(ROUTINGS), default=ROUTINGS, metavar="NAME[,NAME...]",
        help=f"default {','.join(ROUTINGS)}",
    )  # fmt: skip
    sub.add_argument(
        "--imbalance", type=_read_imbalance, metavar="X",
        help="what skewed routing has at least without balancing: largest load of a rank over the "
        "mean one, below the number of ranks (default 1.5); the tables say what was measured",
    )  # fmt: skip
    for name, (text, least) in _SIZES.items():
        standard = ", ".join(f"{getattr(s, name)} on {on}" for on, s in SIZES.items())
        sub.add_argument(
            f"--{name.replace('_', '-')}", type=partial(options.count, least=least), metavar="N",
            help=f"{text} (default {standard})",
        )  # fmt: skip


def _read_imbalance(text: str) -> float:
    """Read an imbalance."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 1, got {text!r}")
    return value


def run(args: argparse.Namespace, out: Output) -> int:
    """Run on one rank; rank 0 writes the figures after each routing."""
    tables.require("rich")
    if "skewed" not in args.routing:
        options.refuse(args, ("imbalance",), "only for the routing skewed")
    options.fill(args, {"imbalance": 1.5})
    output.check_files([("--json", args.json), ("--markdown", args.markdown)])
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda":
        check_gpu()
    ranks = read_ranks(args.device)
    sizes = _choose_sizes(args, ranks)
    writes = ranks.rank == 0
    begin = time.perf_counter()
    with join_ranks(ranks):
        report = _make_report(args, ranks, sizes)

        def after(routing: str, rows: Row) -> None:
            report["routings"][routing] = drop_non_finite(rows)
            report["faults"] += find_faults(routing, rows, sizes.parity, args.imbalance)
            report["seconds"] = time.perf_counter() - begin
            if not writes:
                return
            tell(f"{routing}: done, {report['seconds']:.0f} s since the start")
            # Written after each routing, so that an interrupted run keeps the figures so far.
            if args.json not in (None, "-"):
                output.Files().add("figures", args.json, output.json_text(report))

        import_and_compare(args, sizes, ranks, after)
    if writes:
        output.finish(args, out, report, tables.make_frameworks_grids(report))
    return FAILED if report["faults"] else OK


def drop_non_finite(value: Any) -> Any:
    """Return figures with None in place of numbers that JSON has no way to write."""
    if isinstance(value, dict):
        return {name: drop_non_finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [drop_non_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def import_and_compare(args: argparse.Namespace, sizes: Sizes, ranks: Ranks, after: Any) -> None:
    """Import the framework, set it up, and compare."""
    try:
        framework = make_framework(args.framework, sizes, ranks)
    except ImportError as error:
        raise UsageError(
            f"argument --framework: {args.framework} can't be imported: {error} "
            "(pip install 'lplb_triton[integrations]', Python 3.11 or newer)"
        ) from error
    try:
        compare_routings(framework, args.routing, args.imbalance, after)
    finally:
        framework.close()


def _choose_sizes(args: argparse.Namespace, ranks: Ranks) -> Sizes:
    """Return the sizes, or raise a message that says what is possible."""
    given = {name: getattr(args, name) for name in _SIZES if getattr(args, name)}
    sizes = dataclasses.replace(SIZES[args.device], **given)
    if sizes.hidden % 32:
        raise UsageError(f"argument --hidden: expected a multiple of 32, got {sizes.hidden}")
    if sizes.experts % ranks.size:
        raise UsageError(
            f"argument --experts: expected a multiple of the {ranks.size} ranks, got "
            f"{sizes.experts}"
        )
    if sizes.top_k > sizes.experts:
        raise UsageError(
            f"argument --top-k: a token can choose at most all {sizes.experts} experts, got "
            f"{sizes.top_k}"
        )
    if args.imbalance >= ranks.size and "skewed" in args.routing:
        raise UsageError(
            f"argument --imbalance: {ranks.size} ranks have less than {ranks.size}, got "
            f"{args.imbalance:g}"
        )
    return sizes


def _make_report(args: argparse.Namespace, ranks: Ranks, sizes: Sizes) -> dict[str, Any]:
    """Return a report without figures."""
    package = PACKAGES[args.framework]
    return {
        "command": "frameworks",
        "options": {
            "framework": args.framework,
            "ranks": ranks.size,
            "device": args.device,
            "dtype": "bfloat16" if ranks.on_gpu else "float32",
            "routing": list(args.routing),
            "imbalance": args.imbalance,
            **dataclasses.asdict(sizes),
        },
        "environment": {
            **environment(args.device),
            **communication(args.device),
            package: find_version(package),
        },
        "seconds": 0.0,
        "faults": [],
        "routings": {},
    }
