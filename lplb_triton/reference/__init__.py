"""Torch twins of the kernels, on any device.

The torch backend runs them, and the tests hold the kernels against them. They share no code with
the kernels and import no Triton.
"""

from lplb_triton.reference.certificate import (
    FINE_BITS,
    LEAST_TARGET_FRACTION,
    TARGET_FRACTION,
    certify,
    check_loads,
    choose_aimed_gap,
    make_plan,
    quantize_shares,
)
from lplb_triton.reference.interior_point import (
    LIGHT_FRACTION,
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
    compute_rounding_offsets,
    copy_quotas,
    count_experts,
    cumulative_shares,
    split_counts,
)

__all__ = [
    "LEAST_TARGET_FRACTION",
    "LIGHT_FRACTION",
    "MIN_CENTERING",
    "FINE_BITS",
    "REGULARIZATION",
    "START_CENTERING",
    "START_MARGIN",
    "STEP_FACTOR",
    "TARGET_FRACTION",
    "assign_copies",
    "certify",
    "check_counts_of",
    "check_cumulative",
    "check_loads",
    "choose_aimed_gap",
    "compute_rounding_offsets",
    "copy_quotas",
    "split_counts",
    "count_experts",
    "cumulative_shares",
    "divide_quotas",
    "make_plan",
    "quantize_shares",
    "shares_of_quotas",
    "solve",
]
