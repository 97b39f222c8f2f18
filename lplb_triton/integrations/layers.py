"""What an integration for another training framework is built of.

`LayerBalance` rewrites one layer's ids and holds its plan, `stack_slots` and `keep_redundant_rows`
make the slots' weights from parameters that stay the framework's own, and `attach` has every rank
take part in the backward pass. examples/torchtitan/ is built of them; see docs/frameworks.md.
"""

from lplb_triton.integrations._layer import (
    Imbalance,
    LayerBalance,
    measure_imbalance,
    rebalance_layers,
)
from lplb_triton.training.slot_memory import keep_redundant_rows
from lplb_triton.training.spread import attach, stack_slots

__all__ = [
    "Imbalance",
    "LayerBalance",
    "attach",
    "keep_redundant_rows",
    "measure_imbalance",
    "rebalance_layers",
    "stack_slots",
]
