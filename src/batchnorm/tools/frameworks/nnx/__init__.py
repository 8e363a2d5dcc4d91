"""flax nnx models, as tools see them."""
