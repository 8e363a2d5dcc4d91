"""The passes as Triton kernels, for GPUs."""
