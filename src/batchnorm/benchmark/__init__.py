"""Problems, steps and a runner for `batchnorm bench` and for `benchmarks/`."""
