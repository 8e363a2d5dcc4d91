"""torch models, as tools see them."""
