"""What only the compiler sees: the interpreter is more lenient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import find_negated

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


def test_a_negated_number_among_three_is_found():
    """What ptxas gets wrong is found, also if values are moved in between, and nothing else is."""
    negate, move = "neg.s32 %r5, %r3;\n", "mov.b32 {}, {};\n"
    inner, outer = "min.s32 %r6, %r2, {};\n", "{}.s32 %r7, %r4, {};\n"
    assert find_negated(negate + inner.format("%r5") + outer.format("min", "%r6")) == ["%r6"]
    moved = negate + move.format("%r9", "%r5") + inner.format("%r9") + move.format("%r8", "%r6")
    assert find_negated(moved + outer.format("min", "%r8")) == ["%r8"]
    assert not find_negated(negate + inner.format("%r5") + outer.format("max", "%r6"))
    assert not find_negated(negate + inner.format("%r3") + outer.format("min", "%r6"))
    assert find_negated(negate + inner.format("%r5") + "min.s32 %r7, %r6, 0;") == ["%r6"]
    # Negated outside of the first two it is right.
    assert not find_negated(negate + inner.format("%r4") + "min.s32 %r7, %r6, %r5;")
    # Registers of another function are others.
    other = inner.format("%r5") + outer.format("min", "%r6")
    assert not find_negated(f".func one()\n{negate}.visible .entry two()\n{other}")
