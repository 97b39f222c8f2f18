"""Describe the hardware and the versions of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lplb_triton import __version__
from lplb_triton.costs.gemm import PAIRS

__all__ = ["communication", "device_name", "environment", "find_version", "machine_line", "pairs"]


def environment(device: str) -> dict[str, Any]:
    """Return hardware and versions by name.

    Parameters
    ----------
    device
        ``"cuda"`` to describe the GPU too.

    Returns
    -------
    dict
        JSON-able; None for what is not there.
    """
    found: dict[str, Any] = {
        "lplb_triton": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda,
    }
    found.update({name: find_version(name) for name in ("torch", "triton", "numpy", "scipy")})
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = _driver_version()
    return found


def communication(device: str) -> dict[str, Any]:
    """Return the versions of the libraries through which GPUs communicate."""
    on_gpu = device == "cuda"
    return {
        "nccl": _nccl_version() if on_gpu else None,
        "nvshmem4py": find_version("nvshmem4py-cu13") or find_version("nvshmem4py-cu12"),
    }


def machine_line(report: dict[str, Any]) -> str:
    """Return hardware and versions of a report in one line."""
    e = report["environment"]
    untimed = report["command"] in ("scale", "simulate-time") and not e["gpu"]
    if untimed or report["command"] in ("advise", "live", "place", "placement", "workloads"):
        where = f"{e['gpu']}, {e['cpu']}" if e["gpu"] else e["cpu"]
        threads = f"{e['torch_threads']} thread" + ("s" if e["torch_threads"] > 1 else "")
        return f"{where}, {threads}, torch {e['torch']}; {report['seconds']:.0f} s in all"
    if report["command"] in ("ep", "frameworks"):
        ranks = report["options"]["ranks"]
        names = ("torch", "triton", "nccl", "nvshmem4py", "megatron-core", "transformers")
        where = f"{ranks} x {e['gpu']}, driver {e['driver'] or 'unknown'}, " if e["gpu"] else ""
        versions = ", ".join(f"{name} {e[name]}" for name in names if e.get(name))
        return f"{where}{versions}, {e['cpu']}; {ranks} processes, {report['seconds']:.0f} s in all"
    # Some commands have no LP whose gap could be chosen.
    gap = report["options"].get("tolerance")
    return (
        f"{e['gpu']}, driver {e['driver'] or 'unknown'}, torch {e['torch']}, triton {e['triton']}, "
        f"{e['cpu']}; CUDA-graph replays{'' if gap is None else f', gap {gap:g}'}, "
        f"{report['seconds']:.0f} s in all"
    )


def device_name() -> str:
    """Return the name of the GPU, or ``CPU`` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def pairs() -> int:
    """Return the number of pairs of SMs of the GPU; those of an H100 without one."""
    if not torch.cuda.is_available():
        return PAIRS
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.multi_processor_count) // 2


def _nccl_version() -> str:
    # Untyped in torch.
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def find_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    """Return the version of the NVIDIA driver, if nvidia-smi knows it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"
