"""Random instances and an outside LP solver, for tests and benchmarks."""
