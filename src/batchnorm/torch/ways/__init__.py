"""The ways to y: the last call again, eager kernels, operators of a graph, array code."""
