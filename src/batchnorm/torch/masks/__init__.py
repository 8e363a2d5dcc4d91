"""Masks that travel: the blocks that give them, and the masks at other resolutions."""
