"""One HTML page from the figures of ``lplb-bench balance``: a headline, answers, and details.

The page needs no network and no script: pictures are inline SVG, maps inline PNG. `data` collects
what it shows beside the comparison, `saving` predicts times, `words` says it in words, `sections`
and `charts` draw, and `page` puts all together.
"""

from __future__ import annotations

from lplb_triton.bench.report.data import describe_shown, heat, rank_loads, read
from lplb_triton.bench.report.page import html
from lplb_triton.bench.report.saving import predict_saving

__all__ = ["describe_shown", "heat", "html", "predict_saving", "rank_loads", "read"]
