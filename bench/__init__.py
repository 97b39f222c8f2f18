"""Workloads, traces, timing and reports: the lplb-bench command."""
