"""What a rank's expert products cost in time, for ``objective="time"``."""

from lplb_triton.costs.time_cost import TimeCost

__all__ = ["TimeCost"]
