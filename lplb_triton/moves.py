"""Where `MovePlan` was defined before; files with a pickled `MovePlan` name this module."""

from lplb_triton.placement.moves import MovePlan, plan_moves

__all__ = ["MovePlan", "plan_moves"]
