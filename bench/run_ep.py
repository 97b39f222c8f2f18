"""``python -m lplb_triton.bench.run_ep``: the same as ``lplb-bench ep``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lplb_triton.bench import cli

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what ``lplb-bench ep`` does.

    Parameters
    ----------
    argv
        Options; by default those of the process.

    Returns
    -------
    int
        The exit code.
    """
    return cli.main(["ep", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
