"""Keras models, as tools see them."""
