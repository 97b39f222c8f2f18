"""``python -m lplb_triton``: the same as ``lplb-bench``."""

from __future__ import annotations

import sys

from lplb_triton.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
