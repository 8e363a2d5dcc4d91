"""A quick measurement on a shape of the user's own; `benchmarks/` has the thorough one."""
