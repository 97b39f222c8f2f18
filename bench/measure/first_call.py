"""Time the first call in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import lplb_triton
from lplb_triton import Balancer
from lplb_triton.bench.measure.loads import TOP_K
from lplb_triton.bench.measure.pipeline import make_pipeline_placement
from lplb_triton.bench.measure.workload import SEED
from lplb_triton.bench.types import Row

__all__ = []


def time_first_call(shape: str, device: str = "cuda") -> float:
    """Time the first `Balancer.run` of this process, in seconds.

    Imports, placement and the start of CUDA and of Triton's driver are left out.

    Parameters
    ----------
    shape : str
        A shape of 256 experts.
    device : str
        Where to run.

    Returns
    -------
    float
    """
    rng = np.random.default_rng(SEED)
    balancer = Balancer(make_pipeline_placement(shape, rng), device=device)
    idx = torch.zeros(128, TOP_K, dtype=torch.int64, device=device)
    if device == "cuda":
        from triton.runtime import driver

        driver.active.get_current_target()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    balancer.run(idx)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def time_first_calls(shape: str, device: str = "cuda") -> Row:
    """Time the first call in fresh processes, with an empty and then with a full kernel cache.

    Parameters
    ----------
    shape : str
        A shape of 256 experts.
    device : str
        Where to run.

    Returns
    -------
    dict
        ``cold_s`` and ``warm_s``, seconds.

    Raises
    ------
    RuntimeError
        If a process fails; the message holds the end of what it printed.
    """
    code = (
        "from lplb_triton.bench.measure.first_call import time_first_call; "
        f"print(time_first_call({shape!r}, {device!r}))"
    )
    root = str(Path(lplb_triton.__file__).resolve().parent.parent)
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": paths}
        for name in ("cold_s", "warm_s"):
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"first call of {shape} failed: {done.stderr[-800:]}")
            found[name] = float(done.stdout.split()[-1])
    return {"shape": shape, **found}
