"""Types that several modules of the benchmarks share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Row"]

Floats = NDArray[np.float64]

# What one measurement found, by name: it becomes an object of the JSON file.
Row = dict[str, Any]
