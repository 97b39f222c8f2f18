"""Settings that every test shares."""

import os
import random

# Tensors here are small. Threads that wait for each other take several times as long for them, and
# far longer when other programs want the cores. BLAS reads this when it is loaded, so do processes
# that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

# Loading a kernel may have to wait until those that run have ended. Some tests let a kernel wait
# for another that a first torch operation stands before, so all are loaded at the start.
loading = os.environ.get("CUDA_MODULE_LOADING")
os.environ["CUDA_MODULE_LOADING"] = "EAGER"
N_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
if N_GPUS:
    torch.zeros(1, device="cuda")
# Not for processes that tests start.
os.environ.pop("CUDA_MODULE_LOADING")
if loading is not None:
    os.environ["CUDA_MODULE_LOADING"] = loading
if N_GPUS == 0:
    # Kernels decide when they are defined whether they are interpreted. Nothing has imported
    # Triton yet: torch doesn't, and test modules are collected after this file.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


# What a back end says to CPU tensors where kernels aren't interpreted.
NOT_INTERPRETED = "backend='triton' needs GPU tensors"


def pytest_addoption(parser):
    parser.addoption(
        "--on-gpu", action="store_true", help="only tests that are for a GPU, too, on it"
    )


def needs_gpu(item):
    """Whether a test needs a GPU."""
    return any(item.get_closest_marker(name) for name in ("gpu", "multigpu"))


def is_for_gpu(item):
    """Whether a test needs a GPU, or runs on one if there is one."""
    both = item.get_closest_marker("both") or hasattr(item.module, "DEVICE")
    return needs_gpu(item) or bool(both)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except ValueError as error:
        hidden = N_GPUS and not needs_gpu(pyfuncitem)
        if hidden and str(error).startswith(NOT_INTERPRETED):
            pytest.skip("runs kernels on the CPU: with GPUs hidden (CUDA_VISIBLE_DEVICES=)")
        raise


def pytest_collection_modifyitems(config, items):
    if config.getoption("--on-gpu"):
        config.hook.pytest_deselected(items=[item for item in items if not is_for_gpu(item)])
        items[:] = [item for item in items if is_for_gpu(item)]
    needs = {"gpu": 1, "multigpu": 2}
    for item in items:
        for marker, count in needs.items():
            if item.get_closest_marker(marker) and count > N_GPUS:
                item.add_marker(
                    pytest.mark.skip(reason=f"needs {count} GPU(s), torch finds {N_GPUS}")
                )
        chosen = os.environ.get("LPLB_TEST_INTEGRATIONS") == "1"
        if item.get_closest_marker("integrations") and not chosen:
            reason = "run by `make test-integrations`, or with LPLB_TEST_INTEGRATIONS=1"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
