"""Tools for models that hold batch normalizations; each imports a framework when asked for it."""
