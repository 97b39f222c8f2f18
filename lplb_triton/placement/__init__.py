"""Where copies of experts lie: placements, how they are chosen and what moving to one takes."""

from lplb_triton.placement.files import load_placements, save_placements
from lplb_triton.placement.placement import Placement

__all__ = ["Placement", "load_placements", "save_placements"]
