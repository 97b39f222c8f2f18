r"""Train an expert-parallel mixture-of-experts language model, balanced batch by batch.

Every process is one rank: it reads its own text, holds its part of the experts of every layer and
all of the rest of the model. On GPUs, one process each::

    torchrun --nproc-per-node 2 examples/train_moe_ep.py --balance none,eplb,lplb \
        --experts 256 --top-k 8 --hidden 2048 --expert-hidden 768 --layers 2 --tokens 8192

On a CPU, N gloo processes::

    python examples/train_moe_ep.py --processes 4 --balance none,eplb,lplb --experts 16 --top-k 2 \
        --layers 2 --hidden 64 --expert-hidden 64 --seq-len 64 --tokens 256 --steps 200

``--balance`` names one or several runs, made one after the other from the same start:

none  experts in order, no replicas
eplb  a placement with replicas by load history, tokens spread evenly over the copies
lplb  the same placement, tokens spread by the linear program of each batch
live  experts at home and as many replicas, and a live slot on each rank for what the batch needs

All of them compute the same function. The loss curves agree up to the order of sums; how far apart
that alone drives two runs is shown by ``--reverse-sums``. The text, the tokeniser and the dense
part of the model are those of `train_moe.py`; the layer itself is in `moe/parallel.py`.

A checkpoint (``--checkpoint FOLDER``) holds the experts in logical order, one file per rank;
``--resume`` continues from it with any number of ranks that divides the experts and streams.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# torch.distributed.nn stores the default group at import, so import it before there is one.
import torch.distributed.nn
import torch.multiprocessing as mp
from moe.corpus import build_corpus, draw_begins
from moe.model import pick_device
from moe.run_settings import HELP, Settings
from moe.settings import parse_arguments
from moe.trainer import Run, Trainer

from lplb_triton.bench import tables
from lplb_triton.traces import trace as traces


def train(
    settings: Settings,
    device: torch.device,
    group: dist.ProcessGroup,
    log: Callable[[str], object] = print,
) -> list[Run]:
    """Train every run of the settings, one after the other; collective.

    Parameters
    ----------
    settings
        What to do.
    device
        This rank's.
    group
        The EP group.
    log
        Called with progress lines on rank 0.

    Returns
    -------
    list of Run
    """
    rank, ranks = dist.get_rank(group), group.size()
    config = settings.model(ranks)
    corpus = build_corpus(config)
    tokens = corpus.tokens.to(device)
    begins = draw_begins(config, corpus).unflatten(1, (ranks, -1))[:, rank].flatten(1)
    begins = begins.to(device)
    silent = rank != 0
    say = (lambda line: None) if silent else log
    say(f"text: {corpus.size} bytes, {tokens.numel()} tokens; {ranks} ranks, {device.type}")
    runs = []
    for balance in settings.runs:
        trainer = Trainer(settings, balance, device, group, say)
        if settings.resume:
            trainer.load_checkpoint(Path(settings.resume))
        # The recorder writes its file even if training fails.
        with trainer.recorder or nullcontext():
            runs.append(trainer.train(tokens, begins))
        trainer.close()
        # Two runs' experts and optimizer states may not fit at once.
        del trainer
    return runs


def make_report(settings: Settings, runs: Sequence[Run], ranks: int, device: torch.device) -> dict:
    """Summarize the runs by medians over the steps after the first ``skip``."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    chosen = asdict(settings)
    for name in ("text", "checkpoint", "resume", "record", "out"):
        del chosen[name]
    summary = []
    for run in runs:
        row: dict[str, Any] = {"balance": run.balance, "final_loss": run.losses[-1]}
        for name in ("step_ms", "moe_ms", "imbalance", "unbalanced"):
            # A run of fewer steps keeps its last one.
            values = getattr(run, name)
            row[name] = statistics.median(values[min(settings.skip, len(values) - 1) :])
        summary.append(row)
    return {
        "made_by": "examples/train_moe_ep.py",
        "hardware": hardware,
        "torch": str(torch.__version__),
        "ranks": ranks,
        "settings": chosen,
        "medians": summary,
        "runs": [asdict(run) for run in runs],
    }


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw loss and imbalance over the steps."""
    tables.require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        left.plot(run.losses, label=run.balance, linewidth=1)
        right.plot(run.imbalance, label=run.balance, linewidth=1)
    left.set(xlabel="step", ylabel="loss (nats per token)")
    right.set(xlabel="step", ylabel="imbalance (largest / mean rank)")
    left.legend()
    figure.savefig(path, dpi=120)


def run_rank(rank: int, settings: Settings, store: str | None) -> None:
    """Run one rank: one of ``--processes`` if there is a ``store``, else one of torchrun's."""
    minutes = timedelta(minutes=10)
    if store is not None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank,
            world_size=max(settings.processes, 1), timeout=minutes,
        )  # fmt: skip
        device = torch.device("cpu")
    else:
        device = pick_device(settings.device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # Losses and counts are gathered by the same group as tokens.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=minutes)
    try:
        runs = train(settings, device, dist.group.WORLD, lambda line: print(line, flush=True))
        if dist.get_rank() == 0:
            summary = make_report(settings, runs, dist.get_world_size(), device)
            for row in summary["medians"]:
                print(
                    f"{row['balance']:5s} step {row['step_ms']:.2f} ms, MoE layers "
                    f"{row['moe_ms']:.2f} ms, imbalance {row['imbalance']:.3f}"
                )
            if settings.out is not None:
                folder = Path(settings.out)
                (folder / "train.json").write_text(json.dumps(summary, indent=1) + "\n")
                draw_curves(runs, folder / "curves.png")
    finally:
        # Free all references to the group, so that gloo's threads end with it. Otherwise they free
        # tensors while the interpreter ends, which can abort (pytorch/pytorch issue 190489).
        gc.collect()
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Parameters
    ----------
    arguments
        Arguments, or None for those of the process.

    Returns
    -------
    int
        Exit status.
    """
    summary = (__doc__ or "").partition("\n")[0]
    settings = parse_arguments(arguments, Settings, HELP, summary)
    try:
        if settings.out is not None:
            tables.require("matplotlib")
            # Before the training, so that its results are not lost.
            Path(settings.out).mkdir(parents=True, exist_ok=True)
            for name in ("train.json", "curves.png"):
                traces.check_writable(Path(settings.out) / name)
        if "LOCAL_RANK" in os.environ and not settings.processes:
            run_rank(int(os.environ["LOCAL_RANK"]), settings, None)
            return 0
        settings.model(max(settings.processes, 1))
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(
                run_rank, (settings, str(Path(folder) / "store")), nprocs=max(settings.processes, 1)
            )
    except (OSError, ValueError, RuntimeError, mp.ProcessRaisedException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
