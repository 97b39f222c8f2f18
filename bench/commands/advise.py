"""``lplb-bench advise``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lplb_triton.bench import advise, machine, options, output, placement, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.measure.simulate import draw_experts
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, say
from lplb_triton.bench.progress import progress
from lplb_triton.placement.arguments import MOST_LIVE
from lplb_triton.traces import trace as traces

__all__ = ["add", "run", "sizes"]

CHECK_TOKENS, CHECK_ERROR = (256, 1024, 4096, 8192), 0.15
# Ranks of --check: the smallest of its models has eight experts.
CHECK_EP = 8
# Models that predictions are checked for.
CHECK_MODELS = ("deepseek-v3", "qwen3-235b-a22b", "mixtral-8x7b")
DEFAULT_MODEL = "deepseek-v3"
TOKENS = 4096
FIELDS = ("hidden", "inner", "experts", "top_k")
# Sizes that loads don't depend on, so that other ones than the trace's may be given.
FREE = ("hidden", "inner")
BANDWIDTHS = ("node_bandwidth", "network_bandwidth")


class Sizes(NamedTuple):
    """Sizes of a layer, and the source of each."""

    model: advise.Model
    source: dict[str, str]
    layers: int | None = None
    """Layers with experts, where the model is known."""


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "advise",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="whether balancing pays for a model and a batch: a prediction",
        description=(
            "PREDICT the time of a layer's expert products on its slowest rank, what balancing\n"
            "each batch saves over EPLB's even split, what it costs, and from how many tokens per\n"
            "rank on it pays. Times of a rank's products are measured on this machine's GPU, or\n"
            "come from a packaged table of one H100. Communication is left out, unless\n"
            "--ranks-per-node says that ranks span nodes: then dispatch and combine are priced\n"
            "too, and what is recommended has the least sum of both.\n"
            "With --trace the number of experts, and top_k where the trace's meta has it, are\n"
            "the trace's. So are hidden and inner where its meta has them, unless --model,\n"
            "--hf-config, --hidden or --inner say others; --top-k gives what the meta lacks."
        ),
        examples=(
            "  lplb-bench advise --model deepseek-v3 --ep 32 --tokens 4096\n"
            "  lplb-bench advise --model qwen3-235b-a22b --ep 16 --tokens 2048\n"
            "  lplb-bench advise --hf-config path/to/config.json --ep 8 --tokens 8192\n"
            "  lplb-bench advise --trace trace.npz --hidden 4096 --inner 1536 --top-k 8 --ep 16\n"
            "  lplb-bench advise --trace packaged --model deepseek-v3 --ep 16\n"
            "  lplb-bench advise --trace packaged --model deepseek-v3 --ranks-per-node 8\n"
            "  lplb-bench advise --check       on a GPU: hold predictions against measured times"
        ),
    )
    _add_sizes(sub)
    _add_batches(sub)
    sub.add_argument(
        "--gemm", choices=("gpu", "table"), help="where times come from (default: a GPU, if any)"
    )
    sub.add_argument(
        "--check", action="store_true",
        help=f"on a GPU: measure the slowest rank for the three models, --ep {CHECK_EP} and four "
        f"batch sizes; fails if a prediction is more than {CHECK_ERROR:.0%}% off",
    )  # fmt: skip


def _add_sizes(sub: argparse.ArgumentParser) -> None:
    """Add the sizes of a layer."""
    source = sub.add_mutually_exclusive_group()
    source.add_argument(
        "--model", choices=tuple(advise.MODELS),
        help=f"sizes of a published model (default {DEFAULT_MODEL}, without --trace); the "
        "following replace some",
    )  # fmt: skip
    source.add_argument(
        "--hf-config", type=Path, metavar="PATH",
        help="sizes from the config.json of a Hugging Face model with experts, or from the folder "
        "that holds it",
    )  # fmt: skip
    for name, most, text in (
        ("hidden", options.MOST_WIDTH, "width of the model"),
        ("inner", options.MOST_WIDTH, "inner width of an expert"),
        ("experts", options.MOST_EXPERTS, "logical experts (a trace has its own)"),
        ("top-k", options.MOST_EXPERTS, "experts of a token"),
    ):
        sub.add_argument(
            f"--{name}", type=partial(options.count, most=most), metavar="N", help=text
        )


def _add_batches(sub: argparse.ArgumentParser) -> None:
    """Add the loads, the ranks and what is done with a batch."""
    sub.add_argument(
        "--trace", type=Path, metavar="PATH",
        help=f"recorded loads, {options.TRACE_HELP} (default: synthetic, lognormal(0, 1) with "
        "jitter 0.3: an assumption)",
    )  # fmt: skip
    sub.add_argument(
        "--ep", type=options.count, metavar="N",
        help=f"ranks (default {options.EP[0]}, or as many as there are experts if they are fewer)",
    )  # fmt: skip
    sub.add_argument(
        "--tokens", type=options.count, metavar="N",
        help=f"tokens of a rank in a batch (default {TOKENS})",
    )  # fmt: skip
    options.add_slots(sub, default=None)
    sub.add_argument(
        "--live", type=options.integers(1, MOST_LIVE), metavar="N[,N...]",
        help="live slots per rank to predict on top of the best static placement (default 1)",
    )  # fmt: skip
    sub.add_argument(
        "--pull-rate", type=options.rate, metavar="GB/S",
        help="rate at which a rank's port moves live weights; measured by lplb-bench ep --sections "
        f"live (default {advise.GIGABYTES_PER_SECOND:g}: an assumption)",
    )  # fmt: skip
    sub.add_argument(
        "--ranks-per-node", type=options.count, metavar="N",
        help="consecutive ranks of a node: price dispatch and combine across nodes",
    )  # fmt: skip
    for name, value, text in (
        ("node", advise.NODE_GIGABYTES_PER_SECOND, "within its node"),
        ("network", advise.NETWORK_GIGABYTES_PER_SECOND, "across nodes"),
    ):
        sub.add_argument(
            f"--{name}-bandwidth", type=options.rate, metavar="GB/S",
            help=f"rate of a rank {text}, with --ranks-per-node (default {value:g}: an assumption)",
        )  # fmt: skip
    sub.add_argument(
        "--training", action="store_true", default=None,
        help="count the backward pass too: three times the work",
    )  # fmt: skip
    sub.add_argument(
        "--history", type=options.history, metavar="PART|N",
        help="batches of the trace to place experts by: a part in (0, 1) or a number (default "
        f"{options.HISTORY:g})",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Predict, or check predictions."""
    tables.require("rich")
    if args.check:
        fixed = (
            "model",
            "hf_config",
            *FIELDS,
            "trace",
            "tokens",
            "slots",
            "training",
            "history",
            "gemm",
            "live",
            "pull_rate",
            "ranks_per_node",
            *BANDWIDTHS,
        )
        options.refuse(args, fixed, "--check has models, loads and batch sizes of its own")
        return _check(args, out)
    return _predict(args, out)


def _predict(args: argparse.Namespace, out: Output) -> int:
    """Predict for one model, one batch size and one load."""
    _check_options(args)
    trace, loads = None, "synthetic loads, lognormal(0, 1), jitter 0.3 (an assumption)"
    if args.trace is not None:
        trace, loads = options.load_trace(args.trace)
        options.check_batches(trace, loads)
    model, source, layers = sizes(args, trace, loads)
    ep = args.ep or min(options.EP[0], model.experts)
    options.check_divides((ep,), model.experts)
    if args.ranks_per_node is not None and (ep % args.ranks_per_node or args.ranks_per_node == ep):
        raise UsageError(f"argument --ranks-per-node: {ep} ranks don't make up several such nodes")
    begin = time.perf_counter()
    cases = _make_cases(args, trace, model.experts)
    possible = advise.select_slots(model, ep, args.slots)
    if not possible:
        most = model.experts - model.experts // ep
        raise UsageError(f"argument --slots: expected some in [1, {most}] for EP {ep}")
    gemm, points, device = _gemm(args, model, ep, min(possible))
    try:
        advice = advise.advise(
            model, gemm, cases, ep, args.tokens, possible, training=args.training
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    network = _predict_network(args, model, gemm, cases, ep, possible)
    if network is not None:
        advice["best"] = {k: network["best"][k] for k in ("placement", "slots", "quotas")}
        advice["recommended"] = None if network["saved_us"] <= 0 else advice["best"]
    objective = advise.advise_objective(
        model, gemm, cases, ep, args.tokens, possible, training=args.training
    )
    # Live slots aren't predicted on placements with a price, nor with near plans.
    best = advice["best"]
    static = {**best, "placement": "eplb" if best["placement"] == "eplb" else "chain"}
    live = _predict_live(args, model, layers or 1, gemm, cases, ep, static)
    report = {
        "command": "advise",
        "options": {
            "model": model._asdict(),
            "layers": layers,
            "sizes_from": source,
            "loads": loads,
            "ep": ep,
            **_list_options(args),
        },
        "gemm": dataclasses.asdict(gemm),
        "points": [p._asdict() for p in points],
        "environment": machine.environment(device),
        "seconds": time.perf_counter() - begin,
        "left_out": sorted(set(args.slots) - set(possible)),
        **advice,
        "network": network,
        "objective": objective,
        "live": live,
    }
    output.finish(args, out, report, tables.make_advise_grids(report))
    return OK


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options without effect, set defaults, and check files."""
    if args.trace is None:
        options.refuse(args, ("history",), "only with --trace")
    if args.ranks_per_node is None:
        options.refuse(args, BANDWIDTHS, "only with --ranks-per-node")
    options.fill(
        args,
        {
            "slots": options.SLOTS, "tokens": TOKENS, "history": options.HISTORY,
            "training": False, "live": (1,), "pull_rate": advise.GIGABYTES_PER_SECOND,
            "node_bandwidth": advise.NODE_GIGABYTES_PER_SECOND,
            "network_bandwidth": advise.NETWORK_GIGABYTES_PER_SECOND,
        },
    )  # fmt: skip
    output.check_files(
        [("--json", args.json), ("--markdown", args.markdown)],
        [("--trace", args.trace), ("--hf-config", args.hf_config)],
    )


def _list_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say, as far as it isn't chosen by other means."""
    names = ("tokens", "training", "pull_rate", "ranks_per_node", *BANDWIDTHS)
    lists = {name: list(getattr(args, name)) for name in ("slots", "live")}
    return {**lists, **{name: getattr(args, name) for name in names}}


def _predict_network(
    args: argparse.Namespace,
    model: advise.Model,
    gemm: advise.GemmModel,
    cases: tuple[placement.Case, ...],
    ep: int,
    slots: tuple[int, ...],
) -> dict[str, Any] | None:
    """Price dispatch and combine, and choose what has the least sum; None without nodes."""
    if args.ranks_per_node is None:
        return None
    nodes = advise.Network(args.ranks_per_node, args.node_bandwidth, args.network_bandwidth)
    rows = advise.advise_network(
        model, gemm, cases, ep, args.tokens, slots, nodes, training=args.training
    )
    best = advise.choose_network_row(rows)
    even = min(row["total_us"] for row in rows if row["quotas"] == "even")
    run_us = advise.predict_overhead_us(ep, args.tokens)["run"]
    return {"rows": rows, "best": best, "saved_us": even - best["total_us"] - run_us}


def _predict_live(
    args: argparse.Namespace,
    model: advise.Model,
    layers: int,
    gemm: advise.GemmModel,
    cases: tuple[placement.Case, ...],
    ep: int,
    best: dict[str, Any],
) -> list[dict[str, Any]]:
    """Predict live slots on top of the best static placement."""
    return [
        advise.advise_live(
            model, gemm, cases, ep, args.tokens, (best["placement"], best["slots"]), live,
            layers=layers, training=args.training, gigabytes_per_second=args.pull_rate,
        )
        for live in args.live
    ]  # fmt: skip


def _make_cases(
    args: argparse.Namespace, trace: traces.Trace | None, experts: int
) -> tuple[placement.Case, ...]:
    """Cut the trace into cases, or draw synthetic ones."""
    try:
        if trace is None:
            return placement.synthetic_cases(experts, (0, 1))
        return placement.trace_cases(trace, args.history)
    except ValueError as error:
        raise UsageError(f"arguments --trace, --history: {error}") from error


def sizes(args: argparse.Namespace, trace: traces.Trace | None, name: str) -> Sizes:
    """Choose the sizes of the layer, and say where each comes from.

    Parameters
    ----------
    args
        With ``model``, ``hf_config`` and `FIELDS`, None where not given.
    trace
        The loads, if they are recorded.
    name
        Of the trace.

    Returns
    -------
    Sizes

    Raises
    ------
    UsageError
        If sizes contradict each other, or with a trace some are unknown.
    """
    model, option, known, source, layers = _start_sizes(args, trace is None)
    options_given = {k: getattr(args, k) for k in FIELDS if getattr(args, k) is not None}
    for field, value in ({} if trace is None else _read_sizes(trace)).items():
        if field in FREE:
            if field not in known and field not in options_given:
                known[field], source[field] = value, name
            continue
        label = field.replace("_", "-")
        if options_given.get(field, value) != value:
            raise UsageError(f"argument --{label}: the trace {name} has {field} {value}")
        if field not in options_given and known.get(field, value) != value:
            raise UsageError(
                f"argument {option}: {model} has {field} {known[field]}, the trace {name} {value}; "
                f"give --{label} {value} to take the rest of the model's sizes all the same"
            )
        known[field], source[field] = value, name
    for field, value in options_given.items():
        known[field], source[field] = value, "--" + field.replace("_", "-")
    missing = [field for field in FIELDS if field not in known]
    if missing:
        wanted = ", ".join("--" + field.replace("_", "-") for field in missing)
        raise UsageError(
            f"argument --trace: {name} doesn't say all sizes of its layers; give {wanted}, or "
            "--model or --hf-config"
        )
    found = advise.Model(**known)
    if found.top_k > found.experts:
        raise UsageError(
            f"argument --top-k: a token can't have {found.top_k} of {found.experts} experts"
        )
    return Sizes(found, {field: source[field] for field in FIELDS}, layers)


def _start_sizes(
    args: argparse.Namespace, use_default: bool
) -> tuple[str, str, dict[str, int], dict[str, str], int | None]:
    """Return a model's name, its option, its sizes, their sources and its layers with experts."""
    if args.hf_config is not None:
        try:
            found = advise.read_config(args.hf_config, inner=args.inner)
        except (OSError, ValueError) as error:
            text = options.describe_error(error, args.hf_config)
            raise UsageError(f"argument --hf-config: {text}") from error
        file = args.hf_config.name.encode(errors="replace").decode()
        source = {field: f"{file}: {name}" for field, name in found.names.items()}
        return file, "--hf-config", found.sizes._asdict(), source, found.layers
    name = args.model or (DEFAULT_MODEL if use_default else None)
    if name is None:
        return "", "--model", {}, {}, None
    published = advise.PUBLISHED[name]
    sources = dict.fromkeys(FIELDS, name)
    return name, "--model", published.sizes._asdict(), sources, published.layers


def _read_sizes(trace: traces.Trace) -> dict[str, int]:
    """Return the sizes that a trace records."""
    found = {"experts": trace.experts}
    for name in ("hidden", "inner", "top_k"):
        value = trace.meta.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[name] = value
    return found


def _gemm(
    args: argparse.Namespace, model: advise.Model, ep: int, slots: int
) -> tuple[advise.GemmModel, list[advise.Point], str]:
    """Fit or load the model of a rank's time; return it with its measurements and device."""
    on_gpu = torch.cuda.is_available() if args.gemm is None else args.gemm == "gpu"
    if not on_gpu:
        return advise.packaged(model.hidden, model.inner), [], "cpu"
    device, timer = gpu.start(args)
    weights = draw_experts(model.hidden, model.inner, model.experts // ep + slots, device)
    name = torch.cuda.get_device_name()
    gemm, points = advise.measure(model, weights, timer, device, name, machine.pairs())
    return gemm, points, "cuda"


def _check(args: argparse.Namespace, out: Output) -> int:
    """Compare predictions with measured times."""
    device, timer = gpu.start(args)
    name = torch.cuda.get_device_name()
    ep = args.ep or CHECK_EP
    models = {name: advise.MODELS[name] for name in CHECK_MODELS}
    for model in models.values():
        options.check_divides((ep,), model.experts)
    begin = time.perf_counter()
    rows, fits = [], {}
    names = [(key, len(CHECK_TOKENS)) for key in models]
    with progress(names, args.progress) as advance:
        for key, model in models.items():
            (case,) = placement.synthetic_cases(model.experts, (0,))
            widest = model.experts // ep + 1
            weights = draw_experts(model.hidden, model.inner, widest, device)
            gemm, points = advise.measure(model, weights, timer, device, name, machine.pairs())
            fits[key] = {"gemm": dataclasses.asdict(gemm), "points": [p._asdict() for p in points]}
            for tokens in CHECK_TOKENS:
                rows.append(
                    advise.compare_times(key, model, gemm, case, ep, tokens, weights, timer, device)
                )
                advance()
    report = {
        "command": "advise",
        "check": True,
        "environment": machine.environment("cuda"),
        "seconds": time.perf_counter() - begin,
        "fits": fits,
        "rows": rows,
    }
    output.finish(args, out, report, tables.make_advice_check_grids(report))
    far = [row for row in rows for k in ("even", "lp") if abs(row[k]["error"]) > CHECK_ERROR]
    if far:
        say(f"{len(far)} of {2 * len(rows)} predictions are more than {CHECK_ERROR:.0%} off")
    return FAILED if far else OK
