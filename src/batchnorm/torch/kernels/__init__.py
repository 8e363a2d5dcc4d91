"""The kernels as torch calls them: cached decisions, a step, and its derivatives."""
