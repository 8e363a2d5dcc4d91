"""Fast versions of the passes over memory that `batchnorm.core` writes in array code."""
