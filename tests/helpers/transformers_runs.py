"""Runs of tests/train_transformers.py in a process for each rank."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent.parent / "train_transformers.py"


def run_training(folder, layout, runs, limit=240):
    """Carry out runs in a layout of ranks, and return their results by name.

    The ranks are given a limit in seconds, and one that fails ends the others.
    """
    spec = {"layout": layout, "runs": runs}
    (folder / "spec.json").write_text(json.dumps(spec))
    world = layout.get("fsdp_size", 1) * layout.get("tp_size", 1)
    ranks = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            # accelerate wants an address, though the ranks meet by a file.
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            "HF_HUB_OFFLINE": "1",
        }
        with open(folder / f"rank{rank}.log", "w") as log:
            command = [sys.executable, str(SCRIPT), str(folder)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    end = time.monotonic() + limit
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [i for i, rank in enumerate(ranks) if rank.poll()]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for i, rank in enumerate(ranks):
        text = (folder / f"rank{i}.log").read_text()
        assert rank.returncode == 0, f"rank {i} ended with {rank.returncode}:\n{text[-4000:]}"
    return torch.load(folder / "results.pt", weights_only=False)
