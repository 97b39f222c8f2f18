"""The quickstart example runs as printed and lowers the imbalance."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"


def test_quickstart_lowers_the_imbalance(tmp_path):
    """The script runs from any folder, and its imbalance after balancing is below that before."""
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env=where, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"imbalance (before|after): +([\d.]+)", done.stdout))
    assert 1 <= float(found["after"]) < float(found["before"])
    assert len(SCRIPT.read_text().splitlines()) <= 40
