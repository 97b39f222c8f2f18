"""Torch twins of the kernels, on any device.

The torch backend runs them, and the tests hold the kernels against them. They share no code with
the kernels and import no Triton.
"""

from lplb_triton.reference.certificate import (
    LEAST_TARGET_PART,
    PART_BITS,
    TARGET_PART,
    as_plan,
    certify,
    gap_to_aim_at,
    quantize_shares,
    valid_loads,
)
from lplb_triton.reference.interior_point import (
    LIGHT_PART,
    MIN_CENTERING,
    REGULARIZATION,
    START_CENTERING,
    START_MARGIN,
    STEP_FACTOR,
    solve,
)
from lplb_triton.reference.quotas import (
    divide_quotas,
    shares_of_quotas,
)
from lplb_triton.reference.tokens import (
    assign_copies,
    check_counts_of,
    check_cumulative,
    copy_quotas,
    count_experts,
    cumulative_shares,
    rounding_offsets,
)

__all__ = [
    "LEAST_TARGET_PART",
    "LIGHT_PART",
    "MIN_CENTERING",
    "PART_BITS",
    "REGULARIZATION",
    "START_CENTERING",
    "START_MARGIN",
    "STEP_FACTOR",
    "TARGET_PART",
    "as_plan",
    "assign_copies",
    "certify",
    "check_counts_of",
    "check_cumulative",
    "copy_quotas",
    "count_experts",
    "cumulative_shares",
    "divide_quotas",
    "gap_to_aim_at",
    "quantize_shares",
    "rounding_offsets",
    "shares_of_quotas",
    "solve",
    "valid_loads",
]
