"""The part that the integrations of training frameworks share, for writing another one."""

from lplb_triton.integrations._layer import (
    Imbalance,
    LayerBalance,
    measure_imbalance,
    rebalance_layers,
)

__all__ = ["Imbalance", "LayerBalance", "measure_imbalance", "rebalance_layers"]
