"""The kernels as torch calls them: what is decided once, a step, and its derivatives."""
