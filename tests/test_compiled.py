"""What only the compiler sees: the interpreter is more lenient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "sizes", "count"), [("80", "one", 32), ("90", "all", 52)])
def test_every_kernel_compiles_without_a_gpu(capability, sizes, count, tmp_path):
    """Every kernel compiles for capabilities 8.0 and 9.0 on a machine without a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), capability, sizes],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "compiled"
    assert done.stdout.count("bytes") == count
