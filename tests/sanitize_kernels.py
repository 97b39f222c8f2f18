"""Run every kernel once or twice on small inputs, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python tests/sanitize_kernels.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/sanitize_kernels.py

``--live`` runs placements with live slots only. ``--plant`` adds a kernel that reads out of bounds:
memcheck must then end with exit code 9.
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl

from lplb_triton import Balancer, solve
from lplb_triton._layout import Extent
from lplb_triton.testing.instances import draw_loads, shape_placement


@triton.jit
def _read_past_the_end_kernel(x_ptr, out_ptr, n):
    tl.store(out_ptr, tl.load(x_ptr + n))


def run_live_slots(rng: np.random.Generator) -> None:
    """Run placements with live slots, on a skewed batch that needs them and an even one."""
    rules = ({}, {"live_cost": 5, "live_domain": 8, "live_resident": True})
    for (shape, slots), settings in zip((("eplb:24:1", 1), ("eplb:64:2", 2)), rules, strict=True):
        placement = shape_placement(shape, rng).with_live_slots(slots)
        balancer = Balancer(placement, device="cuda", rank=1, live_above=1.0, **settings)
        for power in (6, 1):
            ids = (placement.n_logical * rng.random((600, 8)) ** power).astype(np.int64)
            idx = torch.from_numpy(ids).cuda()
            assert (balancer.run(idx, n_sms=9) >= 0).all()
        balancer.check()
        print(shape, "with live slots done", flush=True)


def main() -> None:
    rng = np.random.default_rng(0)
    run_live_slots(rng)
    if "--live" in sys.argv:
        print("ran")
        return
    for shape in ("ring:5", "cube", "hypercube", "eplb:24:1", "eplb:64:2"):
        placement = shape_placement(shape, rng)
        balancer = Balancer(placement, device="cuda", rank=1)
        for dtype, rows in ((torch.int64, 200), (torch.int32, 33)):
            ids = rng.integers(-1, placement.n_logical, (rows, 8))
            idx = torch.from_numpy(ids).to(dtype).cuda()
            out = balancer.run(idx, n_sms=9)
            assert torch.equal(out < 0, idx < 0)
        counts = draw_loads("lognormal", rng, placement.n_logical)
        balancer.solve(counts.cuda()).check()
        # Without sweeps a plan comes to steps by potentials.
        balancer._tables.views["extents"][:, Extent.MOST_SWEEPS] = 0
        balancer.solve(counts.cuda()).check()
        solve(placement.problem(counts.cuda())).check()
        balancer.check()
        print(shape, "done", flush=True)
    if "--plant" in sys.argv:
        x = torch.zeros(64, dtype=torch.int32, device="cuda")
        _read_past_the_end_kernel[(1,)](x, x, 1 << 16)
        torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()
