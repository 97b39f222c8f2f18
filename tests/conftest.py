"""Settings that every test shares."""

import os
import random

import hypothesis
import numpy as np
import pytest
import torch

N_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
if N_GPUS == 0:
    # Kernels decide when they are defined whether they are interpreted. Nothing has imported
    # Triton yet: torch doesn't, and test modules are collected after this file.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    needs = {"gpu": 1, "multigpu": 2}
    for item in items:
        for marker, count in needs.items():
            if item.get_closest_marker(marker) and count > N_GPUS:
                item.add_marker(
                    pytest.mark.skip(reason=f"needs {count} GPU(s), torch finds {N_GPUS}")
                )


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
