"""The expert-parallel layer and its transports, which `moe.parallel` and `moe.transports` hold."""

from moe.parallel import BALANCES, ParallelMoE, even_placement
from moe.transports import AllToAll, DeepEP, Route, invert

__all__ = ["BALANCES", "AllToAll", "DeepEP", "ParallelMoE", "Route", "even_placement", "invert"]
