"""Make the tables of `lplb-bench ep`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_or_na, format_us
from lplb_triton.bench.tables.grid import Grid
from lplb_triton.bench.tables.layer import make_layer_grids

__all__ = [
    "make_ep_grids",
]


def make_ep_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench ep``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
        The last table says how every section ended.
    """
    options, found = report["options"], report["sections"]
    # Results by section, then by back end or routing; one that failed may have no figures.
    by_name: dict[str, dict[str, Any]] = {}
    for name, row in found.items():
        section, variant = name.split(":")
        by_name.setdefault(section, {})[variant] = row
    layouts = {
        "verify": _make_sums_grids,
        "time": _make_sync_grids,
        "pipeline": _make_run_grids,
        "kill": _make_kill_grids,
        "weights": _make_weights_grids,
        "live": make_layer_grids,
        "train": _make_training_grids,
    }
    grids: list[Grid] = []
    for section, rows in by_name.items():
        done = {k: row for k, row in rows.items() if not {"failed", "skipped"} & set(row)}
        if section in ("train", "live"):
            # These have figures even where a check failed.
            part = {"train": "runs", "live": "routings"}[section]
            done = {k: row for k, row in rows.items() if part in row}
        if done:
            grids += layouts[section](done, options)
    ends: list[tuple[str, ...]] = []
    notes = []
    for name, row in found.items():
        word = next((word for word in ("failed", "skipped") if word in row), "done")
        ends.append((name, word, f"{row['seconds']:.0f}" if "seconds" in row else ""))
        if word != "done":
            notes.append(f"{name} {word}: {row[word]}")
    return [*grids, Grid("Sections", ("section", "end", "seconds"), ends, tuple(notes))]


def _make_sums_grids(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    modes = ("eager", "graph")
    return [
        Grid(
            "Sums held against what they must be, with random delays",
            ("back end", "eager epochs", "wrong", "seconds", "graph epochs", "wrong", "seconds"),
            [
                (
                    kind,
                    *(str(row[f"{m}_{k}"]) for m in modes for k in ("epochs", "wrong", "seconds")),
                )
                for kind, row in rows.items()
            ],
            tuple(f"{kind}: {row['sync']}" for kind, row in rows.items()),
        )
    ]


_SPREAD = ("rank 0 median", "p99", "slowest median", "p99")


def _format_by_rank(times: dict[str, dict[str, float]]) -> tuple[str, ...]:
    return tuple(format_us(times[who][name]) for who in times for name in ("median", "p99"))


def _make_sync_grids(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    lines = []
    for kind, row in rows.items():
        gather, plain = (row[key]["slowest"]["median"] for key in ("sum and gather", "all-reduce"))
        ratio = plain / row["sum"]["slowest"]["median"]
        lines.append(
            (
                kind,
                *_format_by_rank(row["sum"]),
                format_us(gather),
                format_us(plain),
                f"{ratio:.2f}",
            )
        )
    return [
        Grid(
            "Load sync, 256 counts, microseconds",
            ("back end", *_SPREAD, "with gather", "all-reduce", "speed-up"),
            lines,
            (
                f"{_describe_replays(options, rows)} with gather: every rank's counts too. "
                "all-reduce: torch.distributed's of 256 int32. These and the speed-up are medians "
                "of the slowest.",
            ),
        )
    ]


def _describe_replays(options: dict[str, Any], rows: dict[str, Any]) -> str:
    how = "CUDA-graph replays" if options["device"] == "cuda" else "Repetitions on a CPU"
    calls = next(iter(rows.values()))["calls_per_replay"]
    counted = options["replays"] - options["replays"] // 10
    return (
        f"{how} of {calls} calls each, time per call; p99 over {counted} of them; slowest: of "
        "each the rank that took longest."
    )


def _make_run_grids(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    runs: list[tuple[str, ...]] = []
    hosts: list[tuple[str, ...]] = []
    for kind, row in rows.items():
        for name, found in row["placements"].items():
            alone = format_us(found["without_sync_us"]["slowest"]["median"])
            for quotas in ("local", "global"):
                head, times = (name, kind, quotas), found[quotas]
                runs.append((*head, *_format_by_rank(times["run_us"]), alone))
                hosts.append((*head, *_format_by_rank(times["host_us"])))
    header = ("shape", "back end", "quotas", *_SPREAD)
    grids = [
        Grid(
            "Whole run with load sync, microseconds",
            (*header, "without sync"),
            runs,
            (
                f"{options['tokens']} tokens x top-8 per rank, 256 experts. "
                f"{_describe_replays(options, rows)} without sync: each rank by itself, median of "
                "the slowest.",
            ),
        ),
        Grid(
            "Host, microseconds",
            header,
            hosts,
            ("Wall time of an eager call of the whole run that isn't waited for.",),
        ),
    ]
    first, row = next(iter(rows.items()))
    loads = [
        (
            name,
            quotas,
            *(f"{found[quotas]['imbalance'][k]:.4f}" for k in ("mean", "max")),
            f"{found[quotas]['over_bound']:.4f}",
            f"{found[quotas]['kept_on_rank']:.4f}",
        )
        for name, found in row["placements"].items()
        for quotas in ("local", "global")
    ]
    grids.append(
        Grid(
            "Loads over all ranks, in whole tokens",
            ("shape", "quotas", "imbalance mean", "max", "over bound", "kept on rank"),
            loads,
            (
                f"From the ids of all ranks with {first}; every id, quota and largest load of "
                "every back end was held against the LP before it was timed. over bound: largest "
                "load over the LP's lower bound, at most. kept on rank: part of the tokens that "
                "stay where they are.",
            ),
        )
    )
    return grids


def _make_kill_grids(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    return [
        Grid(
            "The last rank killed",
            ("back end", "seconds"),
            [(kind, f"{row['took_seconds']:.2f}") for kind, row in rows.items()],
            (
                "seconds: until the others name it.",
                *(f"{kind}: {row['error']}" for kind, row in rows.items()),
            ),
        )
    ]


def _make_weights_grids(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    lines, notes = [], []
    for redundant, row in rows.items():
        sent = row["rows_out"] * row["bytes_per_expert"]
        for name, form in row["forms"].items():
            kept = form["kept_bytes"]
            lines.append(
                (
                    redundant,
                    name,
                    "n/a" if kept is None else f"{kept / 2**20:.1f}",
                    f"{sent / 2**20:.1f}",
                    *(format_us(form[part][k]) for part in _PASSES for k in ("median", "p99")),
                )
            )
    first = next(iter(rows.values()))
    notes.append(
        f"One layer of {first['experts']} experts of {first['bytes_per_expert'] / 2**20:.2f} MiB, "
        f"{first['home_bytes'] / 2**20:.0f} MiB of them on each rank. sent: weights, mean by rank; "
        "as much comes back in gradients. kept: device memory beyond the originals from the "
        "forward pass to the backward pass. Times are of the slowest rank, with the host's work. "
        "The first three forms are lplb_triton.spread's, which sends in every forward pass: all "
        "slots in a new tensor, all slots in memory whose first rows are the parameter, and rows "
        "of redundant slots for parameters by expert. Replicas sends once per optimizer step; "
        "rows: redundant_only."
    )
    header = ("slots", "form", "kept MiB", "sent", "weights us", "p99", "gradients us", "p99")
    return [
        Grid("Weights of one layer's slots, and their gradients back", header, lines, tuple(notes))
    ]


_PASSES = ("weights", "gradients")


def _make_training_grids(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    even = rows["even"]["runs"][0]["moe_ms"] if "even" in rows else None
    times: list[tuple[str, ...]] = []
    losses: list[tuple[str, ...]] = []
    for routing, row in rows.items():
        for made in row["runs"]:
            head = (routing, made["balance"])
            over = "n/a" if even is None else f"{made['moe_ms'] / even:.3f}"
            values = (f"{made[key]:.3f}" for key in ("unbalanced", "imbalance"))
            steps = (f"{made[key]:.2f}" for key in ("step_ms", "moe_ms"))
            times.append((*head, *values, *steps, over))
            part = made["certified"]
            losses.append(
                (
                    *head,
                    format_or_na(made["final_loss"], ".4f"),
                    format_or_na(made["loss_difference"], ".1e"),
                    "no LP" if part is None else f"{part:.2%}",
                )
            )
        noise = format_or_na(row["reversed_difference"], ".1e")
        losses.append((routing, "reversed", "", noise, ""))
    s = next(iter(rows.values()))["settings"]
    return [
        Grid(
            "Training, milliseconds",
            ("routing", "run", "in order", "imbalance", "step", "layers", "over even"),
            times,
            (
                f"examples/train_moe_ep.py: layers {s['layers']}, experts {s['experts']}, "
                f"top-{s['top_k']}, hidden {s['hidden']}, expert hidden {s['expert_hidden']}, "
                f"{s['tokens']} tokens per rank, {s['redundant']} redundant slots per rank, "
                f"{s['dtype']}; medians of steps {s['skip'] + 1} to {s['steps']} on the slowest "
                "rank. layers: MoE layers, forward and backward. in order: imbalance if experts "
                "lay in order. over even: layers over those of none with even routing.",
            ),
        ),
        Grid(
            "Losses of the same runs",
            ("routing", "run", "last loss", "difference", "certified"),
            losses,
            (
                "difference: of the losses from those of none, root of the mean square over "
                "the steps. reversed: none with its gradients summed over tokens in the opposite "
                "order.",
            ),
        ),
    ]
